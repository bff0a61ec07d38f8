"""Where the torch half and the Optuna half meet: the objective, the search, its result."""

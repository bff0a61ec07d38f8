"""The answer of a search: its network, recipe, comparison, and other budgets."""

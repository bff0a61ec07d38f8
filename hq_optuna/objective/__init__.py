"""Where a network meets a trial: what is prepared once, scored, trained and recorded."""

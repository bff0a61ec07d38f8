"""The step protocol: tickets, the log of a search, who owns what, and how a study is read."""

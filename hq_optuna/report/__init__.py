"""The report of a search as a page, as text and as data."""

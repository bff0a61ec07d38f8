"""The user's network and data: what is in them, whether they can be searched, how well they do."""

"""Workers of a search: their loop, the coordinator that leads them, processes and Dask."""

"""Workers of a search: their loop, the foreman that leads them, processes and Dask."""

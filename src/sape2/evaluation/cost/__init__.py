"""The cost of encodings in operations, time and memory.

`subjects` defines the code that is run, `sweep` the grids, batches and dtypes, and `rows` the results.
"""

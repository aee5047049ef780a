"""What encodings cost in operations, time and memory; what they are worth is measured beside this folder, not in it.

What is run is in `subjects`, over which grids, batches and dtypes in `sweep`, and its numbers in `rows`.
"""

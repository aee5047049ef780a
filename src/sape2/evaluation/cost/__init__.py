"""What encodings cost: what is run (`subjects`), over which grids, batches and dtypes (`sweep`), and its numbers (`rows`)."""

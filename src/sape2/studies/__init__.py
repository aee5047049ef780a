"""Studies of many runs: encodings and seeds compared, and controlled tasks. Uses `training` and `evaluation`.

`run` trains and measures one run, `compare/` compares encodings x seeds, `probing` and `probes/` are the controlled tasks.
"""

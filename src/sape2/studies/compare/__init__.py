"""Comparison of encodings x seeds: plans the runs, executes them and compares their results.

Tables come from run folders (`headlines`, `groups`, `tables`), or from the raw rows of a study
(`rawrows`, `paired`, `outcome`).
"""

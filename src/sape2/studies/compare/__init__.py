"""Encodings x seeds planned, worked off and set side by side; no run is trained or measured here.

Tables come from run folders (`headlines`, `groups`, `tables`), or from the raw rows of a study
(`rawrows`, `paired`, `outcome`).
"""

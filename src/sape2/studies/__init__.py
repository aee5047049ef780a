"""Runs set beside each other; how one is trained, and what is measured on it, is not here.

One run to its rows (`run`), encodings x seeds (`compare/`), controlled tasks (`probing`, `probes/`).
"""

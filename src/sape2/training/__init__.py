"""A model trained: loop, optimiser, checkpoints, processes, and files that survive a crash; no measurements."""

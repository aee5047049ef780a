"""Training of a model: loop, optimiser, checkpoints, processes, and files that survive a crash."""

"""A run: its folder, settings, images, checkpoints, weights, rows and lock. Files appear complete or not at all."""

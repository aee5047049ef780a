"""Whole models: the ViT, its form for one image size, and what is written of it for others (export, hub). No training."""

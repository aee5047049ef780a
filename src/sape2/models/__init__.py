"""Whole models: the ViT, its form for one image size, what is written of it for others (export, hub); no training."""

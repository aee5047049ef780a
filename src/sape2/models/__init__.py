"""Whole models: the ViT, frozen models for one image size, export to files, and folders for the hub."""

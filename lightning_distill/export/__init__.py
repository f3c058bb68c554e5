"""Trained networks as directories that other programs load: formats, model card, from a run or from a checkpoint."""

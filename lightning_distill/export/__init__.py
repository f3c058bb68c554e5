"""Exports of trained networks: directories that other programs load, and their model cards."""

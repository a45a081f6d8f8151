"""Checks of methods and model families, and checkpoints with random weights, for tests and for users."""

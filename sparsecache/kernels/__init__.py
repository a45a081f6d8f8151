"""Kernels, each with its plain torch twin. A leaf: imports nothing of the project."""

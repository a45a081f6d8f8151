"""The old name of `plots`."""

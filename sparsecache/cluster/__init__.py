"""Engines in Ray workers, with the interface of one engine. Only this package imports Ray."""

"""Runs engines in workers on Ray, behind the interface of one engine. Only this package imports Ray."""

"""Synthetic rows in LongBench's format, one generator per dataset, made offline from a seed."""

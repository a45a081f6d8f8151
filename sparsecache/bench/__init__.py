"""Speed, measured: our engine beside its peers and the machine's limits, in one process, on the same prompts."""

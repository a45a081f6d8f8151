"""Speed, measured: our engine beside its peers and the machine's limits, in the same run, on the same prompts."""

"""Speed measurements: the engine, baselines and the machine's roofline, in one run over the same prompts."""

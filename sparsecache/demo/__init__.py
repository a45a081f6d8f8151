"""A sample of LongBench's 21 datasets and a tiny checkpoint, both made on the spot, without a download."""

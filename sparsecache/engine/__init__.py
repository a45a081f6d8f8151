"""The generation half: tokens, weights and KV. Knows nothing about LongBench."""

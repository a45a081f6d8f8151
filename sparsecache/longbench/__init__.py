"""The benchmark half: rows, prompts, metrics and files. Knows nothing about caches or torch."""

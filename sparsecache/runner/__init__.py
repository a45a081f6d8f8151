"""The runner: joins datasets and prompts (`longbench`) with engines and cache methods (`engine`, `methods`)."""

"""Rows of RULER (https://arxiv.org/abs/2404.06654), generated from a seed to a prompt length in tokens."""

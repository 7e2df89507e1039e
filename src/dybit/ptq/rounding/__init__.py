"""Choosing the codes of weights: to nearest, and GPTQ."""

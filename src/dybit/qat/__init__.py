"""Quantization-aware training: weights and inputs are rounded in training, and scales are learned."""

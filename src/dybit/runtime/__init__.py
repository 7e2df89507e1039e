"""Quantized models as programs of kernels."""

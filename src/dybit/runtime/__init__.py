"""Fused inference: whole quantized models as sequences of kernel calls."""

"""Quantized layers: modules whose weights are packed codes."""

"""Post-training quantization: transforms, one rounding, corrections."""

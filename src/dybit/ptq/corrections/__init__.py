"""Bringing a quantized model closer to the floating-point one."""

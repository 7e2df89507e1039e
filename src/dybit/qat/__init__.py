"""Quantization-aware training: rounds weights and inputs in training and learns their scales."""

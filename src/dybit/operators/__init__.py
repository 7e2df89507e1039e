"""Torch operators on packed weights: linear, convolution, embedding, experts."""

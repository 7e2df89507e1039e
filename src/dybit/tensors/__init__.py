"""Weights as codes and scales, and the search for scales."""

"""Weights as codes and scales, and the search for scales. Knows torch, no layers."""

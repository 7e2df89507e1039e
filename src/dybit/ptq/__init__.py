"""Algorithms that make up for the errors of rounding after training."""

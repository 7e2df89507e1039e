"""Networks as lists of matrix products and convolutions. Needs NumPy only."""

"""Measures models: fidelity, time, the layers and shapes that run, and formats ranked on weights."""

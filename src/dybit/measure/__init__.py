"""Measures models: fidelity, time, workloads, and formats ranked on weights."""

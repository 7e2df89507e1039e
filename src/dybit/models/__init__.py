"""Whole models: plans, calibration, batch-norm folding, checkpoints."""

"""dybit."""

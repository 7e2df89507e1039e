"""The search for the width of every layer under a budget."""

"""Post-training algorithms that go beyond rounding to the nearest code."""

"""Changes of a floating-point model that keep its function and make it easier to quantize."""

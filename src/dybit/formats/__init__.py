"""Number formats as tables: DyBit, the formats it is compared with, and packing of codes. Needs NumPy only."""

"""The compiled extension, and operators on codes: pack, decode, round."""

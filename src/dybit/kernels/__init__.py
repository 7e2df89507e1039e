"""The compiled extension and the operators on codes: pack, decode, round."""

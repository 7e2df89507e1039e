"""Other projects' files: MXFP4 and NVFP4 checkpoints of compressed-tensors, and MXFP4 tensors in GGUF.

4-bit DyBit with ``max_run=2`` (``s4r2``) has the values of FP4 E2M1, halved, in
the same order of codes: with the block scales of MXFP4 (32 weights share a power of two) or NVFP4 (16 share an FP8
E4M3) a weight is written and read value for value, without rounding.
"""

from dybit.interchange.compressed import read_compressed, save_compressed
from dybit.interchange.ggml import read_gguf, write_gguf
from dybit.interchange.imported import Imported

__all__ = ["Imported", "read_compressed", "read_gguf", "save_compressed", "write_gguf"]

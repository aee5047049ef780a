"""Multi-head attention with any position encoding, and the ways to compute its products. Biases are defined in `encodings`."""

from sape2.attention.module import Attention, attend
from sape2.attention.paths import choose_path, describe_path
from sape2.attention.products import encode, logits

__all__ = ["Attention", "attend", "choose_path", "describe_path", "encode", "logits"]

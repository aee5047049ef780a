"""Multi-head attention under any encoding, and the ways its products are computed. What a bias is belongs to `encodings`."""

from sape2.attention.module import Attention, attend
from sape2.attention.paths import choose_path, describe_path
from sape2.attention.products import encode, logits

__all__ = ["Attention", "attend", "choose_path", "describe_path", "encode", "logits"]

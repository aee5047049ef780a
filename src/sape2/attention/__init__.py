"""Multi-head attention under any encoding, and how its products are computed; what a bias is (`encodings`) is not here."""

from sape2.attention.module import Attention, attend
from sape2.attention.paths import choose_path, describe_path
from sape2.attention.products import encode, logits

__all__ = ["Attention", "attend", "choose_path", "describe_path", "encode", "logits"]

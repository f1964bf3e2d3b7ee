"""Dense vectors as Milvus takes them: packed float32, checked."""

from __future__ import annotations

import functools
import math
import struct
import sys
from collections.abc import Callable, Sequence

import numpy as np

_FLOAT32 = np.dtype("<f4")
# Of struct's formats only the native one is quick: the others pack floats byte by byte.
_BYTE_ORDER = "" if sys.byteorder == "little" else "<"


def pack(embedding: Sequence[float]) -> bytes:
    """The vector as little-endian float32.

    Raises:
        ValueError: It holds NaN, infinity, or what is no float32; the message continues a sentence about the vector.
    """
    try:
        packed = _packer(len(embedding))(*embedding)
    except (struct.error, OverflowError, TypeError) as error:
        raise ValueError(f"does not fit float32 ({error})") from None
    finite = np.isfinite(np.frombuffer(packed, _FLOAT32))
    if np.count_nonzero(finite) != len(embedding):  # finite.all() takes longer
        if all(map(math.isfinite, embedding)):
            raise ValueError("does not fit float32 (a number is too large)")
        raise ValueError("holds NaN or infinity")
    return packed


@functools.lru_cache(maxsize=64)
def _packer(dim: int) -> Callable[..., bytes]:
    return struct.Struct(f"{_BYTE_ORDER}{dim}f").pack

"""Dense vectors: as Milvus takes them (packed float32, checked), and as nodes hold them."""

from __future__ import annotations

import functools
import math
import struct
import sys
from collections.abc import Callable, Sequence

from llama_index.core.schema import BaseNode, Document, TextNode

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
    # Infinity and NaN have all bits of the exponent set, seven of them in a number's last byte. So have numbers from
    # 1.7e38 on: only then each is looked at.
    last_bytes = packed[3::4]
    if b"\x7f" in last_bytes or b"\xff" in last_bytes:
        _check_finite(packed, embedding)
    return packed


def _check_finite(packed: bytes, embedding: Sequence[float]) -> None:
    if all(map(math.isfinite, struct.unpack(f"<{len(embedding)}f", packed))):
        return
    if all(map(math.isfinite, embedding)):
        raise ValueError("does not fit float32 (a number is too large)")
    raise ValueError("holds NaN or infinity")


@functools.lru_cache(maxsize=64)
def _packer(dim: int) -> Callable[..., bytes]:
    return struct.Struct(f"{_BYTE_ORDER}{dim}f").pack


def set_embedding(node: BaseNode, embedding: list[float]) -> None:
    """Give a node its embedding.

    As `node.embedding = embedding`, without pydantic's look at each of the numbers, which takes 15 microseconds of a
    vector of 768: whoever stores the vector checks it.
    """
    if type(node) in (TextNode, Document) and type(embedding) is list and embedding and type(embedding[0]) is float:
        node.__dict__["embedding"] = [*embedding]  # a list of the node's own, as pydantic makes
        node.model_fields_set.add("embedding")
    else:
        node.embedding = embedding

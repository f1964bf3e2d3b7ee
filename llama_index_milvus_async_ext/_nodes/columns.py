"""What a column takes of the values that JSON has, and their sizes."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from llama_index.core.schema import BaseNode
from pymilvus import DataType

from llama_index_milvus_async_ext._nodes.refusals import mismatch, refused

_WHOLE, _ANY_NUMBER = (int, np.integer), (int, float, np.number, np.bool_)
COLUMN_TYPES: dict[DataType, tuple[type, ...]] = {
    DataType.BOOL: (bool, np.bool_, int, np.integer),
    DataType.INT8: _WHOLE,
    DataType.INT16: _WHOLE,
    DataType.INT32: _WHOLE,
    DataType.INT64: _WHOLE,
    DataType.FLOAT: _ANY_NUMBER,
    DataType.DOUBLE: _ANY_NUMBER,
    DataType.VARCHAR: (str,),
}
# What packs a number as its column does, and refuses one that is too large for it.
_NUMBERS: dict[DataType, Callable[[Any], bytes]] = {
    DataType.BOOL: {False: b"\0", True: b"\1"}.__getitem__,  # 0 and 1 as well
    DataType.INT8: struct.Struct("<b").pack,
    DataType.INT16: struct.Struct("<h").pack,
    DataType.INT32: struct.Struct("<i").pack,
    DataType.INT64: struct.Struct("<q").pack,
    DataType.FLOAT: struct.Struct("<f").pack,
    DataType.DOUBLE: struct.Struct("<d").pack,
}
_WHOLE_NUMBERS = frozenset(kind for kind, types in COLUMN_TYPES.items() if types is _WHOLE)


def size_of(node: BaseNode, name: str, value: Any, kind: DataType, limit: int, remedy: str) -> int:
    """The bytes of a value in a request, once it is sure that its column takes it.

    Numbers and truth are told apart as protobuf tells them, and so the plain store: a column of FLOAT or DOUBLE takes
    True for 1.0, one of whole numbers does not, and one of BOOL takes 1 and 0. (Of other numbers protobuf would make
    True.)

    Args:
        node: The node, which an error names.
        name: The column, which stands for the metadata key as well.
        value: The value.
        kind: The column's type.
        limit: Bytes of a text at the most.
        remedy: What to do about a text that is too long.

    Raises:
        SchemaMismatchError: The column does not take it.
        ValueError: No column would.
    """
    known: Any = COLUMN_TYPES[kind]
    if not isinstance(value, known) or (kind in _WHOLE_NUMBERS and isinstance(value, bool)):
        raise mismatch(
            node,
            f"column {name!r} holds {kind.name} values, but its value is of type {type(value).__name__}",
            f"convert metadata[{name!r}]",
        )
    if kind == DataType.VARCHAR:
        try:
            nbytes = len(value.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise refused(node, f"its {name!r} is not valid Unicode ({error})", "repair the text") from None
        if nbytes > limit:
            problem = f"its {name!r} has {nbytes} bytes in UTF-8, and the column takes {limit}"
            raise mismatch(node, problem, remedy)
        return nbytes
    try:
        _NUMBERS[kind](value)
    except KeyError:
        problem = f"column {name!r} holds BOOL values, but its value is {str(value)[:80]}"
        raise mismatch(node, problem, f"convert metadata[{name!r}]") from None
    except (struct.error, OverflowError):  # protobuf would make infinity of the latter
        problem = f"its {name!r}, {str(value)[:80]}, is too large for {kind.name}"
        raise mismatch(node, problem, "use a smaller number") from None
    return 8

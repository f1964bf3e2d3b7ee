"""Servers that put an upserted row where no filter on the partition key finds it, and the way around."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pymilvus import DataType

from llama_index_milvus_async_ext._milvus.literals import string_literal
from llama_index_milvus_async_ext._milvus.schema import PrimaryKey, Row

# Milvus chose the partition of an upserted row by its primary key, instead of by its partition key (milvus #30607;
# mended on the 22nd of February 2024, before this version came out).
_MENDED = (2, 3, 12)
_VERSION = re.compile(r"v?(\d+)\.(\d+)\.(\d+)")


def misplaces_upserts(version: str) -> bool:
    """Whether a server of this version puts upserted rows into wrong partitions; not if its version can't be read."""
    number = _VERSION.match(version)
    return number is not None and tuple(map(int, number.groups())) < _MENDED


def expression_of(key: PrimaryKey, rows: Sequence[Row]) -> str:
    """What names the stored rows of the same primary keys."""
    keys = [row.columns[key.name] for row in rows]
    literals = map(string_literal, keys) if key.type == DataType.VARCHAR else (str(int(each)) for each in keys)
    return f"{key.name} in [{', '.join(literals)}]"

"""Servers that put an upserted row where no filter on the partition key finds it, and the way around."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence

from pymilvus import DataType
from pymilvus.exceptions import MilvusException

from llama_index_milvus_async_ext._milvus.errors import ReplacementError
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


def deleting() -> contextlib.AbstractContextManager[None]:
    """Say of a delete that fails what may be gone: this one, or that of an attempt before, may have been executed."""
    return _noting("earlier rows of these ids may be deleted, until the nodes are written again")


def inserting() -> contextlib.AbstractContextManager[None]:
    """Say of an insert that fails, after its delete, what is gone."""
    return _noting("earlier rows of these ids are deleted, until the nodes are written again")


@contextlib.contextmanager
def _noting(note: str) -> Iterator[None]:
    try:
        yield
    except MilvusException as failure:
        raise ReplacementError.of(failure, note) from failure


def expression_of(key: PrimaryKey, rows: Sequence[Row]) -> str:
    """What names the stored rows of the same primary keys."""
    keys = [row.columns[key.name] for row in rows]
    literals = map(string_literal, keys) if key.type == DataType.VARCHAR else (str(int(each)) for each in keys)
    return f"{key.name} in [{', '.join(literals)}]"

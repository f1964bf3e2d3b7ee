"""Ids as a caller gives them: in a list, or in whatever else they come out of one by one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llama_index.core.bridge.pydantic import BaseModel

from llama_index_milvus_async_ext._milvus.literals import shown


def listed(name: str, ids: Any) -> list[Any]:
    """The ids, in a list: they are named in several requests, and again in those that are repeated.

        listed("node_ids", {"a": 1}.keys())  # ["a"]

    Args:
        name: What the caller knows them as.
        ids: A list, which is returned itself, or any iterable of ids: a set, the keys of a dict, a generator.

    Raises:
        TypeError: They are no such thing. A single text would be taken for its letters, and a node or filters, which
            are iterables too, for their fields.
    """
    if isinstance(ids, list):
        return ids
    if isinstance(ids, Iterable) and not isinstance(ids, (str, bytes, BaseModel)):
        return list(ids)
    raise TypeError(f"{name} must be a list of ids, or another iterable of them, got {shown(ids)}")

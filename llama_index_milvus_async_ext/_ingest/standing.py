"""What a collection's rows say of a document: no await, no clock, no I/O.

Each row of a document carries the same record: the version that it belongs to (the document and what was made of it),
a digest of the keys of all rows that were written with it, and the document's source. So a look at the rows that are
there tells whether they are all there, and nothing else has to be stored, or can be lost.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import orjson

from llama_index_milvus_async_ext._store.records import StoredRow

_DIGEST_BYTES = 12  # of 2 ** 96, two of a billion documents are the same with a chance of 1e-11


def digest(parts: Iterable[str]) -> str:
    """A short text that stands for these texts, in this order."""
    encoded = [part.encode("utf-8", "surrogatepass") for part in parts]
    joined = b"".join([b"%d:%s" % (len(part), part) for part in encoded])
    return hashlib.blake2b(joined, digest_size=_DIGEST_BYTES).hexdigest()


def digest_of_keys(keys: Iterable[Any]) -> str:
    """A short text that stands for a set of primary keys."""
    return digest(sorted(map(str, keys)))


def record_bytes(version: str, keys: Iterable[Any], source: str) -> bytes:
    """What each row of a document says of it, as JSON."""
    return orjson.dumps({"version": version, "nodes": digest_of_keys(keys), "source": source})


class Standing(NamedTuple):
    """How a document stands in the collection.

    Attributes:
        is_known: Whether it has any rows.
        is_whole: Whether all rows of the wanted version are there.
        stale: The keys of the rows that do not belong to it: of earlier versions, and of attempts that were broken off.
    """

    is_known: bool
    is_whole: bool
    stale: list[Any]


def standing(rows: Sequence[StoredRow], version: str) -> Standing:
    """How a document stands of which these are all rows, and which is wanted in this version."""
    groups: dict[str, list[Any]] = {}
    for row in rows:
        if row.record is not None and row.record.get("version") == version:
            groups.setdefault(str(row.record.get("nodes")), []).append(row.key)
    # Two runs at the same time may both have written it: whoever looks next keeps the same one.
    whole = max((nodes for nodes, keys in groups.items() if digest_of_keys(keys) == nodes), default=None)
    kept = set(groups[whole]) if whole is not None else set()
    return Standing(bool(rows), whole is not None, [row.key for row in rows if row.key not in kept])

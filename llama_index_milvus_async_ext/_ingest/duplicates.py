"""Documents that are left out, as another one has brought their content: no await, no clock, no I/O."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from llama_index_milvus_async_ext._ingest.item import Item, weight_of_text

_ROOM = 4_000  # what documents may weigh that are kept in case their originals change


class LeftOut(NamedTuple):
    """A document that was left out.

    Attributes:
        original: The document for whose sake.
        outcome: As what it was counted.
        item: The document; None if it is not kept.
    """

    original: str
    outcome: str
    item: Item | None


@dataclass
class Duplicates:
    """Who stands for whom.

    What is stored of an original says what it was before this run, until the stream has held it, too: it may come with
    other content then, or not at all. So what is left out for its sake is kept until then, as far as there is room.

    Attributes:
        first: The first document of each content, by its hash.
        hashes: Of the documents that are recorded.
        seen: The documents that the stream has held so far.
        unseen_are_deleted: Whether an original goes that the stream does not hold.
        is_wanted: Whether duplicates are left out at all.
        room: What documents may weigh that are kept.
    """

    first: dict[str, str]
    hashes: Mapping[str, str]
    seen: Collection[str]
    unseen_are_deleted: bool
    is_wanted: bool
    room: int = _ROOM

    def __post_init__(self) -> None:
        self._relying: dict[str, dict[str, str]] = {}  # on each original: documents, and their hashes
        self._left_out: dict[str, LeftOut] = {}
        self._come: set[str] = set()

    def original_of(self, item: Item) -> str | None:
        """The document that stands for this one, if it holds what it held; this one relies on it from now on."""
        if not self.is_wanted:
            return None
        original = self.first.setdefault(item.hash, item.document_id)
        if original == item.document_id or (self.unseen_are_deleted and original not in self.seen and self.room <= 0):
            return None
        self._relying.setdefault(original, {})[item.document_id] = item.hash
        return original

    def leave_out(self, item: Item, original: str, outcome: str) -> None:
        """Note a document that is left out for the sake of another one, and as what it is counted."""
        is_kept = original not in self._come and (self.room > 0 or self.unseen_are_deleted)
        self.room -= weight_of_text(item) if is_kept else 0
        self._left_out[item.document_id] = LeftOut(original, outcome, item.again() if is_kept else None)

    def lost_by(self, item: Item) -> list[str]:
        """Those that have relied on what a document no longer holds, as it comes with other content."""
        relying = self._relying.get(item.document_id, {})
        lost = [each for each, hash_ in relying.items() if hash_ != item.hash]
        for document_id in lost:
            del relying[document_id]
        return lost

    def come(self, item: Item) -> None:
        """Note that the stream holds a document, after those that it loses have come again."""
        if not self.is_wanted:
            return
        before = self.hashes.get(item.document_id, item.hash)
        if before != item.hash and self.first.get(before) == item.document_id:
            del self.first[before]  # else each of several that hold the same now would find that it has changed
        self._come.add(item.document_id)
        self._forget(item.document_id)
        for document_id in self._relying.get(item.document_id, {}):
            self._keep_no_longer(document_id, item.document_id)

    def fail(self, item: Item) -> None:
        """Note that a document is not stored as it came: the next one of its content is the first then."""
        if self.first.get(item.hash) == item.document_id:
            del self.first[item.hash]

    def orphans(self) -> dict[str, list[str]]:
        """At the end of the stream: those that have relied on what is deleted then, by that."""
        gone = [original for original in self._relying if original not in self.seen]
        return {original: list(self._relying.pop(original)) for original in gone} if self.unseen_are_deleted else {}

    def take_back(self, document_id: str, original: str) -> LeftOut | None:
        """A document whose original is lost; None if it was not left out for its sake.

        The first of several takes its place.
        """
        left_out = self._left_out.get(document_id)
        if left_out is None or left_out.original != original:
            return None
        self._forget(document_id)
        if left_out.item is not None and self.first.get(left_out.item.hash) == original:
            self.first[left_out.item.hash] = document_id
        return left_out

    def _keep_no_longer(self, document_id: str, original: str) -> None:
        """Its original has come: keep no more of a document than that it was left out."""
        left_out = self._left_out.get(document_id)
        if left_out is not None and left_out.original == original:
            self._forget(document_id)
            self._left_out[document_id] = left_out._replace(item=None)

    def _forget(self, document_id: str) -> None:
        left_out = self._left_out.pop(document_id, None)
        if left_out is not None and left_out.item is not None:
            self.room += weight_of_text(left_out.item)

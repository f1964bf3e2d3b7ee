"""Lets a bounded number of items in, and equal keys in their order."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Hashable
from typing import Any

from llama_index_milvus_async_ext._lane.items import Item, Submission

WINDOW = 1_000  # values that become items in one go: under a millisecond's work


class Entrance:
    """Where submissions wait with their callers until there is room inside.

    All lanes that write to one collection share an entrance, whatever their other settings: so there is one order of
    equal keys, which no second store, partition or batch size can evade. Items of one key go one after the other, in
    the order of submission: the next one may be sent once the request of the one before it has ended.

    Large submissions enter window by window, in turns with the others, so that a small one does not wait for all of
    them. What comes after a submission that is not in yet, and shares a key with it, is kept out until it is.

    Args:
        capacity: Items inside that wait to be sent, at the most.
        tells_repeats: Whether it matters if an item came while one of an equal key had no outcome (where rows are
            inserted it does: the second one has to replace the first).
    """

    def __init__(self, capacity: int, tells_repeats: bool = True) -> None:
        self.capacity = capacity
        self.tells_repeats = tells_repeats
        self.inside = 0
        self.has_turn = False
        self._line: deque[Submission[Any]] = deque()
        self._large: list[Submission[Any]] = []  # in part inside already, or kept out; their keys bar later ones
        self._kept_out: list[Submission[Any]] = []
        self._barred: dict[Hashable, int] = {}  # keys of the small ones that are kept out, and who was first
        self._newest = 0
        self._waiting: set[int] = set()  # numbers of those that are not all in, in whatever order they stand
        self._oldest = 0  # none that waits has a smaller one
        self._ended: dict[Hashable, int] = {}  # keys that have ended while somebody waits, and who was the newest then
        self._last_of_key: dict[Hashable, Item[Any]] = {}

    @property
    def is_open(self) -> bool:
        """Whether somebody waits, and there is room."""
        return bool(self._line) and self.inside < self.capacity

    @property
    def knows_keys(self) -> bool:
        """Whether some key is still in use."""
        return bool(self._last_of_key)

    def queue(self, submission: Submission[Any]) -> None:
        """Have a submission wait for its turn."""
        self._newest = submission.number
        if not self._waiting:
            self._oldest = submission.number
        self._waiting.add(submission.number)
        self._line.append(submission)

    def admit(self) -> list[Submission[Any]]:
        """Let a window's worth of values in; the submissions that now have items which may be sent."""
        moved = []
        room = min(self.capacity - self.inside, WINDOW)
        looked_at = 0
        while self._line and room > 0 and looked_at < WINDOW:
            looked_at += 1
            submission = self._line.popleft()
            if submission.given_up:
                self._forget(submission)
                continue
            count = min(len(submission.values) - submission.entered, room)
            if not self._may_enter(submission, count):
                self._keep_out(submission)
                continue
            self._enter(submission, count)
            room -= count
            moved.append(submission)
            if submission.entered < len(submission.values):
                self._note_large(submission)
                self._line.append(submission)
            else:
                self._forget(submission)
        if not self._waiting:
            self._ended.clear()
        return moved

    def leave(self, item: Item[Any]) -> Item[Any] | None:
        """Note that an item's request has ended; the next item of its key, which may be sent now."""
        if item.key is None:
            return None
        follower = item.follower
        while follower is not None and follower.settled:  # given up while it waited
            item, follower = follower, follower.follower
        if follower is None:
            if self._last_of_key.get(item.key) is item:
                del self._last_of_key[item.key]
                if self.tells_repeats and self._waiting:
                    self._note_ended(item.key)
            return None
        follower.waits_behind = False
        return follower

    def _note_ended(self, key: Hashable) -> None:
        self._ended.pop(key, None)  # so that they stand in the order of their numbers
        self._ended[key] = self._newest
        # Those before which nobody waits any more, two at a time: so they don't become more and more.
        while self._oldest not in self._waiting:
            self._oldest += 1
        for known in list(itertools.islice(self._ended, 2)):
            if self._ended[known] < self._oldest:
                del self._ended[known]

    def _enter(self, submission: Submission[Any], count: int) -> None:
        start = submission.entered
        end = submission.entered = start + count
        self.inside += count
        values, keys, ready = submission.values, submission.keys, submission.ready
        if keys is None:
            items = [Item(values[index], None, submission, index) for index in range(start, end)]
            ready.extend(items)
            submission.live.update(items)
            return
        last_of_key = self._last_of_key
        for index in range(start, end):
            key = keys[index]
            item = Item(values[index], key, submission, index)
            submission.live.add(item)
            if key is None:
                ready.append(item)
                continue
            earlier = last_of_key.get(key)
            if earlier is None:
                ready.append(item)
                if self._ended:
                    item.repeats = self._ended.get(key, -1) >= submission.number
            else:
                earlier.follower = item
                item.waits_behind = item.repeats = True
            last_of_key[key] = item

    def _may_enter(self, submission: Submission[Any], count: int) -> bool:
        if submission.keys is None or not (self._large or self._barred):
            return True
        window = submission.keys[submission.entered : submission.entered + count]
        barred = () if self._barred.keys().isdisjoint(window) else self._barred.keys() & window
        return all(self._barred[key] > submission.number for key in barred) and all(
            earlier.own_keys.isdisjoint(window)
            for earlier in self._large
            if earlier.number < submission.number and earlier.own_keys is not None
        )

    def _keep_out(self, submission: Submission[Any]) -> None:
        """Let those behind go first, but for those that share a key with it."""
        self._kept_out.append(submission)
        if submission.keys is not None and len(submission.keys) <= WINDOW:
            for key in submission.keys:
                self._barred.setdefault(key, submission.number)
        else:
            self._note_large(submission)

    def _note_large(self, submission: Submission[Any]) -> None:
        if submission.keys is not None and submission.own_keys is None:
            submission.own_keys = frozenset(submission.keys)
        if not submission.is_noted:
            submission.is_noted = True
            self._large.append(submission)

    def _forget(self, submission: Submission[Any]) -> None:
        """A submission is in, or wants nothing any more: look anew at those that it may have kept out."""
        self._waiting.discard(submission.number)
        submission.own_keys = None
        if submission.is_noted:
            submission.is_noted = False
            self._large.remove(submission)
            self._barred.clear()
            self._line.extendleft(reversed(self._kept_out))
            self._kept_out.clear()

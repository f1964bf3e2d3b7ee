"""Any number of rows, looked up page by page: nothing is held between one page and the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

from llama_index_milvus_async_ext._lane.port import Port
from llama_index_milvus_async_ext._milvus.endpoint import Call
from llama_index_milvus_async_ext._milvus.errors import QueryError, classify
from llama_index_milvus_async_ext._milvus.schema import PrimaryKey
from llama_index_milvus_async_ext._milvus.session import Connected
from llama_index_milvus_async_ext._queries.filters import after_expression
from llama_index_milvus_async_ext._store import calls
from llama_index_milvus_async_ext.retry import Verdict

if TYPE_CHECKING:
    from llama_index_milvus_async_ext._store.open_store import OpenStore

T = TypeVar("T")

# As pymilvus's own iterator asks: without them Milvus Lite, and servers from 2.4 on, give any rows, in any order.
_IN_ORDER = {"iterator": "True", "reduce_stop_for_best": "True"}


class Cursor:
    """How far a look-up has come that goes through the rows in the order of their primary keys.

    Each page begins behind the last key of the one before: so a row that is there all along is met once, whatever is
    written and deleted meanwhile. Only an empty page is the end. A server's may be shorter than was asked for, and also
    longer: it gives what its segments have up to where the first of them would have to be asked again.

    Args:
        matching: The expression that the rows match, which can be joined by `and` as it stands; "" for all.
        rows: Rows to ask for at once.
    """

    def __init__(self, matching: str, rows: int) -> None:
        self.rows = rows
        self.has_begun = False
        self._matching = matching
        self._last: Any = None

    def expression(self, key: PrimaryKey) -> str:
        """What the rows match that are still to come."""
        return self._matching if self._last is None else after_expression(self._matching, key, self._last)

    def advance(self, keys: Sequence[Any]) -> None:
        """Go on behind these keys, which are those of a page.

        Raises:
            QueryError: They are not in order: rows could be lost between the pages.
        """
        known = [] if self._last is None else [self._last]
        if any(later < earlier for earlier, later in pairwise([*known, *keys])):
            raise QueryError(
                "this Milvus does not answer in the order of the primary keys, so rows can't be read page by page; "
                "Milvus Lite does from version 3.2.1 on"
            )
        if keys:
            self._last = keys[-1]

    def halve(self) -> bool:
        """Ask for fewer rows at once from now on; False if it is one already."""
        could = self.rows > 1
        self.rows = max(self.rows // 2, 1)
        return could


async def next_page(
    store: OpenStore,
    connected: Connected,
    port: Port,
    cursor: Cursor,
    ask: Callable[[str, dict[str, Any]], Call[T]],
    keys_of: Callable[[T, str], Sequence[Any]],
) -> T:
    """The next page; empty after the last one. Where an answer would be too large, smaller ones are asked for.

    Args:
        store: The store.
        connected: Its connection, on which this call has begun.
        port: The caller's.
        cursor: How far it has come.
        ask: Makes the call that looks up what matches an expression, with these options of pymilvus's.
        keys_of: The primary keys of an answer, by the name of their field.

    Raises:
        MilvusException: Milvus rejected the look-up, or could not be reached until the deadline.
    """
    key = (await calls.schema(store, connected, port)).primary_key
    if not cursor.has_begun and not connected.endpoint.is_lite:
        # A page is answered as an iterator's, for which pymilvus leaves the consistency out. What this one has waited
        # for the pages see too.
        await calls.call(store, connected, port, ask(cursor.expression(key), {"limit": 1}))
    cursor.has_begun = True
    while True:
        page = ask(cursor.expression(key), {"limit": cursor.rows, **_IN_ORDER})
        try:
            found = await calls.call(store, connected, port, page)
        except Exception as error:
            if classify(error) is not Verdict.TOO_LARGE or not cursor.halve():
                raise
        else:
            cursor.advance(keys_of(found, key.name))
            return found

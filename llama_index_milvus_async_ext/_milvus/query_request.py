"""Look-ups whose answers are read column by column, where pymilvus would make a dict of each row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import orjson
from pymilvus.client.prepare import Prepare
from pymilvus.grpc_gen import common_pb2, schema_pb2

_CLOSING = ord("}")


class Wanted(NamedTuple):
    """What is wanted of each row: some columns, and one dynamic field."""

    columns: tuple[str, ...]
    dynamic: str

    @property
    def fields(self) -> list[str]:
        """The output fields to ask for."""
        return [*self.columns, self.dynamic]


class LookedUp:
    """What a look-up has found, read when it is asked for: on the thread of whoever asked, not on the I/O thread.

    Args:
        found: A `QueryResults` message that is readable, or the rows as pymilvus gives them.
        wanted: What was asked for.
    """

    def __init__(self, found: Any, wanted: Wanted) -> None:
        self._found = found
        self._wanted = wanted

    def columns(self) -> list[Sequence[Any]]:
        """A list of values for each column that was asked for, and last the dynamic field's, None where it is not."""
        if isinstance(self._found, list):
            return [[row.get(name) for row in self._found] for name in self._wanted.fields]
        columns = _columns(self._found)
        values: list[Sequence[Any]] = [list(columns[name]) for name in self._wanted.columns]
        return [*values, dynamic_values(columns[None], self._wanted.dynamic)]


def query_request(collection: str, expression: str, wanted: Wanted, options: dict[str, Any]) -> Any:
    """Build a QueryRequest, strongly consistent; the options are pymilvus's, such as `limit`."""
    return Prepare.query_request(
        collection,
        expression,
        wanted.fields,
        use_default_consistency=False,
        consistency_level=common_pb2.ConsistencyLevel.Strong,
        guarantee_timestamp=0,  # Milvus takes the time at which the request arrives
        **{"partition_names": None, **options},
    )


def is_readable(answer: Any, wanted: Wanted) -> bool:
    """Whether an answer has the columns that were asked for, in a form that is known here."""
    columns = _columns(answer)
    return {*wanted.columns, None} <= columns.keys() and len(set(map(len, columns.values()))) == 1


def _columns(answer: Any) -> dict[str | None, Sequence[Any]]:
    """The columns by name, the JSON of the dynamic fields under None; those of other sorts are left out."""
    columns: dict[str | None, Sequence[Any]] = {}
    for column in answer.fields_data:
        if column.valid_data:
            continue
        if column.type == schema_pb2.DataType.VarChar:
            columns[column.field_name] = column.scalars.string_data.data
        elif column.type == schema_pb2.DataType.Int64:
            columns[column.field_name] = column.scalars.long_data.data
        elif column.type == schema_pb2.DataType.JSON and column.is_dynamic:
            columns[None] = column.scalars.json_data.data
    return columns


def dynamic_values(rows: Sequence[bytes], name: str) -> list[Any]:
    """The value of one of the dynamic fields of each row, None where it is not.

    A server of 2.3 answers with all of a row's dynamic fields, of which the node's JSON is the most. So only the end of
    a row is parsed if the field is the last one, and equal ends only once.

    Args:
        rows: The JSON of each row.
        name: The field, of plain letters.
    """
    key = b'"%s":' % name.encode()
    values = []
    known: dict[bytes, Any] = {}
    for row in rows:
        place = row.rfind(key)
        end = row[place - 1 :] if place > 0 else b""
        if end not in known:
            try:
                known[end] = _value_at_end(end, len(key) + 1)
            except ValueError:
                values.append(orjson.loads(row).get(name))
                continue
        values.append(known[end])
    return values


def _value_at_end(end: bytes, start: int) -> Any:
    """The value of a field, if this is the end of a JSON object, and the field its last one.

    A quotation mark after a comma or a brace is none inside a text, where it would stand after a backslash, and as it
    is not followed by what may follow a text, it opens one: so this is a key. What follows is one value and the brace
    that closes the outermost object: so it is a key of that, and not of an object inside it.

    Raises:
        ValueError: It is not so, or can't be told.
    """
    if end[:1] not in (b",", b"{") or end[-1] != _CLOSING:
        raise ValueError
    return orjson.loads(end[start:-1])

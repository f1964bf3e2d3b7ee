"""Rows as the request that stores them, in its serialised form."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from pymilvus import DataType
from pymilvus.client import entity_helper
from pymilvus.client.prepare import Prepare
from pymilvus.grpc_gen import milvus_pb2, schema_pb2

from llama_index_milvus_async_ext._milvus.schema import DYNAMIC_FIELD, SCALAR_ATTRIBUTES, Row, Schema

logger = logging.getLogger(__name__)


def write_request(collection: str, partition: str, schema: Schema, rows: Sequence[Row], upsert: bool) -> bytes:
    """Build an InsertRequest or UpsertRequest, in its serialised form.

    The first row of a schema is built both here and by pymilvus; only if the two are equal does the quick way stay in
    use for it.
    """
    if schema.fast is None:
        sample = rows[:1]
        try:
            kind = milvus_pb2.UpsertRequest if upsert else milvus_pb2.InsertRequest
            ours = kind.FromString(_columnar_request(collection, partition, schema, sample, upsert))
            schema.fast = bool(ours == _pymilvus_request(collection, partition, schema, sample, upsert))
        except Exception as error:  # whatever the reason, perhaps the row itself, pymilvus's own way is there
            logger.debug("row encoder is not used for %r: %s", collection, error)
        else:
            if not schema.fast:
                logger.debug("row encoder and pymilvus differ for %r: pymilvus is used", collection)
    if schema.fast:
        return _columnar_request(collection, partition, schema, rows, upsert)
    serialised: bytes = _pymilvus_request(collection, partition, schema, rows, upsert).SerializeToString()
    return serialised


# Numbers of fields in Milvus's messages. Protobuf never changes them; where one were wrong, the comparison would show.
_REQUEST_FIELDS_DATA = 5  # of InsertRequest and UpsertRequest
_COLUMN_SCALARS, _COLUMN_VECTORS = 3, 4  # of FieldData
_SCALARS_STRING, _SCALARS_JSON = 6, 9  # of ScalarField
_VECTORS_FLOAT = 2  # of VectorField
_ARRAY_DATA = 1  # of StringArray, JSONArray and FloatArray


def _columnar_request(collection: str, partition: str, schema: Schema, rows: Sequence[Row], upsert: bool) -> bytes:
    """The request, joined from the bytes of its rows, which are copied once.

    In a protobuf message they would be copied into it, and again, more than once, when it is serialised.
    """
    kind = milvus_pb2.UpsertRequest if upsert else milvus_pb2.InsertRequest
    chunks = [kind(collection_name=collection, partition_name=partition).SerializeToString()]
    for info in schema.fields:
        name, kind_of_field = info["name"], info["type"]
        column = schema_pb2.FieldData(field_name=name, type=int(kind_of_field))
        if kind_of_field == DataType.FLOAT_VECTOR:
            vectors = [row.vector for row in rows if row.vector is not None]
            dim = schema_pb2.VectorField(dim=sum(map(len, vectors)) // (4 * len(rows)))
            floats = _field(_VECTORS_FLOAT, _field(_ARRAY_DATA, vectors))
            values = _field(_COLUMN_VECTORS, [dim.SerializeToString(), *floats])
        elif kind_of_field == DataType.VARCHAR:
            texts = [row.columns[name].encode() for row in rows]
            values = _field(_COLUMN_SCALARS, _field(_SCALARS_STRING, _repeated(texts)))
        else:
            values = []
            if kind_of_field == DataType.SPARSE_FLOAT_VECTOR:
                for row in rows:
                    entity_helper.pack_field_value_to_field_data(row.columns[name], column, info, {})
            else:
                getattr(column.scalars, SCALAR_ATTRIBUTES[kind_of_field]).data.extend(
                    [row.columns[name] for row in rows]
                )
        chunks += _field(_REQUEST_FIELDS_DATA, [column.SerializeToString(), *values])
    column = schema_pb2.FieldData(field_name=DYNAMIC_FIELD, type=int(DataType.JSON))
    dynamic = _field(_COLUMN_SCALARS, _field(_SCALARS_JSON, _repeated([row.dynamic for row in rows])))
    is_dynamic = schema_pb2.FieldData(is_dynamic=True).SerializeToString()
    chunks += _field(_REQUEST_FIELDS_DATA, [column.SerializeToString(), *dynamic, is_dynamic])
    count = kind(num_rows=len(rows), schema_timestamp=schema.described.get("update_timestamp", 0))
    chunks.append(count.SerializeToString())
    return b"".join(chunks)


class _Prefixes(dict[int, bytes]):
    """What stands before each value of an array, by the value's length: as many as there are lengths."""

    def __missing__(self, length: int) -> bytes:
        self[length] = prefix = _varint(_ARRAY_DATA << 3 | 2) + _varint(length)
        return prefix


_prefixes = _Prefixes()


def _field(number: int, chunks: Sequence[bytes]) -> list[bytes]:
    """A field that holds a message, or packed numbers: these chunks."""
    return [_varint(number << 3 | 2), _varint(sum(map(len, chunks))), *chunks]


def _repeated(values: Sequence[bytes]) -> list[bytes]:
    """The field `data` of an array of strings or bytes."""
    chunks = [b""] * (2 * len(values))
    chunks[::2] = map(_prefixes.__getitem__, map(len, values))
    chunks[1::2] = values
    return chunks


def _pymilvus_request(collection: str, partition: str, schema: Schema, rows: Sequence[Row], upsert: bool) -> Any:
    build = Prepare.row_upsert_param if upsert else Prepare.row_insert_param
    return build(
        collection,
        [row.entity for row in rows],
        partition,
        schema.described["fields"],
        schema.described.get("struct_array_fields"),
        enable_dynamic=schema.dynamic,
        schema_timestamp=schema.described.get("update_timestamp", 0),
    )


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)

"""A collection as Milvus describes it, and a row that fits it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson
from pymilvus import DataType

DYNAMIC_FIELD = "$meta"
ID_FIELD = "id"  # LlamaIndex's name for the primary key
SCALAR_ATTRIBUTES = {
    DataType.BOOL: "bool_data",
    DataType.INT8: "int_data",
    DataType.INT16: "int_data",
    DataType.INT32: "int_data",
    DataType.INT64: "long_data",
    DataType.FLOAT: "float_data",
    DataType.DOUBLE: "double_data",
    DataType.VARCHAR: "string_data",
}


class PrimaryKey(NamedTuple):
    """The field that names a collection's rows: `id`, a text, in collections that LlamaIndex made."""

    name: str = ID_FIELD
    type: DataType = DataType.VARCHAR
    auto_id: bool = False


DEFAULT_KEY = PrimaryKey()


@dataclass(slots=True)
class Row:
    """One row, ready to be put into a request.

    Attributes:
        columns: Values of the collection's columns by name (the dense vector as floats).
        dynamic: The dynamic fields as JSON; empty where the collection has none.
        vector: The dense vector as packed little-endian float32, or None if the collection has none.
    """

    columns: dict[str, Any]
    dynamic: bytes
    vector: bytes | None

    @property
    def entity(self) -> dict[str, Any]:
        """Columns and dynamic fields by name, as pymilvus takes them."""
        return {**orjson.loads(self.dynamic), **self.columns} if self.dynamic else self.columns


@dataclass(eq=False)
class Schema:
    """What the row path needs to know of a collection.

    Attributes:
        described: The collection as Milvus describes it.
        fields: The fields that a row must bring, in the collection's order.
        primary_key: The field that names its rows.
        fast: Whether rows are encoded here; None until the first row was encoded both ways and compared.
        confirmed_at: When Milvus last described the collection so, in seconds of the monotonic clock.
        partitions: Names of partitions that it is known to have.
    """

    described: dict[str, Any]
    fields: list[dict[str, Any]] = field(init=False)
    primary_key: PrimaryKey = field(init=False)
    fast: bool | None = field(init=False)
    confirmed_at: float = field(init=False, default=0.0)
    partitions: frozenset[str] = field(init=False, default=frozenset())

    def __post_init__(self) -> None:
        everything = self.described["fields"]
        self.fields = [f for f in everything if not f.get("auto_id") and not f.get("is_function_output")]
        keys = [
            PrimaryKey(f["name"], f["type"], bool(f.get("auto_id") or self.described.get("auto_id")))
            for f in everything
            if f.get("is_primary")
        ]
        self.primary_key = keys[0] if keys else DEFAULT_KEY
        vectors = [f for f in self.fields if f["type"] == DataType.FLOAT_VECTOR]
        known = {*SCALAR_ATTRIBUTES, DataType.FLOAT_VECTOR, DataType.SPARSE_FLOAT_VECTOR}
        simple = (
            self.dynamic
            and len(vectors) <= 1
            and not self.described.get("struct_array_fields")
            and not any(f.get("auto_id") for f in everything)
            and all(
                f["type"] in known and not f.get("nullable") and f.get("default_value") is None for f in self.fields
            )
        )
        self.fast = None if simple else False

    @property
    def dynamic(self) -> bool:
        """Whether fields outside the schema are stored."""
        return bool(self.described.get("enable_dynamic_field"))

    @property
    def partition_key(self) -> str | None:
        """The field whose value decides in which partition a row is; None if there is none."""
        return next((f["name"] for f in self.described["fields"] if f.get("is_partition_key")), None)

    @property
    def identity(self) -> tuple[Any, ...]:
        """What a collection keeps as long as nobody makes it anew."""
        return self.primary_key, self.described.get("collection_id")

    @property
    def has_sparse(self) -> bool:
        """Whether a row brings a sparse vector."""
        return any(f["type"] == DataType.SPARSE_FLOAT_VECTOR for f in self.fields)

    @property
    def names(self) -> set[str]:
        """Names of all fields, those that a function fills included."""
        return {f["name"] for f in self.described["fields"]}

    @property
    def function_outputs(self) -> set[str]:
        """Names of the fields that Milvus fills itself."""
        return {f["name"] for f in self.described["fields"] if f.get("is_function_output")}

    def params(self, name: str) -> dict[str, Any]:
        """Type parameters of a field, such as `dim` or `max_length`; empty for an unknown one."""
        return next((f.get("params", {}) for f in self.described["fields"] if f["name"] == name), {})

"""What a collection is made as, where that is more than upstream's constructor can be told."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

from pymilvus import CollectionSchema, DataType, MilvusClient

from llama_index_milvus_async_ext._milvus.schema import ID_FIELD, Schema
from llama_index_milvus_async_ext._queries.filters import path_of
from llama_index_milvus_async_ext._store.existing import make_beside_others
from llama_index_milvus_async_ext._store.opening import Known, metric_for_new

_DEFAULT_METRIC = "IP"  # upstream's
_MAX_LENGTH = 65_535
_KEY_TYPES = (DataType.VARCHAR, DataType.INT64)
_partition_key: ContextVar[str | None] = ContextVar("partition_key", default=None)


@contextlib.contextmanager
def partitioned_by(partition_key_field: str | None) -> Iterator[None]:
    """While this lasts, this thread's collections are made with this partition key."""
    token = _partition_key.set(partition_key_field)
    try:
        yield
    finally:
        _partition_key.reset(token)


def with_partition_key(schema: CollectionSchema) -> CollectionSchema:
    """A schema of upstream's, with the field that is to be the partition key: one of its scalar fields, or a text."""
    name = _partition_key.get()
    if name is None:
        return schema
    field = next((field for field in schema.fields if field.name == name), None)
    if field is None:
        schema.add_field(name, DataType.VARCHAR, max_length=_MAX_LENGTH, is_partition_key=True)
    else:
        field.is_partition_key = True
    return schema


class Wanted(NamedTuple):
    """How a collection is asked for, beside upstream's arguments.

    Attributes:
        partition_key_field: The constructor's; a `Known` one is compared with nothing.
        schema: What it is made from, if one is given.
        is_compared: Whether one that is there is compared with the schema: a copy of a store has not asked for it.
        timeout: Of each question, in seconds.
    """

    partition_key_field: str | None
    schema: CollectionSchema | None
    is_compared: bool
    timeout: float

    @classmethod
    def of(
        cls, partition_key_field: str | None, schema: CollectionSchema | dict[str, Any] | None, timeout: float
    ) -> Wanted:
        """By the constructor's arguments; a copy's schema is what `described` has left of it.

        Raises:
            TypeError: The schema is none.
        """
        if isinstance(schema, dict) and "fields" in schema:
            return cls(partition_key_field, CollectionSchema.construct_from_dict(schema), False, timeout)
        if schema is not None and not isinstance(schema, CollectionSchema):
            raise TypeError(f"schema must be a pymilvus.CollectionSchema, got {type(schema).__name__}")
        return cls(partition_key_field, schema, True, timeout)


def described(schema: CollectionSchema) -> dict[str, Any]:
    """A schema as plain values: pymilvus's own does not pickle."""
    plain: dict[str, Any] = schema.to_dict()
    for field in plain["fields"]:
        default = field.get("default_value")
        if default is not None:
            field["default_value"] = getattr(default, default.WhichOneof("data"))
    return plain


def filterable_of(keys: Sequence[str] | None) -> tuple[str, ...] | None:
    """The constructor's `filterable_metadata`.

    Raises:
        TypeError, ValueError: It is no list of keys.
    """
    if keys is None:
        return None
    if not isinstance(keys, (list, tuple, set, frozenset)) or not all(isinstance(key, str) for key in keys):
        raise TypeError(f"filterable_metadata must be a list of metadata keys, got {keys!r}")
    for key in keys:
        if (path := path_of(key)) is not None and len(path) > 1:
            raise ValueError(f"filterable_metadata has {key!r}, which is a path in filters; name the key {path[0]!r}")
    return tuple(keys)


def check_arguments(arguments: dict[str, Any], wanted: Wanted) -> None:
    """Refuse arguments that no collection could be made with.

    Args:
        arguments: The constructor's that are upstream's.
        wanted: The others.

    Raises:
        TypeError, ValueError: An argument is wrong, or does not go with another.
    """
    partition_key_field, schema = wanted.partition_key_field, wanted.schema
    if partition_key_field is not None:
        if not isinstance(partition_key_field, str) or not partition_key_field:
            raise TypeError(f"partition_key_field must be the name of a field, got {partition_key_field!r}")
        taken = {ID_FIELD, *(arguments[name] for name in ("text_key", "doc_id_field", "embedding_field"))}
        if arguments["enable_sparse"]:
            taken.add(arguments["sparse_embedding_field"])
        if partition_key_field in taken and schema is None:
            raise ValueError(
                f"partition_key_field={partition_key_field!r} is a field of the store's own; name a metadata key"
            )
        names, types = arguments["scalar_field_names"] or [], arguments["scalar_field_types"] or []
        if (kind := dict(zip(names, types, strict=False)).get(partition_key_field)) not in (None, *_KEY_TYPES):
            raise ValueError(
                f"partition_key_field={partition_key_field!r} is of type {DataType(kind).name} by scalar_field_types, "
                "and Milvus takes VARCHAR and INT64 for a partition key"
            )
    if schema is not None:
        if arguments["scalar_field_names"]:
            raise ValueError("scalar_field_names goes without schema=: add these fields to the schema")
        _check_schema(schema, arguments)
        key = next((field.name for field in schema.fields if field.is_partition_key), None)
        if partition_key_field not in (None, key):
            has = f"the partition key {key!r}" if key else "no partition key"
            raise ValueError(f"partition_key_field={partition_key_field!r}, but schema= has {has}")


def check_made(found: Schema, collection: str, wanted: Wanted) -> None:
    """Refuse a collection, by its name, that is not as it was asked for.

    Raises:
        ValueError: It has another partition key, or other fields.
    """
    key, schema = wanted.partition_key_field, wanted.schema
    if key is not None and not isinstance(key, Known) and found.partition_key != key:
        has = f"the partition key {found.partition_key!r}" if found.partition_key else "no partition key"
        raise ValueError(
            f"collection {collection!r} has {has}, but partition_key_field={key!r} is asked for; a collection keeps "
            "what it was made with: leave it out, or choose another collection_name"
        )
    if schema is None or not wanted.is_compared:
        return
    there = {field["name"]: field["type"] for field in found.described["fields"]}
    for field in schema.fields:
        if there.get(field.name) != field.dtype:
            has = f"of type {DataType(there[field.name]).name}" if field.name in there else "not there"
            raise ValueError(
                f"collection {collection!r} exists, and its field {field.name!r} is {has}, where schema= has "
                f"{field.dtype.name}; leave schema= out, or choose another collection_name"
            )
        has_dim, wants_dim = found.params(field.name).get("dim"), field.params.get("dim")
        if wants_dim is not None and has_dim is not None and int(has_dim) != int(wants_dim):
            raise ValueError(
                f"collection {collection!r} exists, and its field {field.name!r} has {has_dim} dimensions, where "
                f"schema= has {wants_dim}; leave schema= out, or choose another collection_name"
            )
        if field.is_partition_key and found.partition_key != field.name:
            raise ValueError(
                f"collection {collection!r} exists, and its partition key is {found.partition_key!r}, where schema= "
                f"has {field.name!r}; leave schema= out, or choose another collection_name"
            )


def make_from(schema: CollectionSchema, client: MilvusClient, arguments: dict[str, Any], timeout: float) -> None:
    """Make a collection from a user's own schema, with the indexes that upstream would make; blocks.

    Args:
        schema: The schema, which has been checked.
        client: The way to Milvus.
        arguments: The constructor's that are upstream's.
        timeout: Of each question, in seconds.
    """
    name = arguments["collection_name"]

    def make() -> None:
        if not client.has_collection(name, timeout=timeout):
            client.create_collection(
                name,
                schema=schema,
                index_params=_indexes(schema, client, arguments),
                consistency_level=arguments["consistency_level"],
            )

    if arguments["overwrite"] and client.has_collection(name, timeout=timeout):
        client.drop_collection(name, timeout=timeout)
    make_beside_others(make, lambda: None)


def _check_schema(schema: CollectionSchema, arguments: dict[str, Any]) -> None:
    """Refuse a schema by which this store could not store nodes."""
    fields = {field.name: field for field in schema.fields}
    texts = {
        ID_FIELD: "the node's id, as the primary key",
        arguments["doc_id_field"]: "the id of the node's document",
        arguments["text_key"]: "the node's text",
    }
    vectors = {}
    if arguments["enable_dense"]:
        vectors[arguments["embedding_field"]] = ("embedding_field", DataType.FLOAT_VECTOR)
    if arguments["enable_sparse"]:
        vectors[arguments["sparse_embedding_field"]] = ("sparse_embedding_field", DataType.SPARSE_FLOAT_VECTOR)
    for name, what in texts.items():
        if name not in fields or fields[name].dtype != DataType.VARCHAR:
            key = "is_primary=True, " if name == ID_FIELD else ""
            raise ValueError(
                f"schema= has no field {name!r} of type VARCHAR, for {what}: "
                f"add_field({name!r}, DataType.VARCHAR, {key}max_length=...)"
            )
    if not fields[ID_FIELD].is_primary or schema.auto_id or fields[ID_FIELD].auto_id:
        raise ValueError(f"schema= must have {ID_FIELD!r} as its primary key, with auto_id=False: it is the node's id")
    for name, (argument, kind) in vectors.items():
        if name not in fields or fields[name].dtype != kind:
            dim = ", dim=..." if kind == DataType.FLOAT_VECTOR else ""
            raise ValueError(
                f"schema= has no field {name!r} of type {kind.name}, which {argument} names: "
                f"add_field({name!r}, DataType.{kind.name}{dim}), or name yours by {argument}="
            )
        has, wanted = fields[name].params.get("dim"), arguments["dim"]
        if kind == DataType.FLOAT_VECTOR and not has:
            raise ValueError(f"schema= gives the vector field {name!r} no dimension: add_field(..., dim=...)")
        if kind == DataType.FLOAT_VECTOR and wanted not in (None, int(has)):
            raise ValueError(f"schema= gives {name!r} dimension {has}, but dim={wanted} is asked for")
    others = [name for name, field in fields.items() if "VECTOR" in field.dtype.name and name not in vectors]
    if others:
        raise ValueError(
            f"schema= has the vector field {others[0]!r}, which this store would not fill; leave it out, or name it "
            "by embedding_field= or sparse_embedding_field= (with enable_sparse=True)"
        )
    if not schema.enable_dynamic_field:
        raise ValueError("schema= must have enable_dynamic_field=True: the node itself is stored in a dynamic field")


def _indexes(schema: CollectionSchema, client: MilvusClient, arguments: dict[str, Any]) -> Any:
    """The indexes as upstream makes them, of its arguments."""
    indexes = client.prepare_index_params()
    management = getattr(arguments["index_management"], "value", arguments["index_management"])
    if management == "no_validation":
        return indexes
    if arguments["enable_dense"]:
        metric = metric_for_new(arguments["similarity_metric"], arguments["index_config"]) or _DEFAULT_METRIC
        _add_index(indexes, arguments["embedding_field"], "FLAT", metric, arguments["index_config"])
    if arguments["enable_sparse"]:
        name = arguments["sparse_embedding_field"]
        is_bm25 = any(name in _names(function.output_field_names) for function in schema.functions)
        metric = "BM25" if is_bm25 else "IP"
        _add_index(indexes, name, "SPARSE_INVERTED_INDEX", metric, arguments["sparse_index_config"])
    return indexes


def _add_index(indexes: Any, field: str, kind: str, metric: str, config: dict[str, Any] | None) -> None:
    known = {"field_name": field, "index_name": field, "index_type": kind, "metric_type": metric}
    given = dict(config or {})
    named = known | {name: given.pop(name) for name in known if name in given}
    indexes.add_index(**named, **({"params": given} if given else {}))


def _names(names: str | Sequence[str]) -> Sequence[str]:
    return [names] if isinstance(names, str) else names

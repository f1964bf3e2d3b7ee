"""Filters by metadata that a store does not store as fields: refused, as they would find nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llama_index.core.vector_stores.types import MetadataFilters
from llama_index.vector_stores.milvus import MilvusVectorStore
from llama_index.vector_stores.milvus.utils import ScalarMetadataFilter

from llama_index_milvus_async_ext._milvus.errors import QueryError
from llama_index_milvus_async_ext._milvus.literals import shown
from llama_index_milvus_async_ext._milvus.schema import DYNAMIC_FIELD, Schema
from llama_index_milvus_async_ext._nodes.rows import FIELDS_OF_NODES, RECORD_FIELD
from llama_index_milvus_async_ext._queries.filters import path_of


def check_filterable(
    store: MilvusVectorStore, schema: Schema, filters: MetadataFilters | None, scalar_filters: Any = None
) -> None:
    """Refuse a filter on metadata that is stored in the node's JSON only.

    Args:
        store: The store that is asked; one without `filterable_metadata` stores all metadata as fields.
        schema: Its collection, whose columns can always be filtered by.
        filters: The filters.
        scalar_filters: Further ones, in upstream's form.

    Raises:
        QueryError: A filter's key is not among the filterable ones.
    """
    filterable = getattr(store, "filterable_metadata", None)
    if filterable is None:
        return
    known = {*filterable, *schema.names, *FIELDS_OF_NODES, RECORD_FIELD}
    for key in (*_keys(filters), *(ScalarMetadataFilter.model_validate(each).key for each in scalar_filters or ())):
        if _name(key) not in known:
            raise QueryError(
                f"filter on {shown(key)}: this store has filterable_metadata={list(filterable)!r}, so that its nodes "
                f"keep {shown(_name(key))} where Milvus can't filter by it; name it in filterable_metadata= and write "
                "the nodes again"
            )


def _keys(filters: MetadataFilters | None) -> Iterator[str]:
    for each in filters.filters or [] if filters is not None else []:
        if isinstance(each, MetadataFilters):
            yield from _keys(each)
        else:
            yield each.key


def _name(key: str) -> str:
    """The metadata key, or column, that a filter's key begins with."""
    path = path_of(key)
    if path is None:
        return key
    return path[1] if path[0] == DYNAMIC_FIELD and len(path) > 1 else path[0]

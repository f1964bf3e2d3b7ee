"""Opening a store: whether the collection that is there, and the class that asks, fit what is asked for."""

from __future__ import annotations

import inspect
from typing import Any

from llama_index.vector_stores.milvus import MilvusVectorStore
from llama_index.vector_stores.milvus.base import similarity_metrics_map

from llama_index_milvus_async_ext._store.existing import Existing

# Upstream's own methods between its public ones and Milvus, which this package goes another way round: it never calls
# them, so that to override one would change nothing. And what to override instead.
_QUERIES = "override query_many and aquery_many, and change the queries that they are given"
_RESULTS = "override query_many and aquery_many, and change the results that they return"
BYPASSED_HOOKS = {
    "_prepare_before_search": _QUERIES,
    "_default_search": _QUERIES,
    "_async_default_search": _QUERIES,
    "_mmr_search": _QUERIES,
    "_async_mmr_search": _QUERIES,
    "_sparse_search": _QUERIES,
    "_async_sparse_search": _QUERIES,
    "_hybrid_search": _QUERIES,
    "_async_hybrid_search": _QUERIES,
    "_parse_from_milvus_results": _RESULTS,
    "_get_id_from_hit": _RESULTS,
}


_VECTORS = {"": "dense", "sparse_": "sparse"}  # of the arguments: how embedding fields are called, and enabled
_DEFAULT_METRIC = "IP"  # upstream's


def check_hooks(cls: type) -> None:
    """Refuse a class that overrides a method of upstream's that nothing here calls.

    Were it a tenant's filter, it would be left out without a word.

    Raises:
        TypeError: The class overrides one; the message names it, and what to override instead.
    """
    for name, instead in BYPASSED_HOOKS.items():
        # A version of upstream's that does not have the method does not call it either.
        theirs = getattr(MilvusVectorStore, name, None)
        if theirs is not None and getattr(cls, name, theirs) is not theirs:
            raise TypeError(
                f"{cls.__name__} overrides {name}, which MilvusVectorStore calls and AsyncMilvusVectorStore does not: "
                f"{instead}"
            )


class Known(str):
    """The metric, or the partition key, of a store that is opened again, as its copy or by another class.

    It was not asked for: where the collection has another, that one is taken. The same holds for the dimension and the
    schema beside it. Only a collection that has to be made anew is made with them.
    """

    __slots__ = ()


def arguments_of(store: MilvusVectorStore) -> dict[str, Any]:
    """The constructor's arguments that a store has now, but for its connection, `overwrite` and `batch_size`.

    With these, `fitted` opens the store's collection again, whatever it is like.
    """
    names = inspect.signature(MilvusVectorStore.__init__).parameters
    left_out = {"self", "kwargs", "uri", "token", "overwrite", "batch_size"}
    arguments = {name: getattr(store, name) for name in names if name not in left_out}
    return arguments | {"similarity_metric": Known(store.similarity_metric)}


def metric_for_new(metric: str | None, index_config: dict[str, Any] | None) -> str | None:
    """The metric of a collection that is made with these arguments; None if they name none."""
    configured = (index_config or {}).get("metric_type")
    if configured:
        return str(configured).upper()
    return similarity_metrics_map.get(metric.lower(), "L2") if metric is not None else None  # as upstream reads it


def fitted(found: Existing | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """The constructor's `dim` and `similarity_metric` that fit a collection, which are checked against those asked for.

    Milvus searches with the metric of the index. What a store calls its metric decides two things only: what an index
    is made with, unless `index_config` names another; and what a hybrid search asks for, which Milvus refuses if it is
    not the index's. So the index's metric is what is returned, where it is known.

    Args:
        found: The collection as it is; None if it is made anew.
        arguments: The constructor's. `dim` and `similarity_metric` are None where the collection's are to be taken; a
            `Known` is compared with nothing, nor is the dimension beside it.

    Raises:
        ValueError: The collection has another dimension or metric than those asked for, or lacks a field.
    """
    collection, dim, metric = (arguments[name] for name in ("collection_name", "dim", "similarity_metric"))
    index_config = arguments["index_config"]
    asked = metric_for_new(metric, index_config)
    if found is None:
        return {"similarity_metric": asked or _DEFAULT_METRIC}
    elsewhere = "or choose another collection_name"
    wanted = [arguments[f"{prefix}embedding_field"] for prefix, kind in _VECTORS.items() if arguments[f"enable_{kind}"]]
    missing = [name for name in wanted if name not in found.schema.names]
    if missing:
        raise ValueError(
            f"collection {collection!r} exists, but has no field {missing[0]!r}; name its vector field by "
            f"embedding_field or sparse_embedding_field, {elsewhere}"
        )
    embedding_field = arguments["embedding_field"]
    is_known = isinstance(metric, Known)
    stored_dim = found.schema.params(embedding_field).get("dim")
    if dim is not None and stored_dim is not None and dim != int(stored_dim) and not is_known:
        raise ValueError(
            f"collection {collection!r} has dimension {stored_dim}, but dim={dim} is asked for; "
            f"use the embedding model that it was made for, {elsewhere}"
        )
    stored = found.metrics.get(embedding_field) or None
    if asked is not None and stored is not None and asked != stored and not is_known:
        configured = (index_config or {}).get("metric_type")
        source = f"index_config's metric_type {configured!r}" if configured else f"similarity_metric={metric!r}"
        raise ValueError(
            f"collection {collection!r} is indexed with metric {stored}, but {source} is asked for; "
            f"leave it out, to search by {stored}, {elsewhere}"
        )
    return {
        "dim": int(stored_dim) if stored_dim is not None else dim,
        "similarity_metric": stored or asked or _DEFAULT_METRIC,
    }

"""Which version of a document is wanted: a digest of the document, and of what is to be made of it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from llama_index.core.schema import BaseNode, TransformComponent

from llama_index_milvus_async_ext._ingest.standing import digest

# What a description holds that does not change what is made of a document: how quickly, by whose leave, on what.
_IRRELEVANT = frozenset(
    {
        *("callback_manager", "embed_batch_size", "num_workers", "rate_limiter", "embeddings_cache", "show_progress"),
        *("show_progress_bar", "parallel_process", "target_devices", "device", "cache_folder", "in_place"),
        *("api_key", "api_base", "api_version", "default_headers", "max_retries", "timeout", "retries"),
        *("reuse_client", "base_url", "organization", "http_client", "async_http_client"),
    }
)
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def hash_of(document: BaseNode) -> str:
    """LlamaIndex's hash of a document; where sets are in its metadata, that of another which has them in an order.

    LlamaIndex reads them as they come, which is in another order in each process.
    """
    metadata = _in_order(document.metadata)
    if metadata is not document.metadata:
        document = document.model_copy(update={"metadata": metadata})
    return str(document.hash)


def _in_order(value: Any) -> Any:
    """The value itself, or another in which a text stands for each set."""
    if isinstance(value, (set, frozenset)) and len(value) > 1:
        return f"{type(value).__name__} of {sorted(repr(_in_order(each)) for each in value)}"
    if isinstance(value, dict):
        made: Any = {key: _in_order(each) for key, each in value.items()}
        return made if any(made[key] is not value[key] for key in value) else value
    if isinstance(value, (list, tuple)):
        made = [_in_order(each) for each in value]
        return made if any(one is not other for one, other in zip(made, value, strict=True)) else value
    return value


def _as_text(value: Any) -> str:
    """What stands for a value that JSON does not know."""
    found = _in_order(value)
    return found if isinstance(found, str) else repr(found)


def version_of(document: BaseNode, pipeline_version: str, source: str, hash_: str | None = None) -> str:
    """The version of a document: it changes with the text, the metadata and how they are shown to the model.

    Args:
        document: The document.
        pipeline_version: What stands for the transformations.
        source: The name of its source.
        hash_: Its hash, if it is known: it is computed anew each time that it is asked for.
    """
    excluded = (document.excluded_embed_metadata_keys, document.excluded_llm_metadata_keys)
    templates = [
        str(getattr(document, name, "")) for name in ("metadata_template", "metadata_separator", "text_template")
    ]
    # LlamaIndex's hash reads the metadata as text, in which 1 and "1" are the same: a filter tells them apart.
    shown = json.dumps([*map(list, excluded), *templates, document.metadata], sort_keys=True, default=_as_text)
    return digest([pipeline_version, source, document.class_name(), hash_ or hash_of(document), shown])


def described(transformations: Sequence[TransformComponent]) -> str:
    """What stands for these transformations: a digest of their settings, as far as they decide what is made."""
    return digest(_description(each) for each in transformations)


def named_version(named: Any, document: BaseNode, source: str) -> str:
    """The version of a document that the user has named."""
    if not isinstance(named, str):
        raise TypeError(f"version= gave {named!r} for document {document.node_id!r}; it must give a text")
    return digest([named, source])


def _description(transformation: TransformComponent) -> str:
    name = f"{type(transformation).__module__}.{type(transformation).__qualname__}"
    try:
        settings = _relevant(transformation.to_dict())
    except Exception as error:
        raise ValueError(
            f"{type(transformation).__name__} can't be described by its to_dict() ({error}), so nobody would know when "
            "its settings change; give version="
        ) from error
    return name + _ADDRESS.sub("", json.dumps(settings, sort_keys=True, default=str))


def _relevant(value: Any) -> Any:
    if isinstance(value, dict):
        # Of a component of LlamaIndex's; in a dict of the user's own the same names may mean something else.
        left_out = _IRRELEVANT if "class_name" in value else frozenset()
        return {str(key): _relevant(each) for key, each in value.items() if key not in left_out}
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))  # whose order is another in each process
    if isinstance(value, (list, tuple)):
        return [_relevant(each) for each in value]
    return value

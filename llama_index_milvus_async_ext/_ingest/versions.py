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


def version_of(document: BaseNode, pipeline_version: str, source: str, hash_: str | None = None) -> str:
    """The version of a document: it changes with the text, the metadata and how they are shown to the model.

    Args:
        document: The document.
        pipeline_version: What stands for the transformations.
        source: The name of its source.
        hash_: LlamaIndex's hash of it, if it is known: it is computed anew each time that it is asked for.
    """
    excluded = (document.excluded_embed_metadata_keys, document.excluded_llm_metadata_keys)
    templates = [
        str(getattr(document, name, "")) for name in ("metadata_template", "metadata_separator", "text_template")
    ]
    shown = json.dumps([*map(list, excluded), *templates])
    return digest([pipeline_version, source, document.class_name(), hash_ or document.hash, shown])


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
        return {str(key): _relevant(each) for key, each in value.items() if key not in _IRRELEVANT}
    if isinstance(value, (list, tuple)):
        return [_relevant(each) for each in value]
    return value

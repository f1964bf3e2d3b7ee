"""The constructor's arguments, as they are given: from a program, from its environment, or from a store's `to_dict`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, get_args

from llama_index.core.bridge.pydantic import BaseModel, TypeAdapter, ValidationError

from llama_index_milvus_async_ext._milvus.limits import Limits
from llama_index_milvus_async_ext._milvus.literals import shown
from llama_index_milvus_async_ext.retry import RetryPolicy

_KINDS: dict[type, tuple[str, TypeAdapter[Any]]] = {
    kind: (words, TypeAdapter(kind))
    for kind, words in ((bool, "True or False"), (int, "a whole number"), (float, "a number"))
}
_POLICY = TypeAdapter(RetryPolicy)
_SETTINGS_OF_A_POLICY = {field.name for field in dataclasses.fields(RetryPolicy)}


def as_fields(model: type[BaseModel], given: dict[str, Any]) -> dict[str, Any]:
    """Arguments, of which numbers and flags are what the fields of their names will make of them.

        as_fields(AsyncMilvusVectorStore, {"dim": "4", "overwrite": "false"})  # {"dim": 4, "overwrite": False}

    What is compared, or decides something, before there are fields must not differ from what they will hold.

    Raises:
        ValueError: One is no such thing; the message names it.
    """
    return {name: _as_field(name, model.model_fields[name].annotation, value) for name, value in given.items()}


def _as_field(name: str, annotation: Any, value: Any) -> Any:
    options = get_args(annotation) or (annotation,)
    kind = next((kind for kind in _KINDS if kind in options), None)
    if kind is None or (value is None and type(None) in options):
        return value
    words, adapter = _KINDS[kind]
    try:
        return adapter.validate_python(value)
    except ValidationError:
        raise ValueError(f"{name} must be {words}, got {shown(value)}") from None


def without_fields(model: type[BaseModel], options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a connection, without what stands in a store's `to_dict` and is no argument of its constructor."""
    return {name: value for name, value in options.items() if name not in {*model.model_fields, "class_name"}}


def limits_of(model: type[BaseModel], retry: Any, **given: Any) -> Limits:
    """The bounds of a store's requests.

    Raises:
        ValueError: One is no number, or not positive.
        TypeError: `retry` is no retry policy, nor the dict that a policy is in a store's `to_dict`.
    """
    numbers = as_fields(model, given)
    for name, value in numbers.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    return Limits(**numbers, retry=_policy(retry))


def _policy(given: Any) -> RetryPolicy:
    if given is None:
        return RetryPolicy()
    if isinstance(given, RetryPolicy):
        return given
    if not isinstance(given, Mapping):
        raise TypeError(f"retry must be a RetryPolicy, got {type(given).__name__}")
    unknown = [*given.keys() - _SETTINGS_OF_A_POLICY]
    if unknown:
        raise TypeError(f"retry is a dict with {unknown[0]!r}, which is no setting of a RetryPolicy")
    try:
        return _POLICY.validate_python(dict(given))
    except ValidationError as error:
        wrong = error.errors()[0]
        where = f" of {wrong['loc'][0]!r}" if wrong["loc"] else ""
        raise ValueError(f"retry is no RetryPolicy's dict{where}: {wrong['msg']}") from None

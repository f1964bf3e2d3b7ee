"""Copies of a store: opened again, and given what its own class adds to a store of this package.

pydantic's way would share the connection, or drop it as what does not pickle, connect elsewhere and apply `overwrite`
again. To call the class's own constructor would need arguments that only it knows, and lose what was set since.
"""

from __future__ import annotations

import copy
import inspect
import logging
import pickle
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    from llama_index_milvus_async_ext._store.open_store import OpenStore

S = TypeVar("S", bound="OpenStore")

logger = logging.getLogger(__name__)

_is_trial: ContextVar[bool] = ContextVar("is_trial", default=False)


class _Added(NamedTuple):
    """What a store has beside what its opening gives it: of a subclass's fields, or set by the user.

    Attributes:
        fields: Its fields, and what else stands beside these.
        private: Its private attributes.
        extra: What pydantic keeps of a class that allows other fields.
        fields_set: The names of the fields that pydantic takes for set.
    """

    fields: dict[str, Any]
    private: dict[str, Any]
    extra: dict[str, Any]
    fields_set: set[str]

    @classmethod
    def of(cls, store: OpenStore, base: type[OpenStore]) -> _Added:
        opened_with = base.model_fields.keys() & inspect.signature(base.__init__).parameters
        private = store.__pydantic_private__ or {}
        return cls(
            fields={name: value for name, value in vars(store).items() if name not in opened_with},
            private={name: value for name, value in private.items() if name not in base.__private_attributes__},
            extra=dict(store.__pydantic_extra__ or {}),
            fields_set=set(store.__pydantic_fields_set__),
        )

    def each(self, kind: type, carried: Callable[[Any], Any]) -> _Added:
        """Each value as it is carried over; what can't be is left as the class's defaults have it, and told of."""

        def of(values: dict[str, Any]) -> dict[str, Any]:
            kept = {}
            for name, value in values.items():
                try:
                    kept[name] = carried(value)
                except Exception as error:  # whatever a value's own methods raise
                    logger.warning(
                        "a copy of %s starts with the default of %r, if there is one: the value can't be copied (%s)",
                        *(kind.__name__, name, type(error).__name__),
                    )
            return kept

        return _Added(of(self.fields), of(self.private), of(self.extra), self.fields_set)

    def give(self, store: OpenStore) -> None:
        """Give a store that was opened again what it does not have by that."""
        vars(store).update(self.fields)
        (store.__pydantic_private__ or {}).update(self.private)
        if self.extra:
            object.__setattr__(store, "__pydantic_extra__", self.extra)
        store.__pydantic_fields_set__.update(self.fields_set)


def copied(store: S, base: type[OpenStore], memo: dict[int, Any] | None = None) -> S:
    """A copy, with a connection of its own; of what its class adds the values themselves, or copies of these.

    Args:
        store: The store.
        base: The class of this package, whose constructor opens it.
        memo: Of a deep copy, as `copy.deepcopy` has it; None of a shallow one.
    """
    again = opened_again(type(store), base, store.arguments_again())
    added = _Added.of(store, base)
    if memo is not None:
        memo[id(store)] = again
        added = added.each(type(store), lambda value: copy.deepcopy(value, memo))
    added.give(again)
    return again


def reduced(store: OpenStore, base: type[OpenStore]) -> tuple[Any, ...]:
    """A store as `pickle` takes it."""
    # What it consists of is pickled for trial, and may hold the store itself: of that, once is enough.
    added = _Added({}, {}, {}, set()) if _is_trial.get() else _Added.of(store, base).each(type(store), _tried)
    return opened_again, (type(store), base, store.arguments_again()), added, None, None, _give


def opened_again(kind: type[S], base: type[OpenStore], arguments: dict[str, Any]) -> S:
    """Open a store, whatever arguments the constructor of its own class takes.

    Args:
        kind: The class.
        base: That whose constructor is called.
        arguments: Its arguments.
    """
    store = kind.__new__(kind)
    base.__init__(store, **arguments)
    return store


def _give(store: OpenStore, added: _Added) -> None:
    added.give(store)


def _tried(value: Any) -> Any:
    token = _is_trial.set(True)
    try:
        pickle.dumps(value)
    finally:
        _is_trial.reset(token)
    return value

"""Milvus boolean expressions in which ids, keys and values can only ever be data.

A filter expression is source code, parsed by Milvus (a Go grammar) and by Milvus Lite (a Python parser of its own).
What is written here reads the same in both; what only one of them could read is refused, or fails there with a parse
error. It never quietly means something else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from operator import index
from typing import Any

from llama_index.core.vector_stores.types import FilterCondition, FilterOperator, MetadataFilters, VectorStoreQuery
from llama_index.vector_stores.milvus.utils import FilterOperatorFunction, ScalarMetadataFilter
from pymilvus import DataType

from llama_index_milvus_async_ext._milvus.errors import QueryError, QueryMismatchError
from llama_index_milvus_async_ext._milvus.literals import shown, string_literal
from llama_index_milvus_async_ext._milvus.schema import DEFAULT_KEY, PrimaryKey

# What one of the parsers takes for its own, in any case: keywords, functions, Lite's hidden columns.
_RESERVED = (
    "and|or|not|in|like|is|null|exists|true|false|iso|interval|_seq|_partition|"
    "(?:json|array)_contains(?:_any|_all)?|array_length|text_match|phrase_match|random_sample"
)
_NAME = rf"(?!(?i:{_RESERVED})(?!\w))[A-Za-z_]\w*"
_STEP = r"""\[(?:"[^"'\\\[\]\x00-\x1f\ud800-\udfff]+"|'[^"'\\\[\]\x00-\x1f\ud800-\udfff]+'|0|[1-9][0-9]*)\]"""
_NAME_OR_PATH = re.compile(rf"(?:{_NAME}|\$meta(?=\[))(?:{_STEP})*", re.ASCII)

# Milvus matches keys against the stored JSON text, where these are \u00xx: an escape that Lite does not know.
_UNREACHABLE_IN_KEY = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")

# Lite reads % and _ as wildcards wherever they stand, Milvus 2.3 only some % at the end; neither lets them be escaped.
# Backslashes are escapes in the patterns of some versions, and Milvus cuts a pattern off at a NUL.
_SPECIAL_IN_PATTERN = re.compile(r"[%_\\\x00]")

_WHOLE_NUMBER = re.compile(r"0|-?[1-9][0-9]{0,18}")
_MAX_INT = 2**63 - 1  # and not one more below zero: the grammar reads the digits before it reads the minus
_LEAST = str(-_MAX_INT - 1)  # of the whole numbers of 64 bits: a key may be this one, which no expression can name
_FAN_OUT = 16

_COMPARISONS = frozenset({"==", "!=", "<", "<=", ">", ">="})
_ORDERED = frozenset({FilterOperator.LT, FilterOperator.LTE, FilterOperator.GT, FilterOperator.GTE})
_ARRAY_FUNCTIONS = {
    FilterOperator.CONTAINS: FilterOperatorFunction.ARRAY_CONTAINS,
    FilterOperator.ANY: FilterOperatorFunction.ARRAY_CONTAINS_ANY,
    FilterOperator.ALL: FilterOperatorFunction.ARRAY_CONTAINS_ALL,
}


def ids_expression(field: str, ids: Sequence[str]) -> str:
    """Match the rows whose `field`, a text, is one of `ids`.

        ids_expression("doc_id", ["a", "b"])  # doc_id in ["a", "b"]

    Raises:
        QueryError: There are no ids (the caller knows the answer without asking Milvus, and an expression for nothing
            is one slip away from an expression for everything), or one of them cannot be sent.
        TypeError: `ids` is a single string, which would be taken for its letters.
    """
    return keys_expression(PrimaryKey(field), ids)


def keys_expression(key: PrimaryKey, ids: Sequence[Any]) -> str:
    """Match the rows of these node ids, by the collection's own primary key.

        keys_expression(PrimaryKey("pk", DataType.INT64), ["17", 4])  # pk in [17, 4]

    Where the key is a whole number, a node's id is its text.

    Raises:
        QueryMismatchError: An id can't be one of this key.
        QueryError: As `ids_expression`.
        TypeError: `ids` is a single string, which would be taken for its letters, or an iterator, which would be empty
            when it is asked again: and no ids, at the end of this, would be all rows.
    """
    if isinstance(ids, (str, Iterator)):
        what = "string" if isinstance(ids, str) else "iterator"
        raise TypeError(f"ids must be a list of strings, not the {what} {shown(ids)}")
    if not ids:
        raise QueryError("no ids to match")
    name, literals = _key_expression(key.name), [_key_literal(key, each) for each in ids]
    listed = [each for each in literals if each != _LEAST]
    parts = [f"{name} in [{', '.join(listed)}]"] if listed else []
    return _joined("or", parts if len(listed) == len(literals) else [*parts, f"{name} < -{_MAX_INT}"])


def after_expression(matching: str, key: PrimaryKey, last: Any) -> str:
    """Match the rows that match something, or any, and come after another one in the order of the primary key.

        after_expression('colour == "red"', PrimaryKey(), "a")  # (colour == "red" and id > "a")

    What they match can be joined by `and` as it stands, as all expressions that are made here.
    Milvus and Milvus Lite order texts by code point, as Python does.

    Raises:
        QueryMismatchError: `last` can't be one of this key.
    """
    literal = _key_literal(key, last)
    after = f">= -{_MAX_INT}" if literal == _LEAST else f"> {literal}"
    return _joined("and", [matching, f"{_key_expression(key.name)} {after}"])


def filter_expression(filters: MetadataFilters | None, scalar_filters: Any = None, *, is_lite: bool = False) -> str:
    """Translate metadata filters; "" where they restrict nothing.

        filter_expression(MetadataFilters(filters=[MetadataFilter(key="colour", value="red")]))  # colour == "red"

    The rows are those of upstream's translation, with `scalar_filters` in upstream's form (a list of dicts) and filters
    without a value left out, as there. The result can be joined by `and` as it stands.

    `NOT`, which upstream cannot translate, finds the rows that none of its filters matches, as LlamaIndex's own simple
    store does; filters without a condition are joined by `AND`, as there.

    A key that is an identifier names a column or a metadata key, whichever there is; `info["colour"]` and `tags[0]`
    reach into nested metadata; any other key is a metadata key, taken literally. Lite cannot apply `CONTAINS`, `ANY`,
    `ALL` and `IS_EMPTY` to the latter, and says so. `TEXT_MATCH` is a prefix match that takes `%` and `_` literally.

    A row without the key matches `NE`, `NIN` and `IS_EMPTY`, and nothing else. On Lite alone, an `NE` that stands below
    no `NOT` leaves such rows out, as upstream's does; `True` is 1 there, and `False` 0; and a text that would have to
    be put in order with the filter's number is found neither by the filter nor by a `NOT` above it.

    Args:
        filters: The filters.
        scalar_filters: Further ones, in upstream's form.
        is_lite: Whether the expression is for Milvus Lite, which leaves rows without the key out of both a filter and
            its opposite, unless told otherwise in a way that older servers can't read.

    Raises:
        QueryError: A filter that Milvus cannot express: the message names its key and the reason.
    """
    scalars = [ScalarMetadataFilter.model_validate(each) for each in scalar_filters or []]
    parts = [_metadata_expression(filters, is_lite, False)] if filters is not None else []
    parts += [_named(_array_test, each.key, each.operator, each.value) for each in scalars]
    return _joined("and", parts)


def search_expression(
    query: VectorStoreQuery,
    doc_id_field: str,
    scalar_filters: Any = None,
    *,
    primary_key: PrimaryKey = DEFAULT_KEY,
    is_lite: bool = False,
) -> str:
    """Everything that restricts a query's rows: its filters, its `doc_ids` and its `node_ids`; "" where nothing does.

        search_expression(VectorStoreQuery(doc_ids=["a"]), "doc_id")  # doc_id in ["a"]

    Empty lists of ids restrict nothing, as upstream.

    Raises:
        QueryError: As `filter_expression` and `keys_expression`.
    """
    if query.filters is None and not (scalar_filters or query.doc_ids or query.node_ids):
        return ""
    parts = [filter_expression(query.filters, scalar_filters, is_lite=is_lite)]
    parts += [ids_expression(doc_id_field, query.doc_ids)] if query.doc_ids else []
    parts += [keys_expression(primary_key, query.node_ids)] if query.node_ids else []
    return _joined("and", parts)


def _metadata_expression(filters: MetadataFilters, is_lite: bool, is_negated: bool) -> str:
    condition = filters.condition or FilterCondition.AND
    is_negated |= condition == FilterCondition.NOT
    parts = []
    for each in filters.filters or []:
        if isinstance(each, MetadataFilters):
            parts.append(_metadata_expression(each, is_lite, is_negated))
        elif each.value is not None or each.operator == FilterOperator.IS_EMPTY:
            test = _test if not is_lite else _decided_test if is_negated else _lite_test
            parts.append(_named(test, each.key, each.operator, each.value))
    if condition == FilterCondition.NOT:
        matched = _joined("or", parts)
        return f"(not ({matched}))" if matched else ""
    return _joined("or" if condition == FilterCondition.OR else "and", parts)


def _named(test: Callable[[str, Any, Any], str], key: str, operator: Any, value: Any) -> str:
    try:
        return test(_key_expression(key), operator, value)
    except ValueError as error:
        raise QueryError(f"filter on {shown(key)}: {error}") from None


def _decided_test(key: str, operator: FilterOperator, value: Any) -> str:
    """A test that is true or false of each row, for Lite, where one of a missing value is neither."""
    test = _lite_test(key, operator, value)
    if operator == FilterOperator.NE:
        return f"({key} is null or {test})"
    if operator in _ARRAY_FUNCTIONS or operator in (FilterOperator.NIN, FilterOperator.IS_EMPTY):
        return test
    if operator == FilterOperator.TEXT_MATCH or (operator in _ORDERED and isinstance(value, str)):
        # Nor can Lite say of a number whether it comes before a text. It can say that it is no text.
        test = f'{key} like "%" and {test}'
    return f"({key} is not null and {test})"


def _lite_test(key: str, operator: FilterOperator, value: Any) -> str:
    if operator in (FilterOperator.IN, FilterOperator.NIN):
        return _lite_membership(key, operator, value)
    return _test(key, operator, value)


def _test(key: str, operator: FilterOperator, value: Any) -> str:
    if operator == FilterOperator.IS_EMPTY:
        return _array_test(key, FilterOperatorFunction.ARRAY_LENGTH, 0)
    if operator in _ARRAY_FUNCTIONS:
        return _array_test(key, _ARRAY_FUNCTIONS[operator], value)
    if operator == FilterOperator.TEXT_MATCH:
        return _starts_with(key, value)
    if operator in (FilterOperator.IN, FilterOperator.NIN):
        return _membership(key, operator, value)
    if operator.value not in _COMPARISONS:
        raise QueryError(f"Milvus has no operator {operator.name}")
    if isinstance(value, list) and operator not in (FilterOperator.EQ, FilterOperator.NE):
        raise QueryError(f"{operator.name} needs one value, not {shown(value)}")
    return f"{key} {operator.value} {_literal(value)}"


def _array_test(key: str, function: FilterOperatorFunction, value: Any) -> str:
    # Empty: Milvus does not parse `[]` here, Lite does.
    if function.name.endswith(("_ANY", "_ALL")) and not (isinstance(value, list) and value):
        raise QueryError(f"{function.name} needs a list of at least one value, not {shown(value)}")
    if function.name.endswith("_LENGTH") and not isinstance(value, int):
        raise QueryError(f"{function.name} needs a whole number, not {shown(value)}")
    literal = _literal(value)
    if function.name.endswith("_CONTAINS") and literal.startswith("-"):  # Lite parses a minus in a list only
        function, literal = FilterOperatorFunction[f"{function.name}_ANY"], f"[{literal}]"
    return function.value.format(key=key, value=literal)


def _membership(key: str, operator: FilterOperator, values: Any) -> str:
    _check_list(operator, values)
    negated = operator == FilterOperator.NIN
    if "[" not in key:
        return f"{key} {'not in' if negated else 'in'} {_literal(values)}"
    # Lite has `in` for bare names only. Without values, the pair is true of no row, or of every row that the back end
    # takes to have the key, as `in []` and `not in []` are.
    sign, joint, pair = ("!=", "and", "or") if negated else ("==", "or", "and")
    tests = [f"{key} {sign} {_literal(value)}" for value in values]
    return _joined(joint, tests or [f"({key} == 0 {pair} {key} != 0)"])


def _lite_membership(key: str, operator: FilterOperator, values: Any) -> str:
    """A membership that is decided of each row, whatever it has under the key."""
    _check_list(operator, values)
    if "[" in key:
        found = _membership(key, FilterOperator.IN, values)
    else:
        # Where rows differ in type, Lite's `in` fails at the first one with a list or an object, for everybody: so it
        # is asked of texts alone. A chain for them as well takes minutes there, for a thousand texts.
        texts = [value for value in values if isinstance(value, str)]
        tests = [f'({key} like "%" and {key} in {_literal(texts)})'] if texts else []
        tests += [f"{key} == {_literal(value)}" for value in values if not isinstance(value, str)]
        found = _joined("or", tests) or f"({key} is null and {key} is not null)"
    return f"({key} is null or (not ({found})))" if operator == FilterOperator.NIN else found


def _check_list(operator: FilterOperator, values: Any) -> None:
    if not isinstance(values, list):
        raise QueryError(f"{operator.name} needs a list, not {shown(values)}")


def _starts_with(key: str, value: Any) -> str:
    if isinstance(value, list):
        raise QueryError(f"TEXT_MATCH needs one value, not {shown(value)}")
    prefix = value if isinstance(value, str) else _literal(value)
    if not _SPECIAL_IN_PATTERN.search(prefix):
        return f"{key} like {string_literal(prefix + '%')}"
    # The texts with this prefix are an interval, as both back ends order text by code point. It ends where the last
    # character that can be is counted up; there is one, as there is a special one.
    rest = prefix.rstrip("\U0010ffff")
    following = chr(ord(rest[-1]) + 1) if rest[-1] != "\ud7ff" else "\ue000"  # over the surrogates
    return f"({key} >= {string_literal(prefix)} and {key} < {string_literal(rest[:-1] + following)})"


def _key_expression(key: str) -> str:
    if _NAME_OR_PATH.fullmatch(key):
        return key
    # Milvus 2.3 splits paths at "][" without regard to quotes; some such keys make the whole server crash.
    if not key or "][" in key or _UNREACHABLE_IN_KEY.search(key):
        raise QueryError('Milvus cannot look up a metadata key that is empty or contains "][" or control characters')
    return f"$meta[{string_literal(key)}]"


def path_of(key: str) -> list[str] | None:
    """The names and places that a filter's key is a path of; None if it is a metadata key, taken literally.

    path_of('info["colour"][0]')  # ["info", "colour", "0"]
    """
    if not _NAME_OR_PATH.fullmatch(key):
        return None
    name, *steps = key.replace("]", "").split("[")
    return [name, *(step.strip("\"'") for step in steps)]


def _key_literal(key: PrimaryKey, id_: Any) -> str:
    if key.type == DataType.VARCHAR:
        if not isinstance(id_, str):
            raise QueryMismatchError(f"{shown(id_)} is no id: {key.name!r} of this collection is a text")
        return string_literal(id_)
    number: int | None = None
    if isinstance(id_, str):
        number = int(id_) if _WHOLE_NUMBER.fullmatch(id_) else None
    elif hasattr(id_, "__index__") and not isinstance(id_, bool):  # numpy's integers as well
        number = index(id_)
    if number is None or not -_MAX_INT - 1 <= number <= _MAX_INT:
        raise QueryMismatchError(f"{shown(id_)} is no id: {key.name!r} of this collection is a whole number of 64 bits")
    return str(number)


def _literal(value: Any) -> str:
    if isinstance(value, str):
        return string_literal(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and abs(value) <= _MAX_INT:
        return str(int(value))
    if isinstance(value, float) and math.isfinite(value):
        return repr(float(value))
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, (int, float)):
        raise QueryError(f"{shown(value)} is no number that Milvus can read: finite, whole ones within ±(2**63 - 1)")
    raise QueryError(f"{shown(value)} is a {type(value).__name__}; Milvus compares text, numbers, booleans and lists")


def _joined(operator: str, parts: list[str]) -> str:
    # Milvus parses a flat chain in quadratic time: 3000 alternatives take 24 s, as a tree 0.3 s.
    parts = [part for part in parts if part]
    separator = f" {operator} "
    while len(parts) > 1:
        groups = (parts[start : start + _FAN_OUT] for start in range(0, len(parts), _FAN_OUT))
        parts = [f"({separator.join(group)})" for group in groups]
    return "".join(parts)

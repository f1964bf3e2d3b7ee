"""Filter expressions, asked of real back ends: they select the rows that are named, and no others."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from llama_index.core.vector_stores.types import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
)
from llama_index.vector_stores.milvus.base import _to_milvus_filter
from pymilvus import DataType, MilvusClient
from pymilvus.exceptions import MilvusException

from llama_index_milvus_async_ext._milvus.errors import QueryError
from llama_index_milvus_async_ext._milvus.schema import PrimaryKey
from llama_index_milvus_async_ext._queries.filters import (
    filter_expression,
    ids_expression,
    keys_expression,
    search_expression,
    string_literal,
)
from tests.conftest import Backend, examples

AND, OR, NOT = FilterCondition.AND, FilterCondition.OR, FilterCondition.NOT
Op = FilterOperator

HOSTILE = [
    'x"] or id not in ["zz',
    "x'] or id not in ['zz",
    'x" or id != "',
    "x' or id != '",
    'back\\" or id != "slash',
    "\\",
    "\\\\",
    '\\"',
    "\\n",
    "\\u4e2d",
    "\\中",
    '"',
    "'",
    "line\nbreak",
    "carriage\rreturn",
    "tab\tstop",
    "nul\0a",
    "nul\0b",
    "nul",
    "\x01\x08\x0c\x1b\x7f\x85\u2028\ufeff",
    "😀 é 中 \U00020000",
    "{x}",
    "$meta",
    "100%",
    "%",
    "_",
    "//",
    "-- #",
    " padded ",
    "true",
    "long" * 10_000,
]

# Metadata keys that are no identifiers for one back end or the other.
ODD_KEYS = [
    *("two words", "a-b", "a.b", "a/b", "a~b", "~1", "1st", "0", " padded ", "$x", "%", "{x}", "a==b", "a(b"),
    *("in", "IN", "Like", "not", "is", "null", "true", "tRuE", "exists", "iso", "interval", "array_length", "_seq"),
    *("é", "中", "😀", "\U00020000", "\x7f", "\u2028"),
    *('say "hi"', "it's", "'q'", '"q"', "\\", "\\\\", "\\u4e2d", "\\中", "line\nbreak", "return\r", "tab\t"),
    *("[a]", "]", "[", 'a["b]', 'x"] == 1 or id != "zz', "x'] == 1 or id != 'zz", "x == 1 or id"),
]


class Rows:
    """A collection on a real back end: what does an expression select there?"""

    def __init__(self, backend: Backend) -> None:
        self.client = MilvusClient(backend.uri)
        self.is_lite = backend.name == "lite"
        self.name = f"flt_{uuid.uuid4().hex[:12]}"
        schema = self.client.create_schema(enable_dynamic_field=True)
        schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=65_535)
        schema.add_field("doc_id", DataType.VARCHAR, max_length=65_535)
        schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=2)
        schema.add_field("size", DataType.INT64)
        schema.add_field("tags", DataType.ARRAY, element_type=DataType.VARCHAR, max_capacity=8, max_length=64)
        index = self.client.prepare_index_params()
        index.add_index("embedding", index_type="FLAT", metric_type="IP")
        self.client.create_collection(self.name, schema=schema, index_params=index, consistency_level="Strong")

    def insert(self, *rows: dict[str, Any]) -> None:
        columns = {"doc_id": "", "embedding": [1.0, 0.0], "size": 0, "tags": []}
        self.client.insert(self.name, [columns | row for row in rows])
        self.settle()

    def delete(self, expression: str) -> None:
        self.client.delete(self.name, filter=expression)
        self.settle()

    def settle(self) -> None:
        # One strong read waits for the server's clock (200 ms); after it, the other reads need not.
        self.client.query(self.name, filter="size == -1", consistency_level="Strong")

    def close(self) -> None:
        self.client.drop_collection(self.name)
        self.client.close()

    def ids(self, expression: str) -> set[str]:
        found = self.client.query(
            self.name, filter=expression, output_fields=["id"], limit=16_000, consistency_level="Eventually"
        )
        return {row["id"] for row in found}


BENIGN = [
    {"id": "red", "doc_id": "d1", "color": "red", "year": 2020, "score": 0.5, "labels": ["x", "y"], "size": 5},
    {"id": "redder", "doc_id": "d1", "color": "redder", "year": 2021, "score": -1.5, "labels": ["x"], "tags": ["x"]},
    {"id": "blue", "doc_id": "d2", "color": "blue", "year": -3, "labels": [], "tags": ["x", "y"], "flag": True},
    {"id": "number", "doc_id": "d2", "color": 7, "year": "2020", "labels": [1, 2], "score": 1e300, "flag": False},
    {"id": "quoted", "doc_id": "d3", "color": 'it\'s "red"', "labels": ["it's"], "info": {"a": {"b": "deep"}}},
    {"id": "bare", "doc_id": "d3"},
]
PATTERNS = [
    "50% off",
    "50x off",
    "a_b",
    "axb",
    "c\\d",
    "c\\\\d",
    "cd",
    "n\0a",
    "n\0b",
    "%",
    "\U0010ffff%x",
    "\n%",
    "%\ud7ff",
    "%\U0010ffff",
]


@pytest.fixture(scope="module")
def empty_rows(backend: Backend) -> Iterator[Rows]:
    with closing(Rows(backend)) as rows:
        yield rows


@pytest.fixture(scope="module")
def rows(backend: Backend) -> Iterator[Rows]:
    with closing(Rows(backend)) as rows:
        rows.insert(*BENIGN)
        rows.insert(*({"id": f"key {n}", key: "odd"} for n, key in enumerate(ODD_KEYS)))
        rows.insert(*({"id": f"pattern {n}", "pattern": text} for n, text in enumerate(PATTERNS)))
        rows.insert(*({"id": f"hostile {n}", "doc_id": text, "said": text} for n, text in enumerate(HOSTILE)))
        yield rows


def where(key: str, value: Any, operator: FilterOperator = Op.EQ) -> MetadataFilter:
    return MetadataFilter(key=key, value=value, operator=operator)


def filters(*parts: MetadataFilter | MetadataFilters, condition: FilterCondition = AND) -> MetadataFilters:
    return MetadataFilters(filters=list(parts), condition=condition)


# -- string_literal ---------------------------------------------------------------------------------------------------


def test_characters_of_every_kind_read_back(empty_rows: Rows) -> None:
    # The first plane whole, and one in 101 of the others: all of them take the server 16 s (and read back).
    characters = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x10000), *range(0x10000, 0x110000, 101)]))
    texts = [characters[start : start + 1000] for start in range(0, len(characters), 1000)]
    empty_rows.insert(*({"id": text} for text in texts))
    try:
        for chosen in (texts[::2], texts[1::2]):
            assert empty_rows.ids(ids_expression("id", chosen)) == set(chosen)
    finally:
        empty_rows.delete('id != ""')


hostile_texts = st.lists(
    st.sampled_from([*"\\\"'nrtuxU0123%_[](){}$,? ", "\n", "\r", "\0", "中", *HOSTILE[:8]])
    | st.characters(exclude_categories=["Cs"]),
    min_size=1,
    max_size=12,
).map("".join)


@given(data=st.data())
@settings(
    max_examples=5,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking against a server takes minutes
    suppress_health_check=list(HealthCheck),
)
def test_any_text_names_its_own_rows_and_no_others(empty_rows: Rows, data: st.DataObject) -> None:
    texts = data.draw(st.lists(hostile_texts, min_size=20, max_size=60, unique=True))
    chosen = texts[: len(texts) // 2]
    empty_rows.insert(*({"id": text, "doc_id": text, "said": text, "parts": [text, "-"]} for text in texts))
    try:
        for field in ("id", "doc_id", "said"):
            assert empty_rows.ids(ids_expression(field, chosen)) == set(chosen), field
            assert empty_rows.ids(f"{field} == {string_literal(texts[-1])}") == {texts[-1]}, field
            assert empty_rows.ids(filter_expression(filters(where(field, chosen, Op.NIN)))) == set(texts) - set(chosen)
        assert empty_rows.ids(filter_expression(filters(where("parts", chosen, Op.ANY)))) == set(chosen)
        for prefix in {texts[0][:1], texts[0][:3], texts[0]}:
            starting = {text for text in texts if text.startswith(prefix)}
            assert empty_rows.ids(filter_expression(filters(where("said", prefix, Op.TEXT_MATCH)))) == starting
            assert empty_rows.ids(filter_expression(filters(where("doc_id", prefix, Op.TEXT_MATCH)))) == starting
        empty_rows.delete(ids_expression("id", chosen))
        assert empty_rows.ids('id != ""') == set(texts) - set(chosen)
    finally:
        empty_rows.delete('id != ""')


@pytest.mark.parametrize("text", ["\ud800", "fine until \udfff", "\ud83d"])
def test_a_lone_surrogate_is_refused_with_its_position(text: str) -> None:
    with pytest.raises(ValueError, match=rf"at position {len(text) - 1} is half of a surrogate pair"):
        string_literal(text)


# -- ids --------------------------------------------------------------------------------------------------------------


def test_hostile_doc_ids_select_and_delete_their_own_rows(rows: Rows) -> None:
    for n, text in enumerate(HOSTILE):
        assert rows.ids(ids_expression("doc_id", [text])) == {f"hostile {n}"}
    before = rows.ids('id != ""')
    for text in HOSTILE[:6]:
        rows.delete(ids_expression("id", [text]))  # no row has such an id
    assert rows.ids('id != ""') == before


def test_ids_are_a_list_with_something_in_it() -> None:
    assert ids_expression("id", ["a", 'b"']) == r'id in ["a", "b\""]'
    with pytest.raises(QueryError, match="no ids"):
        ids_expression("id", [])
    with pytest.raises(TypeError, match="not the string 'abc'"):
        ids_expression("id", "abc")


def test_keys_are_of_the_collections_own_type() -> None:
    number, text = PrimaryKey("pk", DataType.INT64), PrimaryKey("pk")
    assert keys_expression(number, ["17", 4, np.int64(5), "-1"]) == "pk in [17, 4, 5, -1]"
    for wrong in ("seventeen", "1.0", "017", " 1", "", "٣", 2**63, str(2**63), True, 1.0, None):
        with pytest.raises(QueryError, match="'pk' of this collection is a whole number"):
            keys_expression(number, [wrong])
    assert keys_expression(text, ["17"]) == 'pk in ["17"]'
    with pytest.raises(QueryError, match="17 is no id: 'pk' of this collection is a text"):
        keys_expression(text, [17])


# -- the same rows as upstream ----------------------------------------------------------------------------------------

AS_UPSTREAM: list[MetadataFilters] = [
    filters(where("color", "red")),
    filters(where("color", 'it\'s "red"')),
    filters(where("color", 7)),
    filters(where("color", "red", Op.NE)),
    filters(where("year", 2020)),
    filters(where("year", -3)),
    filters(where("year", 2020, Op.GT)),
    filters(where("year", 2020, Op.GTE)),
    filters(where("year", 2020, Op.LT)),
    filters(where("year", 2020, Op.LTE)),
    filters(where("score", 0.5)),
    filters(where("score", -1e-07, Op.GT)),
    filters(where("score", 1e300)),
    filters(where("size", 5)),
    filters(where("doc_id", "d1")),
    filters(where("color", ["red", "blue"], Op.IN)),
    filters(where("color", ["red", "blue"], Op.NIN)),
    filters(where("color", [], Op.IN)),
    filters(where("color", [], Op.NIN)),
    filters(where("year", [2020, -3], Op.IN)),
    filters(where("score", [0.5, 2.0], Op.IN)),
    filters(where("labels", "x", Op.CONTAINS)),
    filters(where("labels", 2, Op.CONTAINS)),
    filters(where("tags", "x", Op.CONTAINS)),
    filters(where("labels", ["x", "it's"], Op.ANY)),
    filters(where("tags", ["y", "z"], Op.ANY)),
    filters(where("labels", ["x", "y"], Op.ALL)),
    filters(where("tags", ["x", "y"], Op.ALL)),
    filters(where("labels", None, Op.IS_EMPTY)),
    filters(where("tags", None, Op.IS_EMPTY)),
    filters(where("color", "red", Op.TEXT_MATCH)),
    filters(where("color", "", Op.TEXT_MATCH)),
    filters(where("year", 20, Op.TEXT_MATCH)),
    filters(where("doc_id", "d", Op.TEXT_MATCH)),
    filters(where('info["a"]["b"]', "deep")),
    filters(where("$meta['info']['a']['b']", "deep")),
    filters(where("labels[0]", "x")),
    filters(where("color", "red"), where("year", 2020)),
    filters(where("color", "red"), where("year", None), where("size", 5)),
    filters(where("color", "red"), where("color", "blue"), condition=OR),
    filters(where("doc_id", "d1"), filters(where("color", "red"), where("color", "blue"), condition=OR)),
    filters(filters(where("doc_id", "d1"), where("year", 2020)), where("color", "blue"), condition=OR),
]


@pytest.mark.parametrize("each", AS_UPSTREAM, ids=lambda each: _to_milvus_filter(each).strip("() "))
def test_the_same_rows_as_upstream(rows: Rows, each: MetadataFilters) -> None:
    assert rows.ids(filter_expression(each)) == rows.ids(_to_milvus_filter(each))


@pytest.mark.filterwarnings("ignore:The `parse_obj` method is deprecated")  # upstream's
@pytest.mark.parametrize(
    ("operator", "value"),
    [
        ("ARRAY_CONTAINS({key}, {value})", "x"),
        ("not ARRAY_CONTAINS({key}, {value})", "x"),
        ("ARRAY_CONTAINS_ANY({key}, {value})", ["x", "y"]),
        ("not ARRAY_CONTAINS_ANY({key}, {value})", ["y"]),
        ("ARRAY_CONTAINS_ALL({key}, {value})", ["x", "y"]),
        ("not ARRAY_CONTAINS_ALL({key}, {value})", ["x", "y"]),
        ("ARRAY_LENGTH({key}) == {value}", 2),
        ("ARRAY_LENGTH({key}) != {value}", 2),
    ],
)
def test_scalar_filters_select_the_same_rows_as_upstream(rows: Rows, operator: str, value: Any) -> None:
    scalars = [{"key": "tags", "value": value, "operator": operator}]
    found = rows.ids(filter_expression(None, scalars))
    assert found == rows.ids(_to_milvus_filter(None, scalars))
    both = filters(where("doc_id", ["d1", "d2"], Op.IN), where("year", -100, Op.GT))
    assert rows.ids(filter_expression(both, scalars)) == found & rows.ids(filter_expression(both))


def test_scalar_filters_hold_beside_alternatives(rows: Rows) -> None:
    # Upstream leaves out the parentheses here: red, or (blue and tagged).
    either = filters(where("color", "red"), where("color", "blue"), condition=OR)
    assert rows.ids(filter_expression(either, [{"key": "tags", "value": "x"}])) == {"blue"}


@pytest.mark.parametrize("nothing", [None, filters(), filters(where("color", None)), filters(filters())], ids=repr)
def test_filters_that_restrict_nothing_are_empty(nothing: MetadataFilters | None) -> None:
    assert filter_expression(nothing) == ""
    assert filter_expression(nothing, []) == ""
    assert search_expression(VectorStoreQuery(filters=nothing, doc_ids=[], node_ids=[]), "doc_id") == ""
    assert search_expression(VectorStoreQuery(filters=nothing, doc_ids=["a"]), "doc_id") == 'doc_id in ["a"]'


def test_filters_doc_ids_and_node_ids_all_hold(rows: Rows) -> None:
    either = filters(where("color", "red"), where("color", "blue"), condition=OR)
    query = VectorStoreQuery(filters=either, doc_ids=["d1", "d3"], node_ids=["red", "redder", "blue"])
    assert rows.ids(search_expression(query, "doc_id")) == {"red"}
    assert rows.ids(search_expression(VectorStoreQuery(node_ids=["bare"]), "doc_id")) == {"bare"}
    assert rows.ids(search_expression(VectorStoreQuery(doc_ids=["d2"]), "doc_id", [{"key": "tags", "value": "y"}])) == {
        "blue"
    }


# -- NOT --------------------------------------------------------------------------------------------------------------

# Each combination of having a key or not, with texts, numbers, truth values, lists.
TABLE: list[dict[str, Any]] = [
    {"id": f"row {n}", "doc_id": f"d{n % 3}", "size": n % 4, "tags": ["x", "y"][: n % 3]}
    | ({"word": ["ant", "bee", 'c"d'][n % 3]} if n % 5 else {})
    | ({"number": n % 6 - 2} if n % 4 else {})
    | ({"share": n / 4} if n % 3 else {})
    | ({"o-d-d": ["ant", 2][n % 2]} if n % 7 > 2 else {})
    | ({"list": [["x"], ["x", "y"], []][n % 3]} if n % 2 else {})
    for n in range(30)
]


@pytest.fixture(scope="module")
def table(backend: Backend) -> Iterator[Rows]:
    with closing(Rows(backend)) as rows:
        rows.insert(*TABLE)
        yield rows


def matches(row: dict[str, Any], each: MetadataFilter | MetadataFilters) -> bool:
    """What LlamaIndex's own simple store makes of a filter, nested ones included."""
    if isinstance(each, MetadataFilters):
        found = [matches(row, part) for part in each.filters]
        return not any(found) if each.condition == NOT else any(found) if each.condition == OR else all(found)
    value, wanted = row.get(each.key), each.value
    if each.operator in (Op.NE, Op.NIN):
        return value != wanted if each.operator == Op.NE else value not in wanted
    if each.operator == Op.IS_EMPTY:
        return not value
    if value is None:
        return False
    return {
        Op.EQ: lambda: value == wanted,
        Op.IN: lambda: value in wanted,
        Op.TEXT_MATCH: lambda: isinstance(value, str) and value.startswith(wanted),
        Op.CONTAINS: lambda: wanted in value,
        Op.ANY: lambda: any(each in value for each in wanted),
        Op.ALL: lambda: all(each in value for each in wanted),
        Op.LT: lambda: value < wanted,
        Op.GTE: lambda: value >= wanted,
    }[each.operator]()


words, numbers = st.sampled_from(["ant", "bee", 'c"d', "none"]), st.integers(-3, 4)
within = st.sampled_from([Op.IN, Op.NIN])
plain_filters = st.one_of(
    st.builds(where, st.sampled_from(["word", "o-d-d", "doc_id"]), words, st.sampled_from([Op.EQ, Op.NE])),
    st.builds(where, st.sampled_from(["number", "size", "o-d-d"]), numbers, st.sampled_from([Op.EQ, Op.NE])),
    st.builds(where, st.sampled_from(["number", "share", "size"]), numbers, st.sampled_from([Op.LT, Op.GTE])),
    st.builds(where, st.just("word"), words, st.sampled_from([Op.LT, Op.GTE, Op.TEXT_MATCH])),
    st.builds(where, st.just("o-d-d"), st.sampled_from(["a", "a%", ""]), st.just(Op.TEXT_MATCH)),
    st.builds(where, st.sampled_from(["word", "o-d-d"]), st.lists(words, max_size=3), within),
    st.builds(
        where, st.sampled_from(["number", "size"]), st.lists(numbers, max_size=3), st.sampled_from([Op.IN, Op.NIN])
    ),
    st.builds(where, st.sampled_from(["list", "tags"]), st.sampled_from(["x", "y"]), st.just(Op.CONTAINS)),
    st.builds(where, st.sampled_from(["list", "tags"]), st.just(["y", "z"]), st.sampled_from([Op.ANY, Op.ALL])),
    st.builds(where, st.just("tags"), st.none(), st.just(Op.IS_EMPTY)),
)
nested_filters = st.recursive(
    plain_filters,
    lambda inner: st.builds(
        lambda parts, condition: filters(*parts, condition=condition),
        st.lists(inner, min_size=1, max_size=3),
        st.sampled_from([AND, OR, NOT]),
    ),
    max_leaves=6,
)


@given(parts=st.lists(nested_filters, min_size=1, max_size=3))
@settings(
    max_examples=examples(60),
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_not_finds_the_rows_that_none_of_its_filters_matches(table: Rows, parts: list[Any]) -> None:
    negated = filters(*parts, condition=NOT)
    expected = {row["id"] for row in TABLE if matches(row, negated)}
    expression = filter_expression(negated, is_lite=table.is_lite)
    assert table.ids(expression) == expected, expression


def test_not_has_a_place_beside_other_filters(table: Rows) -> None:
    not_ant = filters(where("word", "ant"), condition=NOT)
    for condition in (AND, OR):
        both = filters(where("doc_id", "d1"), not_ant, condition=condition)
        expected = {row["id"] for row in TABLE if matches(row, both)}
        assert table.ids(filter_expression(both, is_lite=table.is_lite)) == expected
    query = VectorStoreQuery(filters=not_ant, node_ids=["row 0", "row 1", "row 3"])
    # Row 0 has no word, row 1 another, row 3 this one.
    assert table.ids(search_expression(query, "doc_id", is_lite=table.is_lite)) == {"row 0", "row 1"}


def test_not_over_nothing_restricts_nothing() -> None:
    for empty in (filters(condition=NOT), filters(where("a", None), filters(), condition=NOT)):
        assert filter_expression(empty) == filter_expression(empty, is_lite=True) == ""


def test_filters_without_a_condition_must_all_match(rows: Rows) -> None:
    unsaid = MetadataFilters(filters=[where("doc_id", "d1"), where("color", "red")], condition=None)
    assert filter_expression(unsaid) == filter_expression(filters(*unsaid.filters))
    assert rows.ids(filter_expression(filters(unsaid, where("size", 5)))) == {"red"}


# -- values, patterns, keys -------------------------------------------------------------------------------------------


def test_hostile_values_are_values(rows: Rows) -> None:
    for n, text in enumerate(HOSTILE):
        assert rows.ids(filter_expression(filters(where("said", text)))) == {f"hostile {n}"}
    for attempt in HOSTILE[:6]:
        scalars = [{"key": "tags", "value": attempt}]
        assert rows.ids(filter_expression(None, scalars)) == set()
        assert rows.ids(filter_expression(filters(where("color", attempt, Op.TEXT_MATCH)))) == set()
        assert rows.ids(filter_expression(filters(where("labels", [attempt], Op.ALL)))) == set()


def test_a_text_match_takes_wildcards_literally(rows: Rows) -> None:
    for prefix in [*PATTERNS, "50%", "50", "a_", "a", "c\\", "n\0", "n", "%%", "__"]:
        starting = {f"pattern {n}" for n, text in enumerate(PATTERNS) if text.startswith(prefix)}
        assert rows.ids(filter_expression(filters(where("pattern", prefix, Op.TEXT_MATCH)))) == starting, prefix


def test_any_key_finds_the_rows_that_have_it(rows: Rows) -> None:
    for n, key in enumerate(ODD_KEYS):
        own = {f"key {n}"}
        for operator, value in [
            (Op.EQ, "odd"),
            (Op.GTE, "odd"),
            (Op.TEXT_MATCH, "od"),
            (Op.TEXT_MATCH, "odd"),
            (Op.IN, ["even", "odd"]),
        ]:
            assert rows.ids(filter_expression(filters(where(key, value, operator)))) == own, (key, operator)


def test_lists_on_odd_keys_mean_what_they_mean_on_plain_ones(rows: Rows) -> None:
    rows.insert(*({"id": f"twin {color}", "plain": color, "o-d-d": color} for color in ["red", "green", 7, None]))
    try:
        for operator in (Op.IN, Op.NIN):
            for values in ([], ["red"], ["red", "blue"], [7], ["red", *map(str, range(500)), "green"]):
                plain = rows.ids(filter_expression(filters(where("plain", values, operator))))
                odd = rows.ids(filter_expression(filters(where("o-d-d", values, operator))))
                assert odd == plain, (operator, values[:3])
    finally:
        rows.delete('id like "twin%"')


def test_membership_is_decided_of_each_row_whatever_others_have_under_the_key(rows: Rows) -> None:
    """On Lite one row with a list there made `in` fail for everybody."""
    kinds = {"text": "red", "line": "a\nb%", "number": 7, "share": 0.5, "list": ["red"], "deep": {"a": ["red"]}}
    kinds |= {"negative": [-5, "x"], "empty": [], "none": None}
    rows.insert(*({"id": f"kind {kind}", "some": value, "o-d-d": value} for kind, value in kinds.items()))
    try:
        lists: list[list[Any]] = [[], ["red"], ["red", 'it\'s "red"'], ["a\nb%"], [7, -3], [0.5], [2**63 - 1]]
        lists += [["red", 7, 0.5]] if rows.is_lite else []  # a server takes values of one type
        for values in lists:
            among = {kind for kind, value in kinds.items() if any(value == each for each in values)}
            others = kinds.keys() - among
            for key, operator, condition, expected in [
                *((key, Op.IN, AND, among) for key in ("some", "o-d-d")),
                *((key, Op.IN, NOT, others) for key in ("some", "o-d-d")),
                *((key, Op.NIN, NOT, among) for key in ("some", "o-d-d")),
                ("some", Op.NIN, AND, others),
            ]:
                each = filters(where(key, [], operator).model_copy(update={"value": values}), condition=condition)
                found = rows.ids(f'id like "kind%" and {filter_expression(each, is_lite=rows.is_lite)}')
                assert found == {f"kind {kind}" for kind in expected}, (key, operator, condition, values)
        for operator, value in [(Op.CONTAINS, -5), (Op.ANY, [-5]), (Op.ALL, [-5])]:
            assert rows.ids(filter_expression(filters(where("some", value, operator)))) == {"kind negative"}
    finally:
        rows.delete('id like "kind%"')


def test_lite_says_so_where_it_cannot_look_into_lists(rows: Rows) -> None:
    for operator, value in [(Op.CONTAINS, "x"), (Op.ANY, ["x"]), (Op.ALL, ["x"]), (Op.IS_EMPTY, None)]:
        expression = filter_expression(filters(where("o-d-d", value, operator)))
        if rows.is_lite:
            with pytest.raises(MilvusException, match="expected field name"):
                rows.ids(expression)
        else:
            assert (rows.ids(expression) == set()) is (operator != Op.IS_EMPTY)


@pytest.mark.parametrize(
    "key", ["", "][", "a][b", 'a["]["b"]', "nul\0", "\x1b", "\x08", "\ud800", 'a["\ud800"]'], ids=ascii
)
def test_keys_that_milvus_cannot_look_up_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match=r"^filter on .*(cannot look up|cannot be sent)"):
        filter_expression(filters(where(key, 1)))


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operator", "value", "reason"),
    [
        (Op.EQ, float("nan"), "nan is no number"),
        (Op.LT, float("-inf"), "-inf is no number"),
        (Op.IN, [1.0, float("inf")], "inf is no number"),
        (Op.EQ, 2**63, "9223372036854775808 is no number"),
        (Op.GT, -(2**63), "-9223372036854775808 is no number"),
        (Op.EQ, "\ud800", "surrogate"),
        (Op.IN, "red", "IN needs a list"),
        (Op.NIN, 5, "NIN needs a list"),
        (Op.ANY, "red", "ANY needs a list"),
        (Op.ALL, [], "ALL needs a list of at least one"),
        (Op.GT, [1], "GT needs one value"),
        (Op.TEXT_MATCH, ["red"], "TEXT_MATCH needs one value"),
        (Op.TEXT_MATCH_INSENSITIVE, "red", "no operator TEXT_MATCH_INSENSITIVE"),
    ],
)
def test_what_milvus_cannot_express_is_refused_by_key_and_reason(
    operator: FilterOperator, value: Any, reason: str
) -> None:
    with pytest.raises(QueryError, match=f"^filter on 'the key': .*{reason}"):
        filter_expression(filters(where("the key", value, operator)))


def test_values_of_other_types_are_refused() -> None:
    for value in (object(), {"a": 1}, b"bytes", [None]):
        unchecked = MetadataFilter.model_construct(key="k", value=value, operator=Op.EQ)
        with pytest.raises(ValueError, match=r"filter on 'k': .* is a "):
            filter_expression(filters().model_copy(update={"filters": [unchecked]}))


def test_values_past_the_model_are_still_read_right(rows: Rows) -> None:
    for flag, found in [(True, {"blue"}), (False, {"number"})]:
        unchecked = MetadataFilter.model_construct(key="flag", value=flag, operator=Op.EQ)
        assert rows.ids(filter_expression(filters().model_copy(update={"filters": [unchecked]}))) == found


@pytest.mark.parametrize(
    ("operator", "value"),
    [
        ("ARRAY_CONTAINS_ANY({key}, {value})", "x"),
        ("ARRAY_CONTAINS_ALL({key}, {value})", []),
        ("ARRAY_LENGTH({key}) == {value}", "x"),
        ("ARRAY_CONTAINS({key}, {value})", float("nan")),
        ("{key} == {value}", 1),
    ],
)
def test_scalar_filters_that_do_not_parse_are_refused(operator: str, value: Any) -> None:
    with pytest.raises(ValueError):
        filter_expression(None, [{"key": "tags", "value": value, "operator": operator}])

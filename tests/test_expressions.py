"""What filters, keys and ids are written as: what `test_filters` asks of real back ends, letter by letter.

Without Milvus, so that `make mutants` can try a mistake in each of them.
"""

from __future__ import annotations

from typing import Any

import pytest
from llama_index.core.vector_stores.types import FilterOperator as Op
from llama_index.core.vector_stores.types import MetadataFilters, VectorStoreQuery
from pymilvus import DataType

from llama_index_milvus_async_ext._milvus.errors import QueryError, QueryMismatchError
from llama_index_milvus_async_ext._milvus.schema import PrimaryKey
from llama_index_milvus_async_ext._queries.filters import (
    after_expression,
    filter_expression,
    ids_expression,
    keys_expression,
    search_expression,
    string_literal,
)
from tests.test_filters import AND, NOT, OR, filters, where

MOST = 2**63 - 1


@pytest.mark.parametrize(
    ("operator", "value", "written"),
    [
        (Op.EQ, "red", 'k == "red"'),
        (Op.EQ, 'say "hi"\\\n\r\t', r'k == "say \"hi\"\\\n\r\t"'),
        (Op.EQ, 7, "k == 7"),
        (Op.EQ, MOST, f"k == {MOST}"),
        (Op.GT, -MOST, f"k > -{MOST}"),
        (Op.GTE, 0.5, "k >= 0.5"),
        (Op.LT, 1e300, "k < 1e+300"),
        (Op.LTE, "m", 'k <= "m"'),
        (Op.NE, 1, "k != 1"),
        (Op.EQ, ["a", "b"], 'k == ["a", "b"]'),
        (Op.NE, [], "k != []"),
        (Op.IN, ["a", "b"], 'k in ["a", "b"]'),
        (Op.IN, [], "k in []"),
        (Op.NIN, [1, 2], "k not in [1, 2]"),
        (Op.CONTAINS, "x", 'ARRAY_CONTAINS(k, "x")'),
        (Op.CONTAINS, "-5", 'ARRAY_CONTAINS(k, "-5")'),
        (Op.CONTAINS, -5, "ARRAY_CONTAINS_ANY(k, [-5])"),
        (Op.CONTAINS, -0.5, "ARRAY_CONTAINS_ANY(k, [-0.5])"),
        (Op.ANY, ["x"], 'ARRAY_CONTAINS_ANY(k, ["x"])'),
        (Op.ALL, [1, 2], "ARRAY_CONTAINS_ALL(k, [1, 2])"),
        (Op.IS_EMPTY, None, "ARRAY_LENGTH(k) == 0"),
        (Op.IS_EMPTY, 5, "ARRAY_LENGTH(k) == 0"),
        (Op.TEXT_MATCH, "re", 'k like "re%"'),
        (Op.TEXT_MATCH, "", 'k like "%"'),
        (Op.TEXT_MATCH, 20, 'k like "20%"'),
        (Op.TEXT_MATCH, "a_", '(k >= "a_" and k < "a`")'),
        (Op.TEXT_MATCH, "a%", '(k >= "a%" and k < "a&")'),
        (Op.TEXT_MATCH, "a%X", '(k >= "a%X" and k < "a%Y")'),
        (Op.TEXT_MATCH, "a\\", r'(k >= "a\\" and k < "a]")'),
        (Op.TEXT_MATCH, "a\0", '(k >= "a\0" and k < "a\x01")'),
        (Op.TEXT_MATCH, "%\ud7ff", '(k >= "%\ud7ff" and k < "%\ue000")'),
        (Op.TEXT_MATCH, "%\U0010ffff\U0010ffff", '(k >= "%\U0010ffff\U0010ffff" and k < "&")'),
    ],
)
def test_each_operator(operator: Op, value: Any, written: str) -> None:
    assert filter_expression(filters(where("k", value, operator))) == written
    if operator not in (Op.IN, Op.NIN):
        assert filter_expression(filters(where("k", value, operator)), is_lite=True) == written


@pytest.mark.parametrize(
    ("key", "values", "written"),
    [
        ("k", ["a", "b"], '(k like "%" and k in ["a", "b"])'),
        ("k", [1, "a", 2.5], '((k like "%" and k in ["a"]) or k == 1 or k == 2.5)'),
        ("k", [7], "k == 7"),
        ("k", [], "(k is null and k is not null)"),
        ("k[0]", ["a", 1], '(k[0] == "a" or k[0] == 1)'),
        ("a b", [], '($meta["a b"] == 0 and $meta["a b"] != 0)'),
    ],
)
def test_membership_for_lite_asks_in_of_texts_alone(key: str, values: list[Any], written: str) -> None:
    def said(operator: Op) -> str:
        each = where(key, [], operator).model_copy(update={"value": values})  # the model takes one type only
        return filter_expression(filters(each), is_lite=True)

    name = key if key != "a b" else '$meta["a b"]'
    assert said(Op.IN) == written
    assert said(Op.NIN) == f"({name} is null or (not ({written})))"


def test_a_flag_is_no_number() -> None:
    for flag, written in ((True, "k == true"), (False, "k == false")):
        unchecked = where("k", 1).model_copy(update={"value": flag})
        assert filter_expression(filters().model_copy(update={"filters": [unchecked]})) == written


@pytest.mark.parametrize(
    ("key", "written"),
    [
        ("name", "name"),
        ("_x1", "_x1"),
        ("index", "index"),  # begins with a word of theirs
        ("in", '$meta["in"]'),
        ("Null", '$meta["Null"]'),
        ("array_contains_any", '$meta["array_contains_any"]'),
        ("json_contains", '$meta["json_contains"]'),
        ("1st", '$meta["1st"]'),
        ("two words", '$meta["two words"]'),
        ("é", '$meta["é"]'),
        ('say "hi"', r'$meta["say \"hi\""]'),
        ('info["a"][0]', 'info["a"][0]'),
        ("info['a'][10]", "info['a'][10]"),
        ("info[01]", '$meta["info[01]"]'),
        ("$meta['a']", "$meta['a']"),
        ("$meta", '$meta["$meta"]'),
        ("tab\t", r'$meta["tab\t"]'),
    ],
)
def test_each_kind_of_key(key: str, written: str) -> None:
    assert filter_expression(filters(where(key, 1))) == f"{written} == 1"


def test_lists_on_keys_that_are_reached_into() -> None:
    def said(operator: Op, values: list[Any]) -> str:
        return filter_expression(filters(where("a b", values, operator)))

    key = '$meta["a b"]'
    assert said(Op.IN, [1]) == f"{key} == 1"
    assert said(Op.IN, ["x", "y"]) == f'({key} == "x" or {key} == "y")'
    assert said(Op.NIN, ["x", "y"]) == f'({key} != "x" and {key} != "y")'
    assert said(Op.IN, []) == f"({key} == 0 and {key} != 0)"
    assert said(Op.NIN, []) == f"({key} == 0 or {key} != 0)"
    for operator in (Op.IN, Op.NIN):
        with pytest.raises(QueryError, match=f"{operator.name} needs a list, not 7"):
            filter_expression(filters(where("k", 7, operator)), is_lite=True)
    negative = {"key": "k", "value": -1, "operator": "not ARRAY_CONTAINS({key}, {value})"}
    assert filter_expression(None, [negative]) == "not ARRAY_CONTAINS_ANY(k, [-1])"


def test_conditions_and_nesting() -> None:
    a, b, c, none = where("a", 1), where("b", 2), where("c", 3), where("d", None)
    assert filter_expression(None) == filter_expression(filters()) == filter_expression(filters(none)) == ""
    assert filter_expression(filters(a)) == filter_expression(filters(a, none)) == "a == 1"
    assert filter_expression(filters(a, b)) == "(a == 1 and b == 2)"
    assert filter_expression(filters(a, b, condition=OR)) == "(a == 1 or b == 2)"
    inner = filters(b, c, condition=OR)
    assert filter_expression(filters(a, inner)) == "(a == 1 and (b == 2 or c == 3))"
    assert filter_expression(filters(inner, a, condition=OR)) == "((b == 2 or c == 3) or a == 1)"
    without = MetadataFilters.model_construct(filters=[a, b], condition=None)
    assert filter_expression(without) == "(a == 1 and b == 2)"
    assert filter_expression(filters(a, b, condition=NOT)) == "(not ((a == 1 or b == 2)))"
    assert filter_expression(filters(a, condition=NOT)) == "(not (a == 1))"
    assert filter_expression(filters(none, condition=NOT)) == ""
    assert filter_expression(filters(filters(a, condition=NOT), b)) == "((not (a == 1)) and b == 2)"
    empty = MetadataFilters.model_construct(filters=None, condition=AND)
    assert filter_expression(empty) == ""


@pytest.mark.parametrize(
    ("operator", "value", "written"),
    [
        (Op.EQ, 1, "(k is not null and k == 1)"),
        (Op.GT, 1, "(k is not null and k > 1)"),
        (Op.EQ, "x", '(k is not null and k == "x")'),
        (Op.GT, "x", '(k is not null and k like "%" and k > "x")'),
        (Op.LTE, "x", '(k is not null and k like "%" and k <= "x")'),
        (Op.TEXT_MATCH, "x", '(k is not null and k like "%" and k like "x%")'),
        (Op.IN, [1], "(k is not null and k == 1)"),
        (Op.IN, ["x"], '(k is not null and (k like "%" and k in ["x"]))'),
        (Op.NE, 1, "(k is null or k != 1)"),
        (Op.NIN, [1], "(k is null or (not (k == 1)))"),
        (Op.CONTAINS, 1, "ARRAY_CONTAINS(k, 1)"),
        (Op.ANY, [1], "ARRAY_CONTAINS_ANY(k, [1])"),
        (Op.IS_EMPTY, None, "ARRAY_LENGTH(k) == 0"),
    ],
)
def test_below_a_not_lite_is_told_of_missing_keys(operator: Op, value: Any, written: str) -> None:
    one = where("k", value, operator)
    plain = filter_expression(filters(one))
    for negated in (filters(one, condition=NOT), filters(filters(one, condition=OR), condition=NOT)):
        assert filter_expression(negated, is_lite=True) == f"(not ({written}))"
        assert filter_expression(negated) == f"(not ({plain}))"
    beside = filters(filters(where("a", 1), condition=NOT), one)
    as_it_is = filter_expression(filters(one), is_lite=True)
    assert filter_expression(beside, is_lite=True) == f"((not ((a is not null and a == 1))) and {as_it_is})"


def test_many_alternatives_are_a_tree() -> None:
    def chain(first: int, last: int) -> str:
        return " or ".join(f"k == {n}" for n in range(first, last))

    def alternatives(count: int) -> str:
        return filter_expression(filters(*(where("k", n) for n in range(count)), condition=OR))

    assert alternatives(16) == f"({chain(0, 16)})"
    assert alternatives(17) == f"(({chain(0, 16)}) or (k == 16))"
    assert alternatives(33) == f"(({chain(0, 16)}) or ({chain(16, 32)}) or (k == 32))"


@pytest.mark.filterwarnings("ignore:The `parse_obj` method is deprecated")  # upstream's
def test_scalar_filters_stand_beside_the_others() -> None:
    scalars = [
        {"key": "tags", "value": "x", "operator": "ARRAY_CONTAINS({key}, {value})"},
        {"key": "two words", "value": 2, "operator": "ARRAY_LENGTH({key}) != {value}"},
    ]
    both = 'ARRAY_CONTAINS(tags, "x") and ARRAY_LENGTH($meta["two words"]) != 2'
    assert filter_expression(None, scalars) == f"({both})"
    assert filter_expression(filters(where("a", 1)), scalars) == f"(a == 1 and {both})"
    for operator, value in (("ARRAY_LENGTH({key}) == {value}", "x"), ("ARRAY_CONTAINS_ANY({key}, {value})", "x")):
        with pytest.raises(QueryError, match=r"^filter on 'tags': ARRAY_\w+ needs a .*, not 'x'$"):
            filter_expression(None, [{"key": "tags", "value": value, "operator": operator}])


def test_all_that_restricts_a_query() -> None:
    assert search_expression(VectorStoreQuery(), "doc_id") == ""
    assert search_expression(VectorStoreQuery(doc_ids=[], node_ids=[], filters=filters()), "doc_id") == ""
    assert search_expression(VectorStoreQuery(doc_ids=["a"]), "own") == 'own in ["a"]'
    assert search_expression(VectorStoreQuery(node_ids=["a", "b"]), "own") == 'id in ["a", "b"]'
    query = VectorStoreQuery(doc_ids=["a"], node_ids=["1"], filters=filters(where("k", 1, Op.NE), condition=NOT))
    scalars = [{"key": "tags", "value": "x", "operator": "ARRAY_CONTAINS({key}, {value})"}]
    rest = 'ARRAY_CONTAINS(tags, "x") and own in ["a"] and pk in [1]'
    key = PrimaryKey("pk", DataType.INT64)
    assert (
        search_expression(query, "own", scalars, primary_key=key, is_lite=True)
        == f"(((not ((k is null or k != 1))) and {rest.split(' and ')[0]}) and {' and '.join(rest.split(' and ')[1:])})"
    )
    plain = VectorStoreQuery(filters=query.filters)
    assert search_expression(plain, "own") == "(not (k != 1))"
    assert search_expression(VectorStoreQuery(), "own", scalars) == 'ARRAY_CONTAINS(tags, "x")'


def test_keys_of_each_type() -> None:
    number = PrimaryKey("pk", DataType.INT64)
    assert keys_expression(number, ["0", "-17", MOST, -MOST, str(MOST)]) == f"pk in [0, -17, {MOST}, -{MOST}, {MOST}]"
    for least in (-MOST - 1, str(-MOST - 1)):  # for which the grammar has no literal
        assert keys_expression(number, [least]) == f"pk < -{MOST}"
        assert keys_expression(number, [3, least, 4]) == f"(pk in [3, 4] or pk < -{MOST})"
    for wrong in (MOST + 1, -MOST - 2, "-0", "+1", "1" * 20, True):
        with pytest.raises(QueryMismatchError, match=r"is no id: 'pk' of this collection is a whole number of 64 bits"):
            keys_expression(number, [wrong])
    assert keys_expression(PrimaryKey("a b"), ["x"]) == '$meta["a b"] in ["x"]'
    assert ids_expression("id", ["a", "b"]) == 'id in ["a", "b"]'
    with pytest.raises(QueryMismatchError, match=r"^17 is no id: 'pk' of this collection is a text$"):
        keys_expression(PrimaryKey("pk"), [17])


def test_what_is_long_is_shown_in_part() -> None:
    for length, shown in ((78, repr("x" * 78)), (79, "'" + "x" * 76 + "...")):
        with pytest.raises(TypeError) as refused:
            ids_expression("id", "x" * length)
        assert str(refused.value).endswith(f"not the string {shown}")
    assert string_literal("x" * 100) == '"' + "x" * 100 + '"'


def test_what_comes_after_a_key_stands_beside_what_else_is_asked_for() -> None:
    number = PrimaryKey("pk", DataType.INT64)
    assert after_expression("", number, 7) == "pk > 7"
    assert after_expression("", number, -MOST - 1) == f"pk >= -{MOST}"
    assert after_expression("(a == 1 or b == 2)", PrimaryKey(), 'say "x"') == (
        '((a == 1 or b == 2) and id > "say \\"x\\"")'
    )
    with pytest.raises(QueryMismatchError, match="'a' is no id: 'pk' of this collection is a whole number"):
        after_expression("", number, "a")

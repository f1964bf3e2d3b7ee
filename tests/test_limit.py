"""The limit on requests in flight: it gives way at once, and comes back slowly."""

from __future__ import annotations

import pytest

from llama_index_milvus_async_ext._lane.limit import Limit


def test_the_overloads_of_one_volley_cut_it_once() -> None:
    limit = Limit(8)
    for _ in range(8):
        limit.overloaded(sent_at=1.0, now=2.0)
    assert limit.current == 5
    limit.overloaded(sent_at=1.9, now=3.0)
    assert limit.current == 5, "it was out before the cut"
    limit.overloaded(sent_at=2.0, now=3.0)
    assert limit.current == 5, "it was sent as the first of the others ended"
    limit.overloaded(sent_at=2.5, now=3.0)
    assert limit.current == 3


def test_one_request_is_always_allowed() -> None:
    limit = Limit(8)
    for second in range(50):
        limit.overloaded(sent_at=second + 0.5, now=second + 1.0)
    assert limit.current == 1
    assert limit.free(in_flight=0, ceiling=8) == 1
    limits = []
    for _ in range(4):
        limit.succeeded("rows", in_flight=limit.current, now=60.0)
        limits.append(limit.current)
    assert limits == [2, 2, 2, 3], "however long it was so low, it comes back as slowly"


def test_it_grows_by_one_for_a_limits_worth_of_successes_and_never_above_its_maximum() -> None:
    limit = Limit(8)
    limit.overloaded(sent_at=1.0, now=2.0)
    before = limit.current
    for _ in range(before + 1):
        limit.succeeded("rows", in_flight=limit.current, now=3.0)
    assert limit.current == before + 1
    for _ in range(1_000):
        limit.succeeded("rows", in_flight=limit.current, now=3.0)
    assert limit.current == 8


def test_it_does_not_grow_while_it_is_not_in_use() -> None:
    limit = Limit(8)
    limit.overloaded(sent_at=1.0, now=2.0)
    for _ in range(1_000):
        limit.succeeded("rows", in_flight=limit.current - 1, now=3.0)
    assert limit.current == 5


def test_whoever_asks_for_more_raises_it_unless_it_is_lowered_now() -> None:
    limit = Limit()
    assert (limit.current, limit.once_allowed(6)) == (1, 6)
    limit.allow(6)
    assert (limit.current, limit.once_allowed(6), limit.once_allowed(9)) == (6, 6, 9)
    limit.allow(3)
    assert limit.current == 6, "another one wants as much still"
    limit.overloaded(sent_at=1.0, now=2.0)
    assert limit.once_allowed(9) == 4
    limit.allow(9)
    assert limit.current == 4, "it has to find out first"
    for _ in range(1_000):
        limit.succeeded("rows", in_flight=limit.current, now=3.0)
    assert limit.current == 9


@pytest.mark.parametrize(
    ("in_flight", "ceiling", "free"), [(0, 8, 4), (3, 8, 1), (4, 8, 0), (6, 8, 0), (0, 2, 2), (3, 2, 0)]
)
def test_what_is_free_keeps_to_limit_and_ceiling(in_flight: int, ceiling: int, free: int) -> None:
    assert Limit(4).free(in_flight, ceiling) == free


def test_it_remembers_when_anything_was_last_acknowledged() -> None:
    limit = Limit(4)
    limit.succeeded("rows", in_flight=1, now=7.0)
    limit.overloaded(sent_at=6.0, now=8.0)
    assert limit.progress_at == limit.progress_of("rows") == 7.0 and limit.progress_of("queries") < 0

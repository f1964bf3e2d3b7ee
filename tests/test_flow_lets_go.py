"""A flow holds nothing that is done with, however many items a stage has made at once."""

from __future__ import annotations

import weakref
from collections.abc import AsyncIterator

import pytest

from llama_index_milvus_async_ext._flow.stages import Stage, Stopwatch, flow


class Thing:
    pass


@pytest.mark.parametrize("ordered", [True, False])
async def test_a_stage_lets_go_of_each_item_that_it_has_handed_on(ordered: bool) -> None:
    made: list[weakref.ref[Thing]] = []
    alive: list[int] = []

    async def source() -> AsyncIterator[None]:
        yield None

    async def all_at_once(_: list[None]) -> list[Thing]:
        things = [Thing() for _ in range(20)]
        made.extend(map(weakref.ref, things))
        return things

    async def one_by_one(things: list[Thing]) -> list[Thing]:
        alive.append(sum(ref() is not None for ref in made))
        return []

    stages = [Stage("many", all_at_once, ordered=ordered), Stage("one", one_by_one)]
    await flow(source(), stages, Stopwatch())
    assert len(alive) == 20
    assert alive[10] <= 13, alive  # ten are gone, but for one or two on their way

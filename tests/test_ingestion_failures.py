"""Ingestion: what a failure of each stage costs, what is said of it, and what the next run makes good."""

from __future__ import annotations

import asyncio
import os
import pickle
import re
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_index.core.schema import BaseNode, Document, NodeRelationship, RelatedNodeInfo, TextNode
from pymilvus.exceptions import MilvusException

from llama_index_milvus_async_ext import AsyncMilvusVectorStore, AsyncMilvusWriter, RetryPolicy
from llama_index_milvus_async_ext._ingest.embedding import embed_nodes
from llama_index_milvus_async_ext.ingestion import FailedDocument, IngestionError, IngestionReport, aingest, ingest
from tests import programs
from tests.conftest import examples
from tests.fault_proxy import FaultProxy
from tests.faults import First, LoseAnswer, MilvusError, Nth, Refuse
from tests.ingesting import (
    BOTH_NAMES,
    DIM,
    Ingest,
    Lines,
    Model,
    both,
    counts,
    doc,
    docs,
    expected,
    held,
    writing_to,
)
from tests.waiting import blocked_until


def through(proxy: FaultProxy, collection_name: str) -> AsyncMilvusVectorStore:
    policy = RetryPolicy(max_attempts=3, initial_backoff_seconds=0.01, max_backoff_seconds=0.02, deadline_seconds=30)
    return AsyncMilvusVectorStore(
        uri=proxy.uri, collection_name=collection_name, dim=DIM, consistency_level="Strong", retry=policy
    )


def stages_of(report: IngestionReport) -> dict[str | None, str]:
    return {each.document_id: each.stage for each in report.failed}


# --- one bad document


@both
def test_a_document_that_the_splitter_refuses_costs_no_other(store: AsyncMilvusVectorStore, run: Ingest) -> None:
    documents = [*docs(3), doc("bad", "one", "unsplittable"), *docs(6)[3:]]
    report = run(writing_to(store), documents, on_failure="collect")
    assert counts(report) == (6, 0, 0, 0, 1)
    assert stages_of(report) == {"bad": "transform"}
    assert str(report.failed[0].error) == "this line can't be split"
    assert held(store) == expected(docs(6))
    documents[3] = doc("bad", "one", "mended")
    assert counts(run(writing_to(store), documents)) == (1, 0, 6, 0, 0)


@both
def test_a_text_that_the_model_refuses_fails_alone(store: AsyncMilvusVectorStore, run: Ingest) -> None:
    model = Model(embed_batch_size=64)
    documents = [*docs(30), doc("bad", "fine", "refused", "fine as well"), *docs(60)[30:]]
    report = run(writing_to(store, model), documents, on_failure="collect")
    assert counts(report) == (60, 0, 0, 0, 1)
    assert stages_of(report) == {"bad": "embed"}
    assert report.texts_embedded == 122, "all but the one that was refused"
    assert held(store) == expected(docs(60))


@both
def test_while_the_model_is_down_all_documents_fail_and_keep_their_earlier_version(
    store: AsyncMilvusVectorStore, run: Ingest
) -> None:
    run(writing_to(store), docs(20))
    model = Model(embed_batch_size=50)
    model.is_down = True
    now = [*docs(200, version="second"), doc("long", *(f"line {n}" for n in range(1_000)))]
    report = run(writing_to(store, model), now, on_failure="collect")
    assert counts(report) == (0, 0, 0, 0, 201)
    assert {each.stage for each in report.failed} == {"embed"}
    assert all(isinstance(each.error, ConnectionError) for each in report.failed)
    # Of the 400 texts that come two by two, none is asked for more than twice; of the others, few are.
    assert model.calls <= 2 * 400 + 200
    assert held(store) == expected(docs(20)), "what was there is there"
    model.is_down = False
    assert counts(run(writing_to(store, model), now)) == (181, 20, 0, 0, 0)


async def outcome_of(texts: int, refused: set[int]) -> tuple[set[int], int, int]:
    """Which of so many texts could not be embedded, by how many calls, and how many have embeddings."""
    calls = 0

    async def embed(some: list[str]) -> list[list[float]]:
        nonlocal calls
        calls += 1
        if any(int(text) in refused for text in some):
            raise ValueError("refused")
        return [[1.0]] * len(some)

    nodes = [TextNode(text=str(number)) for number in range(texts)]
    errors = await embed_nodes(nodes, embed)
    return set(errors), calls, sum(node.embedding is not None for node in nodes)


@settings(max_examples=examples(100), deadline=None)
@given(st.integers(1, 300), st.data())
async def test_few_refused_texts_are_found_by_halving(texts: int, data: st.DataObject) -> None:
    refused = data.draw(st.sets(st.integers(0, texts - 1), max_size=2))
    failed, calls, embedded = await outcome_of(texts, refused)
    assert failed == refused and embedded == texts - len(refused)
    assert calls <= 1 + 2 * len(refused) * (texts - 1).bit_length()


@pytest.mark.parametrize("texts", [1, 2, 5, 100, 1_000])
async def test_a_model_that_refuses_everything_is_asked_few_times(texts: int) -> None:
    failed, calls, embedded = await outcome_of(texts, set(range(texts)))
    assert len(failed) == texts and not embedded
    assert calls <= 2 * texts.bit_length() + 4


class Ending(Lines):
    """Raises, of a document that asks for it, what no future can hold."""

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[BaseNode]:
        if any("stop" in node.get_content() for node in nodes):
            raise StopIteration  # as a `next()` that finds nothing
        return super().__call__(nodes)


@both
@pytest.mark.parametrize("num_workers", [None, pytest.param(1, marks=pytest.mark.slow)])
def test_a_transformation_that_raises_stop_iteration_costs_its_document_alone(
    store: AsyncMilvusVectorStore, run: Ingest, num_workers: int | None
) -> None:
    pipeline = writing_to(store, transformations=[Ending(), Model(), AsyncMilvusWriter(store)])
    report = run(pipeline, [*docs(2), doc("bad", "stop")], num_workers=num_workers, on_failure="collect")
    assert counts(report) == (2, 0, 0, 0, 1)
    assert stages_of(report) == {"bad": "transform"}
    assert "StopIteration" in str(report.failed[0].error)


@both
def test_a_model_that_gives_too_few_vectors_fails_what_it_was_given(store: AsyncMilvusVectorStore, run: Ingest) -> None:
    class Short(Model):
        def _embed(self, texts: list[str]) -> list[list[float]]:
            return super()._embed(texts)[: -1 if len(texts) > 1 or "odd" in texts[0] else None]

    report = run(writing_to(store, Short()), [doc("d0", "one"), doc("d1", "odd")], on_failure="collect")
    assert counts(report) == (1, 0, 0, 0, 1)
    assert "0 vectors for 1 texts" in str(report.failed[0].error)


class Poison(Lines):
    """Makes nodes that can't be stored of lines that ask for it."""

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[BaseNode]:
        made = super().__call__(nodes)
        for node in made:
            if node.get_content() == "nan":
                node.embedding = [float("nan")] * DIM
            elif node.get_content() == "large":
                node.metadata["large"] = "x" * 40_000  # stored twice
            elif node.get_content() == "short":
                node.embedding = [1.0]
            elif node.get_content() == "same":
                node.id_ = "the same"
            elif node.get_content() == "unicode":
                node.text = "\ud800"
        return made


@both
@pytest.mark.parametrize(
    ("poison", "message"),
    [("nan", "can't be stored: its embedding"), ("large", "bytes as JSON"), ("short", "has 1 dimensions")],
)
def test_a_node_that_cannot_be_stored_costs_its_document_alone(
    store: AsyncMilvusVectorStore, run: Ingest, poison: str, message: str
) -> None:
    pipeline = writing_to(store, transformations=[Poison(), AsyncMilvusWriter(store, embed_model=Model())])
    run(pipeline, [doc("bad", "well so far"), *docs(3)])
    report = run(pipeline, [doc("bad", "one", poison, "two"), *docs(6)], on_failure="collect")
    assert counts(report) == (3, 0, 3, 0, 1)
    (failed,) = report.failed
    assert (failed.document_id, failed.stage) == ("bad", "write")
    assert message in str(failed.error)
    assert failed.report is not None
    assert len(failed.report.failed) == 1 and len(failed.report.written) == 2, "what became of each of its nodes"
    now = held(store)
    assert now.pop("bad") == ["well so far"], "the earlier version is there, whole, and nothing of the other"
    assert now == expected(docs(6))
    assert counts(run(pipeline, [doc("bad", "mended"), *docs(6)])) == (0, 1, 6, 0, 0)
    assert held(store) == expected([doc("bad", "mended"), *docs(6)])


@both
def test_text_that_is_not_valid_unicode_costs_its_document_alone(store: AsyncMilvusVectorStore, run: Ingest) -> None:
    pipeline = writing_to(store, transformations=[Poison(), AsyncMilvusWriter(store, embed_model=Model())])
    documents = [*docs(2), doc("bad", "unicode"), doc("worse", "\ud800"), doc("worst", "text", page="\ud800")]
    report = run(pipeline, documents, on_failure="collect")
    assert (report.added, {each.document_id for each in report.failed}) == (2, {"bad", "worse", "worst"})
    assert held(store) == expected(docs(2))


@both
def test_two_nodes_of_one_id_fail_their_documents_and_are_named(store: AsyncMilvusVectorStore, run: Ingest) -> None:
    pipeline = writing_to(store, transformations=[Poison(), Model(), AsyncMilvusWriter(store)])
    report = run(pipeline, [doc("d0", "same", "other", "same"), doc("d1", "fine")], on_failure="collect")
    assert counts(report) == (1, 0, 0, 0, 1)
    assert "nodes 0 and 2 of document 'd0' have the same id 'the same'" in str(report.failed[0].error)
    report = run(pipeline, [doc("d2", "same"), doc("d3", "same"), doc("d1", "fine")], on_failure="collect")
    assert report.added + len(report.failed) == 2 and report.unchanged == 1
    for each in report.failed:
        assert "have nodes of the same id" in str(each.error)


@both
def test_nodes_of_one_id_in_two_documents_are_never_both_taken_for_whole(
    store: AsyncMilvusVectorStore, run: Ingest
) -> None:
    pipeline = writing_to(store, transformations=[Poison(), Model(), AsyncMilvusWriter(store)])
    run(pipeline, [doc("d0", "same", "one")])
    report = run(pipeline, [doc("d1", "same", "two")], on_failure="collect")  # takes d0's row away
    assert report.added + len(report.failed) == 1
    again = run(pipeline, [doc("d0", "same", "one")], on_failure="collect")
    assert again.unchanged == 0 or report.failed, "one of them must say so, or be written again"


# --- streams that end early


def found_cancelled() -> Iterator[Document]:
    yield from docs(3)
    raise asyncio.CancelledError  # as of a future of another loop


class AwaitsWhatIsCancelled:
    """A stream that awaits something of its own, which somebody has cancelled: a pool that was shut down."""

    async def __aiter__(self) -> AsyncIterator[Document]:
        for each in docs(3):
            yield each
        pool = asyncio.ensure_future(asyncio.sleep(60))
        asyncio.get_running_loop().call_soon(pool.cancel)
        await pool


@both
@pytest.mark.parametrize(
    "stream",
    [
        found_cancelled,
        pytest.param(
            AwaitsWhatIsCancelled,
            marks=pytest.mark.skipif(sys.version_info < (3, 11), reason="nobody can tell on Python 3.10"),
        ),
    ],
)
def test_a_stream_in_which_something_was_cancelled_is_a_stream_that_raises(
    store: AsyncMilvusVectorStore, run: Ingest, stream: Callable[[], Any]
) -> None:
    report = run(writing_to(store), stream(), on_failure="collect", delete_missing=True)
    assert counts(report) == (3, 0, 0, 0, 1)
    assert stages_of(report) == {None: "read"}
    assert isinstance(report.failed[0].error.__cause__, asyncio.CancelledError)
    assert held(store) == expected(docs(3))


async def test_a_run_that_is_cancelled_while_its_stream_awaits_is_cancelled(store: AsyncMilvusVectorStore) -> None:
    has_begun = asyncio.Event()

    async def stream() -> AsyncIterator[Document]:
        yield docs(1)[0]
        has_begun.set()
        await asyncio.sleep(60)

    running = asyncio.create_task(aingest(writing_to(store), stream(), on_failure="collect"))
    await has_begun.wait()
    running.cancel()
    await asyncio.wait([running])
    assert running.cancelled()


# --- what the caller wants to be done about failures


@both
def test_raising_comes_after_all_that_can_be_done(store: AsyncMilvusVectorStore, run: Ingest) -> None:
    bad = [doc(f"bad{n}", "unsplittable") for n in range(5)]
    with pytest.raises(IngestionError) as raised:
        run(writing_to(store), [*bad, *docs(3)])
    assert held(store) == expected(docs(3))
    report = raised.value.report
    assert (report.ok, report.documents) == (False, 8)
    lines = str(raised.value).splitlines()
    assert lines[0] == "5 of 8 documents were not ingested:"
    # They are split beside each other: which of them fails first, nobody knows.
    assert re.fullmatch(r"  document 'bad[0-4]', transform: ValueError: this line can't be split", lines[1])
    assert lines[4] == "  and 2 more"
    assert isinstance(raised.value.__cause__, ValueError)
    copied = pickle.loads(pickle.dumps(raised.value))
    assert isinstance(copied, IngestionError)
    assert str(copied) == str(raised.value) and copied.report.documents == 8


@both
@pytest.mark.parametrize("is_async", [False, True], ids=["iterable", "async-iterable"])
def test_too_many_failures_end_the_reading(store: AsyncMilvusVectorStore, run: Ingest, is_async: bool) -> None:
    read = 0

    def bad() -> Iterator[Document]:
        nonlocal read
        for n in range(100_000):
            read += 1
            yield doc(f"bad{n}", "unsplittable")

    async def awaited() -> AsyncIterator[Document]:
        for each in bad():
            yield each

    stream = awaited if is_async else bad
    run(writing_to(store), docs(3), source="s")
    report = run(writing_to(store), stream(), source="s", max_failures=5, delete_missing=True, on_failure="collect")
    assert len(report.failed) > 5
    assert read < 20_000, "no more than what is under way at once"
    assert report.documents == read, "and each of them stands in the report"
    assert len({each.document_id for each in report.failed}) == read
    assert held(store) == expected(docs(3)), "and nothing is deleted"


@both
def test_what_had_been_read_when_the_run_gave_up_says_so(store: AsyncMilvusVectorStore, run: Ingest) -> None:
    run(writing_to(store), docs(1))
    documents = [*docs(1), doc("bad", "unsplittable"), *docs(50)[1:]]
    report = run(writing_to(store), documents, max_failures=0, on_failure="collect")
    assert report.documents == 51
    errors = {each.document_id: str(each.error) for each in report.failed}
    assert errors.pop("bad") == "this line can't be split"
    assert set(errors.values()) == {"given up, as more than 0 documents had failed (max_failures)"}
    assert report.unchanged == 1
    assert run(writing_to(store), docs(50)).ok
    assert held(store) == expected(docs(50))


@both
def test_as_many_failures_as_are_allowed_end_nothing(store: AsyncMilvusVectorStore, run: Ingest) -> None:
    documents = [doc("b0", "unsplittable"), doc("b1", "refused"), *docs(50)]
    report = run(writing_to(store), documents, max_failures=2, on_failure="collect")
    assert counts(report) == (50, 0, 0, 0, 2)


def test_a_report_is_short_and_counts_what_was_done(store: AsyncMilvusVectorStore) -> None:
    report = ingest(writing_to(store), [*docs(3), doc("bad", "refused")], on_failure="collect")
    assert repr(report).startswith(
        "IngestionReport(added=3, replaced=0, unchanged=0, deleted=0, failed=1, nodes=6, texts_embedded=6, retries=0, "
        "elapsed_seconds="
    )
    assert {"read", "look-up", "transform", "embed", "write", "settle"} <= set(report.stage_seconds)
    assert all(0 <= seconds <= report.elapsed_seconds for seconds in report.stage_seconds.values())
    with pytest.raises(IngestionError):
        report.raise_for_failures()
    IngestionReport(added=1).raise_for_failures()
    assert pickle.loads(pickle.dumps(report)).added == 3
    of_stream = IngestionReport(failed=[FailedDocument(None, "read", OSError("gone"))])
    assert "the stream, read: OSError: gone" in str(IngestionError(of_stream))


# --- Milvus


@both
def test_a_write_that_is_refused_once_is_repeated_and_counted(
    proxy: FaultProxy, collection_name: str, run: Ingest
) -> None:
    with through(proxy, collection_name) as store:
        proxy.script(method="Upsert", fault=Refuse(), on=First(1))

        def stream() -> Iterator[Document]:  # a request that two writes share would count for both
            yield from docs(5)[:1]
            blocked_until(lambda: proxy.counts["Upsert"] > 0)
            yield from docs(5)[1:]

        report = run(writing_to(store), stream())
        assert counts(report) == (5, 0, 0, 0, 0)
        assert report.retries == 1
        assert held(store) == expected(docs(5))


@both
def test_an_answer_that_is_lost_doubles_nothing(proxy: FaultProxy, collection_name: str, run: Ingest) -> None:
    with through(proxy, collection_name) as store:
        proxy.script(method="Upsert", fault=LoseAnswer(), on=Nth(1))
        assert counts(run(writing_to(store), docs(5))) == (5, 0, 0, 0, 0)
        assert held(store) == expected(docs(5))


@both
@pytest.mark.parametrize("mode", ["refused", "lost"])
def test_documents_that_cannot_be_written_are_there_in_their_earlier_version(
    proxy: FaultProxy, collection_name: str, run: Ingest, mode: str
) -> None:
    with through(proxy, collection_name) as store:
        run(writing_to(store), docs(5))
        fault = MilvusError(65535, "broken") if mode == "refused" else LoseAnswer()
        proxy.script(method="Upsert", fault=fault)
        now = docs(7, version="second")
        report = run(writing_to(store), now, on_failure="collect", delete_missing=True)
        assert counts(report) == (0, 0, 0, 0, 7)
        assert {each.stage for each in report.failed} == {"write"}
        for each in report.failed:
            assert each.report is not None
            assert len(each.report.unknown if mode == "lost" else each.report.failed) == 2
        proxy.heal()
        there = held(store)
        assert all(set(there[each.node_id]) >= set(expected([each])[each.node_id]) for each in docs(5))
        run(writing_to(store), now)
        assert held(store) == expected(now)


@both
def test_what_was_certainly_not_written_is_not_deleted(proxy: FaultProxy, collection_name: str, run: Ingest) -> None:
    with through(proxy, collection_name) as store:
        run(writing_to(store), docs(2))
        proxy.script(MilvusError(65535, "broken"), method="Upsert")
        before = proxy.counts["Delete"]
        report = run(writing_to(store), docs(5, version="second"), on_failure="collect")
        assert counts(report) == (0, 0, 0, 0, 5)
        assert proxy.counts["Delete"] == before, "in an outage each of them would take as long as the write has"
        proxy.heal()
        assert held(store) == expected(docs(2))


@both
def test_of_a_document_written_in_part_only_what_was_written_is_deleted(
    store: AsyncMilvusVectorStore, run: Ingest
) -> None:
    of_d = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id="d")}
    other = TextNode(id_="d#1", text="of another run", embedding=Model().vector("two"), relationships=of_d)

    class Unwritable(Lines):
        """Its last node can't be stored; but another run, that goes on beside this one, has stored it."""

        def __call__(self, nodes: Any, **kwargs: Any) -> Any:
            store.add([other])
            made = super().__call__(nodes)
            made[-1].embedding = [float("nan")] * DIM
            return made

    steps = [Unwritable(own_ids=True), AsyncMilvusWriter(store, embed_model=Model())]
    report = run(writing_to(store, transformations=steps), [doc("d", "one", "two")], on_failure="collect")
    assert counts(report) == (0, 0, 0, 0, 1)
    assert held(store) == {"d": ["of another run"]}


@both
def test_documents_that_cannot_be_looked_up_fail_and_are_left_alone(
    proxy: FaultProxy, collection_name: str, run: Ingest
) -> None:
    with through(proxy, collection_name) as store:
        run(writing_to(store), docs(5))
        proxy.script(method="Query", fault=MilvusError(65535, "broken"))
        model = Model()
        report = run(writing_to(store, model), docs(5, version="second"), on_failure="collect")
        assert {(each.document_id, each.stage) for each in report.failed} == {(f"d{n}", "look-up") for n in range(5)}
        assert all(isinstance(each.error, MilvusException) for each in report.failed)
        assert model.calls == 0
        proxy.heal()
        assert held(store) == expected(docs(5))


@both
def test_what_is_stale_and_cannot_be_deleted_is_reported_and_deleted_by_the_next_run(
    proxy: FaultProxy, collection_name: str, run: Ingest
) -> None:
    with through(proxy, collection_name) as store:
        run(writing_to(store), docs(5))
        proxy.script(method="Delete", fault=MilvusError(65535, "broken"))
        now = [*docs(2, version="second"), *docs(6)[2:5], doc("new", "one")]
        report = run(writing_to(store), now, on_failure="collect")
        assert (report.added, report.unchanged, stages_of(report)) == (1, 3, {"d0": "delete", "d1": "delete"})
        proxy.heal()
        model = Model()
        assert counts(run(writing_to(store, model), now)) == (0, 0, 6, 0, 0)
        assert model.calls == 0, "the new version is there already"
        assert held(store) == expected(now)


@both
def test_missing_documents_that_cannot_be_deleted_are_a_failure_of_the_run(
    proxy: FaultProxy, collection_name: str, run: Ingest
) -> None:
    with through(proxy, collection_name) as store:
        run(writing_to(store), docs(5))
        proxy.script(method="Delete", fault=MilvusError(65535, "broken"))
        report = run(writing_to(store), docs(2), delete_missing=True, on_failure="collect")
        assert counts(report) == (0, 0, 2, 0, 1)
        assert stages_of(report) == {None: "delete"}
        proxy.heal()
        assert counts(run(writing_to(store), docs(2), delete_missing=True)) == (0, 0, 2, 3, 0)


# --- worker processes

_WORKERS = """
import os
import sys

from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter

from llama_index_milvus_async_ext import AsyncMilvusVectorStore, AsyncMilvusWriter
from llama_index_milvus_async_ext.ingestion import ingest
from tests.ingesting import DIM, Lines, Model, docs, expected, held
from tests.ingesting import asynchronously


class Killing(Lines):
    def __call__(self, nodes, **kwargs):
        if any("poison" in node.get_content() for node in nodes):
            os._exit(3)
        for node in nodes:
            node.metadata["in_worker"] = os.getpid() != PARENT
        return super().__call__(nodes)


def main():
    from tests.ingesting import doc, counts

    uri, name, way = sys.argv[1:]
    run = {"sync": ingest, "async": asynchronously}[way]
    with AsyncMilvusVectorStore(uri=uri, collection_name=name, dim=DIM, consistency_level="Strong") as store:
        pipeline = IngestionPipeline(transformations=[Killing(), SentenceSplitter(), Model()], vector_store=store)
        good = docs(30)
        documents = [*good[:9], doc("poison", "poison"), *good[9:]]
        report = run(pipeline, documents, num_workers=2, on_failure="collect")
        assert counts(report) == (30, 0, 0, 0, 1), report
        (failed,) = report.failed
        assert (failed.document_id, failed.stage, type(failed.error).__name__) == (
            "poison", "transform", "BrokenProcessPool"), failed
        assert held(store) == expected(good)
        assert counts(run(pipeline, docs(30), num_workers=2)) == (0, 0, 30, 0, 0)
        print("as it should be")


PARENT = int(os.environ.setdefault("TEST_PARENT", str(os.getpid())))
if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", BOTH_NAMES)
def test_a_transformation_that_kills_its_worker_process_costs_its_document_alone(
    tmp_path: Any, collection_name: str, way: str
) -> None:
    script = tmp_path / "workers.py"
    script.write_text(_WORKERS)
    environment = {**os.environ, "PYTHONPATH": str(programs.ROOT)}
    ended = programs.run(script, str(tmp_path / "own.db"), collection_name, way, timeout=200, environment=environment)
    assert ended.stdout.strip().endswith("as it should be"), ended

"""Ingestion against a model: whatever comes and fails, the collection is in step after the next clean run.

And what its decisions rest on, as pure functions: what a collection's rows say of a document, and versions.
"""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import Document, TextNode

from llama_index_milvus_async_ext import AsyncMilvusVectorStore, AsyncMilvusWriter, RetryPolicy
from llama_index_milvus_async_ext._ingest.standing import Standing, digest, digest_of_keys, record_bytes, standing
from llama_index_milvus_async_ext._ingest.versions import described, hash_of, named_version, version_of
from llama_index_milvus_async_ext._store.records import StoredRow
from llama_index_milvus_async_ext.ingestion import IngestionReport, aingest, ingest
from tests.conftest import examples
from tests.fault_proxy import FaultProxy
from tests.faults import Chance, LoseAnswer, MilvusError, Refuse
from tests.ingesting import DIM, Lines, Model, asynchronously, doc, held

# --- what a collection's rows say

texts = st.text(max_size=5)
versions = st.sampled_from(["v1", "v2", "v3"])


@st.composite
def attempts(draw: st.DrawFn) -> list[tuple[str, list[str], list[str]]]:
    """Attempts at a document: the version of each, the keys that it was to write, and those that are there."""
    made = []
    for number in range(draw(st.integers(0, 5))):
        keys = [f"{number}-{place}" for place in range(draw(st.integers(1, 4)))]
        there = draw(st.one_of(st.just(keys), st.lists(st.sampled_from(keys), unique=True)))
        made.append((draw(versions), keys, there))
    return made


@settings(max_examples=examples(500), deadline=None)
@given(attempts(), versions, st.integers(0, 3), st.randoms(use_true_random=False))
def test_a_whole_attempt_is_recognised_among_any_others_and_stale_is_exactly_the_rest(
    made: list[tuple[str, list[str], list[str]]], wanted: str, foreign: int, chance: Any
) -> None:
    rows = [
        StoredRow(key, "d", json.loads(record_bytes(version, keys, "s")))
        for version, keys, there in made
        for key in there
    ]
    rows += [StoredRow(f"foreign-{number}", "d", None) for number in range(foreign)]
    whole = [set(keys) for version, keys, there in made if version == wanted and set(keys) == set(there)]
    chance.shuffle(rows)
    found = standing(rows, wanted)
    kept = {row.key for row in rows} - set(found.stale)
    assert found.is_known == bool(rows)
    assert found.is_whole == bool(whole)
    assert kept in whole if whole else not kept
    assert len(found.stale) + len(kept) == len(rows)
    chance.shuffle(rows)
    again = standing(rows, wanted)
    assert set(again.stale) == set(found.stale), "whoever looks, in whatever order, keeps the same one"


def test_rows_with_records_of_other_shapes_belong_to_no_version() -> None:
    rows = [
        StoredRow(n, "d", record) for n, record in enumerate([None, {}, {"version": "v"}, {"version": 3, "nodes": []}])
    ]
    assert standing(rows, "v") == Standing(True, False, [0, 1, 2, 3])
    assert standing([], "v") == Standing(False, False, [])


@given(st.lists(texts, max_size=4), st.lists(texts, max_size=4))
def test_a_digest_stands_for_the_texts_and_where_they_end(one: list[str], other: list[str]) -> None:
    assert (digest(one) == digest(other)) == (one == other)


@given(st.lists(st.one_of(texts, st.integers()), unique_by=str, max_size=6), st.randoms(use_true_random=False))
def test_the_order_of_keys_is_nothing_to_their_digest(keys: list[Any], chance: Any) -> None:
    shuffled = list(keys)
    chance.shuffle(shuffled)
    assert digest_of_keys(keys) == digest_of_keys(shuffled)
    assert digest_of_keys(keys) != digest_of_keys([*keys, "one more"]) or "one more" in keys


@given(st.text(st.characters(exclude_categories=["Cs"])), st.lists(texts, max_size=3))
def test_a_record_is_json_whatever_the_source_is_called(source: str, keys: list[str]) -> None:
    assert json.loads(record_bytes("v", keys, source)) == {
        "version": "v",
        "nodes": digest_of_keys(keys),
        "source": source,
    }


# --- versions


def test_whatever_changes_the_nodes_of_a_document_changes_its_version() -> None:
    same = [doc("d", "text", page=1), doc("another", "text", page=1)]
    same += [copy.deepcopy(same[0]), pickle.loads(pickle.dumps(same[0])), Document.from_dict(same[0].to_dict())]
    hidden, templated = doc("d", "text", page=1), doc("d", "text", page=1)
    hidden.excluded_embed_metadata_keys = ["page"]
    templated.text_template = "{content}"
    others: list[tuple[Any, str, str]] = [
        (doc("d", "text", page=2), "p", "s"),
        (doc("d", "text"), "p", "s"),
        (doc("d", "text "), "p", "s"),
        (hidden, "p", "s"),
        (templated, "p", "s"),
        (TextNode(id_="d", text="text", metadata={"page": 1}), "p", "s"),
        (same[0], "another", "s"),
        (same[0], "p", "another"),
    ]
    assert len({version_of(each, "p", "s") for each in same}) == 1
    assert len({version_of(same[0], "p", "s"), *(version_of(*each) for each in others)}) == 1 + len(others)
    assert named_version("a", same[0], "s") != named_version("a", same[0], "t")


ONE_WAY, THE_OTHER = {0, 8}, {8, 0}  # equal, but as texts they differ, as others do in another process


def test_the_order_of_a_set_is_nothing_to_the_version() -> None:
    assert repr(ONE_WAY) != repr(THE_OTHER)
    for kind in (Document, TextNode):
        deep = [
            kind(id_="d", text="t", metadata={"tags": tags, "deep": [{"tags": ({"a"}, frozenset(tags))}]})
            for tags in (ONE_WAY, THE_OTHER)
        ]
        assert len({hash_of(each) for each in deep}) == len({version_of(each, "p", "s") for each in deep}) == 1
    kinds = [ONE_WAY, frozenset(ONE_WAY), list(ONE_WAY), ONE_WAY | {1}, {"0", "8"}, set()]
    assert len({version_of(doc("d", "t", tags=each), "p", "s") for each in kinds}) == len(kinds)


def test_where_no_set_is_the_hash_is_llama_index_own_and_the_version_what_it_was() -> None:
    plain = doc("d", "t", names=["a", ("b", None)], deep={"page": 1})
    assert hash_of(plain) == plain.hash
    assert version_of(plain, "p", "s") == "3815de7e527dceb144796560"


def test_settings_that_decide_what_is_made_are_described_and_others_are_not() -> None:
    class Remote(Model):
        api_key: str = ""
        settings: Any = None

    base = [SentenceSplitter(chunk_size=64, chunk_overlap=0), Remote()]
    same: list[list[Any]] = [
        [SentenceSplitter(chunk_size=64, chunk_overlap=0), Remote(embed_batch_size=3, num_workers=2, api_key="k")],
        [copy.deepcopy(base[0]), pickle.loads(pickle.dumps(Model())) and Remote()],
        [SentenceSplitter(chunk_size=64, chunk_overlap=0), Remote(callback_manager=None)],
    ]
    others: list[list[Any]] = [
        [SentenceSplitter(chunk_size=65, chunk_overlap=0), Remote()],
        [SentenceSplitter(chunk_size=64, chunk_overlap=1), Remote()],
        [SentenceSplitter(chunk_size=64, chunk_overlap=0), Remote(model_name="other")],
        [SentenceSplitter(chunk_size=64, chunk_overlap=0), Remote(settings={"deep": [{"api_key": "k", "size": 2}]})],
        [SentenceSplitter(chunk_size=64, chunk_overlap=0), Model()],
        [Remote(), SentenceSplitter(chunk_size=64, chunk_overlap=0)],
        [SentenceSplitter(chunk_size=64, chunk_overlap=0)],
    ]
    assert {described(each) for each in same} == {described(base)}
    assert len({described(base), *map(described, others)}) == 1 + len(others)
    deep = [Remote(settings=[{"class_name": "Part", "api_key": key, "size": 2}]) for key in ("k", "l")]
    assert described(deep[:1]) == described(deep[1:])
    own = [Remote(settings={"device": device}) for device in ("pump", "fan")]
    assert described(own[:1]) != described(own[1:]), "a name in a dict of the user's own"
    assert described([Remote(settings={"a", "b"})]) == described([Remote(settings={"b", "a"})])
    assert described([Remote(settings=object())]) == described([Remote(settings=object())]), (
        "not where it lies in memory"
    )


# --- a machine of documents that come, change, go and fail


class Interrupted(Model):
    """A model that calls something once it has embedded so many texts, and refuses what it is told to."""

    _at: int = PrivateAttr(default=1_000_000)
    _then: Any = PrivateAttr(default=None)
    _refused: str | None = PrivateAttr(default=None)

    async def _aembed(self, texts: list[str]) -> list[list[float]]:
        await asyncio.sleep(0)
        return self._embed(texts)

    def _embed(self, texts: list[str]) -> list[list[float]]:
        if self.texts >= self._at and self._then is not None:
            self._then()
        if self._refused is not None and any(self._refused in text for text in texts):
            raise ValueError("refused")
        return super()._embed(texts)


class Refusing(Lines):
    _refused: str | None = PrivateAttr(default=None)

    def __call__(self, nodes: Any, **kwargs: Any) -> Any:
        if self._refused is not None and any(self._refused in node.get_content() for node in nodes):
            raise ValueError("can't be split")
        return super().__call__(nodes)


IDS = [f"{source}{number}" for source in "ab" for number in range(3)]
LINES = [f"text {letter}" for letter in "uvwxyz"]
ids = st.sampled_from(IDS)
lines = st.lists(st.sampled_from(LINES), max_size=6, unique=True)
sources = st.sampled_from("ab")
BROKEN = MilvusError(65535, "broken")
# pymilvus itself repeats look-ups and deletes that can't reach Milvus, until their time is up.
FAULTS = [("Upsert", BROKEN), ("Upsert", Refuse()), ("Upsert", LoseAnswer()), ("Delete", BROKEN), ("Query", BROKEN)]
RATES = st.sampled_from([0.3, 0.7, 1.0])

Content = tuple[str, ...]


class Machine(RuleBasedStateMachine):
    """Documents of two sources; of each, in which versions it may be in the collection, whole."""

    uri: str
    name: str
    proxy: FaultProxy

    @initialize()
    def begin(self) -> None:
        self.proxy.heal()
        policy = RetryPolicy(
            max_attempts=2, initial_backoff_seconds=0.001, max_backoff_seconds=0.001, deadline_seconds=30
        )
        self.store = AsyncMilvusVectorStore(
            uri=self.proxy.uri,
            collection_name=self.name,
            dim=DIM,
            consistency_level="Strong",
            retry=policy,
            batch_size=3,
        )
        self.store.client.delete(self.name, filter='id != ""')
        self.documents: dict[str, Content] = {"a-always": ("always",), "b-always": ("always",)}
        self.possible: dict[str, set[Content]] = {}
        self.model = Interrupted(embed_batch_size=2)
        self.splitter = Refusing()

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        self.proxy.heal()
        for source in "ab":
            self.run_clean(source, True, True)
        assert held(self.store) == {key: sorted(content) for key, content in self.documents.items() if content}
        self.store.close()

    # what happens to documents

    @rule(document_id=ids, content=lines)
    def put(self, document_id: str, content: list[str]) -> None:
        self.documents[document_id] = tuple(content)

    @rule(document_id=ids)
    def shorten(self, document_id: str) -> None:
        if document_id in self.documents:
            self.documents[document_id] = self.documents[document_id][:-1]

    @rule(document_id=ids)
    def remove(self, document_id: str) -> None:
        self.documents.pop(document_id, None)

    # runs

    @rule(source=sources, delete_missing=st.booleans(), is_async=st.booleans())
    def run_clean(self, source: str, delete_missing: bool, is_async: bool) -> None:
        report = self.ingested(source, self.stream(source), delete_missing=delete_missing, is_async=is_async)
        assert report is not None and report.ok, report.failed if report else None
        for key in [key for key in self.possible if key.startswith(source)]:
            if key not in self.documents and delete_missing:
                self.possible[key] = {()}
        for document in self.stream(source):
            self.possible[document.node_id] = {self.documents[document.node_id]}
        self.check()
        there = held(self.store)
        for key, content in self.documents.items():
            if key.startswith(source):
                assert there.get(key, []) == sorted(content), "nothing double, nothing stale"

    @rule(source=sources, delete_missing=st.booleans(), is_async=st.booleans(), refused=st.sampled_from(LINES))
    def run_with_refused_texts(self, source: str, delete_missing: bool, is_async: bool, refused: str) -> None:
        self.model._refused = refused
        self.run_failing(source, delete_missing, is_async)
        self.model._refused = None

    @rule(source=sources, delete_missing=st.booleans(), is_async=st.booleans(), refused=st.sampled_from(LINES))
    def run_with_a_splitter_that_raises(self, source: str, delete_missing: bool, is_async: bool, refused: str) -> None:
        self.splitter._refused = refused
        self.run_failing(source, delete_missing, is_async)
        self.splitter._refused = None

    @rule(
        source=sources,
        delete_missing=st.booleans(),
        is_async=st.booleans(),
        what=st.sampled_from(FAULTS),
        rate=RATES,
        seed=st.integers(0, 9),
    )
    def run_with_milvus_failing(
        self, source: str, delete_missing: bool, is_async: bool, what: tuple[str, Any], rate: float, seed: int
    ) -> None:
        method, fault = what
        self.proxy.script(fault, method=method, on=Chance(rate, seed))
        self.run_failing(source, delete_missing, is_async)
        self.proxy.heal()

    @rule(source=sources, delete_missing=st.booleans(), is_async=st.booleans(), after=st.integers(0, 3))
    def run_with_a_stream_that_raises(self, source: str, delete_missing: bool, is_async: bool, after: int) -> None:
        def broken() -> Iterator[Document]:
            yield from self.stream(source)[:after]
            raise OSError("gone")

        read = {document.node_id for document in self.stream(source)[:after]}
        before = {key: set(contents) for key, contents in self.possible.items()}
        report = self.run_failing(source, delete_missing, is_async, broken())
        assert report is not None and not report.ok
        there = held(self.store)
        for key, contents in before.items():
            if key not in read:
                self.possible[key] = contents
                assert any(is_within(content, there.get(key, [])) for content in contents), "neither read nor deleted"

    @rule(source=sources, delete_missing=st.booleans(), at=st.integers(0, 12))
    def run_that_is_cancelled(self, source: str, delete_missing: bool, at: int) -> None:
        async def main() -> None:
            task = asyncio.current_task()
            assert task is not None
            self.model._at, self.model._then = self.model.texts + at, task.cancel
            await aingest(self.pipeline, self.stream(source), source=source, delete_missing=delete_missing)

        self.note_attempts(source, delete_missing)
        try:
            asyncio.run(main())
        except asyncio.CancelledError as cancellation:
            assert isinstance(cancellation.report, IngestionReport)  # type: ignore[attr-defined]
        finally:
            self.model._then = None
        self.check()

    # what they have in common

    @property
    def pipeline(self) -> IngestionPipeline:
        return IngestionPipeline(transformations=[self.splitter, self.model, AsyncMilvusWriter(self.store)])

    def stream(self, source: str) -> list[Document]:
        return [doc(key, *content) for key, content in self.documents.items() if key.startswith(source)]

    def ingested(self, source: str, stream: Any, *, delete_missing: bool, is_async: bool) -> IngestionReport:
        run = asynchronously if is_async else ingest
        return run(self.pipeline, stream, source=source, delete_missing=delete_missing, on_failure="collect")

    def run_failing(self, source: str, delete_missing: bool, is_async: bool, stream: Any = None) -> IngestionReport:
        self.note_attempts(source, delete_missing)
        given = self.stream(source) if stream is None else stream
        report = self.ingested(source, given, delete_missing=delete_missing, is_async=is_async)
        failed = {each.document_id for each in report.failed}
        if stream is None:
            for document in self.stream(source):
                key = document.node_id
                if key not in failed:
                    self.possible[key] = {self.documents[key]}
        self.proxy.heal()
        self.check()
        return report

    def note_attempts(self, source: str, delete_missing: bool) -> None:
        for document in self.stream(source):
            self.possible.setdefault(document.node_id, {()}).add(self.documents[document.node_id])
        for key, contents in self.possible.items():
            if delete_missing and key.startswith(source) and key not in self.documents:
                contents.add(())

    def check(self) -> None:
        there = held(self.store)
        for key, contents in self.possible.items():
            now = there.pop(key, [])
            assert any(is_within(content, now) for content in contents), f"{key} is there in no version: {now}"
        assert not there, "nothing is there that nobody has ingested"


def is_within(content: Sequence[str], rows: Sequence[str]) -> bool:
    return not Counter(content) - Counter(rows)


@pytest.mark.slow
def test_whatever_fails_the_collection_is_in_step_after_the_next_clean_run(
    lite_uri: str, collection_name: str, proxy: FaultProxy
) -> None:
    Machine.uri, Machine.name, Machine.proxy = lite_uri, collection_name, proxy
    run_state_machine_as_test(
        Machine, settings=settings(max_examples=examples(40), stateful_step_count=15, deadline=None)
    )

"""Ingestions beside each other and beside readers: no document is ever absent, and in the end each is there once."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.ingestion import IngestionPipeline
from pymilvus import MilvusClient

from llama_index_milvus_async_ext import AsyncMilvusVectorStore, AsyncMilvusWriter, RetryPolicy
from llama_index_milvus_async_ext.ingestion import aingest
from tests import programs
from tests.conftest import Backend
from tests.embedding import HashEmbedding
from tests.fault_proxy import FaultProxy
from tests.faults import Chance, LoseAnswer, MilvusError
from tests.ingester import INGESTER
from tests.sentences import (
    MOST_SENTENCES,
    Edition,
    Texts,
    documents,
    first_edition,
    next_edition,
    nodes_of,
    rows_in,
    splitter,
    stored,
    text_of,
)
from tests.servers import LiteServer
from tests.waiting import until

DIM = 8
DOCUMENTS = 60
RUNS = 10
BAD_DATA = 1100
QUICK = RetryPolicy(initial_backoff_seconds=0.001, max_backoff_seconds=0.01, deadline_seconds=30)


class MoodyEmbedding(HashEmbedding):
    """A model that fails now and then, while `mood` says so."""

    mood: float = 0.0

    def _embed(self, texts: list[str]) -> list[list[float]]:
        vectors = super()._embed(texts)
        if random.Random(self.calls).random() < self.mood:
            raise ConnectionError("not now")
        return vectors


class Versions:
    """What may be found where the nodes of each version have ids of their own: one of the versions, whole."""

    def __init__(self, versions: dict[str, list[Counter[str]]]) -> None:
        self._versions = versions

    @classmethod
    def first(cls, edition: Edition) -> Versions:
        return cls({document: [texts] for document, texts in nodes_of(edition).items()})

    def then(self, held: Texts, edition: Edition) -> Versions:
        """From now on, documents may be there in this version as well; or still in one that they are there in."""
        new = nodes_of(edition)
        return Versions(
            {
                document: [new[document], *(version for version in versions if version <= held[document])]
                for document, versions in self._versions.items()
            }
        )

    def allows(self, document: str, found: Counter[str]) -> bool:
        return any(version <= found for version in self._versions[document])


class Places:
    """What may be found where a node has its predecessor's id: what stood in each place, or what is to stand there.

    What both the old and the new version have is never absent.
    """

    def __init__(self, held: Texts, new: Texts) -> None:
        self._texts = {document: held[document] | new[document] for document in new}
        self._kept = {document: places(held[document]) & places(new[document]) for document in new}

    @classmethod
    def first(cls, edition: Edition) -> Places:
        return cls(nodes_of(edition), nodes_of(edition))

    def then(self, held: Texts, edition: Edition) -> Places:
        return Places(held, nodes_of(edition))

    def allows(self, document: str, found: Counter[str]) -> bool:
        is_once = sum(found.values()) == len(places(found))
        return found <= self._texts[document] and self._kept[document] <= places(found) and is_once


def places(texts: Counter[str]) -> set[str]:
    """The numbers of these sentences."""
    return {text.split()[1] for text in texts}


class Reader:
    """Asks for all documents all the time, in another thread.

    Attributes:
        looks: How often it has had an answer.
        torn: The number of the look, and what it found of a document, where that may not be.
    """

    def __init__(self, uri: str, collection: str, edition: Edition, expected: Versions | Places) -> None:
        self.looks = 0
        self.torn: list[tuple[int, str, Counter[str]]] = []
        self.error: BaseException | None = None
        self._expected = expected
        self._documents = sorted(edition)
        self._client = MilvusClient(uri)
        self._collection = collection
        self._is_over = False
        self._thread = threading.Thread(target=self._run)

    def expect(self, edition: Edition) -> None:
        """An update to this edition begins."""
        self._expected = self._expected.then(self.look(), edition)

    def look(self) -> Texts:
        found = self._client.query(
            self._collection,
            filter=f"doc_id in {json.dumps(self._documents)}",
            output_fields=["doc_id", "text"],
            consistency_level="Strong",
        )
        texts: Texts = {}
        for row in found:
            texts.setdefault(row["doc_id"], Counter())[row["text"]] += 1
        return texts

    def has_looked_anew(self) -> Callable[[], bool]:
        """Tells whether it has had an answer to something that it asked from now on."""
        after_next = self.looks + 2
        return lambda: self.looks >= after_next or self.error is not None

    def _run(self) -> None:
        try:
            while not self._is_over:
                before = self._expected
                texts = self.look()
                for document in self._documents:
                    found = texts.get(document, Counter())
                    if not before.allows(document, found) and not self._expected.allows(document, found):
                        self.torn.append((self.looks, document, found))
                self.looks += 1
        except BaseException as error:
            self.error = error

    def __enter__(self) -> Reader:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        self._thread.join()
        self._client.close()
        if self.error is not None:
            raise self.error


async def updated_again_and_again(
    backend: Backend, proxy: FaultProxy, collection: str, expected: type[Versions] | type[Places], rows_per_write: int
) -> Reader:
    """Update all documents ten times, while a reader looks; half of these runs fail in parts."""
    chance = random.Random(10)
    names = [f"document {number}" for number in range(DOCUMENTS)]
    edition = {name: text_of(name, 0, chance.randint(1, MOST_SENTENCES)) for name in names}
    store = AsyncMilvusVectorStore(
        uri=proxy.uri, collection_name=collection, dim=DIM, batch_size=rows_per_write, retry=QUICK
    )
    model = MoodyEmbedding(dim=DIM, embed_batch_size=5, blocking=False)
    pipeline = IngestionPipeline(transformations=[splitter(expected is Places), model, AsyncMilvusWriter(store)])
    await aingest(pipeline, documents(edition))
    failures = 0
    with Reader(backend.uri, collection, edition, expected.first(edition)) as reader:
        for run in range(1, RUNS + 1):
            for name in names:
                if chance.random() < 0.7:
                    edition[name] = text_of(name, run, chance.randint(1, MOST_SENTENCES))
            await asyncio.to_thread(reader.expect, edition)
            if run % 2:
                model.mood = 0.3
                proxy.script(MilvusError(BAD_DATA), method="Upsert", on=Chance(0.2, seed=run))
                proxy.script(LoseAnswer(), method="Upsert", on=Chance(0.2, seed=-run))
                proxy.script(MilvusError(BAD_DATA), method="Delete", on=Chance(0.5, seed=run))
            report = await aingest(pipeline, documents(edition), on_failure="collect")
            assert report.documents == DOCUMENTS
            failures += len(report.failed)
            model.mood = 0.0
            proxy.heal()
            await until(reader.has_looked_anew(), seconds=60)
    assert failures
    await aingest(pipeline, documents(edition))
    assert stored(rows_in(store.client, collection)) == nodes_of(edition)
    await store.aclose()
    print(f"{reader.looks} looks, {failures} failed documents, {len(reader.torn)} torn ones")
    return reader


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_where_ids_are_new_in_each_version_a_reader_finds_each_document_whole_at_any_time(
    backend: Backend, fault_proxy: FaultProxy, collection_name: str
) -> None:
    reader = await updated_again_and_again(backend, fault_proxy, collection_name, Versions, rows_per_write=8)
    if backend.name == "server":
        assert not reader.torn
        return
    # An answer of Milvus Lite is not of one moment: it collects the rows, and then looks which have been deleted. So
    # an answer that a write and the delete after it both overtake has neither version. The next one has.
    assert not torn_twice_running(reader)


def torn_twice_running(reader: Reader) -> list[tuple[int, str]]:
    """Looks in which a document was torn, as it was in the one before."""
    torn = {(look, document) for look, document, _ in reader.torn}
    return sorted((look, document) for look, document in torn if (look - 1, document) in torn)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("rows_per_write", [2, 8])
async def test_where_ids_stay_a_reader_finds_each_node_in_its_old_or_its_new_version_at_any_time(
    backend: Backend, fault_proxy: FaultProxy, collection_name: str, rows_per_write: int
) -> None:
    # Each replaces its predecessor as it is written: of a document, some may be new while others are still old.
    reader = await updated_again_and_again(backend, fault_proxy, collection_name, Places, rows_per_write)
    if backend.name == "lite":
        assert not reader.torn
    else:  # a row of Milvus 2.3 that is being replaced can be absent for a moment
        assert not torn_twice_running(reader)


@pytest.fixture(params=["lite", pytest.param("server", marks=pytest.mark.server)])
def server_uri(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A server that several processes may write to."""
    if request.param == "server":
        yield request.getfixturevalue("milvus_server").uri
    else:
        with LiteServer(tmp_path / "data") as server:
            yield server.uri


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("with_fixed_ids", [False, True], ids=["random-ids", "fixed-ids"])
def test_two_processes_with_overlapping_documents_leave_what_one_more_run_puts_in_order(
    server_uri: str, with_fixed_ids: bool, tmp_path: Path
) -> None:
    chance = random.Random(2)
    collection = f"together_{chance.getrandbits(32):x}_{with_fixed_ids}"
    arguments = {
        "uri": server_uri,
        "collection": collection,
        "dim": DIM,
        "rows": 4,
        "texts": 4,
        "with_fixed_ids": with_fixed_ids,
        "awaits": True,
    }
    edition = first_edition(chance, 90)
    client = MilvusClient(server_uri)
    try:
        for number in range(3):
            names = list(edition)
            # Each process has two thirds of the documents, and so half of its own with the other.
            halves = [dict.fromkeys(names[:60]), dict.fromkeys(names[-60:])]
            files = []
            for half, names_of_half in enumerate(halves):
                files.append(tmp_path / f"{number}-{half}.json")
                files[-1].write_text(json.dumps({name: edition[name] for name in names_of_half}))
            run_at_once([arguments | {"documents_file": str(file), "delete_missing": False} for file in files])
            whole = tmp_path / f"{number}.json"
            whole.write_text(json.dumps(edition))
            [(_, rows)] = run_at_once([arguments | {"documents_file": str(whole), "delete_missing": True}])
            assert stored(rows) == nodes_of(edition)
            [(counts, again)] = run_at_once([arguments | {"documents_file": str(whole), "delete_missing": True}])
            assert counts == {"added": 0, "replaced": 0, "unchanged": len(edition), "deleted": 0, "nodes": 0}
            assert sorted(again) == sorted(rows)
            edition = next_edition(chance, edition, number + 1)
    finally:
        client.drop_collection(collection)
        client.close()


def run_at_once(arguments: list[dict[str, Any]]) -> list[Any]:
    """Run the program for each, all at the same time; what each says at its end."""
    with ExitStack() as stack:
        running = [stack.enter_context(programs.start(INGESTER, json.dumps(each))) for each in arguments]
        for program in running:
            assert program.stdout.readline() == "ready\n"
        for program in running:
            program.stdin.close()
        said = [program.stdout.readlines() for program in running]
        assert [program.wait(60) for program in running] == [0] * len(running)
    return [json.loads(lines[-1]) for lines in said]

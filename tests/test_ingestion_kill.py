"""Ingestions that are killed, or whose server is: to run again completes them, and costs what was under way."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.ingestion import IngestionPipeline

from llama_index_milvus_async_ext import AsyncMilvusVectorStore, AsyncMilvusWriter
from llama_index_milvus_async_ext._ingest import run
from llama_index_milvus_async_ext.ingestion import aingest
from tests import programs
from tests.embedding import HashEmbedding
from tests.ingester import INGESTER
from tests.sentences import (
    MOST_SENTENCES,
    Edition,
    documents,
    first_edition,
    next_edition,
    nodes_of,
    rows_in,
    splitter,
    stored,
)
from tests.waiting import until

DIM = 8
ROWS_PER_WRITE = 4
TEXTS_PER_EMBEDDING = 4
KILLS = 20
DOCUMENTS = 60
SEED = 20

# What can have been embedded without being acknowledged, at any moment: two batches that are embedded, or wait to be
# handed on; what waits to be written, to which the document that fills it up is added; and the writes under way. A
# document that is larger than a batch is a batch of its own.
UNDER_WAY = (
    2 * max(TEXTS_PER_EMBEDDING, MOST_SENTENCES)
    + (ROWS_PER_WRITE - 1 + MOST_SENTENCES)
    + run._WRITES_AT_ONCE * max(ROWS_PER_WRITE, MOST_SENTENCES)
)


class Life:
    """One run of the program, to its end or until it is killed."""

    def __init__(self, arguments: dict[str, Any], moment: float) -> None:
        """Run it, and kill it once it has said so many lines."""
        lines = []
        with programs.start(INGESTER, json.dumps(arguments)) as program:
            assert program.stdout.readline() == "ready\n"
            program.stdin.close()
            while len(lines) < moment and (line := program.stdout.readline()):
                lines.append(line)
            if len(lines) >= moment:
                program.kill()
                lines += program.stdout.readlines()
            exit_code = program.wait(60)
        self.texts = lines.count("text\n")
        self.was_killed = exit_code != 0
        if self.was_killed:
            assert exit_code == -9
            self.rows = []
        else:
            self.rows = json.loads(lines[-1])[1]


@pytest.fixture(params=["lite", pytest.param("server", marks=pytest.mark.server)])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A `.db` file of the test's own, which is killed with the client; or the server, which is not."""
    if request.param == "lite":
        return str(tmp_path / "killed.db")
    server: str = request.getfixturevalue("milvus_server").uri
    return server


@pytest.fixture
def nothing_left(uri: str) -> Any:
    """Drops the programs' collection of the server that tests share."""
    yield
    if uri.startswith("http"):
        with AsyncMilvusVectorStore(uri=uri, collection_name="killed", dim=DIM) as store:
            store.client.drop_collection("killed")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("with_fixed_ids", [False, True], ids=["random-ids", "fixed-ids"])
@pytest.mark.usefixtures("nothing_left")
def test_an_ingestion_killed_at_any_moment_is_completed_by_running_it_again(
    uri: str, with_fixed_ids: bool, tmp_path: Path
) -> None:
    chance = random.Random(SEED)
    file = tmp_path / "documents.json"
    arguments = {
        "uri": uri,
        "collection": "killed",
        "documents_file": str(file),
        "dim": DIM,
        "rows": ROWS_PER_WRITE,
        "texts": TEXTS_PER_EMBEDDING,
        "with_fixed_ids": with_fixed_ids,
        "delete_missing": True,
    }
    editions = [first_edition(chance, DOCUMENTS)]
    file.write_text(json.dumps(editions[0]))
    embedded = kills = completed = 0
    for number in itertools.count():
        life = Life(arguments | {"awaits": number % 2}, chance.randrange(120) if kills < KILLS else float("inf"))
        embedded += life.texts
        kills += life.was_killed
        if not life.was_killed:
            completed += 1
            assert stored(life.rows) == nodes_of(editions[-1]), f"edition {len(editions)}, after {kills} kills"
            if kills == KILLS:
                break
        # Documents change when a run is complete, and now and then before it is.
        if not life.was_killed or chance.random() < 0.2:
            editions.append(next_edition(chance, editions[-1], len(editions)))
            file.write_text(json.dumps(editions[-1]))

    again = Life(arguments | {"awaits": True}, float("inf"))
    assert again.texts == 0
    assert stored(again.rows) == nodes_of(editions[-1])
    wanted = texts_in(editions)
    print(
        f"{kills} kills, {completed} of {len(editions)} editions completed: {embedded} texts embedded, {wanted} wanted"
    )
    assert embedded <= wanted + kills * UNDER_WAY


def texts_in(editions: list[Edition]) -> int:
    """How many texts a clean run over each edition embeds, all runs together."""
    versions = {(document, text) for edition in editions for document, text in edition.items()}
    return sum(text.count("Sentence ") for _, text in versions)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("with_fixed_ids", [False, True], ids=["random-ids", "fixed-ids"])
async def test_a_server_killed_in_the_midst_of_an_ingestion_and_restarted_has_each_node_once(
    own_server: Any, with_fixed_ids: bool
) -> None:
    chance = random.Random(SEED)
    edition = first_edition(chance, DOCUMENTS)
    store = AsyncMilvusVectorStore(
        uri=own_server.uri, collection_name="killed", dim=DIM, batch_size=ROWS_PER_WRITE, rpc_timeout_seconds=10
    )
    model = HashEmbedding(dim=DIM, embed_batch_size=2, seconds_per_text=0.002, blocking=False)
    pipeline = IngestionPipeline(transformations=[splitter(with_fixed_ids), model, AsyncMilvusWriter(store)])
    await aingest(pipeline, documents(edition), source="editions")
    wanted = model.texts
    edition = next_edition(chance, edition, 1)
    wanted += texts_in([edition])

    running = asyncio.create_task(
        aingest(pipeline, documents(edition), source="editions", delete_missing=True, on_failure="collect")
    )
    moment = model.texts + chance.randrange(texts_in([edition]) // 2)
    await until(lambda: model.texts >= moment or running.done(), seconds=60)
    own_server.kill()
    assert not running.done(), "it is killed in the middle"
    await asyncio.to_thread(own_server.start)
    report = await running
    again = await aingest(pipeline, documents(edition), source="editions", delete_missing=True)
    assert again.ok
    assert again.replaced + again.added <= len(report.failed), "what ended well is not done again"
    assert stored(rows_in(store.client, "killed")) == nodes_of(edition)
    assert model.texts <= wanted + UNDER_WAY
    await store.aclose()

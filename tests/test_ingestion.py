"""Ingestion: the forms that a pipeline may have, and the streams that documents come in."""

from __future__ import annotations

import asyncio
import copy
import pickle
import sqlite3
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import SimpleDirectoryReader
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.readers.base import ReaderConfig
from llama_index.core.readers.string_iterable import StringIterableReader
from llama_index.core.schema import BaseNode, Document, NodeRelationship, TextNode, TransformComponent
from llama_index.core.vector_stores.simple import SimpleVectorStore
from llama_index.core.vector_stores.types import VectorStoreQuery
from llama_index.vector_stores.milvus import MilvusVectorStore

from llama_index_milvus_async_ext import AsyncMilvusVectorStore, AsyncMilvusWriter
from llama_index_milvus_async_ext.ingestion import IngestionError, aingest, ingest
from tests.conftest import Backend
from tests.ingesting import (
    BOTH,
    BOTH_NAMES,
    DIM,
    Ingest,
    Lines,
    Model,
    asynchronously,
    counts,
    doc,
    docs,
    expected,
    held,
    rows,
    writing_to,
)
from tests.waiting import blocked_until

both = pytest.mark.parametrize("run", BOTH, ids=BOTH_NAMES)


@pytest.fixture
def store(lite_uri: str, collection_name: str) -> Iterator[AsyncMilvusVectorStore]:
    with AsyncMilvusVectorStore(
        uri=lite_uri, collection_name=collection_name, dim=DIM, consistency_level="Strong"
    ) as store:
        yield store


def plain_store(uri: str, collection_name: str, **options: Any) -> MilvusVectorStore:
    return MilvusVectorStore(uri=uri, collection_name=collection_name, dim=DIM, consistency_level="Strong", **options)


# --- forms of pipelines


@both
def test_the_writer_is_the_last_step(backend: Backend, collection_name: str, run: Ingest) -> None:
    with AsyncMilvusVectorStore(uri=backend.uri, collection_name=collection_name, dim=DIM) as store:
        model = Model()
        report = run(writing_to(store, model), docs(5))
        assert counts(report) == (5, 0, 0, 0, 0)
        assert (report.nodes, report.texts_embedded, model.texts) == (10, 10, 10)
        assert held(store) == expected(docs(5))
        assert counts(run(writing_to(store, model), docs(5))) == (0, 0, 5, 0, 0)


@both
def test_the_pipeline_has_our_store(store: AsyncMilvusVectorStore, run: Ingest) -> None:
    pipeline = IngestionPipeline(transformations=[Lines(), Model()], vector_store=store)
    assert counts(run(pipeline, docs(5))) == (5, 0, 0, 0, 0)
    assert held(store) == expected(docs(5))


@both
def test_a_plain_store_is_taken_over_and_can_be_used_after(backend: Backend, collection_name: str, run: Ingest) -> None:
    async def main() -> MilvusVectorStore:  # the plain store wants a loop
        return plain_store(backend.uri, collection_name)

    store = asyncio.run(main())
    pipeline = IngestionPipeline(transformations=[Lines(), Model()], vector_store=store)
    for expected_counts in ((5, 0, 0, 0, 0), (0, 0, 5, 0, 0)):
        assert counts(run(pipeline, docs(5))) == expected_counts
        assert held(store) == expected(docs(5))
        found = store.query(VectorStoreQuery(query_embedding=Model().vector("line 1 of 3, first"), similarity_top_k=1))
        assert [node.get_content() for node in found.nodes or []] == ["line 1 of 3, first"]
    assert pipeline.vector_store is store
    store.delete("d0")
    assert "d0" not in held(store)
    store.client.close()


@both
def test_a_model_in_the_writer_embeds_what_has_no_embedding_yet(store: AsyncMilvusVectorStore, run: Ingest) -> None:
    class Halves(Lines):
        def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[BaseNode]:
            made = super().__call__(nodes)
            made[0].embedding = [1.0] + [0.0] * (DIM - 1)
            return made

    model = Model()
    pipeline = IngestionPipeline(transformations=[Halves(), AsyncMilvusWriter(store, embed_model=model)])
    report = run(pipeline, docs(4))
    assert (report.nodes, report.texts_embedded, model.texts) == (8, 4, 4)
    nearest = store.query(VectorStoreQuery(query_embedding=[1.0] + [0.0] * (DIM - 1), similarity_top_k=4))
    assert sorted(node.get_content() for node in nearest.nodes or []) == [f"line 0 of {n}, first" for n in range(4)]


@both
def test_no_model_is_needed_where_nodes_bring_their_embeddings(store: AsyncMilvusVectorStore, run: Ingest) -> None:
    nodes = [TextNode(id_=f"n{n}", text=f"text {n}", embedding=[float(n)] * DIM) for n in range(1, 5)]
    report = run(IngestionPipeline(transformations=[AsyncMilvusWriter(store)]), nodes)
    assert (counts(report), report.nodes, report.texts_embedded) == ((4, 0, 0, 0, 0), 4, 0)
    assert held(store) == {f"n{n}": [f"text {n}"] for n in range(1, 5)}
    assert [node.relationships for node in nodes] == [{}] * 4, "the caller's own nodes are left alone"


@both
def test_without_a_splitter_the_documents_are_the_nodes(store: AsyncMilvusVectorStore, run: Ingest) -> None:
    pipeline = IngestionPipeline(transformations=[Model()], vector_store=store)
    documents = [doc("d0", "one"), doc("d1", "two")]
    assert counts(run(pipeline, documents)) == (2, 0, 0, 0, 0)
    assert held(store) == {"d0": ["one"], "d1": ["two"]}
    assert {row["id"] for row in rows(store)} == {"d0", "d1"}
    assert [each.relationships for each in documents] == [{}, {}]
    assert counts(run(pipeline, [doc("d0", "one"), doc("d1", "three")])) == (0, 1, 1, 0, 0)
    assert held(store) == {"d0": ["one"], "d1": ["three"]}, "the new row has the key of the old one, and stays"


class Upper(TransformComponent):
    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        for node in nodes:
            assert isinstance(node, TextNode)
            node.text = node.text.upper()
        return nodes


class Asked(TransformComponent):
    """A transformation that waits for something, as one that asks a language model."""

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        for node in nodes:
            node.metadata["answer"] = "blocking"
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        await asyncio.sleep(0)
        for node in nodes:
            node.metadata["answer"] = "awaited"
        return nodes


@both
def test_own_transformations_are_run_and_awaited_where_they_can_be(store: AsyncMilvusVectorStore, run: Ingest) -> None:
    pipeline = IngestionPipeline(transformations=[Lines(), Upper(), Asked(), Upper(), Model()], vector_store=store)
    run(pipeline, docs(2))
    assert held(store)["d0"] == ["LINE 0 OF 0, FIRST", "LINE 1 OF 0, FIRST"]
    answers = {node.metadata["answer"] for node in store.get_nodes(node_ids=[row["id"] for row in rows(store)])}
    assert answers == {"blocking" if run is ingest else "awaited"}


@both
def test_a_transformation_may_follow_the_model(store: AsyncMilvusVectorStore, run: Ingest) -> None:
    pipeline = IngestionPipeline(transformations=[Lines(), Model(), Upper(), AsyncMilvusWriter(store)])
    assert counts(run(pipeline, docs(3))) == (3, 0, 0, 0, 0)
    assert held(store)["d2"] == ["LINE 0 OF 2, FIRST", "LINE 1 OF 2, FIRST"]
    assert counts(run(pipeline, docs(3))) == (0, 0, 3, 0, 0)


class Loose(TransformComponent):
    """Makes nodes that name no document, or none, or the document itself beside others."""

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[BaseNode]:
        made: list[BaseNode] = []
        for node in nodes:
            content = node.get_content()
            if content == "itself":
                made.append(node)
            if content != "nothing":
                made += [TextNode(text=f"{content} {place}") for place in range(2)]
        return made


@both
def test_nodes_belong_to_their_document_whatever_a_transformation_says(
    store: AsyncMilvusVectorStore, run: Ingest
) -> None:
    pipeline = IngestionPipeline(transformations=[Loose(), Model()], vector_store=store)
    documents = [doc("d0", "loose"), doc("d1", "nothing"), doc("d2", "itself")]
    assert counts(run(pipeline, documents)) == (2, 0, 1, 0, 0)
    assert held(store) == {"d0": ["loose 0", "loose 1"], "d2": ["itself", "itself 0", "itself 1"]}
    assert counts(run(pipeline, documents)) == (0, 0, 3, 0, 0)
    store.delete("d2")
    assert set(held(store)) == {"d0"}, "as LlamaIndex deletes a document"


@both
def test_the_pipelines_own_documents_and_readers_are_read_too(store: AsyncMilvusVectorStore, run: Ingest) -> None:
    class Reader(StringIterableReader):
        def load_data(self, texts: list[str]) -> list[Document]:
            return [doc(text, text) for text in texts]

    pipeline = writing_to(
        store,
        documents=[doc("own", "of the pipeline")],
        readers=[ReaderConfig(reader=Reader(), reader_kwargs={"texts": ["x", "y"]})],
    )
    assert counts(run(pipeline, [doc("given", "to the call")])) == (4, 0, 0, 0, 0)
    assert held(store) == {"own": ["of the pipeline"], "given": ["to the call"], "x": ["x"], "y": ["y"]}
    assert counts(run(pipeline, [])) == (0, 0, 3, 0, 0)

    async def stream() -> AsyncIterator[Document]:
        yield doc("streamed", "as well")

    assert counts(run(pipeline, stream())) == (1, 0, 3, 0, 0)


@both
def test_a_wrong_pipeline_or_argument_is_refused_with_what_is_wrong(
    store: AsyncMilvusVectorStore, lite_uri: str, run: Ingest
) -> None:
    writer = AsyncMilvusWriter(store)
    with AsyncMilvusVectorStore(uri=lite_uri, collection_name=f"{store.collection_name}_2", dim=DIM) as other:
        for pipeline, error, message in (
            (IngestionPipeline(transformations=[Lines(), Model()]), ValueError, "does not say where the nodes go"),
            (IngestionPipeline(transformations=[writer, Model()]), ValueError, "must be the last"),
            (IngestionPipeline(transformations=[writer, writer]), ValueError, "must be the last"),
            (IngestionPipeline(transformations=[writer], vector_store=other), ValueError, "one of them"),
            (IngestionPipeline(transformations=[], vector_store=SimpleVectorStore()), TypeError, "SimpleVectorStore"),
            ("no pipeline", TypeError, "must be an IngestionPipeline, got str"),
        ):
            with pytest.raises(error, match=message):
                run(pipeline, docs(1))
    for options, error, message in (
        ({"source": 3}, TypeError, "source must be a text"),
        ({"source": "\ud800"}, ValueError, "source"),
        ({"num_workers": 0}, ValueError, "num_workers must be 1 or more"),
        ({"max_failures": -1}, ValueError, "max_failures must be 0 or more"),
        ({"on_failure": "ignore"}, ValueError, "on_failure"),
    ):
        with pytest.raises(error, match=message):
            run(writing_to(store), docs(1), **options)
    with pytest.raises(TypeError, match="documents"):
        run(writing_to(store), 3)
    assert not rows(store)


@both
def test_the_writer_and_the_pipeline_may_name_the_same_store(store: AsyncMilvusVectorStore, run: Ingest) -> None:
    report = run(writing_to(store, vector_store=store), docs(2))
    assert (report.added, report.nodes) == (2, 4)
    assert len(rows(store)) == 4


# --- streams


def folder_of(path: Path, files: dict[str, str]) -> Iterator[list[Document]]:
    for name, text in files.items():
        (path / name).write_text(text)
    yield from SimpleDirectoryReader(str(path), filename_as_id=True).iter_data()


async def one_after_the_other(documents: list[Document]) -> AsyncIterator[Document]:
    for each in documents:
        await asyncio.sleep(0)
        yield each


@both
@pytest.mark.parametrize(
    "form", [list, tuple, iter, lambda all_: (x for x in all_), one_after_the_other, lambda x: [x]]
)
def test_documents_come_in_any_iterable(store: AsyncMilvusVectorStore, run: Ingest, form: Any) -> None:
    assert counts(run(writing_to(store), form(docs(7)))) == (7, 0, 0, 0, 0)
    assert held(store) == expected(docs(7))


@both
def test_a_folder_is_read_file_by_file(store: AsyncMilvusVectorStore, run: Ingest, tmp_path: Path) -> None:
    files = {"a.txt": "one\ntwo", "b.txt": "three"}
    assert counts(run(writing_to(store), folder_of(tmp_path, files))) == (2, 0, 0, 0, 0)
    assert sorted(map(sorted, held(store).values())) == [["one", "two"], ["three"]]
    files["b.txt"] = "four"
    assert counts(run(writing_to(store), folder_of(tmp_path, files))) == (0, 1, 1, 0, 0)


def test_ingest_reads_in_the_callers_thread_as_a_database_cursor_wants(store: AsyncMilvusVectorStore) -> None:
    with sqlite3.connect(":memory:") as database:
        database.execute("create table pages (name text, content text)")
        database.executemany("insert into pages values (?, ?)", [(f"p{n}", f"page {n}") for n in range(250)])
        cursor = database.execute("select name, content from pages")
        report = ingest(writing_to(store), (doc(name, content) for name, content in cursor))
    database.close()
    assert counts(report) == (250, 0, 0, 0, 0)


def test_aingest_makes_and_reads_an_iterator_in_one_thread(store: AsyncMilvusVectorStore, tmp_path: Path) -> None:
    path = tmp_path / "pages.db"
    with sqlite3.connect(path) as database:
        database.execute("create table pages (name text, content text)")
        database.executemany("insert into pages values (?, ?)", [(f"p{n}", f"page {n}") for n in range(250)])
    database.close()

    def pages() -> Iterator[Document]:
        with sqlite3.connect(path) as database:
            yield from (doc(*row) for row in database.execute("select name, content from pages"))
        database.close()

    assert counts(asynchronously(writing_to(store), pages())) == (250, 0, 0, 0, 0)


@both
def test_what_a_slow_stream_has_given_does_not_wait_for_what_it_gives_next(
    store: AsyncMilvusVectorStore, run: Ingest
) -> None:
    model = Model()

    def stream() -> Iterator[Document]:
        yield from docs(3)
        blocked_until(lambda: model.texts == 6, seconds=30)
        yield doc("late", "one more")

    assert counts(run(writing_to(store, model), stream())) == (4, 0, 0, 0, 0)


@both
def test_an_empty_stream_is_well_and_does_nothing(store: AsyncMilvusVectorStore, run: Ingest) -> None:
    run(writing_to(store), docs(2))
    for nothing in ([], iter(()), [[]], one_after_the_other([])):
        report = run(writing_to(store), nothing, delete_missing=True)
        assert report.ok and counts(report) == (0, 0, 0, 0, 0)
    assert held(store) == expected(docs(2))


@both
def test_what_is_no_document_is_reported_and_costs_no_other(store: AsyncMilvusVectorStore, run: Ingest) -> None:
    report = run(writing_to(store), [*docs(2), "a text", None, *docs(4)[2:]], on_failure="collect")
    assert counts(report) == (4, 0, 0, 0, 2)
    assert [(each.document_id, each.stage, str(each.error)) for each in report.failed] == [
        (None, "read", "the stream must hold documents, not str"),
        (None, "read", "the stream must hold documents, not NoneType"),
    ]
    assert held(store) == expected(docs(4))


def breaking(documents: list[Document]) -> Iterator[Document]:
    yield from documents
    raise OSError("the disk is gone")


async def breaking_later(documents: list[Document]) -> AsyncIterator[Document]:
    for each in documents:
        yield each
    raise OSError("the disk is gone")


class Unreadable:
    def __iter__(self) -> Iterator[Document]:
        raise OSError("the disk is gone")


@both
@pytest.mark.parametrize("stream", [breaking, breaking_later])
def test_a_reader_that_raises_ends_the_stream_and_what_was_read_is_completed(
    store: AsyncMilvusVectorStore, run: Ingest, stream: Any
) -> None:
    run(writing_to(store), docs(10))
    with pytest.raises(IngestionError, match="the stream, read: OSError: the disk is gone") as raised:
        run(writing_to(store), stream(docs(5, version="second")), delete_missing=True)
    report = raised.value.report
    assert counts(report) == (0, 5, 0, 0, 1)
    assert (report.failed[0].document_id, report.failed[0].stage) == (None, "read")
    assert held(store) == expected(docs(5, version="second") + docs(10)[5:]), "none is deleted"


@both
def test_a_stream_that_cannot_even_begin_is_reported(store: AsyncMilvusVectorStore, run: Ingest) -> None:
    report = run(writing_to(store), Unreadable(), on_failure="collect")
    assert [(each.document_id, each.stage) for each in report.failed] == [(None, "read")]


@both
def test_a_document_that_comes_twice_counts_as_it_came_last(store: AsyncMilvusVectorStore, run: Ingest) -> None:
    twice = [doc("d0", "first"), doc("d1", "one"), doc("d0", "second"), doc("d0", "third")]
    with pytest.warns(UserWarning, match="'d0' more than once: the last one counts") as warned:
        report = run(writing_to(store), twice)
    assert len(warned) == 1
    assert report.documents == 4 and report.ok
    assert held(store) == {"d0": ["third"], "d1": ["one"]}
    with pytest.warns(UserWarning, match="more than once"):
        again = run(writing_to(store), [doc("d0", "third"), doc("d0", "third")])
    assert counts(again) == (0, 0, 2, 0, 0)


# --- documents' ids


@both
def test_random_ids_are_noticed_once_with_the_remedy(store: AsyncMilvusVectorStore, run: Ingest) -> None:
    with pytest.warns(UserWarning, match="random ids.*filename_as_id=True.*document_id=") as warned:
        run(writing_to(store), [Document(text="one"), Document(text="two"), Document(text="three")])
    assert len(warned) == 1


@both
def test_a_function_gives_the_ids_where_a_documents_own_are_not_the_same(
    store: AsyncMilvusVectorStore, run: Ingest
) -> None:
    documents = [Document(text=f"text {n}", metadata={"name": f"n{n}"}) for n in range(3)]
    own = [each.node_id for each in documents]
    for expected_counts in ((3, 0, 0, 0, 0), (0, 0, 3, 0, 0)):
        report = run(writing_to(store), documents, document_id=lambda document: document.metadata["name"])
        assert counts(report) == expected_counts
    assert held(store) == {f"n{n}": [f"text {n}"] for n in range(3)}
    assert [each.node_id for each in documents] == own, "the caller's own documents are left alone"


@both
def test_given_ids_cause_no_warning_in_copies_either(store: AsyncMilvusVectorStore, run: Ingest) -> None:

    class Given(Document):
        pass

    late = Document(text="an id given later")
    late.id_ = "d9"
    given = [doc("d0", "one"), Document(doc_id="d1", text="two"), Given(id_="d2", text="three"), late]
    copies = [pickle.loads(pickle.dumps(each)) if type(each) is Document else copy.deepcopy(each) for each in given]
    run(writing_to(store), given)
    assert counts(run(writing_to(store), copies)) == (0, 0, 4, 0, 0)
    copies = [Document.from_dict(each.to_dict()) for each in given[:2]]
    assert counts(run(writing_to(store), copies)) == (0, 0, 2, 0, 0)


@both
@pytest.mark.parametrize("bad", ["\ud800", "", None, 3])
def test_an_id_that_cannot_be_used_fails_its_document_alone(
    store: AsyncMilvusVectorStore, run: Ingest, bad: Any
) -> None:
    def id_of(document: Document) -> Any:
        return bad if document.node_id == "d1" else document.node_id

    report = run(writing_to(store), docs(3), document_id=id_of, on_failure="collect")
    assert counts(report) == (2, 0, 0, 0, 1)
    assert report.failed[0].stage == "read"
    assert set(held(store)) == {"d0", "d2"}


@both
def test_an_id_that_llamaindex_gives_to_nodes_without_a_document_is_refused(
    store: AsyncMilvusVectorStore, run: Ingest
) -> None:
    store.add([TextNode(id_="loose", text="of no document", embedding=[1.0] * DIM)])  # stored with the document "None"
    report = run(writing_to(store), [doc("None", "one")], on_failure="collect")
    assert counts(report) == (0, 0, 0, 0, 1)
    assert held(store) == {"None": ["of no document"]}, "what has nothing to do with the document is left alone"


# --- loops and stores


def test_ingest_works_where_a_loop_runs(store: AsyncMilvusVectorStore) -> None:
    async def cell() -> Any:
        return ingest(writing_to(store), docs(3))

    assert counts(asyncio.run(cell())) == (3, 0, 0, 0, 0)


async def test_several_runs_at_once_on_one_store_do_not_disturb_each_other(
    backend: Backend, collection_name: str
) -> None:
    with AsyncMilvusVectorStore(uri=backend.uri, collection_name=collection_name, dim=DIM) as store:
        parts = [docs(40)[start::4] for start in range(4)]
        reports = await asyncio.gather(
            *(aingest(writing_to(store), part, source=str(n)) for n, part in enumerate(parts))
        )
        assert [counts(report) for report in reports] == [(10, 0, 0, 0, 0)] * 4
        assert await asyncio.to_thread(held, store) == expected(docs(40))


async def test_two_runs_at_once_over_the_same_documents_converge(backend: Backend, collection_name: str) -> None:
    with AsyncMilvusVectorStore(uri=backend.uri, collection_name=collection_name, dim=DIM) as store:
        for version in ("first", "second"):
            documents = docs(40, version=version)
            reports = await asyncio.gather(*(aingest(writing_to(store), documents) for _ in range(2)))
            assert all(report.ok for report in reports)
            there = await asyncio.to_thread(held, store)
            assert all(set(expected(documents)[key]) <= set(there[key]) for key in expected(documents))
            assert (await aingest(writing_to(store), documents)).ok
            assert await asyncio.to_thread(held, store) == expected(documents)


@both
def test_a_store_that_inserts_doubles_nothing(backend: Backend, collection_name: str, run: Ingest) -> None:
    with AsyncMilvusVectorStore(uri=backend.uri, collection_name=collection_name, dim=DIM, upsert_mode=False) as store:
        pipeline = writing_to(store, transformations=[Lines(own_ids=True), Model(), AsyncMilvusWriter(store)])
        run(pipeline, docs(5, lines=3))
        report = run(pipeline, docs(5, version="second"))
        assert counts(report) == (0, 5, 0, 0, 0)
        assert held(store) == expected(docs(5, version="second")), "of the same ids, and one less"


@both
@pytest.mark.parametrize("splitter", [SentenceSplitter(chunk_size=64, chunk_overlap=0)])
def test_llamaindexs_splitter_is_run_as_a_pipeline_runs_it(
    store: AsyncMilvusVectorStore, run: Ingest, splitter: SentenceSplitter
) -> None:
    text = " ".join(f"Sentence number {n} of this document." for n in range(60))
    documents = [Document(id_="d0", text=text, metadata={"page": 1})]
    run(writing_to(store, transformations=[splitter, Model(), AsyncMilvusWriter(store)]), documents)
    nodes = splitter(documents)
    assert held(store)["d0"] == sorted(node.get_content() for node in nodes)
    stored = store.get_nodes(node_ids=[row["id"] for row in rows(store)])
    assert all(node.metadata == {"page": 1} for node in stored)
    assert sum(NodeRelationship.NEXT in node.relationships for node in stored) == len(nodes) - 1

"""Ingestion keeps the collection in step: what is done about a document, and what is not, in one run after another."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import Document, MetadataMode, NodeRelationship, TextNode, TransformComponent
from llama_index.core.vector_stores.types import VectorStoreQuery
from llama_index.vector_stores.milvus import MilvusVectorStore
from pymilvus import DataType, MilvusClient

from llama_index_milvus_async_ext import AsyncMilvusVectorStore, AsyncMilvusWriter
from llama_index_milvus_async_ext._ingest.versions import described, version_of
from llama_index_milvus_async_ext.ingestion import ingest
from tests.conftest import Backend
from tests.ingesting import (
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
    rows,
    writing_to,
)

# Milvus Lite closes a connection that pings as often as pymilvus's clients do, for all that share it.
SELDOM_PINGING = {"grpc.keepalive_time_ms": 600_000}


# --- documents that change


@both
def test_an_unchanged_document_costs_no_embedding_and_no_write(
    backend: Backend, collection_name: str, run: Ingest
) -> None:
    with AsyncMilvusVectorStore(uri=backend.uri, collection_name=collection_name, dim=DIM) as store:
        model = Model()
        run(writing_to(store, model), docs(30))
        before, embedded, ids = store.statistics(), model.texts, {row["id"] for row in rows(store)}
        report = run(writing_to(store, model), docs(30))
        assert counts(report) == (0, 0, 30, 0, 0)
        assert (report.nodes, report.texts_embedded, model.texts) == (0, 0, embedded)
        assert store.statistics().rows == before.rows, "nothing is sent"
        assert store.statistics().requests - before.requests < 10, "and many documents are looked up at once"
        assert {row["id"] for row in rows(store)} == ids


@both
@pytest.mark.parametrize(
    "changed",
    [
        pytest.param(doc("d1", "line 0 of 1, first", "another line"), id="text"),
        pytest.param(doc("d1", "line 0 of 1, first"), id="shortened"),
        pytest.param(doc("d1", *(f"line {n}" for n in range(9))), id="lengthened"),
        pytest.param(doc("d1", "line 0 of 1, first", "line 1 of 1, first", page=3), id="metadata"),
    ],
)
def test_a_changed_document_takes_the_place_of_the_earlier_one(
    backend: Backend, collection_name: str, run: Ingest, changed: Document
) -> None:
    with AsyncMilvusVectorStore(uri=backend.uri, collection_name=collection_name, dim=DIM) as store:
        run(writing_to(store), docs(3))
        now = [docs(3)[0], changed, docs(3)[2]]
        model = Model()
        report = run(writing_to(store, model), now)
        assert counts(report) == (0, 1, 2, 0, 0)
        assert model.texts == len(changed.text.splitlines()), "the others are not embedded again"
        assert held(store) == expected(now), "no chunk stays behind"
        of_it = store.get_nodes(node_ids=[row["id"] for row in rows(store) if row["doc_id"] == "d1"])
        assert [node.metadata for node in of_it] == [changed.metadata] * len(of_it)
        assert counts(run(writing_to(store), now)) == (0, 0, 3, 0, 0)


@both
def test_what_the_model_is_shown_of_a_document_is_a_part_of_its_version(
    store: AsyncMilvusVectorStore, run: Ingest
) -> None:
    run(writing_to(store), [doc("d0", "text", page=3)])
    hidden = doc("d0", "text", page=3)
    hidden.excluded_embed_metadata_keys = ["page"]
    assert counts(run(writing_to(store), [hidden])) == (0, 1, 0, 0, 0)


@both
def test_a_set_in_metadata_is_the_same_whatever_its_order(store: AsyncMilvusVectorStore, run: Ingest) -> None:
    one_way, the_other = {0, 8}, {8, 0}  # equal, but as texts they differ, as others do in another process
    run(writing_to(store), [doc("d0", "text", tags=one_way)])
    assert counts(run(writing_to(store), [doc("d0", "text", tags=the_other)])) == (0, 0, 1, 0, 0)
    assert counts(run(writing_to(store), [doc("d0", "text", tags={0})])) == (0, 1, 0, 0, 0)


@both
def test_an_emptied_document_leaves_nothing_behind(store: AsyncMilvusVectorStore, run: Ingest) -> None:
    run(writing_to(store), docs(2))
    emptied = [doc("d0"), docs(2)[1]]
    assert counts(run(writing_to(store), emptied)) == (0, 1, 1, 0, 0)
    assert held(store) == expected(docs(2)[1:])
    assert counts(run(writing_to(store), emptied)) == (0, 0, 2, 0, 0)
    assert counts(run(writing_to(store), docs(2))) == (1, 0, 1, 0, 0), "and it may come back"
    assert held(store) == expected(docs(2))


@both
def test_many_documents_at_once_are_each_in_step(backend: Backend, collection_name: str, run: Ingest) -> None:
    with AsyncMilvusVectorStore(uri=backend.uri, collection_name=collection_name, dim=DIM, batch_size=50) as store:
        assert counts(run(writing_to(store), docs(700))) == (700, 0, 0, 0, 0)
        now = [*docs(300, lines=1, version="second"), *docs(900)[300:]]
        assert counts(run(writing_to(store), now)) == (200, 300, 400, 0, 0)
        assert held_of_many(store) == expected(now)


def held_of_many(store: AsyncMilvusVectorStore) -> dict[str, list[str]]:
    texts: dict[str, list[str]] = {}
    pages = store.client.query_iterator(
        store.collection_name,
        filter='id != ""',
        output_fields=["doc_id", "text"],
        consistency_level="Strong",
        batch_size=1_000,
    )
    while page := pages.next():
        for row in page:
            texts.setdefault(row["doc_id"], []).append(row["text"])
    pages.close()
    return {document_id: sorted(each) for document_id, each in texts.items()}


# --- pipelines that change


def chunks_of(size: int) -> SentenceSplitter:
    return SentenceSplitter(chunk_size=size, chunk_overlap=0)


@both
def test_another_chunk_size_or_model_ingests_again(store: AsyncMilvusVectorStore, run: Ingest) -> None:
    text = " ".join(f"Sentence number {n} of this document." for n in range(60))

    def pipeline(size: int, model: Model) -> IngestionPipeline:
        return IngestionPipeline(transformations=[chunks_of(size), model, AsyncMilvusWriter(store)])

    documents = [Document(id_="d0", text=text)]
    assert counts(run(pipeline(64, Model()), documents)) == (1, 0, 0, 0, 0)
    assert counts(run(pipeline(128, Model()), documents)) == (0, 1, 0, 0, 0)
    assert counts(run(pipeline(128, Model(model_name="another")), documents)) == (0, 1, 0, 0, 0)
    assert counts(run(pipeline(128, Model(model_name="another")), documents)) == (0, 0, 1, 0, 0)
    assert held(store)["d0"] == sorted(node.get_content() for node in chunks_of(128)(documents))


class Titled(TransformComponent):
    """Gives nodes a title, which is a part of what the model sees."""

    def __call__(self, nodes: Any, **kwargs: Any) -> Any:
        for node in nodes:
            node.metadata["title"] = "of a thing"
        return nodes


@both
def test_a_model_that_moves_among_the_transformations_ingests_again(store: AsyncMilvusVectorStore, run: Ingest) -> None:
    model, writer = Model(), AsyncMilvusWriter(store)
    before = IngestionPipeline(transformations=[Lines(), model, Titled(), writer])
    after = IngestionPipeline(transformations=[Lines(), Titled(), model, writer])
    run(before, [doc("d", "text")])
    assert counts(run(after, [doc("d", "text")])) == (0, 1, 0, 0, 0), "its vectors were those of another text"
    assert counts(run(after, [doc("d", "text")])) == (0, 0, 1, 0, 0)


@both
def test_who_embeds_last_is_nothing_to_the_version(store: AsyncMilvusVectorStore, run: Ingest) -> None:
    model = Model()
    run(IngestionPipeline(transformations=[Lines(), Titled(), model], vector_store=store), [doc("d", "text")])
    for steps in ([model, AsyncMilvusWriter(store)], [AsyncMilvusWriter(store, embed_model=model)]):
        pipeline = IngestionPipeline(transformations=[Lines(), Titled(), *steps])
        assert counts(run(pipeline, [doc("d", "text")])) == (0, 0, 1, 0, 0)
    (row,) = rows(store)
    described_so_far = described([Lines(), Titled(), model])  # that, of all collections that there are
    assert row["_ingestion"]["version"] == version_of(doc("d", "text"), described_so_far, "")


@both
def test_how_quickly_and_by_whose_leave_things_are_made_changes_nothing(
    store: AsyncMilvusVectorStore, run: Ingest
) -> None:
    class Remote(Model):
        api_key: str = "secret"
        api_base: str = "http://one"
        max_retries: int = 1

    run(writing_to(store, Remote()), docs(2))
    for options in (
        {"embed_batch_size": 3},
        {"num_workers": 4},
        {"api_key": "another"},
        {"api_base": "http://two"},
        {"max_retries": 5},
    ):
        assert counts(run(writing_to(store, Remote(**options)), docs(2))) == (0, 0, 2, 0, 0), options
    in_the_writer = [Lines(), AsyncMilvusWriter(store, embed_model=Remote())]
    assert counts(run(writing_to(store, transformations=in_the_writer), docs(2))) == (0, 0, 2, 0, 0)
    assert counts(run(writing_to(store, Remote()), docs(2), num_workers=None, show_progress=False)) == (0, 0, 2, 0, 0)


@both
def test_a_named_version_stands_for_the_pipelines_settings(store: AsyncMilvusVectorStore, run: Ingest) -> None:
    run(writing_to(store), docs(2), version="1")
    other = [Lines(prefix="> "), Model(), AsyncMilvusWriter(store)]
    assert counts(run(writing_to(store, transformations=other), docs(2), version="1")) == (0, 0, 2, 0, 0)
    assert counts(run(writing_to(store), docs(2, version="second"), version="1")) == (0, 2, 0, 0, 0), "the text counts"
    assert counts(run(writing_to(store, transformations=other), docs(2), version="2")) == (0, 2, 0, 0, 0)


@both
def test_a_function_gives_a_documents_whole_version(store: AsyncMilvusVectorStore, run: Ingest) -> None:
    etags = {"d0": "a", "d1": "b"}

    def version(document: Document) -> str:
        return etags[document.node_id]

    run(writing_to(store), docs(2), version=version)
    assert counts(run(writing_to(store), docs(2, version="second"), version=version)) == (0, 0, 2, 0, 0)
    etags["d1"] = "c"
    assert counts(run(writing_to(store), docs(2, version="second"), version=version)) == (0, 1, 1, 0, 0)
    assert held(store) == expected([docs(1)[0], docs(2, version="second")[1]])
    del etags["d0"]
    report = run(writing_to(store), docs(2), version=version, on_failure="collect", delete_missing=True)
    assert counts(report) == (0, 0, 1, 0, 1)
    assert (report.failed[0].document_id, report.failed[0].stage) == ("d0", "read")
    assert "d0" in held(store), "a document that failed is not missing"
    report = run(writing_to(store), docs(1), version=lambda document: 3, on_failure="collect")
    assert "must give a text" in str(report.failed[0].error)


def test_settings_that_cannot_be_described_ask_for_a_version(store: AsyncMilvusVectorStore) -> None:
    class Undescribed(Lines):
        def to_dict(self, **kwargs: Any) -> dict[str, Any]:
            raise TypeError("no")

    pipeline = writing_to(store, transformations=[Undescribed(), Model(), AsyncMilvusWriter(store)])
    with pytest.raises(ValueError, match=r"Undescribed can't be described.*give version="):
        ingest(pipeline, docs(1))
    assert counts(ingest(pipeline, docs(1), version="1")) == (1, 0, 0, 0, 0)


# --- rows that others wrote, or deleted


@both
def test_rows_that_an_index_wrote_of_the_same_documents_are_replaced(
    store: AsyncMilvusVectorStore, run: Ingest
) -> None:
    VectorStoreIndex.from_documents(
        docs(3, lines=5),
        storage_context=StorageContext.from_defaults(vector_store=store),
        embed_model=Model(),
        transformations=[Lines()],
    )
    assert held(store) == expected(docs(3, lines=5))
    assert counts(run(writing_to(store), docs(3))) == (0, 3, 0, 0, 0)
    assert held(store) == expected(docs(3))


@both
def test_rows_that_the_plain_store_wrote_are_replaced(lite_uri: str, collection_name: str, run: Ingest) -> None:
    async def main() -> MilvusVectorStore:
        options: Any = {"dim": DIM, "consistency_level": "Strong", "grpc_options": SELDOM_PINGING}
        plain = MilvusVectorStore(uri=lite_uri, collection_name=collection_name, **options)
        IngestionPipeline(transformations=[Lines(), Model()], vector_store=plain).run(documents=docs(3, lines=5))
        return plain

    plain = asyncio.run(main())
    assert held(plain) == expected(docs(3, lines=5))
    with AsyncMilvusVectorStore(uri=lite_uri, collection_name=collection_name, dim=DIM) as store:
        assert counts(run(writing_to(store), docs(2))) == (0, 2, 0, 0, 0)
        assert held(store) == expected([*docs(2), docs(3, lines=5)[2]])
    plain.client.close()


@both
def test_rows_deleted_behind_its_back_are_written_again(backend: Backend, collection_name: str, run: Ingest) -> None:
    with AsyncMilvusVectorStore(
        uri=backend.uri, collection_name=collection_name, dim=DIM, consistency_level="Strong"
    ) as store:
        run(writing_to(store), docs(4, lines=3))
        store.delete_nodes(node_ids=[next(row["id"] for row in rows(store) if row["doc_id"] == "d1")])
        store.delete("d2")
        assert counts(run(writing_to(store), docs(4, lines=3))) == (1, 1, 2, 0, 0)
        assert held(store) == expected(docs(4, lines=3))


@both
def test_a_row_that_was_added_to_a_document_behind_its_back_is_deleted(
    store: AsyncMilvusVectorStore, run: Ingest
) -> None:
    run(writing_to(store), docs(2))
    of_d0 = {NodeRelationship.SOURCE: Document(id_="d0").as_related_node_info()}
    store.add([TextNode(id_="more", text="more", embedding=[1.0] * DIM, relationships=of_d0)])
    report = run(writing_to(store), docs(2))
    assert (report.unchanged, report.texts_embedded) == (2, 0)
    assert held(store) == expected(docs(2))


@both
def test_the_plain_store_reads_what_was_ingested_as_its_own(
    backend: Backend, collection_name: str, run: Ingest
) -> None:
    splitter = SentenceSplitter(chunk_size=64, chunk_overlap=0, id_func=lambda number, d: f"{d.node_id}#{number}")
    text = " ".join(f"Sentence number {n} of this document." for n in range(60))
    documents = [Document(id_=f"d{n}", text=f"{n}. {text}", metadata={"page": n, "deep": {"a": [n]}}) for n in range(3)]
    with AsyncMilvusVectorStore(uri=backend.uri, collection_name=collection_name, dim=DIM) as store:
        run(IngestionPipeline(transformations=[splitter, Model()], vector_store=store), documents)
        plain_nodes = {
            node.node_id: node
            for node in IngestionPipeline(transformations=[splitter, Model()]).run(documents=documents)
        }

        async def read() -> None:
            options: Any = {"collection_name": collection_name, "dim": DIM, "consistency_level": "Strong"}
            plain = MilvusVectorStore(uri=backend.uri, grpc_options=SELDOM_PINGING, **options)
            for each in (plain, store):
                found = each.get_nodes(node_ids=list(plain_nodes))
                assert len(found) == len(plain_nodes)
                for node in found:
                    wanted = plain_nodes[node.node_id]
                    assert node.get_content() == wanted.get_content()
                    assert node.metadata == wanted.metadata, "no trace of the record"
                    assert node.relationships == wanted.relationships
                    assert "_ingestion" not in node.get_content(MetadataMode.ALL)
                query = VectorStoreQuery(query_embedding=Model().vector("sentence number 7"), similarity_top_k=5)
                for found in (each.query(query), await each.aquery(query)):
                    assert len(found.nodes or []) == 5
                    assert all("_ingestion" not in node.to_json() for node in found.nodes or [])
            await plain.aclient.close()
            plain.client.close()

        asyncio.run(read())


# --- documents that are gone


@both
def test_documents_that_are_gone_are_deleted_if_that_is_asked_for(
    backend: Backend, collection_name: str, run: Ingest
) -> None:
    with AsyncMilvusVectorStore(uri=backend.uri, collection_name=collection_name, dim=DIM) as store:
        run(writing_to(store), docs(5))
        assert counts(run(writing_to(store), docs(3))) == (0, 0, 3, 0, 0)
        assert held(store) == expected(docs(5))
        assert counts(run(writing_to(store), docs(3), delete_missing=True)) == (0, 0, 3, 2, 0)
        assert held(store) == expected(docs(3))


@both
def test_only_documents_of_the_same_source_are_deleted(store: AsyncMilvusVectorStore, run: Ingest) -> None:
    store.add([TextNode(id_="loose", text="of no document", embedding=[1.0] * DIM)])
    named = {source: [doc(f"{source}-{n}", f"{n} of {source}") for n in range(3)] for source in ("", "a", 'b"]\\')}
    for source, documents in named.items():
        run(writing_to(store), documents, source=source)
    everything = [each for documents in named.values() for each in documents]
    for source, documents in named.items():
        report = run(writing_to(store), documents[:1], source=source, delete_missing=True)
        assert counts(report) == (0, 0, 1, 2, 0)
        everything = [each for each in everything if each not in documents[1:]]
        assert held(store) == expected(everything) | {"None": ["of no document"]}


@both
def test_a_document_that_moves_to_another_source_belongs_to_that(store: AsyncMilvusVectorStore, run: Ingest) -> None:
    run(writing_to(store), docs(2), source="a")
    assert counts(run(writing_to(store), docs(1), source="b")) == (0, 1, 0, 0, 0)
    assert counts(run(writing_to(store), docs(2)[1:], source="a", delete_missing=True)) == (0, 0, 1, 0, 0)
    assert held(store) == expected(docs(2))


@both
def test_documents_that_fail_are_not_missing_and_keep_their_earlier_version(
    store: AsyncMilvusVectorStore, run: Ingest
) -> None:
    run(writing_to(store), docs(5))
    now = [doc("d0", "unsplittable"), doc("d1", "refused"), doc("d2", "fine")]
    report = run(writing_to(store), now, delete_missing=True, on_failure="collect")
    assert counts(report) == (0, 1, 0, 2, 2)
    assert held(store) == expected([*docs(2), now[2]])


@both
def test_nothing_is_deleted_while_what_could_not_be_read_may_be_what_is_missing(
    store: AsyncMilvusVectorStore, run: Ingest
) -> None:
    run(writing_to(store), docs(5))
    report = run(writing_to(store), [*docs(3), "a text"], delete_missing=True, on_failure="collect")
    assert counts(report) == (0, 0, 3, 0, 1)
    assert held(store) == expected(docs(5))

    def id_of(document: Document) -> Any:
        return "" if document.node_id == "d2" else document.node_id

    run(writing_to(store), docs(3), document_id=id_of, delete_missing=True, on_failure="collect")
    assert held(store) == expected(docs(5))


# --- collections of other kinds


def collection(uri: str, name: str, key: str, kind: Any, auto_id: bool = False, dynamic: bool = True) -> None:
    client = MilvusClient(uri)
    schema = client.create_schema(auto_id=auto_id, enable_dynamic_field=dynamic)
    schema.add_field(key, kind, is_primary=True, max_length=65_535)
    schema.add_field("doc_id", DataType.VARCHAR, max_length=65_535)
    schema.add_field("text", DataType.VARCHAR, max_length=65_535)
    schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=DIM)
    index = client.prepare_index_params()
    index.add_index("embedding", index_type="FLAT", metric_type="IP")
    client.create_collection(name, schema=schema, index_params=index)
    client.close()


@both
def test_a_collection_without_a_dynamic_field_is_refused(lite_uri: str, collection_name: str, run: Ingest) -> None:
    collection(lite_uri, collection_name, "id", DataType.VARCHAR, dynamic=False)
    with (
        AsyncMilvusVectorStore(uri=lite_uri, collection_name=collection_name, dim=DIM) as store,
        pytest.raises(ValueError, match="has no dynamic field"),
    ):
        run(writing_to(store), docs(1))


@both
@pytest.mark.parametrize("upsert_mode", [True, False])
def test_a_collection_that_makes_its_keys_up_is_refused(
    lite_uri: str, collection_name: str, run: Ingest, upsert_mode: bool
) -> None:
    collection(lite_uri, collection_name, "pk", DataType.INT64, auto_id=True)
    with (
        AsyncMilvusVectorStore(
            uri=lite_uri, collection_name=collection_name, dim=DIM, upsert_mode=upsert_mode
        ) as store,
        pytest.raises(ValueError, match="makes its primary keys up"),
    ):
        run(writing_to(store), docs(1))


@both
def test_a_collection_may_have_a_primary_key_of_another_name(
    backend: Backend, collection_name: str, run: Ingest
) -> None:
    collection(backend.uri, collection_name, "number", DataType.INT64)

    class Numbered(Lines):
        def __call__(self, nodes: Any, **kwargs: Any) -> Any:
            made = super().__call__(nodes)
            for place, node in enumerate(made):
                if node.get_content() != "unnumbered":
                    node.metadata["number"] = 100 * int(node.ref_doc_id[1:]) + place
            return made

    with AsyncMilvusVectorStore(uri=backend.uri, collection_name=collection_name, dim=DIM) as store:
        pipeline = writing_to(store, transformations=[Numbered(), Model(), AsyncMilvusWriter(store)])
        assert counts(run(pipeline, docs(3, lines=3))) == (3, 0, 0, 0, 0)
        assert counts(run(pipeline, docs(3, lines=3))) == (0, 0, 3, 0, 0)
        assert counts(run(pipeline, docs(3, version="second"), delete_missing=True)) == (0, 3, 0, 0, 0)
        assert held(store) == expected(docs(3, version="second"))
        bad = [doc("d3", "unnumbered"), doc("d4", "unnumbered", "unnumbered"), doc("d5", "one")]
        report = run(pipeline, bad, on_failure="collect")
        assert counts(report) == (1, 0, 0, 0, 2)
        assert all("'number'" in str(each.error) for each in report.failed), [str(each.error) for each in report.failed]
        report = run(writing_to(store), [doc("d6", "one", "two", number=7)], on_failure="collect")
        assert "have the same number '7'" in str(report.failed[0].error)

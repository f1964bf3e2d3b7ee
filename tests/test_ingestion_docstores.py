"""Ingestion tells the pipeline's docstore what LlamaIndex's own pipeline tells it, but not before it is true."""

from __future__ import annotations

import asyncio
import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.schema import Document
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.storage.docstore.keyval_docstore import KVDocumentStore
from llama_index.core.storage.kvstore import SimpleKVStore
from llama_index.vector_stores.milvus import MilvusVectorStore

from llama_index_milvus_async_ext import AsyncMilvusVectorStore, AsyncMilvusWriter
from llama_index_milvus_async_ext._ingest.docstores import hashes_of
from llama_index_milvus_async_ext._ingest.duplicates import Duplicates
from llama_index_milvus_async_ext._ingest.item import Item
from llama_index_milvus_async_ext.ingestion import ingest
from tests.conftest import Backend, examples
from tests.fault_proxy import FaultProxy
from tests.faults import MilvusError
from tests.ingesting import (
    DIM,
    Ingest,
    Lines,
    Model,
    asynchronously,
    both,
    counts,
    doc,
    docs,
    expected,
    held,
    writing_to,
)

UPSERTS_AND_DELETE = DocstoreStrategy.UPSERTS_AND_DELETE
DUPLICATES_ONLY = DocstoreStrategy.DUPLICATES_ONLY


# What comes in one run after another.
HISTORY = [
    docs(4),
    docs(4),
    [*docs(1), doc("d1", "changed"), *docs(4)[2:]],
    [doc("d3", "shortened"), doc("new", "one", page=1)],
    [doc("new", "one", page=2)],
    docs(2),
]


def content_of(docstore: SimpleDocumentStore) -> dict[str, Any]:
    return {kind: copy.deepcopy(content) for kind, content in docstore.to_dict().items() if content}


@both
@pytest.mark.parametrize("strategy", list(DocstoreStrategy))
def test_a_docstore_ends_as_a_plain_pipeline_leaves_it(
    store: AsyncMilvusVectorStore, tmp_path: Path, run: Ingest, strategy: DocstoreStrategy
) -> None:
    ours, plain = SimpleDocumentStore(), SimpleDocumentStore()
    # A file of its own: one that has been served for long may refuse pymilvus's async client, for "too many pings".
    uri = str(tmp_path / "plain.db")

    async def plainly() -> list[dict[str, Any]]:
        plain_store = MilvusVectorStore(uri=uri, dim=DIM, consistency_level="Strong")
        pipeline = IngestionPipeline(
            transformations=[Lines(), Model()],
            vector_store=plain_store,
            docstore=plain,
            docstore_strategy=strategy,
            disable_cache=True,
        )
        contents = []
        for documents in HISTORY:
            await pipeline.arun(documents=[each.model_copy(deep=True) for each in documents])
            contents.append(content_of(plain))
        plain_store.client.close()
        return contents

    wanted = asyncio.run(plainly())
    pipeline = writing_to(store, docstore=ours, docstore_strategy=strategy)
    for number, documents in enumerate(HISTORY):
        run(pipeline, [each.model_copy(deep=True) for each in documents])
        assert content_of(ours) == wanted[number], f"after run {number}"


@both
def test_upserts_and_delete_deletes_what_the_docstore_knows_and_the_stream_does_not_hold(
    store: AsyncMilvusVectorStore, run: Ingest
) -> None:
    docstore = SimpleDocumentStore()
    pipeline = writing_to(store, docstore=docstore, docstore_strategy=UPSERTS_AND_DELETE)
    run(writing_to(store), [doc("foreign", "of nobody's docstore")])
    assert counts(run(pipeline, docs(5))) == (5, 0, 0, 0, 0)
    assert counts(run(pipeline, docs(2))) == (0, 0, 2, 3, 0)
    assert held(store) == expected([*docs(2), doc("foreign", "of nobody's docstore")])
    assert set(docstore.docs) == {"d0", "d1"}
    assert counts(run(pipeline, [])) == (0, 0, 0, 0, 0)
    assert set(docstore.docs) == {"d0", "d1"}, "an empty stream deletes nothing"
    report = run(pipeline, [doc("d0", "refused")], on_failure="collect")
    assert counts(report) == (0, 0, 0, 1, 1)
    assert held(store) == expected([*docs(1), doc("foreign", "of nobody's docstore")])


@both
def test_upserts_and_delete_misses_each_document_of_a_content(store: AsyncMilvusVectorStore, run: Ingest) -> None:
    """LlamaIndex's question for all hashes names one document of each."""
    docstore = SimpleDocumentStore()
    pipeline = writing_to(store, docstore=docstore, docstore_strategy=UPSERTS_AND_DELETE)
    run(pipeline, [*(doc(each, "boilerplate") for each in "abcd"), doc("e", "other")])
    report = run(pipeline, [doc("b", "boilerplate"), doc("e", "other")])
    assert counts(report) == (0, 0, 2, 3, 0)
    assert held(store) == {"b": ["boilerplate"], "e": ["other"]} and set(docstore.docs) == {"b", "e"}


@pytest.mark.parametrize("kind", [SimpleDocumentStore, KVDocumentStore])
async def test_what_a_docstore_knows_is_what_it_says_where_contents_differ(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    docstore = kind(SimpleKVStore()) if kind is KVDocumentStore else kind()
    known = {f"d{number}": f"hash {number}" for number in range(5)}
    await docstore.aset_document_hashes(known)
    assert await hashes_of(docstore) == known
    assert await docstore.aget_all_document_hashes() == {hash_: each for each, hash_ in known.items()}
    for attribute in ("_kvstore", "_metadata_collection"):  # of another version
        other = copy.copy(docstore)
        vars(other)[attribute] = None
        monkeypatch.setattr(other, "aget_all_document_hashes", docstore.aget_all_document_hashes)
        assert await hashes_of(other) == known


@both
def test_documents_of_the_same_content_are_ingested_once_if_that_is_asked_for(
    store: AsyncMilvusVectorStore, run: Ingest
) -> None:
    model = Model()
    pipeline = writing_to(store, model, docstore=SimpleDocumentStore(), docstore_strategy=DUPLICATES_ONLY)
    same = [doc("a", "same"), doc("b", "same"), doc("c", "other")]
    assert counts(run(pipeline, same)) == (2, 0, 1, 0, 0)
    assert held(store) == {"a": ["same"], "c": ["other"]}
    assert counts(run(pipeline, same)) == (0, 0, 3, 0, 0)
    assert counts(run(pipeline, [doc("later", "same")])) == (0, 0, 1, 0, 0)
    assert model.texts == 2


@both
@pytest.mark.parametrize("strategy", list(DocstoreStrategy))
def test_a_docstore_knows_nothing_that_is_not_acknowledged(
    proxy: FaultProxy, collection_name: str, run: Ingest, strategy: DocstoreStrategy
) -> None:
    with AsyncMilvusVectorStore(
        uri=proxy.uri, collection_name=collection_name, dim=DIM, consistency_level="Strong"
    ) as store:
        docstore = SimpleDocumentStore()
        pipeline = writing_to(store, docstore=docstore, docstore_strategy=strategy)
        first = [*docs(3), doc("bad", "refused"), doc("worse", "unsplittable")]
        report = run(pipeline, first, on_failure="collect")
        assert counts(report) == (3, 0, 0, 0, 2)
        assert set(docstore.docs) == {"d0", "d1", "d2"}
        before = content_of(docstore)
        proxy.script(method="Upsert", fault=MilvusError(65535, "broken"))
        assert len(run(pipeline, docs(5, version="second"), on_failure="collect").failed) == 5
        assert content_of(docstore) == before
        proxy.heal()
        assert counts(run(pipeline, docs(5, version="second"))) == (2, 3, 0, 0, 0)
        assert held(store) == expected(docs(5, version="second"))
        assert {key: node.get_content() for key, node in docstore.docs.items()} == {
            each.node_id: each.text for each in docs(5, version="second")
        }


@both
def test_a_docstore_that_raises_fails_the_documents_that_it_was_not_told_of(
    store: AsyncMilvusVectorStore, run: Ingest
) -> None:
    class Full(SimpleDocumentStore):
        is_full = True

        async def async_add_documents(self, *arguments: Any, **options: Any) -> None:
            if self.is_full:
                raise OSError("no room")
            await super().async_add_documents(*arguments, **options)

    docstore = Full()
    pipeline = writing_to(store, docstore=docstore)
    report = run(pipeline, docs(3), on_failure="collect")
    assert counts(report) == (0, 0, 0, 0, 3)
    assert {(each.stage, str(each.error)) for each in report.failed} == {("docstore", "no room")}
    docstore.is_full = False
    model = Model()
    assert counts(run(writing_to(store, model, docstore=docstore), docs(3))) == (0, 0, 3, 0, 0)
    assert model.calls == 0, "they were written the first time"
    assert set(docstore.docs) == {"d0", "d1", "d2"}, "and it is told now"


@both
def test_a_docstore_that_cannot_be_asked_is_an_error_before_anything_is_done(
    store: AsyncMilvusVectorStore, run: Ingest
) -> None:
    class Gone(SimpleDocumentStore):
        async def aget_all_document_hashes(self) -> dict[str, str]:
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        run(writing_to(store, docstore=Gone()), docs(3))
    assert not held(store)


@both
def test_a_docstore_that_was_lost_is_filled_again_without_embedding(
    backend: Backend, collection_name: str, run: Ingest
) -> None:
    with AsyncMilvusVectorStore(uri=backend.uri, collection_name=collection_name, dim=DIM) as store:
        run(writing_to(store, docstore=SimpleDocumentStore()), docs(3))
        model, docstore = Model(), SimpleDocumentStore()
        assert counts(run(writing_to(store, model, docstore=docstore), docs(3))) == (0, 0, 3, 0, 0)
        assert model.calls == 0
        assert {key: node.get_content() for key, node in docstore.docs.items()} == {
            each.node_id: each.text for each in docs(3)
        }


@both
def test_documents_deleted_as_missing_leave_the_docstore_too(store: AsyncMilvusVectorStore, run: Ingest) -> None:
    docstore = SimpleDocumentStore()
    pipeline = writing_to(store, docstore=docstore)
    run(pipeline, docs(3))
    assert counts(run(pipeline, docs(2), delete_missing=True)) == (0, 0, 2, 1, 0)
    assert set(docstore.docs) == {"d0", "d1"}


@both
def test_of_several_documents_of_one_content_each_leaves_when_it_is_gone(
    store: AsyncMilvusVectorStore, run: Ingest
) -> None:
    docstore = SimpleDocumentStore()
    pipeline = writing_to(store, docstore=docstore)
    same = [doc("a", "same"), doc("b", "same"), doc("c", "other")]
    run(pipeline, same)
    assert set(docstore.docs) == {"a", "b", "c"}
    run(pipeline, same[2:], delete_missing=True)
    assert set(docstore.docs) == {"c"}
    assert held(store) == {"c": ["other"]}


@both
def test_a_docstore_is_given_the_document_as_it_came(store: AsyncMilvusVectorStore, run: Ingest) -> None:
    class Changing(Lines):
        def __call__(self, nodes: Any, **kwargs: Any) -> Any:
            made = super().__call__(nodes)
            for node in nodes:
                node.metadata["seen"] = True
            return made

    docstore = SimpleDocumentStore()
    given = Document(id_="d0", text="one\ntwo", metadata={"page": 1})
    hashed = given.hash
    run(writing_to(store, transformations=[Changing(), Model()], vector_store=store, docstore=docstore), [given])
    assert docstore.get_document_hash("d0") == hashed


# --- duplicates whose originals change


def without_duplicates(store: AsyncMilvusVectorStore, model: Model) -> IngestionPipeline:
    return writing_to(store, model, docstore=SimpleDocumentStore(), docstore_strategy=DUPLICATES_ONLY)


@both
def test_what_was_left_out_is_ingested_as_soon_as_its_original_changes(
    store: AsyncMilvusVectorStore, run: Ingest
) -> None:
    pipeline = without_duplicates(store, Model())
    run(pipeline, [doc("a", "same"), doc("b", "same"), doc("c", "same")])
    now = [doc("b", "same"), doc("c", "same"), doc("a", "another")]
    report = run(pipeline, now)
    assert counts(report) == (1, 1, 1, 0, 0)
    assert held(store) == {"a": ["another"], "b": ["same"]}
    assert counts(run(pipeline, now)) == (0, 0, 3, 0, 0)
    assert held(store) == {"a": ["another"], "b": ["same"]}


@both
def test_of_the_duplicates_of_one_that_fails_one_takes_its_place(store: AsyncMilvusVectorStore, run: Ingest) -> None:
    failing = {"a"}

    class Refusing(Lines):
        def __call__(self, nodes: Any, **options: Any) -> Any:
            if nodes[0].node_id in failing:
                raise OSError("for now")
            return super().__call__(nodes, **options)

    steps = [Refusing(), Model(), AsyncMilvusWriter(store)]
    known = {"docstore": SimpleDocumentStore(), "docstore_strategy": DUPLICATES_ONLY}
    pipeline = IngestionPipeline(transformations=steps, **known)
    same = [doc("a", "same"), doc("b", "same"), doc("c", "same")]
    assert counts(run(pipeline, same, on_failure="collect")) == (1, 0, 1, 0, 1)
    failing.clear()
    for _ in range(2):
        assert counts(run(pipeline, same)) == (0, 0, 3, 0, 0)
        assert held(store) == {"b": ["same"]}


@both
def test_what_the_docstore_was_not_told_of_is_not_there_twice(store: AsyncMilvusVectorStore, run: Ingest) -> None:
    """As an interrupted run leaves it."""
    run(without_duplicates(store, Model()), [doc("b", "same")])
    anew = without_duplicates(store, Model())
    for _ in range(2):
        assert run(anew, [doc("a", "same"), doc("b", "same")]).ok
        assert held(store) == {"a": ["same"]}
    assert counts(run(anew, [doc("b", "same"), doc("a", "same")])) == (0, 0, 2, 0, 0)
    assert held(store) == {"a": ["same"]}


@both
def test_two_runs_that_take_each_others_documents_for_duplicates_never_delete_both(
    store: AsyncMilvusVectorStore, run: Ingest
) -> None:
    """Two processes, each with a docstore that knows nothing, and the documents in another order."""
    both_documents = [doc("a", "same"), doc("b", "same")]
    run(writing_to(store, Model()), both_documents)
    assert run(without_duplicates(store, Model()), both_documents[::-1]).ok
    assert "a" in held(store)
    run(writing_to(store, Model()), both_documents)
    assert run(without_duplicates(store, Model()), both_documents).ok
    assert held(store) == {"a": ["same"]}


@both
@pytest.mark.parametrize("delete_missing", [False, True])
def test_a_duplicate_that_comes_before_its_original_is_left_out_as_well(
    store: AsyncMilvusVectorStore, run: Ingest, delete_missing: bool
) -> None:
    model = Model()
    pipeline = without_duplicates(store, model)
    same = [doc("a", "same"), doc("b", "same"), doc("c", "other")]
    run(pipeline, same)
    for documents in (same[::-1], same, same[::-1]):
        assert counts(run(pipeline, documents, delete_missing=delete_missing)) == (0, 0, 3, 0, 0)
        assert held(store) == {"a": ["same"], "c": ["other"]}
    assert model.texts == 2


@both
def test_where_an_original_is_deleted_one_of_its_duplicates_takes_its_place(
    store: AsyncMilvusVectorStore, run: Ingest
) -> None:
    pipeline = without_duplicates(store, Model())
    run(pipeline, [doc("a", "same"), doc("b", "same"), doc("c", "same")])
    now = [doc("c", "same"), doc("b", "same")]
    assert counts(run(pipeline, now, delete_missing=True)) == (1, 0, 1, 1, 0)
    assert held(store) == {"c": ["same"]}
    assert counts(run(pipeline, now[::-1], delete_missing=True)) == (0, 0, 2, 0, 0)


@both
def test_a_stream_that_breaks_off_takes_no_original_for_deleted(store: AsyncMilvusVectorStore, run: Ingest) -> None:
    def broken() -> Any:
        yield doc("b", "same")
        raise OSError("gone")

    pipeline = without_duplicates(store, Model())
    run(pipeline, [doc("a", "same")])
    assert counts(run(pipeline, broken(), delete_missing=True, on_failure="collect")) == (0, 0, 1, 0, 1)
    assert held(store) == {"a": ["same"]}


twice = pytest.mark.filterwarnings("ignore:the stream holds document")  # where the first is still under way


@both
@twice
def test_of_a_duplicate_that_comes_twice_the_last_one_counts(store: AsyncMilvusVectorStore, run: Ingest) -> None:
    pipeline = without_duplicates(store, Model())
    run(pipeline, [doc("a", "same")])
    run(pipeline, [doc("b", "same"), doc("b", "another"), doc("a", "third")])
    assert held(store) == {"a": ["third"], "b": ["another"]}


@both
@twice
def test_an_original_that_comes_twice_costs_its_duplicate_not_without_a_word(
    store: AsyncMilvusVectorStore, run: Ingest
) -> None:
    pipeline = without_duplicates(store, Model())
    report = run(pipeline, [doc("a", "same"), doc("b", "same"), doc("a", "another")], on_failure="collect")
    (failed,) = report.failed
    assert failed.document_id == "b" and "document 'a' held the same" in str(failed.error)
    assert held(store) == {"a": ["another"]}


def test_what_cannot_be_kept_fails_where_its_original_changes_and_the_next_run_completes_it(
    store: AsyncMilvusVectorStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Duplicates.__init__, "__defaults__", (0,))
    pipeline = without_duplicates(store, Model())
    run = asynchronously
    run(pipeline, [doc("a", "same"), doc("b", "same")])
    now = [doc("b", "same"), doc("a", "another")]
    assert counts(run(pipeline, now, on_failure="collect")) == (0, 1, 0, 0, 1)
    assert counts(run(pipeline, now)) == (1, 0, 1, 0, 0)
    assert held(store) == {"a": ["another"], "b": ["same"]}
    assert counts(run(pipeline, [doc("c", "same")], delete_missing=True)) == (1, 0, 0, 2, 0)
    assert held(store) == {"c": ["same"]}


@both
def test_what_several_hold_that_another_one_held_before_is_ingested_once(
    store: AsyncMilvusVectorStore, run: Ingest
) -> None:
    pipeline = without_duplicates(store, Model())
    run(pipeline, [doc("a", "same")])
    now = [doc("a", "another"), *(doc(f"b{n}", "same") for n in range(50))]
    assert counts(run(pipeline, now)) == (1, 1, 49, 0, 0)
    assert held(store) == {"a": ["another"], "b0": ["same"]}


def test_what_is_left_out_for_one_original_is_not_let_go_of_as_another_comes() -> None:
    duplicates = Duplicates({"x": "a", "z": "d"}, {"a": "x", "d": "z"}, set(), unseen_are_deleted=False, is_wanted=True)
    for hash_, original in (("x", "a"), ("z", "d")):  # it comes twice, with other content
        item = Item(doc("b", hash_), "b", "version", hash_)
        duplicates.come(item)
        assert duplicates.original_of(item) == original
        duplicates.leave_out(item, original, "unchanged")
    duplicates.come(Item(doc("a", "x"), "a", "version", "x"))
    changed = Item(doc("d", "y"), "d", "version", "y")
    assert duplicates.lost_by(changed) == ["b"]
    left_out = duplicates.take_back("b", "d")
    assert left_out is not None and left_out.item is not None and left_out.item.hash == "z"
    assert duplicates.first["z"] == "b" and duplicates.take_back("b", "d") is None
    assert duplicates.room == Duplicates({}, {}, set(), False, True).room


streams = st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("xyz")), unique_by=lambda each: each[0])


@settings(max_examples=examples(25), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(streams, st.booleans(), st.booleans()), min_size=2, max_size=4))
def test_whatever_changes_each_content_of_the_stream_is_there(
    store: AsyncMilvusVectorStore, history: list[tuple[list[tuple[str, str]], bool, bool]]
) -> None:
    store.client.delete(store.collection_name, filter='id != ""')
    model = Model()
    pipeline = without_duplicates(store, model)
    for stream, delete_missing, is_async in history:
        run = asynchronously if is_async else ingest
        for attempt in range(2):
            texts = model.texts
            report = run(pipeline, [doc(*each) for each in stream], delete_missing=delete_missing)
            assert report.documents == len(stream)
            found = [text for each in held(store).values() for text in each]
            assert set(found) >= {content for _, content in stream}
            if delete_missing and stream:
                assert sorted(found) == sorted({content for _, content in stream}), "and each of them once"
            assert not attempt or model.texts == texts, "nothing has changed"

"""What other people's pipelines do to an ingestion: shared chunk ids, copies, workers, models, streams."""

from __future__ import annotations

import hashlib
import pickle
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from llama_index.core.bridge.pydantic import BaseModel
from llama_index.core.ingestion import DocstoreStrategy
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.readers.base import ReaderConfig
from llama_index.core.readers.string_iterable import StringIterableReader
from llama_index.core.schema import BaseNode, Document, NodeRelationship, RelatedNodeInfo
from llama_index.core.storage.docstore import SimpleDocumentStore

from llama_index_milvus_async_ext import AsyncMilvusVectorStore, AsyncMilvusWriter, ingest
from llama_index_milvus_async_ext.ingestion import IngestionError
from tests.ingesting import (
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


class ByContent(Lines):
    """A splitter whose nodes' ids are those of their texts: two documents may have the same."""

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[BaseNode]:
        made = super().__call__(nodes)
        for node in made:
            node.id_ = hashlib.md5(node.get_content().encode(), usedforsecurity=False).hexdigest()
        return made


def by_content(store: AsyncMilvusVectorStore) -> Any:
    return writing_to(store, transformations=[ByContent(), Model(), AsyncMilvusWriter(store)])


@both
def test_a_chunk_that_moves_to_another_document_is_never_lost(store: AsyncMilvusVectorStore, run: Ingest) -> None:
    pipeline = by_content(store)
    run(pipeline, [doc("d0", "alpha", "K"), doc("d1", "beta")])
    later = [doc("d1", "beta", "K"), doc("d0", "alpha")]
    report = run(pipeline, later, on_failure="collect")
    assert [each.document_id for each in report.failed] == ["d1"] and "'d0'" in str(report.failed[0].error)
    assert held(store)["d1"] == ["beta"], "as it was"
    assert run(pipeline, later).ok
    assert held(store) == expected(later)


@both
def test_a_document_that_fails_takes_no_other_ones_nodes_along(store: AsyncMilvusVectorStore, run: Ingest) -> None:
    pipeline = by_content(store)
    run(pipeline, [doc("good", "boiler", "x")])
    for _ in range(2):
        report = run(pipeline, [doc("good", "boiler", "x"), doc("bad", "boiler", "y" * 70_000)], on_failure="collect")
        assert counts(report) == (0, 0, 1, 0, 1)
        assert held(store) == expected([doc("good", "boiler", "x")])


@both
def test_documents_whose_nodes_have_the_same_ids_are_refused_whenever_they_come(
    store: AsyncMilvusVectorStore, run: Ingest
) -> None:
    splitter = SentenceSplitter(id_func=lambda position, _: f"chunk-{position}")
    pipeline = writing_to(store, transformations=[splitter, Model(), AsyncMilvusWriter(store)])
    together = run(pipeline, docs(3), on_failure="collect")
    assert len(together.failed) == 2
    (there,) = held(store)
    before = held(store)
    for each in docs(3):
        if each.id_ != there:
            later = run(pipeline, [each], on_failure="collect")
            assert len(later.failed) == 1 and repr(there) in str(later.failed[0].error)
    assert held(store) == before


@both
def test_a_duplicate_is_left_out_only_where_its_original_is_there_and_stays(
    store: AsyncMilvusVectorStore, run: Ingest
) -> None:
    options: dict[str, Any] = {
        "docstore": SimpleDocumentStore(),
        "docstore_strategy": DocstoreStrategy.DUPLICATES_ONLY,
    }
    pipeline = writing_to(store, **options)
    run(pipeline, [doc("old", "same"), doc("twin", "same")])
    assert held(store) == {"old": ["same"]}
    assert run(pipeline, [doc("new", "same")], delete_missing=True).ok
    assert held(store) == {"new": ["same"]}, "renamed"
    run(pipeline, [doc("new", "other"), doc("b", "same")])
    assert held(store) == {"new": ["other"], "b": ["same"]}, "the original has changed"
    store.delete("b")
    run(pipeline, [doc("c", "same")])
    assert held(store) == {"new": ["other"], "c": ["same"]}, "the original was deleted behind its back"


@both
def test_the_callers_own_documents_are_left_as_they_came(store: AsyncMilvusVectorStore, run: Ingest) -> None:
    model = Model()
    pipeline = writing_to(store, transformations=[AsyncMilvusWriter(store, embed_model=model)])
    document = Document(id_="d", text="cats", metadata={"a": 1})
    run(pipeline, [document])
    assert document.embedding is None and document.relationships == {}
    document.set_content("dogs run")
    assert run(pipeline, [document]).texts_embedded == 1
    (node,) = store.get_nodes(node_ids=["d"])
    again = Document(id_="d", text="dogs run", metadata={"a": 1})
    assert node.embedding == pytest.approx(model.vector(again.get_content("embed")), abs=1e-6)


@both
def test_what_is_deep_in_the_callers_documents_is_left_as_it_came(store: AsyncMilvusVectorStore, run: Ingest) -> None:
    class Changing(Lines):
        def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[BaseNode]:
            for node in nodes:
                node.metadata["pages"][0]["number"] += 1
                node.metadata["names"].append("another")
                node.excluded_embed_metadata_keys.append("names")
                node.excluded_llm_metadata_keys.append("names")
                node.relationships[NodeRelationship.CHILD][0].metadata["seen"] = True  # type: ignore[index,union-attr]
                node.text_resource.text += " more"  # type: ignore[attr-defined]
            return super().__call__(nodes)

    pipeline = writing_to(store, transformations=[Changing(), Model(), AsyncMilvusWriter(store)])
    document = doc("d", "text", pages=[{"number": 1}], names=["one"])
    document.relationships = {NodeRelationship.CHILD: [RelatedNodeInfo(node_id="child")]}
    before = document.model_copy(deep=True)
    assert run(pipeline, [document]).added == 1
    assert document == before
    assert run(pipeline, [document]).unchanged == 1


class Rooted(Document):
    """A document with an object of the user's own, which refers back to it."""

    holder: Any = None


class Holder(BaseModel):
    of: Any = None


@both
def test_objects_of_the_callers_own_are_not_looked_into(store: AsyncMilvusVectorStore, run: Ingest) -> None:
    document = Rooted(id_="d", text="text", holder=Holder())
    document.holder.of = document
    assert run(writing_to(store), [document]).added == 1


@both
def test_metadata_of_another_type_is_a_change(store: AsyncMilvusVectorStore, run: Ingest) -> None:
    pipeline = writing_to(store)
    run(pipeline, [doc("d", "text", year=1)])
    assert run(pipeline, [doc("d", "text", year="1")]).replaced == 1
    found = store.client.query(store.collection_name, 'id != ""', output_fields=["year"], consistency_level="Strong")
    assert [row["year"] for row in found] == ["1"]


@both
def test_a_transformation_that_would_arrive_in_a_worker_as_another_is_refused(
    store: AsyncMilvusVectorStore, run: Ingest
) -> None:
    splitter = SentenceSplitter(id_func=lambda position, document: f"{document.node_id}-{position}")
    pipeline = writing_to(store, transformations=[splitter, Model(), AsyncMilvusWriter(store)])
    with pytest.raises(ValueError, match=r"SentenceSplitter.* pickle"):
        run(pipeline, docs(2), num_workers=2)


class BrokenTemplate(Lines):
    """One of its nodes can't be formed as a text for the model."""

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[BaseNode]:
        made = super().__call__(nodes)
        for node in made:
            if node.get_content() == "unformed":
                node.metadata = {"a": 1}
                node.text_template = "{nothere}"  # type: ignore[attr-defined]
        return made


@both
def test_a_text_that_cannot_be_formed_costs_its_document_alone(store: AsyncMilvusVectorStore, run: Ingest) -> None:
    pipeline = writing_to(store, transformations=[BrokenTemplate(), Model(), AsyncMilvusWriter(store)])
    report = run(pipeline, [doc("bad", "fine", "unformed"), *docs(3)], on_failure="collect")
    assert counts(report) == (3, 0, 0, 0, 1)
    assert (report.failed[0].document_id, report.failed[0].stage) == ("bad", "embed")


class ServiceError(Exception):
    """An error as some services have, which does not survive its pickling."""

    def __init__(self, message: str, *, response: object) -> None:
        super().__init__(message)
        self.response = response


class Refusing(Model):
    def _embed(self, texts: list[str]) -> list[list[float]]:
        raise ServiceError("too many requests", response=threading.Lock())


def test_the_error_of_a_run_pickles_whatever_the_errors_in_it(store: AsyncMilvusVectorStore) -> None:
    with pytest.raises(IngestionError) as raised:
        ingest(writing_to(store, Refusing()), docs(1))
    copy = pickle.loads(pickle.dumps(raised.value))
    assert str(copy.report.failed[0].error) == "ServiceError: too many requests"


class WithoutLength(list[Document]):
    def __len__(self) -> int:
        raise TypeError("this stream does not know")


@both
@pytest.mark.parametrize("show_progress", [False, True])
def test_a_stream_need_not_know_its_length(store: AsyncMilvusVectorStore, run: Ingest, show_progress: bool) -> None:
    assert run(writing_to(store), WithoutLength(docs(2)), show_progress=show_progress).added == 2


@both
@pytest.mark.parametrize("documents", ["a text", Document(text="one", id_="one")])
def test_a_single_document_is_no_stream(store: AsyncMilvusVectorStore, run: Ingest, documents: Any) -> None:
    with pytest.raises(TypeError, match="documents must be an iterable"):
        run(writing_to(store), documents)


def test_the_pipelines_readers_are_read_beside_the_loop_after_an_async_stream(store: AsyncMilvusVectorStore) -> None:
    threads: list[str] = []

    class Reader(StringIterableReader):
        def load_data(self, texts: list[str]) -> list[Document]:
            threads.append(threading.current_thread().name)
            return [Document(text=text, id_=text) for text in texts]

    async def stream() -> Any:
        for each in docs(2):
            yield each

    pipeline = writing_to(store)
    pipeline.readers = [ReaderConfig(reader=Reader(), reader_kwargs={"texts": ["three"]})]
    assert asynchronously(pipeline, stream()).added == 3
    assert threads and threads[0] != threading.main_thread().name

"""What every workload works on: nodes of the standard library's sources, with random unit vectors, and documents."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from llama_index.core.node_parser import TextSplitter
from llama_index.core.schema import BaseNode, Document, NodeRelationship, ObjectType, RelatedNodeInfo, TextNode

_NODES_PER_DOCUMENT = 20
_DISTINCT_VECTORS = 10_000
_SHORTEST_TEXT, _LONGEST_TEXT = 500, 1_000


def make_nodes(count: int, dim: int, *, embedded: bool = True, prefix: str = "node") -> list[BaseNode]:
    """`count` nodes as a pipeline makes them from files: text, metadata, a SOURCE relationship, an embedding.

    The same at every call. Beyond the first 10,000, nodes share the vectors (the very list) of earlier ones, so that
    large runs measure the store and not the machine's memory; ids and texts stay distinct.
    """
    source = _source_text()
    vectors = make_vectors(min(count, _DISTINCT_VECTORS), dim) if embedded else []
    lengths = np.random.default_rng(1).integers(_SHORTEST_TEXT, _LONGEST_TEXT, count).tolist()
    nodes: list[BaseNode] = []
    start = 0
    for index, length in enumerate(lengths):
        start = (start + length) % (len(source) - _LONGEST_TEXT)
        nodes.append(
            TextNode(
                id_=f"{prefix}-{index:08d}",
                text=f"[{index}] {source[start : start + length]}",
                embedding=vectors[index % _DISTINCT_VECTORS] if embedded else None,
                metadata={**_metadata(index), "position": index},
                relationships={NodeRelationship.SOURCE: _document(index)},
            )
        )
    return nodes


class Pages(TextSplitter):
    """Splits at form feeds: documents have as many nodes as they have pages, and to split them takes next to no time.

    Splitting is a workload of its own with LlamaIndex's splitters, which count tokens.
    """

    def split_text(self, text: str) -> list[str]:
        return text.split("\f")


def make_documents(
    count: int, pages: int, *, characters: int = (_SHORTEST_TEXT + _LONGEST_TEXT) // 2, first: int = 0
) -> Iterator[Document]:
    """`count` documents, made as they are asked for; the same at every call.

    Args:
        count: How many.
        pages: Pages of each, see `Pages`.
        characters: Length of a page.
        first: Number of the first document.
    """
    source = _source_text()
    for number in range(first, first + count):
        start = number * 7_919 % (len(source) - pages * characters)
        parts = [source[start + n * characters : start + (n + 1) * characters] for n in range(pages)]
        yield Document(
            id_=f"document-{number:06d}",
            text="\f".join(f"[{number}.{page}] " + part.replace("\f", " ") for page, part in enumerate(parts)),
            metadata=_metadata(number * _NODES_PER_DOCUMENT),
        )


def numbered(place: int, document: BaseNode) -> str:
    """Ids of nodes that are the same in each run, for a splitter's `id_func`; in the order of the documents."""
    return f"{document.node_id}-{place:04d}"


@cache
def make_vectors(count: int, dim: int) -> Sequence[list[float]]:
    """`count` random unit vectors: with inner product, a vector's nearest neighbour is itself."""
    drawn = np.random.default_rng(dim).normal(size=(count, dim)).astype(np.float32)
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    vectors: list[list[float]] = drawn.tolist()
    return vectors


def _document(index: int) -> RelatedNodeInfo:
    return RelatedNodeInfo(
        node_id=f"document-{index // _NODES_PER_DOCUMENT:06d}",
        node_type=ObjectType.DOCUMENT,
        metadata=_metadata(index),
        hash=f"{index // _NODES_PER_DOCUMENT:064x}",
    )


def _metadata(index: int) -> dict[str, object]:
    document = index // _NODES_PER_DOCUMENT
    return {
        "file_path": f"/corpus/volume_{document % 7}/document_{document:06d}.txt",
        "file_name": f"document_{document:06d}.txt",
        "file_type": "text/plain",
        "file_size": 10_000 + document,
        "creation_date": "2025-01-01",
        "last_modified_date": "2025-06-30",
    }


@cache
def _source_text() -> str:
    library = Path(sysconfig.get_path("stdlib"))
    return "".join(path.read_text(encoding="utf-8", errors="replace") for path in sorted(library.glob("[a-m]*.py")))

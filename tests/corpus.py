"""A real corpus that every machine has: the standard library's own sources, as LlamaIndex documents and nodes."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.schema import Document, NodeRelationship, RelatedNodeInfo, TextNode

# Not the library's, absent from some distributions, or broken sources on purpose.
_LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"})


def documents(limit: int | None = None, min_chars: int = 1) -> list[Document]:
    """One document per source file of at least `min_chars` characters, in the order of their names.

    Its id is the file's path within the library; its metadata `file_name`, `file_path` (the same path) and `package`.
    The same on every machine with the same Python.
    """
    return list(islice(_documents(min_chars), limit))


def _documents(min_chars: int) -> Iterator[Document]:
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in _sources(library):
        inner = path.relative_to(library)
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if len(text) < min_chars:
            continue
        metadata = {"file_name": inner.name, "file_path": inner.as_posix(), "package": inner.parts[0]}
        yield Document(id_=inner.as_posix(), text=text, metadata=metadata)


def _sources(folder: Path) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and entry.name not in _LEFT_OUT:
            yield from _sources(entry)
        elif entry.suffix == ".py":
            yield entry


def stdlib_nodes(limit: int, chunk_chars: int = 1000, embed_model: BaseEmbedding | None = None) -> list[TextNode]:
    """`limit` nodes of whole lines, of `chunk_chars` characters or a little more, with their documents as their source.

    Cut by hand, because a splitter that counts tokens would cost more than what is tested. Ids are
    "<path>#<number>". With `embed_model`, they have embeddings.

    Raises:
        ValueError: the library has fewer chunks than that; ask for shorter ones.
    """
    nodes: list[TextNode] = []
    for document in _documents(min_chars=1):
        source = RelatedNodeInfo(node_id=document.node_id, metadata=document.metadata)
        for number, text in enumerate(_chunks(document.text, chunk_chars)):
            nodes.append(
                TextNode(
                    id_=f"{document.node_id}#{number}",
                    text=text,
                    metadata=document.metadata | {"chunk": number},
                    relationships={NodeRelationship.SOURCE: source},
                )
            )
            if len(nodes) == limit:
                return nodes if embed_model is None else _embedded(nodes, embed_model)
    raise ValueError(f"the standard library gives {len(nodes)} chunks of {chunk_chars} characters, not {limit}")


def _chunks(text: str, chunk_chars: int) -> Iterator[str]:
    lines: list[str] = []
    length = 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        length += len(line)
        if length >= chunk_chars:
            yield "".join(lines)
            lines, length = [], 0
    if "".join(lines).strip():
        yield "".join(lines)


def _embedded(nodes: list[TextNode], embed_model: BaseEmbedding) -> list[TextNode]:
    for node, embedding in zip(nodes, embed_model.get_text_embedding_batch([node.text for node in nodes]), strict=True):
        node.embedding = embedding
    return nodes

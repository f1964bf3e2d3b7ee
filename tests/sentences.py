"""Documents of numbered sentences, each of which becomes a node, and what a collection holds of them."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import Document
from pymilvus import MilvusClient

# Two sentences do not fit into one node.
_SENTENCE = "Sentence {number} of edition {edition} of {document}" + " says one thing and another" * 7 + "."
_SENTENCES = re.compile(r"[^.]+\.\s*")
MOST_SENTENCES = 5

Edition = dict[str, str]
Texts = dict[str, Counter[str]]


def text_of(document: str, edition: int, sentences: int) -> str:
    """A document's text in one of its editions."""
    numbers = range(sentences)
    return " ".join(_SENTENCE.format(number=number, edition=edition, document=document) for number in numbers)


def first_edition(chance: random.Random, size: int) -> Edition:
    """So many documents: their texts, of which some are empty, by their ids."""
    names = [f"document {number}" for number in range(size)]
    return {name: text_of(name, 0, chance.randint(0, MOST_SENTENCES)) for name in names}


def next_edition(chance: random.Random, before: Edition, number: int) -> Edition:
    """Two thirds of the documents changed: longer, shorter or emptied; a few removed, as many new ones added."""
    after = {}
    for document, text in before.items():
        fate = chance.random()
        if fate < 0.6:
            after[document] = text_of(document, number, chance.randint(0, MOST_SENTENCES))
        elif fate < 0.65:
            new = f"document {number}-{len(after)}"
            after[new] = text_of(new, number, chance.randint(1, MOST_SENTENCES))
        else:
            after[document] = text
    return after


def documents(edition: Mapping[str, str]) -> list[Document]:
    return [Document(id_=document, text=text) for document, text in edition.items()]


def fixed_id(number: int, document: Any) -> str:
    """An `id_func` by which a node keeps its id from edition to edition."""
    return f"{document.node_id}, sentence {number}"


def splitter(with_fixed_ids: bool) -> SentenceSplitter:
    """A splitter that makes a node of each sentence, and random ids for them, or fixed ones."""
    # LlamaIndex's usual tokenizers take longer to load than most runs here.
    return SentenceSplitter(
        chunk_size=64,
        chunk_overlap=0,
        tokenizer=str.split,
        chunking_tokenizer_fn=_SENTENCES.findall,
        id_func=fixed_id if with_fixed_ids else None,
    )


def nodes_of(edition: Mapping[str, str]) -> Texts:
    """The texts of all nodes of an edition, by document."""
    made: Texts = {}
    for document in documents(edition):
        texts = Counter(node.get_content() for node in splitter(False)([document]))
        if texts:
            made[document.node_id] = texts
    return made


def rows_in(client: MilvusClient, collection: str) -> list[tuple[str, str, str]]:
    """The key, the document and the text of each row of a collection."""
    pages = client.query_iterator(
        collection, filter="", output_fields=["id", "doc_id", "text"], batch_size=5_000, consistency_level="Strong"
    )
    rows = []
    while page := pages.next():
        rows += [(row["id"], row["doc_id"], row["text"]) for row in page]
    pages.close()
    return rows


def stored(rows: list[Any]) -> Texts:
    """The texts in these rows, by document; no key stands there twice."""
    keys = Counter(key for key, _, _ in rows)
    assert not keys or max(keys.values()) == 1, keys.most_common(3)
    texts: Texts = {}
    for _, document, text in rows:
        texts.setdefault(document, Counter())[text] += 1
    return texts

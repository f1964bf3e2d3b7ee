"""From a stored row back to its node."""

from __future__ import annotations

from typing import Any

from llama_index.core.schema import BaseNode, TextNode
from llama_index.core.vector_stores.utils import metadata_dict_to_node
from llama_index.vector_stores.milvus import MilvusVectorStore
from pydantic_core import from_json

from llama_index_milvus_async_ext._milvus.schema import ID_FIELD

NODE_FIELDS = ("_node_content", "_node_type")


def found_node(store: MilvusVectorStore, id_: Any, entity: dict[str, Any]) -> BaseNode:
    """Build the node of a hit, without its embedding, as upstream builds it.

    A row that LlamaIndex did not write becomes a node of its primary key's text.

    Args:
        store: The store that is asked; its settings are upstream's.
        id_: The row's primary key.
        entity: Its output fields.
    """
    if entity.get("_node_type") == "TextNode" and store.text_key in entity:
        # What metadata_dict_to_node does of it, with a quicker parser, and validated once with its text.
        content = from_json(entity["_node_content"])
        content["text"] = entity[store.text_key]
        return TextNode(**content)
    metadata = {key: entity.get(key) for key in store.output_fields}
    node: BaseNode
    if "_node_content" in entity:
        for key in NODE_FIELDS:
            metadata.setdefault(key, entity.get(key))
        node = metadata_dict_to_node(metadata)
    else:
        node = TextNode(id_=str(id_), metadata=metadata)  # upstream makes an id up at each query
    if store.text_key in entity:
        node.set_content(entity[store.text_key])
    return node


def stored_node(store: MilvusVectorStore, item: dict[str, Any], key_name: str = ID_FIELD) -> BaseNode:
    """Build the node of a stored row, embedding included, as upstream builds it.

    A row that LlamaIndex did not write becomes a node of its primary key's text.

    Args:
        store: The store that is asked; its settings are upstream's.
        item: The row.
        key_name: The collection's primary key.

    Raises:
        ValueError: The row holds neither a node nor a text.
    """
    text = item.get(store.text_key)
    node: BaseNode
    if "_node_content" in item:
        node = metadata_dict_to_node(item, text=text)
    elif text:
        # Upstream makes an id up at each look-up.
        node = TextNode(
            id_=str(item.get(key_name)), text=text, metadata={key: item.get(key) for key in store.output_fields}
        )
    else:
        raise ValueError(
            f"row {item.get(key_name)!r} of collection {store.collection_name!r} holds neither a node nor a text in "
            f"column {store.text_key!r}; was it written by something else, or is text_key= another?"
        )
    embedding = item.get(store.embedding_field)
    node.embedding = list(embedding) if embedding is not None else None
    return node

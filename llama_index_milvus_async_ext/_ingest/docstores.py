"""What LlamaIndex's docstore knows."""

from __future__ import annotations

from llama_index.core.storage.docstore.keyval_docstore import KVDocumentStore
from llama_index.core.storage.docstore.types import BaseDocumentStore


async def hashes_of(docstore: BaseDocumentStore) -> dict[str, str]:
    """Of each document that a docstore knows, the hash.

    LlamaIndex asks for documents by their hashes, which names one of those that hold the same: the others would never
    be missed. So its key-value stores, which all of its own are, are asked as it asks them itself.
    """
    own = getattr(type(docstore), "aget_all_document_hashes", None)
    if isinstance(docstore, KVDocumentStore) and own is KVDocumentStore.aget_all_document_hashes:
        kvstore, collection = getattr(docstore, "_kvstore", None), getattr(docstore, "_metadata_collection", None)
        if kvstore is not None and collection is not None:
            known = await kvstore.aget_all(collection=collection)
            return {document_id: each["doc_hash"] for document_id, each in known.items() if each.get("doc_hash")}
    return {document_id: hash_ for hash_, document_id in (await docstore.aget_all_document_hashes()).items()}

"""Stages that work at the same time, each on other items: it knows nothing of documents, nor of Milvus."""

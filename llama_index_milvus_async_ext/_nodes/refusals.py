"""Why a node can't be stored: which one, what is wrong, and what to do."""

from __future__ import annotations

from llama_index.core.schema import BaseNode, NodeWithScore

from llama_index_milvus_async_ext._milvus.errors import SchemaMismatchError


def refused(node: BaseNode, problem: str, remedy: str) -> ValueError:
    """Of a node that no collection could store."""
    return ValueError(_message(node, problem, remedy))


def mismatch(node: BaseNode, problem: str, remedy: str) -> SchemaMismatchError:
    """Of a node that another collection might store."""
    return SchemaMismatchError(_message(node, problem, remedy))


def _message(node: BaseNode, problem: str, remedy: str) -> str:
    if isinstance(node, NodeWithScore):  # it answers for its node in much, and is none: whatever failed, failed by that
        problem, remedy = "it is a NodeWithScore, the hit of a search, and no node", "pass its .node"
    return f"node {node.node_id[:80]!r} can't be stored: {problem}; {remedy}"

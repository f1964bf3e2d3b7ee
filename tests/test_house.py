"""The house: what each room may import, how large a module may be, and what is public."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import llama_index_milvus_async_ext as package

HOME = Path(package.__file__).parent
PYPROJECT = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text()
# Packages that are not called as what they bring.
BROUGHT_BY = {
    "grpc": "grpcio",
    "llama_index.core": "llama-index-core",
    "llama_index.vector_stores": "llama-index-vector-stores-milvus",
    "pydantic_core": "pydantic",
}
MODULES = sorted(HOME.rglob("*.py"))
# From the top down: a room imports those below it, and itself.
FLOORS = [
    "ingestion",
    "writer",
    "retriever",
    "vector_store",
    "_ingest",
    "_store",
    "_queries",
    "_nodes",
    "_milvus",
    "_lane",
    "_flow",
    "ingestion_report",
    "report",
    "events",
    "retry",
]


def room_of(module: str) -> str:
    return module.removeprefix("llama_index_milvus_async_ext.").split(".")[0]


def imports_of(path: Path) -> set[str]:
    return {
        room_of(node.module)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llama_index_milvus_async_ext.")
    }


def modules_of(path: Path) -> set[str]:
    return {
        name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names])
    }


def test_imports_point_down() -> None:
    for path in MODULES:
        relative = path.relative_to(HOME)
        room = relative.parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for other in imports_of(path):
            assert other == room or FLOORS.index(other) > FLOORS.index(room), f"{relative} imports {other}"


def test_only_one_room_knows_pymilvus_internals_and_the_lane_knows_no_milvus() -> None:
    for path in MODULES:
        relative = path.relative_to(HOME)
        outside = {name for name in modules_of(path) if name.split(".")[0] in ("pymilvus", "grpc", "milvus_lite")}
        if relative.parts[0] in ("_lane", "retry.py"):
            assert not outside, f"{relative} imports {outside}"
        elif relative.parts[0] != "_milvus":
            assert outside <= {"pymilvus", "pymilvus.exceptions"}, f"{relative} imports {outside}"


def test_what_is_imported_is_asked_for() -> None:
    asked_for = set(re.findall(r'^    "([\w-]+)', PYPROJECT.partition("\ndependencies = [")[2].partition("]")[0], re.M))
    used = set()
    for name in set().union(*map(modules_of, MODULES)):
        top = ".".join(name.split(".")[: 2 if name.startswith("llama_index.") else 1])
        if top not in sys.stdlib_module_names and top != package.__name__:
            used.add(BROUGHT_BY.get(top, top.replace("_", "-")))
    assert used == asked_for


def test_the_core_of_the_lane_is_pure() -> None:
    pure = [
        "core",
        "precedence",
        "carrier",
        "turns",
        "air",
        "ledger",
        "limit",
        "entrance",
        "batching",
        "effects",
        "items",
        "lanes",
        "trips",
    ]
    for name in pure:
        tree = ast.parse((HOME / "_lane" / f"{name}.py").read_text())
        assert not [node for node in ast.walk(tree) if isinstance(node, (ast.Await, ast.AsyncFunctionDef))], name
        imported = {node.names[0].name for node in ast.walk(tree) if isinstance(node, ast.Import)}
        assert not imported & {"asyncio", "time", "threading", "random", "logging", "os"}, name


def test_what_decides_in_an_ingestion_is_pure() -> None:
    for name in ("_flow/intake", "_flow/foreign", "_ingest/standing", "_ingest/duplicates"):
        tree = ast.parse((HOME / f"{name}.py").read_text())
        assert not [node for node in ast.walk(tree) if isinstance(node, (ast.Await, ast.AsyncFunctionDef))], name
        imported = {node.names[0].name for node in ast.walk(tree) if isinstance(node, ast.Import)}
        assert not imported & {"asyncio", "time", "threading", "random", "logging", "os"}, name


def test_no_module_is_larger_than_a_room() -> None:
    for path in MODULES:
        most = 250 if path.parent.name == "_lane" else 350
        assert len(path.read_text().splitlines()) <= most, path


def test_nothing_else_is_public() -> None:
    assert sorted(package.__all__) == [
        "AsyncMilvusRetriever",
        "AsyncMilvusVectorStore",
        "AsyncMilvusWriter",
        "FailedDocument",
        "FailedNode",
        "IngestionReport",
        "RetryPolicy",
        "WriteError",
        "WriteReport",
        "aingest",
        "ingest",
    ]

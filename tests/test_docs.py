"""The documentation is true: its code runs and prints what it says, its tables hold the defaults, its links lead on."""

from __future__ import annotations

import ast
import asyncio
import enum
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.vector_stores import FilterOperator
from llama_index_instrumentation import get_dispatcher

from llama_index_milvus_async_ext import (
    AsyncMilvusRetriever,
    AsyncMilvusVectorStore,
    AsyncMilvusWriter,
    RetryPolicy,
    aingest,
    ingest,
)
from tests.pages import PAGES, REPOSITORY, Snippet, anchors, snippets

BASE_PARAMETERS = {"self", "kwargs"}
INTERNAL = {"served_at"}  # how a copy of a store finds the process that holds its file
WITH_CODE = [page for page in PAGES if any(not snippet.reason_not_to_run for snippet in snippets(page))]

needs_demo = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="the demo extra (PyTorch) is not installed"
)


@pytest.fixture
def without_handlers_afterwards() -> Iterator[None]:
    """What a snippet adds to LlamaIndex's instrumentation is taken away again: it would print in other tests."""
    root = get_dispatcher("root")
    before = list(root.event_handlers)
    yield
    root.event_handlers[:] = before


@pytest.fixture
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@needs_demo
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("default")  # PyTorch's and others' own
@pytest.mark.usefixtures("in_an_empty_folder", "without_handlers_afterwards")
@pytest.mark.parametrize("page", WITH_CODE)
def test_snippets_run_one_after_the_other(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Scripts as they stand; all others inside one running loop, on what those before them have left."""

    async def run_inside(snippet: Snippet) -> None:
        waiting = eval(snippet.compiled(), namespace)
        if inspect.iscoroutine(waiting):
            await waiting

    namespace: dict[str, Any] = {"__name__": "__main__"}
    loop = asyncio.new_event_loop()
    try:
        for snippet in snippets(page):
            if snippet.reason_not_to_run:
                continue
            if snippet.is_script:
                exec(snippet.compiled(), {"__name__": "__main__"})
            else:
                loop.run_until_complete(run_inside(snippet))
            assert_promised_was_printed(snippet, capsys.readouterr().out)
    finally:
        loop.close()


def assert_promised_was_printed(snippet: Snippet, printed: str) -> None:
    rest = printed
    for promised in snippet.promised:
        _, found, rest = rest.partition(promised)
        where = f"{snippet.page}, line {snippet.line + 1}"
        assert found, f"{where}: {promised!r} is missing, or not in order, in\n{printed}"


@pytest.mark.parametrize("page", PAGES)
def test_only_snippets_that_need_a_server_or_a_key_are_not_run(page: str) -> None:
    for snippet in snippets(page):
        snippet.compiled()
        assert snippet.reason_not_to_run in ("", "needs a server", "needs an API key")


def test_the_readme_is_short() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES)
def test_a_page_opens_with_what_it_is_for(page: str) -> None:
    title, _, rest = PAGES[page].partition("\n\n")
    assert re.fullmatch(r"# [^\n]+", title.strip())
    assert not rest or re.match(r"[A-Z`]", rest), "a sentence, not a heading, a table or code"


@pytest.mark.parametrize(
    "documented",
    [AsyncMilvusVectorStore, RetryPolicy, AsyncMilvusWriter, AsyncMilvusRetriever, aingest, ingest],
    ids=lambda each: each.__name__,
)
def test_the_tables_hold_every_argument_with_its_default(documented: Callable[..., Any]) -> None:
    title = "aingest" if documented is ingest else documented.__name__
    section = re.search(rf"^## `{title}`\n(.*?)(?=^## |\Z)", PAGES["docs/arguments.md"], re.MULTILINE | re.DOTALL)
    assert section, title
    rows = re.findall(r"^\| `(\w+)` \| (?:`([^`]+)`)? *\|", section[1], re.MULTILINE)
    assert len(rows) == len(dict(rows))
    signature = inspect.signature(documented.__init__ if isinstance(documented, type) else documented)
    parameters = signature.parameters
    defaults = {name: p.default for name, p in parameters.items() if name not in BASE_PARAMETERS | INTERNAL}
    assert {name: _value(text) for name, text in rows} == {name: _plain(value) for name, value in defaults.items()}


def _value(text: str) -> Any:
    if not text:
        return inspect.Parameter.empty
    return None if text == "RetryPolicy()" else ast.literal_eval(text)


def _plain(default: Any) -> Any:
    return default.value if isinstance(default, enum.Enum) else default


def test_the_table_of_filters_has_every_operator() -> None:
    table = PAGES["docs/guides/filters.md"].split("## Operators")[1].split("\n\n- ")[0]
    named = set(re.findall(r"`([A-Z][A-Z_]+)`", table))
    assert {operator.name for operator in FilterOperator} == named


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        to = (REPOSITORY / page).parent.joinpath(path).resolve() if path else REPOSITORY / page
        assert to.is_file(), target
        if anchor:
            assert anchor in anchors(to.read_text(encoding="utf-8")), target


def test_the_map_names_every_module() -> None:
    named = set(re.findall(r"`(\w+)`", PAGES["docs/development.md"].split("| module |")[1]))
    home = REPOSITORY / "llama_index_milvus_async_ext"
    modules = {path.stem for path in home.glob("*.py")} | {path.parent.name for path in home.glob("*/__init__.py")}
    assert modules - {"__init__"} <= named


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="the docs extra is not installed")
def test_the_site_is_built_strictly_and_needs_no_network(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHONWARN")}
    environment["NO_MKDOCS_2_WARNING"] = "1"
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    pages = {path.relative_to(tmp_path).as_posix(): path.read_text("utf-8") for path in tmp_path.rglob("*.html")}
    for name, html in pages.items():
        fetched = re.findall(r'<(?:script|img|link|iframe)\b[^>]*?(?:src|href)="?((?:https?:)?//[^" >]+)', html)
        assert fetched == [], name
    assert pages["design.html"].count('<svg class="diagram"') == 2
    assert "AsyncMilvusVectorStore.aopen" in pages["reference.html"]
    assert "asyncio" in pages["examples/quickstart.py.html"]
    for picture in re.findall(r'<img [^>]*src="([^"]+\.png)"', pages["index.html"] + pages["performance.html"]):
        assert (tmp_path / picture).stat().st_size > 10_000

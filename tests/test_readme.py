"""The README is true: its code runs and prints what it says, its tables hold the defaults, its links lead somewhere."""

from __future__ import annotations

import ast
import asyncio
import enum
import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from llama_index_milvus_async_ext import AsyncMilvusRetriever, AsyncMilvusVectorStore, AsyncMilvusWriter, RetryPolicy

REPOSITORY = Path(__file__).resolve().parent.parent
README = REPOSITORY.joinpath("README.md").read_text(encoding="utf-8")
SCALING = REPOSITORY.joinpath("docs", "scaling.md").read_text(encoding="utf-8")
NOT_RUN = "<!-- not run: "
BASE_PARAMETERS = {"self", "kwargs"}
INTERNAL = {"served_at"}  # how a copy of a store finds the process that holds its file


class Snippet:
    """A Python block of the README, with what it promises to print."""

    def __init__(self, line: int, before: str, code: str) -> None:
        self.line = line
        self.code = code
        self.is_script = "asyncio.run(" in code
        self.reason_not_to_run = before.removeprefix(NOT_RUN).removesuffix(" -->") if NOT_RUN in before else ""
        self.promised = re.findall(r"# -> (.*)", code)

    def compiled(self) -> Any:
        # As many lines down as in the README, so that a traceback names the line there.
        return compile(
            "\n" * self.line + self.code, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True
        )


def snippets(page: str = README) -> list[Snippet]:
    found = []
    for match in re.finditer(r"^([^\n]*)\n```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        line = page.count("\n", 0, match.start(2))
        found.append(Snippet(line, match[1], match[2]))
    return found


needs_demo = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="the demo extra (PyTorch) is not installed"
)


@pytest.fixture
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@needs_demo
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("default")  # PyTorch's and others' own
@pytest.mark.usefixtures("in_an_empty_folder")
def test_scripts_run_as_they_stand(capsys: pytest.CaptureFixture[str]) -> None:
    scripts = [snippet for snippet in snippets() if snippet.is_script]
    assert scripts
    for script in scripts:
        exec(script.compiled(), {"__name__": "__main__"})
        assert_promised_was_printed(script, capsys.readouterr().out)


@needs_demo
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("in_an_empty_folder")
@pytest.mark.parametrize("page", [README, SCALING], ids=["README", "scaling"])
def test_snippets_run_one_after_the_other_inside_a_running_loop(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    async def run() -> None:
        for snippet in snippets(page):
            if not snippet.is_script and not snippet.reason_not_to_run:
                waiting = eval(snippet.compiled(), namespace)
                if inspect.iscoroutine(waiting):
                    await waiting
                assert_promised_was_printed(snippet, capsys.readouterr().out)

    namespace: dict[str, Any] = {"__name__": "__main__"}
    asyncio.run(run())


def assert_promised_was_printed(snippet: Snippet, printed: str) -> None:
    rest = printed
    for promised in snippet.promised:
        _, found, rest = rest.partition(promised)
        assert found, f"line {snippet.line + 1}: {promised!r} is missing, or not in order, in\n{printed}"


def test_only_snippets_that_need_a_server_or_a_key_are_not_run() -> None:
    reasons = [snippet.reason_not_to_run for snippet in snippets() if snippet.reason_not_to_run]
    assert sorted(reasons) == ["needs a server", "needs an API key"]
    assert [snippet.reason_not_to_run for snippet in snippets(SCALING)] == ["needs a server", ""]
    for snippet in [*snippets(), *snippets(SCALING)]:
        snippet.compiled()


@pytest.mark.parametrize(
    "documented",
    [AsyncMilvusVectorStore, RetryPolicy, AsyncMilvusWriter, AsyncMilvusRetriever],
    ids=lambda c: c.__name__,
)
def test_the_tables_hold_every_argument_with_its_default(documented: type) -> None:
    section = re.search(rf"^### `{documented.__name__}`\n(.*?)(?=^##)", README, re.MULTILINE | re.DOTALL)
    assert section, documented
    rows = re.findall(r"^\| `(\w+)` \| (?:`([^`]+)`)? *\|", section[1], re.MULTILINE)
    assert len(rows) == len(dict(rows))
    parameters = inspect.signature(documented.__init__).parameters
    defaults = {name: p.default for name, p in parameters.items() if name not in BASE_PARAMETERS | INTERNAL}
    assert {name: _value(text) for name, text in rows} == {name: _plain(value) for name, value in defaults.items()}


def _value(text: str) -> Any:
    if not text:
        return inspect.Parameter.empty
    return None if text == "RetryPolicy()" else ast.literal_eval(text)


def _plain(default: Any) -> Any:
    return default.value if isinstance(default, enum.Enum) else default


@pytest.mark.parametrize(
    ("page", "folder"), [(README, REPOSITORY), (SCALING, REPOSITORY / "docs")], ids=["README", "scaling"]
)
def test_links_lead_somewhere(page: str, folder: Path) -> None:
    headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for target in re.findall(r"(?<!!)\[[^\]]+\]\(([^)]+)\)", page):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith("http"):
            assert (folder / target).exists(), target


def test_the_map_names_every_module() -> None:
    named = set(re.findall(r"`(\w+)`", README.split("| module |")[1]))
    modules = {path.stem for path in (REPOSITORY / "llama_index_milvus_async_ext").glob("*.py")}
    assert modules - {"__init__"} <= named

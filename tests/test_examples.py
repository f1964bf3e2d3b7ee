"""Every example runs as a user runs it: in an empty folder, without network or key, and quietly."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests import programs
from tests.ray_settings import of_ray
from tests.servers import MilvusServer
from tests.waiting import blocked_until

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
PROMISED = {
    "quickstart.py": ["Bread rises because yeast", "A sail pulls", "Honey keeps for centuries"],
    "existing_app.py": [
        "new store:   .* about penguins",
        "plain store: .* about giraffes",
        "taken over:  .* about penguins",
    ],
    "hybrid_search.py": ["default:\n", "sparse:\n.*E4713", "hybrid:\n.*E4713"],
    "many_questions.py": ["one by one: .* in 200 requests", "at once: .* in +[1-4] requests", "each question: True"],
    "failures.py": [
        "WriteError: 3 of 100 nodes",
        "97 written, 3 failed, 0 unknown",
        "too-long",
        "second try: .*written=3, failed=0, unknown=0",
    ],
    "ingest_folder.py": ["added=[1-9].*failed=0", "Where is JSON decoded.\n +0\\.\\d+  \\w+\\.py: "],
    "nightly.py": [
        "4 added, 0 replaced, 0 deleted, 0 unchanged; 4 texts embedded",
        "1 added, 1 replaced, 1 deleted, 2 unchanged; 2 texts embedded",
        "0 added, 0 replaced, 0 deleted, 4 unchanged; 0 texts embedded",
        "salad of beetroot.\n.*pizza",
    ],
    "server.py": ["Set MILVUS_URI"],
    "tracing.py": [
        "AsyncMilvusWriter.acall .*\n(.*\n)*  Milvus.write_request .*\n +. MilvusWriteBatchEvent rows=20 own_rows=20",
        "AsyncMilvusRetriever.aretrieve .*\n  AsyncMilvusVectorStore.search .*\n    Milvus.search_request",
        "MilvusSearchEvent nq=3 own_queries=1 .*attempts=1",
    ],
    "metrics.py": ["# TYPE milvus_rows_total counter\nmilvus_rows_total 100\n", "milvus_requests_limit 8"],
}
NEEDS = {"tracing.py": "llama_index.observability.otel"}
PROGRESS = "Ingesting into Milvus:"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="the demo extra (PyTorch) is not installed"),
]


def run(
    script: str, *arguments: str, folder: Path, cold: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run an example in a folder, with nothing of the tests' own environment that would change it.

    Cold, it imports all that it needs by itself, as its users have it.
    """
    unset = ("MILVUS_URI", "MILVUS_TOKEN", "OPENAI_API_KEY")
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    environment = inherited | programs.OFFLINE | environment
    if cold:
        command = [sys.executable, str(EXAMPLES / script), *arguments]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    return programs.run(
        EXAMPLES / script,
        *arguments,
        timeout=240,
        cwd=folder,
        environment=environment,
        modules=programs.EXAMPLES,
    )


def test_every_example_is_run_and_listed() -> None:
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    assert scripts == {*PROMISED, "demo.py", "fastapi_service.py", "ray_ingest.py"}
    listed = set(re.findall(r"\]\(([\w.]+)\)", (EXAMPLES / "README.md").read_text(encoding="utf-8")))
    assert listed == scripts | {path.name for path in EXAMPLES.glob("*.ipynb")}


@pytest.mark.parametrize("script", PROMISED)
def test_example_prints_what_it_promises_and_nothing_else(script: str, tmp_path: Path) -> None:
    if script in NEEDS:
        pytest.importorskip(NEEDS[script], exc_type=ImportError)
    done = run(script, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for pattern in PROMISED[script]:
        assert re.search(pattern, done.stdout), f"{pattern!r} is not in:\n{done.stdout}"
    assert done.stderr == ""


def test_server_example_runs_on_a_server(milvus_server: MilvusServer, tmp_path: Path) -> None:
    done = run("server.py", folder=tmp_path, MILVUS_URI=milvus_server.uri)
    assert done.returncode == 0, done.stderr
    assert re.search(r"Mars is planet number 4\.\n.*Neptune is planet number 8\.", done.stdout)
    assert done.stderr == ""


def test_server_example_says_what_is_wrong_where_nobody_listens(tmp_path: Path) -> None:
    done = run("server.py", folder=tmp_path, MILVUS_URI="http://127.0.0.1:1")
    assert done.returncode == 1
    assert done.stderr.startswith("can't connect to http://127.0.0.1:1: no Milvus server answers there")


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra ray is not installed")
def test_ray_example_ingests_each_folder_by_a_task_which_deletes_what_has_vanished_from_it(
    milvus_server: MilvusServer, tmp_path: Path
) -> None:
    for name, texts in {"fish": ["A trout swims.", "A carp dives."], "birds": ["A robin sings."]}.items():
        (tmp_path / name).mkdir()
        for number, text in enumerate(texts):
            (tmp_path / name / f"{number}.txt").write_text(text, encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as ray_folder:
        arguments = ["ray_ingest.py", milvus_server.uri, "fish"]
        first = run(*arguments, "birds", folder=tmp_path, cold=True, **of_ray(ray_folder))
        (tmp_path / "fish" / "0.txt").unlink()
        second = run(*arguments, folder=tmp_path, cold=True, **of_ray(ray_folder))
    for done in (first, second):
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
    for name, added in {"fish": 2, "birds": 1, "all": 3}.items():
        wanted = rf"{name} +{added} added,   0 replaced,   0 unchanged,   0 deleted; +{added} chunks written"
        assert re.search(wanted, first.stdout), first.stdout
    wanted = "fish +0 added,   0 replaced,   1 unchanged,   1 deleted; +0 chunks written"
    assert re.search(wanted, second.stdout), second.stdout


# --- the demo


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documents")
    (folder / "notes").mkdir()
    (folder / "notes" / "tea.md").write_text("# Tea\n\nGreen tea is best at eighty degrees.", encoding="utf-8")
    (folder / "clocks.txt").write_text("A pendulum clock loses time in summer. " * 60, encoding="utf-8")
    (folder / "report.pdf").write_bytes(pdf("The bridge was closed because of rust in its cables."))
    (folder / "broken.pdf").write_bytes(b"%PDF-1.4 and then nothing")
    (folder / ".hidden.txt").write_text("Nobody reads this.", encoding="utf-8")
    return folder


def test_demo_reads_embeds_writes_and_asks_and_a_second_run_finds_all_unchanged(
    documents: Path, tmp_path: Path
) -> None:
    asked = [str(documents), "-q", "Why was the bridge closed?", "-q", "How hot should green tea be?"]
    first = run("demo.py", *asked, folder=tmp_path, cold=True)
    second = run("demo.py", *asked, folder=tmp_path)
    for done in (first, second):
        assert done.returncode == 0, done.stderr
        assert re.search(r"Why was the bridge closed\?\n +0\.\d+  report\.pdf, page 1\n +The bridge was", done.stdout)
        assert re.search(r"green tea be\?\n +0\.\d+  notes/tea\.md\n", done.stdout)
        for stage in ("import", "load the embedding model", "connect", "ingest", "  read", "  look-up", "ask"):
            assert re.search(rf"  {stage} +\d+\.\d\d s", done.stdout), stage
        assert "MockLLM" not in done.stdout and "Nobody reads this" not in done.stdout
        lines = [line for line in re.split("[\r\n]+", done.stderr) if line.strip() and not line.startswith(PROGRESS)]
        skipped, *others = lines
        assert "broken.pdf" in skipped
        assert others == []
    assert PROGRESS in first.stderr
    assert "3 documents added, 0 replaced, 0 unchanged" in first.stdout
    assert "0 documents added, 0 replaced, 3 unchanged" in second.stdout
    assert re.search(r"    embed +\d", first.stdout) and not re.search(r"    embed +\d", second.stdout)
    assert _rows(first) == (0, _rows(first)[1])
    assert _rows(first)[1] >= 4
    assert _rows(second) == (_rows(first)[1],) * 2


def test_demo_that_is_interrupted_goes_on_in_the_next_run(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    for number in range(200):
        text = f"Note {number}. " + "It is long enough to keep the model busy for a while. " * 10
        (notes / f"{number}.txt").write_text(text, encoding="utf-8")
    progress = tmp_path / "progress"
    with (
        progress.open("w") as stderr,
        programs.start(
            EXAMPLES / "demo.py",
            "notes",
            cwd=tmp_path,
            environment=os.environ | programs.OFFLINE,
            stderr=stderr.fileno(),
            modules=programs.EXAMPLES,
        ) as demo,
    ):
        # The bar counts what is settled: embedded, and acknowledged by Milvus.
        blocked_until(lambda: re.search(r" [1-9]\d*document", progress.read_text()) is not None, 120)
        os.kill(demo.pid, signal.SIGINT)
        assert demo.wait(60) == 1
    last = progress.read_text().splitlines()[-1]
    assert last == "demo: interrupted; what was acknowledged is stored, and the next run goes on from there"

    done = run("demo.py", "notes", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    counts = re.search(r"(\d+) documents added, (\d+) replaced, (\d+) unchanged", done.stdout)
    assert counts, done.stdout
    added, replaced, unchanged = map(int, counts.groups())
    assert added > 0 and unchanged > 0
    assert added + replaced + unchanged == 200


def test_demo_says_so_where_there_is_no_text_in_what_it_reads(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" ", encoding="utf-8")
    done = run("demo.py", "empty.txt", folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "demo: there is no text in what was read"


def test_demo_names_a_path_that_does_not_exist(tmp_path: Path) -> None:
    done = run("demo.py", "no/such/folder", folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr == f"demo: there is no file or folder {tmp_path}/no/such/folder\n"


def test_demo_names_a_folder_without_documents(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    done = run("demo.py", "pictures", folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr == f"demo: there is neither a text file nor a PDF in {tmp_path}/pictures\n"


def test_demo_says_what_is_wrong_where_nobody_listens(documents: Path, tmp_path: Path) -> None:
    done = run("demo.py", str(documents / "clocks.txt"), "--uri", "http://127.0.0.1:1", folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("demo: can't connect to http://127.0.0.1:1: no Milvus server answers there")


def _rows(done: subprocess.CompletedProcess[str]) -> tuple[int, int]:
    found = re.search(r"Rows in the collection: (\d+) before, (\d+) after", done.stdout)
    assert found, done.stdout
    return int(found[1]), int(found[2])


def pdf(text: str) -> bytes:
    """A PDF of one page with one line of text."""
    content = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET"
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        "/Resources << /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >> >>",
        f"<< /Length {len(content)} >>\nstream\n{content}\nendstream",
    ]
    written, offsets = "%PDF-1.4\n", []
    for number, body in enumerate(objects, start=1):
        offsets.append(len(written))
        written += f"{number} 0 obj\n{body}\nendobj\n"
    table = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    count = len(objects) + 1
    return (
        f"{written}xref\n0 {count}\n0000000000 65535 f \n{table}"
        f"trailer << /Size {count} /Root 1 0 R >>\nstartxref\n{len(written)}\n%%EOF\n"
    ).encode()


# --- the notebook


def test_notebook_is_committed_with_its_outputs_and_nothing_of_the_machine_that_made_them() -> None:
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(EXAMPLES / "tutorial.ipynb", as_version=4)
    nbformat.validate(notebook)
    outputs: list[Any] = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert {output["output_type"] for output in outputs} == {"stream", "display_data", "execute_result"}
    assert all(output.get("name") != "stderr" for output in outputs)
    assert not re.search(r"/(home|root|tmp|work|Users)/|127\.0\.0\.1", repr(outputs))
    assert (EXAMPLES / "tutorial.ipynb").stat().st_size < 200_000


@pytest.mark.filterwarnings("default")  # Jupyter's own
def test_notebook_runs_inside_a_running_loop_and_draws_a_chart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("TUTORIAL_SIZES", "10,50,100")
    monkeypatch.delenv("MILVUS_URI", raising=False)
    notebook = nbformat.read(EXAMPLES / "tutorial.ipynb", as_version=4)
    folder = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3", resources=folder).execute()

    outputs: list[Any] = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output["text"] for output in outputs if output.get("name") == "stdout")
    for what in ("add", "search"):
        for how in ("plain, one by one", "plain, all at once", "this package"):
            for size in (10, 50, 100):
                assert re.search(rf"{what} +{size} times +{how} +\d", printed), (what, how, size)
    assert "the same nodes for each query: True" in printed
    shown = [output["data"] for output in outputs if "data" in output]
    assert any("image/png" in data for data in shown)
    assert any("written=2, failed=1, unknown=0" in data["text/plain"] for data in shown)
    assert [output["text"] for output in outputs if output.get("name") == "stderr"] == []

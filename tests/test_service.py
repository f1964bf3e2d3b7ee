"""The example of a web service, asked by real clients, of which many hang up: they leave nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import uvicorn
from fastapi import FastAPI
from llama_index.core.bridge.pydantic import PrivateAttr

from examples.fastapi_service import create_app
from tests import programs
from tests.embedding import HashEmbedding
from tests.fault_proxy import FaultProxy
from tests.faults import Drop, Refuse
from tests.leftovers import is_free
from tests.servers import free_ports
from tests.waiting import until

CLIENTS = 64
DIM = 384
SLOW = "slow"
WORDS = ["apple", "bread", "cheese", "dates", "eggs", "figs", "grapes", "honey"]


class GatedModel(HashEmbedding):
    """Embeds at once, but for texts with the word "slow" in them: these wait for ever, or until they are cancelled."""

    _waiting: int = PrivateAttr(default=0)

    @property
    def waiting(self) -> int:
        return self._waiting

    async def _aembed(self, texts: list[str]) -> list[list[float]]:
        if any(SLOW in text for text in texts):
            self._waiting += 1
            try:
                await asyncio.Event().wait()
            finally:
                self._waiting -= 1
        return await super()._aembed(texts)


class Service:
    """The service, on a loop of its own in a thread of its own, as a process of uvicorn's has it."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app
        self.port = free_ports(1)[0]
        self.url = f"http://127.0.0.1:{self.port}"
        self._server = uvicorn.Server(uvicorn.Config(app, port=self.port, log_level="error", lifespan="on"))
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with contextlib.closing(self.loop):
            self.loop.run_until_complete(self._server.serve())

    async def __aenter__(self) -> Service:
        self._thread.start()
        await until(lambda: self._server.started or not self._thread.is_alive(), 20)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.should_exit = True
        await asyncio.to_thread(self._thread.join, 20)
        assert not self._thread.is_alive()

    @property
    def statistics(self) -> Any:
        return self.app.state.store.statistics()

    def is_idle(self) -> bool:
        return bool(self.statistics.in_flight == self.statistics.waiting == 0)

    def tasks(self) -> int:
        """Tasks of the service's loop beside those of uvicorn's lifespan."""
        return sum("LifespanOn" not in repr(task) for task in asyncio.all_tasks(self.loop))

    def held(self) -> tuple[int, list[str]]:
        """Open files of this process, and its threads, but for those of the Milvus and the proxy that it serves."""
        names = [thread.name for thread in threading.enumerate()]
        theirs = ("fault", "ThreadPoolExecutor", "tqdm")
        return psutil.Process().num_fds(), sorted(name for name in names if not name.startswith(theirs))


@asynccontextmanager
async def served(
    proxy: FaultProxy, collection: str, seconds: float = 30.0
) -> AsyncIterator[tuple[Service, GatedModel]]:
    model = GatedModel(dim=DIM, blocking=False)
    options: dict[str, Any] = {"collection_name": collection, "consistency_level": "Strong"}
    async with Service(create_app(model, proxy.uri, DIM, seconds, **options)) as service:
        yield service, model


@asynccontextmanager
async def hanging_up(service: Service, asked: list[tuple[str, Any]]) -> AsyncIterator[None]:
    """Clients that have asked, and hang up when this ends."""
    writers = []
    try:
        for path, body in asked:
            _, writer = await asyncio.open_connection("127.0.0.1", service.port)
            writers.append(writer)
            payload = json.dumps(body)
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json"
            writer.write(f"{head}\r\nContent-Length: {len(payload)}\r\n\r\n{payload}".encode())
        yield
    finally:
        for writer in writers:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)


async def test_64_clients_at_once_of_which_half_hang_up(proxy: FaultProxy, collection_name: str) -> None:
    half = CLIENTS // 2
    given_up: list[tuple[str, Any]] = [("/ask", {"question": f"{SLOW} {n}"}) for n in range(half - 8)]
    given_up += [("/documents", [{"id": f"d{n}", "text": f"{SLOW} {n}"}]) for n in range(8)]
    questions = [WORDS[n % len(WORDS)] for n in range(half)]
    async with served(proxy, collection_name) as (service, model):

        async def one_round() -> None:
            async with hanging_up(service, given_up):
                await until(lambda: model.waiting == half)
                async with httpx.AsyncClient(base_url=service.url) as client:
                    answers = await asyncio.gather(*(client.post("/ask", json={"question": q}) for q in questions))
                assert [answer.status_code for answer in answers] == [200] * half
                assert [answer.json()[0]["document"] for answer in answers] == questions
                assert model.waiting == half
            await until(lambda: model.waiting == 0)
            dropped = proxy.script(Drop(), method=("Search",))  # and others hang up while Milvus searches
            async with hanging_up(service, [("/ask", {"question": word}) for word in WORDS]):
                await until(lambda: dropped.struck > 0)
            await until(service.is_idle)
            proxy.clear()

        async with httpx.AsyncClient(base_url=service.url) as client:
            new = [{"id": word, "text": word} for word in WORDS]
            report = (await client.post("/documents", json=new)).json()
            assert report == {"added": len(WORDS), "replaced": 0, "unchanged": 0, "failed": {}}
            assert (await client.get("/health")).json() == {"status": "ok"}
        await one_round()  # the first makes what is kept, such as the threads of a pool
        await until(lambda: service.tasks() == 1)
        before = service.held()
        await one_round()
        await until(lambda: service.tasks() == 1)
        await until(lambda: service.held()[0] <= before[0] and service.held()[1] == before[1])
        async with httpx.AsyncClient(base_url=service.url) as client:
            assert (await client.get("/statistics")).json()["in_flight"] == 0
        stored = await asyncio.to_thread(lambda: [node.ref_doc_id for node in service.app.state.store.iter_nodes()])
        assert sorted(stored) == WORDS, "nothing of the documents that were given up"


async def test_a_client_hears_of_what_takes_too_long_and_of_a_milvus_that_is_away(
    proxy: FaultProxy, collection_name: str
) -> None:
    async with served(proxy, collection_name, seconds=0.5) as (service, model):
        async with httpx.AsyncClient(base_url=service.url) as client:
            late = await client.post("/ask", json={"question": SLOW})
            assert (late.status_code, late.json()["detail"]) == (504, "there was no answer within 0.5 seconds")
            assert model.waiting == 0
            proxy.script(Refuse(), method=("Search", "Query"))
            away = await client.post("/ask", json={"question": "apple"})
            assert (away.status_code, away.text) == (503, "Milvus: UNAVAILABLE: refused by the fault proxy")
            assert (await client.get("/health")).status_code in (503, 504), "pymilvus itself may still connect anew"
            assert (await client.get("/statistics")).status_code == 200
            for bad in ({"question": ""}, {}, {"question": "\ud800"}):
                assert (await client.post("/ask", content=json.dumps(bad))).status_code == 422
        await until(service.is_idle)


# --- in a process of its own


PROGRAM = """
import sys, uvicorn
from examples.fastapi_service import create_app
from tests import programs
from tests.embedding import HashEmbedding

class Model(HashEmbedding):
    async def _aembed(self, texts):
        print("asked", flush=True)
        return await super()._aembed(texts)

model = Model(dim=384, blocking=False, seconds_per_text=float(sys.argv[3]))
uvicorn.run(create_app(model, sys.argv[1], 384, consistency_level="Strong"), port=int(sys.argv[2]), access_log=False)
"""


@contextlib.contextmanager
def service_process(uri: Path, port: int, errors: Path, seconds_per_text: float = 0.0) -> Iterator[programs.Program]:
    arguments = (str(uri), str(port), str(seconds_per_text))
    with errors.open("w") as stderr, programs.start(PROGRAM, *arguments, stderr=stderr.fileno()) as program:
        yield program


async def answers(client: httpx.AsyncClient) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return (await client.get("/health")).status_code == 200
    return False


def client_of(port: int) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30)


async def ready(client: httpx.AsyncClient) -> None:
    for _ in range(400):
        if await answers(client):
            return
        await asyncio.sleep(0.05)
    raise AssertionError("it does not answer")


@pytest.mark.slow
async def test_a_terminated_service_answers_first_lets_go_of_its_file_and_starts_again(tmp_path: Path) -> None:
    uri, errors, (port, other) = tmp_path / "service.db", tmp_path / "errors", free_ports(2)
    with service_process(uri, port, errors, seconds_per_text=0.5) as first:
        async with client_of(port) as client:
            await ready(client)
            (await client.post("/documents", json=[{"id": word, "text": word} for word in WORDS])).raise_for_status()
            assert first.stdout.readline() == "asked\n"
            with service_process(uri, other, tmp_path / "refused") as second:
                assert await asyncio.to_thread(second.wait, 60) == 3
            refusal = (tmp_path / "refused").read_text()
            assert "another process" in refusal and str(uri) in refusal, refusal

            asking = [asyncio.ensure_future(client.post("/ask", json={"question": word})) for word in WORDS]
            for _ in WORDS:
                assert await asyncio.to_thread(first.stdout.readline) == "asked\n"
            os.kill(first.pid, signal.SIGTERM)
            documents = [answer.json()[0]["document"] for answer in await asyncio.gather(*asking)]
            assert documents == WORDS, "answered before it ended"
        assert await asyncio.to_thread(first.wait, 30) in (0, -signal.SIGTERM)
    assert "Traceback" not in errors.read_text(), errors.read_text()
    assert is_free(uri)

    with service_process(uri, other, errors) as again:
        async with client_of(other) as client:
            await ready(client)
            found = await client.post("/ask", json={"question": "honey"})
            assert found.json()[0]["document"] == "honey"
        os.kill(again.pid, signal.SIGTERM)
        await asyncio.to_thread(again.wait, 30)

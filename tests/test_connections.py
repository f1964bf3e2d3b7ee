"""What stores of one process share: a connection if they connect alike; never a token, a database or TLS settings."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import copy
import traceback
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from llama_index.core.schema import TextNode
from llama_index.core.vector_stores.types import MetadataFilter, MetadataFilters, VectorStoreQuery
from llama_index.vector_stores.milvus import MilvusVectorStore
from pymilvus import MilvusClient
from pymilvus.exceptions import ConnectError

from llama_index_milvus_async_ext import AsyncMilvusRetriever, AsyncMilvusVectorStore, AsyncMilvusWriter
from llama_index_milvus_async_ext._milvus.settings import ConnectionSettings
from tests.conftest import MakeNodes
from tests.embedding import HashEmbedding
from tests.fault_proxy import FaultProxy, RequestRecord
from tests.servers import MilvusServer

DIM = 8
# Lite takes any token, and knows one database, by its name too: to this package these are three.
ANNE = {"token": "anne:1"}
BOB = {"token": "bob:2"}
ANNE_BY_NAME = {"token": "anne:1", "db_name": "default"}

Make = Callable[..., AsyncMilvusVectorStore]


@pytest.fixture
def make_store(proxy: FaultProxy, collection_name: str) -> Iterator[Make]:
    with contextlib.ExitStack() as stores:
        yield lambda **changes: stores.enter_context(
            AsyncMilvusVectorStore(
                proxy.uri, collection_name=collection_name, dim=DIM, consistency_level="Strong", **changes
            )
        )


def shared(*stores: AsyncMilvusVectorStore) -> bool:
    """Whether stores have one connection; those that do not share it share nothing, in pymilvus neither."""
    endpoints = {store.live().endpoint for store in stores}
    assert len({endpoint.connection.client._handler for endpoint in endpoints}) == len(endpoints)
    return len(endpoints) == 1


@pytest.mark.parametrize("settings", [ANNE, ANNE_BY_NAME])
def test_stores_that_connect_alike_share_a_connection(
    make_store: Make, proxy: FaultProxy, collection_name: str, settings: dict[str, Any]
) -> None:
    store = make_store(**settings)
    plain = MilvusVectorStore(proxy.uri, collection_name=collection_name, dim=DIM, use_async_client=False, **settings)
    copied, taken_over = copy.copy(store), AsyncMilvusVectorStore.from_vector_store(plain)
    with (
        copied,
        taken_over,
        AsyncMilvusVectorStore(
            proxy.uri.replace("://", f"://{settings['token']}@"),
            collection_name=collection_name,
            **{name: value for name, value in settings.items() if name != "token"},
        ) as with_its_token_in_the_address,
    ):
        assert shared(store, make_store(max_concurrency=2, **settings), copied, taken_over)
        assert shared(store, with_its_token_in_the_address)
    plain.client.close()


def test_stores_of_other_tokens_or_databases_do_not(make_store: Make) -> None:
    store = make_store(**ANNE)
    for others in (BOB, ANNE_BY_NAME, {}, ANNE | {"grpc_options": {"grpc.keepalive_time_ms": 300_000}}):
        assert not shared(store, make_store(**others))


@pytest.mark.parametrize(
    "change",
    [
        {"uri": "https://milvus.example:19531"},
        {"uri": "http://milvus.example:19530"},
        {"token": "bob:2"},
        {"token": ""},
        {"db_name": "other"},
        {"secure": False},
        {"server_pem_path": "other.pem"},
        {"server_pem_path": ""},
        {"server_name": "other"},
        {"ca_pem_path": "ca.pem"},
        {"client_pem_path": "client.pem"},
        {"client_key_path": "client.key"},
    ],
    ids=repr,
)
def test_whatever_decides_where_and_as_whom_one_connects_tells_settings_apart(change: dict[str, Any]) -> None:
    def settings(uri: str, token: str, **options: Any) -> ConnectionSettings:
        return ConnectionSettings(uri, token, options)

    given = {"uri": "https://milvus.example:19530", "token": "anne:1", "db_name": "a", "server_pem_path": "server.pem"}
    backwards = dict(reversed(given.items()))
    assert settings(**given) == settings(**backwards) and len({settings(**given), settings(**backwards)}) == 1
    assert settings(**given) != settings(**(given | change))


def test_settings_show_neither_token_nor_options() -> None:
    settings = ConnectionSettings("https://anne:s3cret@milvus.example:19530", options={"client_key_path": "my.key"})
    assert settings.token == "anne:s3cret"
    assert repr(settings) == str(settings) == "ConnectionSettings('https://milvus.example:19530')"


@pytest.mark.parametrize(
    ("uri", "bare", "token"),
    [
        ("http://anne:s3cret@milvus.example/db", "http://milvus.example/db", "anne:s3cret"),
        ("HTTPS://:s3cret@milvus.example", "HTTPS://milvus.example", "s3cret"),  # an API key
        ("http://s3cret@milvus.example", "http://milvus.example", "s3cret"),
        ("http://s3cret:@milvus.example", "http://milvus.example", "s3cret"),
        ("tcp://anne:s3/c:r#e?t@[::1]:19530", "tcp://[::1]:19530", "anne:s3/c:r#e?t"),
        ("http://anne:s3@cr[et@milvus.example", "http://milvus.example", "anne:s3@cr[et"),
        ("grpc://anne:s3cret@milvus.example:19530", "grpc://milvus.example:19530", "anne:s3cret"),
        ("anne:s3cret@milvus.example:19530", "milvus.example:19530", "anne:s3cret"),
        ("anne:s3://cret@milvus.example:19530", "milvus.example:19530", "anne:s3://cret"),
        ("http://anne:s3cret@milvus.example/db?mail=a@b", "http://milvus.example/db?mail=a@b", "anne:s3cret"),
        ("http://milvus.example:19530?owner=a@b.example:1", "http://milvus.example:19530?owner=a@b.example:1", ""),
        ("http://milvus.example/db@b", "http://milvus.example/db@b", ""),
        ("http://[::1]/db@b", "http://[::1]/db@b", ""),
        ("file:///home/a@b/x", "file:///home/a@b/x", ""),
        ("/home/a@b/milvus", "/home/a@b/milvus", ""),
        ("C:\\home\\a@b", "C:\\home\\a@b", ""),
        ("http://@milvus.example", "http://milvus.example", ""),
        ("http://milvus.example", "http://milvus.example", ""),
        ("unix:/run/a@b.socket", "unix:/run/a@b.socket", ""),
        ("/data/a@b.db", "/data/a@b.db", ""),
    ],
)
def test_an_address_keeps_no_token_whatever_it_is(uri: str, bare: str, token: str) -> None:
    settings = ConnectionSettings(uri)
    assert (settings.uri, settings.token) == (bare, token)
    assert ConnectionSettings(uri, "other").token == "other", "what is given as the token counts"


async def test_an_api_key_in_the_address_is_sent_as_the_token_and_shown_nowhere(
    proxy: FaultProxy, collection_name: str, make_nodes: MakeNodes, log: pytest.LogCaptureFixture
) -> None:
    address = proxy.uri.replace("://", "://:s3cret@")
    async with AsyncMilvusVectorStore(address, collection_name=collection_name, dim=DIM) as store:
        writer, retriever = AsyncMilvusWriter(store), AsyncMilvusRetriever(store, HashEmbedding(dim=DIM))
        await writer.acall(make_nodes(3))
        shown = [store.uri, repr(store), repr(writer), repr(retriever), writer.model_dump_json(), log.text]
        shown += [str(each) for each in (store, store.to_dict(), store.model_dump(), writer.to_dict())]
        shown += [store.model_dump_json(), str(writer.model_dump())]
        assert not [text for text in shown if "s3cret" in text]
    sent = {names_of(record)[0] for record in proxy.requests_of("Insert", "Upsert")}
    assert sent == {"s3cret"}


@pytest.mark.parametrize("scheme", ["grpc://", "milvus://", "", "http://", "https://", "tcp://"])
@pytest.mark.parametrize("who", ["anne:s3cret", ":s3cret", "anne:x/s3cret"])
def test_what_is_said_of_an_address_that_leads_nowhere_holds_no_token(
    scheme: str, who: str, log: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConnectError, match=f"can't connect to {scheme}127.0.0.1:1: ") as refused:
        AsyncMilvusVectorStore(f"{scheme}{who}@127.0.0.1:1", dim=DIM)
    shown = [log.text, *traceback.format_exception(refused.value)]
    for error in (refused.value, refused.value.__cause__):
        shown += [str(error), repr(error), repr(vars(error))]
    assert not [text for text in shown if "s3cret" in text]


def names_of(record: RequestRecord) -> tuple[str, str]:
    """As whom a request came, and to which database."""
    token = base64.b64decode(record.metadata.get("authorization", b"")).decode()
    return token, str(record.metadata.get("dbname", ""))


@pytest.mark.parametrize("upsert_mode", [True, False])
async def test_each_request_has_the_token_and_the_database_of_its_own_store(
    make_store: Make, proxy: FaultProxy, make_nodes: MakeNodes, upsert_mode: bool
) -> None:
    everybody = [("anne:1", ""), ("bob:2", ""), ("anne:1", "default")]
    stores = []
    for who, names in zip((ANNE, BOB, ANNE_BY_NAME), everybody, strict=True):
        proxy.clear()
        stores.append(make_store(upsert_mode=upsert_mode, **who))
        # pymilvus names no database where it connects
        assert {names_of(record) for record in proxy.requests if record.method != "Connect"} == {names}
    proxy.clear()
    nodes = [make_nodes(3, dim=DIM) for _ in stores]
    query = VectorStoreQuery(query_embedding=[0.5] * DIM, similarity_top_k=1)

    async def all_at_once(call: Callable[[AsyncMilvusVectorStore, list[TextNode]], Any]) -> None:
        await asyncio.gather(*map(call, stores, nodes))

    await all_at_once(lambda store, mine: store.async_add(mine, force_flush=True))
    await all_at_once(lambda store, mine: store.aquery(query))
    await all_at_once(lambda store, mine: store.aget_nodes(node_ids=[mine[0].node_id]))
    await all_at_once(lambda store, mine: store.adelete(str(mine[2].ref_doc_id)))
    for store in stores:
        store.live().endpoint.connection.forget_schema(store.collection_name)
    await all_at_once(lambda store, mine: store.adelete_nodes(node_ids=[mine[1].node_id]))
    for method in ("Upsert" if upsert_mode else "Insert", "Search", "Query", "Delete", "Flush", "DescribeCollection"):
        assert {names_of(record) for record in proxy.requests_of(method)} == {*everybody}, method
    await stores[2].aclear()
    assert [names_of(record) for record in proxy.requests_of("DropCollection")] == everybody[2:]


@pytest.fixture
def other_database(milvus_server: MilvusServer, collection_name: str) -> Iterator[str]:
    """A second database of the server, with no collection but, perhaps, the test's."""
    name = f"d_{uuid.uuid4().hex}"
    with contextlib.closing(MilvusClient(milvus_server.uri, dedicated=True)) as client:
        client.create_database(name)
        yield name
        with contextlib.closing(MilvusClient(milvus_server.uri, db_name=name, dedicated=True)) as inside:
            inside.drop_collection(collection_name)
        client.drop_database(name)


async def test_one_collection_name_in_two_databases_is_two_collections(
    milvus_server: MilvusServer, collection_name: str, other_database: str, make_nodes: MakeNodes
) -> None:
    first, second = (
        AsyncMilvusVectorStore(
            milvus_server.uri, collection_name=collection_name, dim=DIM, consistency_level="Strong", db_name=db_name
        )
        for db_name in ("default", other_database)
    )
    nodes = make_nodes(20, dim=DIM)
    ids = [node.node_id for node in nodes]
    query = VectorStoreQuery(query_embedding=nodes[0].embedding, similarity_top_k=20)
    async with first, second:
        await asyncio.gather(first.async_add(nodes), second.async_add(nodes[:15]))
        found = await asyncio.gather(first.aquery(query), second.aquery(query))
        assert [sorted(each.ids or []) for each in found] == [sorted(ids), sorted(ids[:15])]
        await second.adelete_nodes(node_ids=ids[:3])
        await second.adelete_nodes(filters=MetadataFilters(filters=[MetadataFilter(key="number", value=3)]))
        await second.adelete(str(nodes[10].ref_doc_id))
        got = await asyncio.gather(first.aget_nodes(node_ids=ids), second.aget_nodes(node_ids=ids))
        assert [sorted(node.node_id for node in each) for each in got] == [sorted(ids), sorted(ids[4:10])]
        await second.aclear()
        assert len(await first.aget_nodes(node_ids=ids)) == 20

"""Tokens and TLS against the real server: the right ones work, wrong ones are named at once, none is shown."""

from __future__ import annotations

import base64
import contextlib
import datetime
import ipaddress
import logging
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pymilvus import MilvusClient
from pymilvus.exceptions import ConnectError

from llama_index_milvus_async_ext import AsyncMilvusVectorStore, AsyncMilvusWriter
from llama_index_milvus_async_ext._milvus.settings import ConnectionSettings
from tests.conftest import MakeNodes
from tests.servers import MilvusServer

DIM = 8
TOKEN = "root:r1ght-one"
pytestmark = pytest.mark.server


def certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for loopback that signs itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.timezone.utc)
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem, key_file = folder / "server.pem", folder / "server.key"
    pem.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        )
    )
    return pem, key_file


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server that asks for a token and speaks TLS only, and its certificate."""
    if reason := MilvusServer.unavailable_reason():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("secured")
    pem, key = certificate(folder)
    config = {
        "common": {"security": {"authorizationEnabled": True, "tlsMode": 1}},
        "tls": {"serverPemPath": str(pem), "serverKeyPath": str(key), "caPemPath": str(pem)},
    }
    with MilvusServer(folder / "data", extra_config=config) as server:
        with contextlib.closing(
            MilvusClient(f"https://127.0.0.1:{server.port}", token="root:Milvus", server_pem_path=str(pem))
        ) as client:
            client.update_password("root", "Milvus", TOKEN.partition(":")[2])  # a word that stands nowhere by itself
        yield server, str(pem)


def options(secured: Any, **changes: Any) -> dict[str, Any]:
    server, pem = secured
    given = {"uri": f"https://127.0.0.1:{server.port}", "token": TOKEN, "server_pem_path": pem, "dim": DIM}
    return given | changes


def secrets_in(token: str) -> list[str]:
    """A token, its password, and the form in which it is sent."""
    return [token, token.partition(":")[2], base64.b64encode(token.encode()).decode().rstrip("=")] if token else []


async def test_the_right_token_over_tls_works(secured: Any, make_nodes: MakeNodes, caplog: Any) -> None:
    caplog.set_level(logging.DEBUG)
    async with AsyncMilvusVectorStore(**options(secured), collection_name="secured") as store:
        writer = AsyncMilvusWriter(store)
        await writer.acall(make_nodes(50, dim=DIM))
        assert writer.last_report is not None and len(writer.last_report.written) == 50
        shown = (repr(store), repr(writer), str(writer.to_dict()), str(store.to_dict()), caplog.text)
        assert not any(secret in text for secret in secrets_in(TOKEN) for text in shown)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"token": "root:wr0ng"}, "refuses the token"),
        ({"token": ""}, "refuses the token"),
        ({"uri": "http"}, "expects TLS"),
        ({"server_pem_path": ""}, "expects TLS"),
    ],
)
def test_a_mismatch_is_named_at_the_first_attempt_and_shows_no_token(
    secured: Any,
    changes: dict[str, Any],
    says: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = options(secured, **changes)
    if changes.get("uri") == "http":
        given["uri"] = f"http://127.0.0.1:{secured[0].port}"
        del given["server_pem_path"]
    attempts: list[str] = []
    client = ConnectionSettings.client

    def counted(settings: ConnectionSettings, uri: str | None = None) -> MilvusClient:
        attempts.append(settings.uri)
        return client(settings, uri)

    # While one that fits is open: pymilvus shares connections by address and token, whatever the TLS settings.
    with AsyncMilvusVectorStore(**options(secured), collection_name="secured"):
        caplog.set_level(logging.DEBUG)
        monkeypatch.setattr(ConnectionSettings, "client", counted)
        with pytest.raises(ConnectError, match="can't connect") as refused:
            AsyncMilvusVectorStore(**given, collection_name="secured")
    assert attempts == [given["uri"]], "what no attempt mends is tried once"
    assert says in str(refused.value)
    shown = [str(refused.value), repr(refused.value), *traceback.format_exception(refused.value), caplog.text]
    assert not any(secret in text for secret in secrets_in(given["token"]) for text in shown)


async def test_a_token_in_the_address_is_used_and_taken_out_of_it(secured: Any) -> None:
    server, _ = secured
    given = options(secured, uri=f"https://{TOKEN}@127.0.0.1:{server.port}", token="")
    async with AsyncMilvusVectorStore(**given, collection_name="secured") as store:
        assert store.uri == f"https://127.0.0.1:{server.port}"
        assert store.client.has_collection("secured")
        assert not any(secret in repr(store) for secret in secrets_in(TOKEN))

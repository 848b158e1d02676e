"""Requests through a proxy, as the usual environment variables say: a real one on loopback that counts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from tests.support.asking import client, raw_server, request
from tests.support.fake_server import FakeServer

from cotree.base.errors import CotreeError, UsageError
from cotree.models.client import Choice

KEY = "sk-very-secret-0123456789"
VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def _no_proxy_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@asynccontextmanager
async def proxy(target: str, seen: list[web.Request]) -> AsyncIterator[str]:
    """An HTTP proxy that sends every request on to one server, whatever host it is for; yields HOST:PORT."""

    async def forward(asked: web.Request) -> web.StreamResponse:
        seen.append(asked)
        async with aiohttp.ClientSession() as session:
            body = await asked.read()
            headers = {
                name: value for name, value in asked.headers.items() if name in ("Authorization", "Content-Type")
            }
            async with session.request(asked.method, target + asked.path, data=body, headers=headers) as reply:
                return web.Response(body=await reply.read(), status=reply.status, content_type="application/json")

    async with raw_server(forward) as url:
        yield url.removeprefix("http://")


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
@pytest.mark.parametrize("form", ["http://{}", "{}", "http://me:pass@{}"])
async def test_a_server_beyond_this_machine_is_asked_through_the_proxy(
    name: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[web.Request] = []
    async with FakeServer(api_key=KEY) as server, proxy(server.url, seen) as address:
        monkeypatch.setenv(name, form.format(address))
        async with client("http://model.invalid:8000", api_key=KEY) as c:
            assert await c.find_problem() == ""
            done = await c.complete(request())
            assert isinstance(done.choices[0], Choice)
            assert f"at http://model.invalid:8000 through the proxy http://{address}" in str(c)
            assert "pass" not in str(c) + repr(c)
        assert [asked.headers["Host"] for asked in seen] == ["model.invalid:8000"] * 2
        signed = [asked.headers.get("Proxy-Authorization") for asked in seen]
        assert signed == ["Basic bWU6cGFzcw==" if "me:" in form else None] * 2


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "LOCALHOST.", "a.localhost", "[::1]", "127.8.9.1", "0.0.0.0"]
)
def test_this_machine_is_never_asked_through_a_proxy(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert "proxy" not in str(client(f"http://{host}:8000"))
    assert "proxy" in str(client("http://128.0.0.1:8000"))


async def test_requests_to_this_machine_work_beside_a_dead_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    async with FakeServer() as server, client(server.url) as c:
        assert await c.find_problem() == ""
        await c.complete(request())


@pytest.mark.parametrize(
    ("no_proxy", "url", "direct"),
    [
        ("gpu1,.cluster", "http://gpu1:8000", True),
        ("gpu1,.cluster", "http://a.cluster", True),
        ("gpu1, cluster", "https://a.cluster/v1", True),
        ("gpu1:8000", "http://gpu1:8000", True),
        ("gpu1:8000", "http://gpu1:8001", False),
        ("*", "http://gpu2", True),
        ("gpu1", "http://gpu2", False),
        ("", "https://gpu2", False),
    ],
)
@pytest.mark.parametrize("upper", [False, True])
def test_no_proxy_names_who_is_asked_directly(
    no_proxy: str, url: str, direct: bool, upper: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"http_proxy": "http://p:1", "https_proxy": "http://q:2", "no_proxy": no_proxy}.items():
        monkeypatch.setenv(name.upper() if upper else name, value)
    used = "http://q:2" if url.startswith("https") else "http://p:1"
    assert ("proxy" not in str(client(url))) is direct
    assert (f"through the proxy {used}" in str(client(url))) is not direct


@pytest.mark.parametrize("value", ["socks5://h:1", "http://", "http://h:99999999", "://"])
def test_a_proxy_of_another_kind_is_named_before_any_work(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", value)
    with pytest.raises(UsageError, match=r"`thinker`: the proxy in `http_proxy` must look like .*`no_proxy`") as failed:
        client("http://gpu1:8000")
    assert value not in str(failed.value).replace("http://HOST:PORT", "")
    client("http://127.0.0.1:8000")


async def test_a_key_and_a_netrc_file_stay_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that opens a tunnel sees no key; no password of ~/.netrc takes the key's place."""
    (tmp_path / ".netrc").write_text("default login me password other\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    told: list[bytes] = []

    async def tunnel(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        told.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    listening = await asyncio.start_server(tunnel, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
    async with listening, client("https://model.invalid", api_key=KEY) as c:
        with pytest.raises(CotreeError, match=r"through the proxy .*the proxy refuses \(HTTP 403\) \(1 attempt\)"):
            await c.complete(request())
    assert told[0].startswith(b"CONNECT model.invalid:443")
    assert KEY.encode() not in told[0] and b"uthorization" not in told[0]
    seen: list[web.Request] = []
    async with FakeServer(api_key=KEY) as server, proxy(server.url, seen) as address:
        monkeypatch.setenv("http_proxy", address)
        async with client("http://model.invalid", api_key=KEY) as c:
            await c.complete(request())
        assert "Proxy-Authorization" not in seen[0].headers


async def test_a_dead_proxy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "127.0.0.1:9")
    says = r"at http://model.invalid through the proxy http://127.0.0.1:9: cannot connect .*\(2 attempts\)"
    options: dict[str, Any] = {"attempts": 2}
    async with client("http://model.invalid", **options) as c:
        with pytest.raises(CotreeError, match=says):
            await c.complete(request())

"""A headless Chromium, driven over its DevTools protocol: the pages as people get them, and what they ask for.

aiohttp, which cotree has anyway, speaks the protocol; a WebDriver would need ten more packages and would not say which
requests a page makes.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import aiohttp
import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian: apt install chromium)")
_FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
          "--no-first-run", "--disable-component-update", "--disable-background-networking",
          "--remote-debugging-port=0")  # fmt: skip
_KEYS = {"Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


class Browser:
    """One page. requests: every URL that it asked for; problems: exceptions, refused scripts and dialogs."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.requests: list[str] = []
        self.problems: list[str] = []
        self._socket = socket
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for message in self._socket:
            event = json.loads(message.data)
            if "id" in event:
                self._answers.pop(event["id"]).set_result(event)
                continue
            said, about = event["method"], event["params"]
            if said == "Network.requestWillBeSent":
                self.requests.append(about["request"]["url"])
            elif said == "Runtime.exceptionThrown":
                self.problems.append(json.dumps(about["exceptionDetails"])[:500])
            elif said == "Log.entryAdded" and about["entry"]["level"] == "error":
                self.problems.append(about["entry"]["text"])
            elif said == "Page.javascriptDialogOpening":
                self.problems.append(f"dialog: {about['message']}")
                asyncio.ensure_future(self.send("Page.handleJavaScriptDialog", accept=True))  # noqa: RUF006

    async def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command of the protocol and return its result."""
        number = next(self._ids)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params})
        found = await asyncio.wait_for(answer, 60)
        assert "error" not in found, f"{method}: {found['error']}"
        return cast(dict[str, Any], found["result"])

    async def run(self, script: str) -> Any:
        """The value of an expression in the page; a promise is awaited."""
        found = await self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, f"{script}: {found['exceptionDetails']}"
        return found["result"].get("value")

    async def until(self, script: str, seconds: float = 60) -> Any:
        """Wait until an expression is true, and return its value."""
        end = time.monotonic() + seconds
        while not (value := await self.run(script)):
            assert time.monotonic() < end, f"never true: {script}; {self.problems}; {await self.run(_SHOWN)}"
            await asyncio.sleep(0.05)
        return value

    async def open(self, url: str) -> None:
        """Open a page anew, and wait until it has run its script."""
        await self.send("Page.navigate", url="about:blank")
        await self.send("Page.navigate", url=url)
        await self.until('location.href !== "about:blank" && document.readyState === "complete"')

    async def look(self, *, width: int, height: int = 800, dark: bool = False, scale: float = 1) -> None:
        """Set the size of the window, and whether the system is dark."""
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 600}
        await self.send("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.send("Emulation.setEmulatedMedia", features=[scheme])

    async def click(self, selector: str, *, at: tuple[float, float] = (0.5, 0.5), shift: bool = False) -> None:
        """Click an element as a mouse does, by default in its middle."""
        await self.until(f"!!document.querySelector({json.dumps(selector)})")
        box = await self.run(
            f"(e => {{ e.scrollIntoViewIfNeeded(); const b = e.getBoundingClientRect(); "
            f"return [b.x, b.y, b.width, b.height]; }})(document.querySelector({json.dumps(selector)}))"
        )
        place = {"x": box[0] + at[0] * box[2], "y": box[1] + at[1] * box[3], "modifiers": 8 if shift else 0}
        for kind in ("mousePressed", "mouseReleased"):
            await self.send("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    async def press(self, *keys: str) -> None:
        """Press keys one after the other."""
        for key in keys:
            text = {"text": key} if len(key) == 1 else {"windowsVirtualKeyCode": _KEYS[key]}
            await self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
            await self.send("Input.dispatchKeyEvent", type="keyUp", key=key)

    async def write(self, selector: str, text: str) -> None:
        """Write into a field in place of what is there, and leave it."""
        await self.until(f"!!document.querySelector({json.dumps(selector)})")
        await self.run(f"(e => {{ e.focus(); e.select(); }})(document.querySelector({json.dumps(selector)}))")
        await self.send("Input.insertText", text=text)
        await self.run("document.activeElement.blur()")

    async def screenshot(self) -> bytes:
        """What the window shows, as PNG."""
        return base64.b64decode((await self.send("Page.captureScreenshot", format="png"))["data"])


_SHOWN = "document.body.innerText.slice(0, 500)"


@asynccontextmanager
async def browser() -> AsyncIterator[Browser]:
    """A browser with an empty profile and one page, ended with all its processes."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
        quiet = asyncio.subprocess.DEVNULL
        process = await asyncio.create_subprocess_exec(*command, stdout=quiet, stderr=quiet, start_new_session=True)
        try:
            port = await _port_of(Path(profile), process)
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json/list") as found:
                    pages = [page for page in await found.json() if page["type"] == "page"]
                async with session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    page = Browser(socket)
                    for domain in ("Page", "Runtime", "Network", "Log"):
                        await page.send(f"{domain}.enable")
                    await page.look(width=1280)
                    yield page
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


async def _port_of(profile: Path, process: asyncio.subprocess.Process) -> str:
    """The port that a browser listens on, which it writes into its profile."""
    end = time.monotonic() + 60
    while time.monotonic() < end and process.returncode is None:
        written = profile / "DevToolsActivePort"
        if written.is_file() and (lines := written.read_text().splitlines()):
            return lines[0]
        await asyncio.sleep(0.05)
    raise AssertionError("chromium does not start")

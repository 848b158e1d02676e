"""vLLM in processes of its own: `vllm serve` for a transformers folder, on loopback, with a key that nobody else knows.

Each server has a small parent (`supervise.py`) that ends it and all its workers when this process is done with it or is
gone, however it ended. Where several GPUs are free there are several servers of a model, each with GPUs of its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from cotree.base.errors import CotreeError, UsageError, first_cotree_error
from cotree.base.progress import one_line
from cotree.models import supervise

_PORTS = 3  # so many are tried before a server is given up because its port is taken
# What torchrun says to its processes, one of which this may be; vLLM would take it for its own.
_OF_TORCHRUN = re.compile("(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*")
_TAKEN = re.compile("address already in use", re.I)
# What vLLM writes before a line of its log, and a line that says what went wrong.
_LOG_PREFIX = re.compile(r"^(\(.*?\) )?((INFO|WARNING|ERROR) [\d: -]+\[[^\]]*\] *)?")
_FAULT = re.compile(r"^[\w.: -]*(Error|Exception|error): ")


def vllm_program() -> str | None:
    """The `vllm` program: on PATH, or beside the Python that runs this."""
    return shutil.which("vllm") or shutil.which("vllm", path=os.path.dirname(sys.executable))


def visible_gpus() -> tuple[str, ...]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them: that variable's, else all there are."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return tuple(map(str, range(_gpus_here())))
    found = [name.strip() for name in named.split(",")]
    return tuple(found[: next((i for i, name in enumerate(found) if name in ("", "-1")), len(found))])


@cache
def _gpus_here() -> int:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def share_gpus(needs: Mapping[str, int]) -> dict[str, list[tuple[str, ...]]]:
    """The GPUs of each server of each model: as many servers a model as the GPUs suffice for, equally many for all.

    Without a GPU each model has one server (vLLM's build for CPUs). Where the GPUs do not suffice for one server of
    each model, models share them, and each must be told to take less memory (`gpu_memory_utilization`).

    Args:
        needs: of each model, how many GPUs one server takes.

    Raises:
        UsageError: a server takes more GPUs than there are.
    """
    gpus = visible_gpus()
    if not gpus:
        return {name: [()] for name in needs}
    for name, need in needs.items():
        if need > len(gpus):
            fix = "lower `tensor_parallel_size` in its `engine_args`, or set CUDA_VISIBLE_DEVICES"
            raise UsageError(f"model `{name}`: a server of it takes {need} GPUs, {len(gpus)} are visible; {fix}")
    servers = max(len(gpus) // max(sum(needs.values()), 1), 1)
    found: dict[str, list[tuple[str, ...]]] = {name: [] for name in needs}
    taken = 0
    for name, need in needs.items():
        for _ in range(servers):
            if taken % len(gpus) + need > len(gpus):  # the GPUs of a server stand beside each other
                taken = 0
            found[name].append(gpus[taken % len(gpus) :][:need])
            taken += need
    return found


def gpus_of_a_server(engine_args: Mapping[str, Any]) -> int:
    """How many GPUs one server with these arguments takes."""
    return prod(int(engine_args.get(f"{kind}_parallel_size", 1)) for kind in ("tensor", "pipeline", "data"))


def command_line(engine_args: Mapping[str, Any]) -> list[str]:
    """Arguments as `vllm serve` takes them: `{tensor_parallel_size: 2}` as `--tensor-parallel-size 2`, true as
    `--flag`, false as `--no-flag`, a section as JSON, a list as several values."""
    words: list[str] = []
    for name, value in engine_args.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, Mapping):
            words += [f"--{flag}", json.dumps(value)]
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return words


@dataclass
class Server:
    """A running `vllm serve`. log: its file, of which what stands from `start` on is this server's."""

    name: str
    url: str
    api_key: str = field(repr=False)
    log: Path
    start: int
    process: subprocess.Popen[bytes]

    def ended(self) -> str:
        """Why it runs no longer, with the last words of its log, in one line; "" while it runs."""
        code = self.process.poll()
        return "" if code is None else f"vLLM ended (exit code {code}): {self.last_words()}; its log is {self.log}"

    def last_words(self) -> str:
        """What its log says of errors, the last three of them; else its last three lines."""
        with self.log.open("rb") as file:
            file.seek(max(self.start, file.seek(0, os.SEEK_END) - 2**17))
            text = file.read().decode("utf-8", "replace")
        lines = [line for line in (_LOG_PREFIX.sub("", line).strip() for line in text.splitlines()) if line]
        faults = list(dict.fromkeys(line for line in lines if _FAULT.match(line)))
        return " | ".join(one_line(line)[:300] for line in (faults or lines)[-3:]) or "its log is empty"

    async def stop(self) -> None:
        """End it; returns when the last of its processes is gone, and the GPU with it."""
        self.process.terminate()
        await asyncio.to_thread(self.process.wait)


@asynccontextmanager
async def serve(
    source: Path,
    engine_args: Mapping[str, Any],
    *,
    name: str,
    gpus: Sequence[tuple[str, ...]],
    logs: Path,
    ready: float,
) -> AsyncIterator[list[Server]]:
    """Serve a transformers folder while the block runs, by a server for each entry of `gpus`; all are ready.

    Args:
        name: the model's, under which it is served.
        gpus: the GPUs of each server; none leaves the choice to vLLM.
        logs: the folder in which each server has a file, `vllm-NAME-NUMBER.log`.
        ready: the most seconds until they are.

    Raises:
        UsageError: vLLM is not here.
        CotreeError: a server ends before it is ready, or takes too long; the last words of its log are said.
    """
    if (program := vllm_program()) is None:
        raise UsageError(f"model `{name}`: `engine: vllm` needs vLLM; pip install 'cotree[vllm]', or put it on PATH")
    # Sampling as a request says it, without what a model's own generation_config.json would add.
    arguments = {"generation_config": "vllm", "enable_prompt_tokens_details": True, "uvicorn_log_level": "warning"}
    arguments |= engine_args
    command = [program, "serve", str(source), "--served-model-name", name, *command_line(arguments)]
    file_name = re.sub(r"[^\w.@=-]+", "_", name)[-100:]
    servers: dict[int, Server] = {}

    async def start(number: int, devices: tuple[str, ...]) -> None:
        log = logs / f"vllm-{file_name}-{number}.log"
        deadline = time.monotonic() + ready
        for left in reversed(range(_PORTS)):
            server = servers[number] = _start(command, devices, name=name, log=log)
            if await _is_ready(server, deadline):
                return
            if server.process.poll() is None:
                fault = f"vLLM is not ready after {ready:g} s: {server.last_words()}; its log is {log}"
                raise CotreeError(f"model `{name}`: {fault}; raise the model's `timeout` if it is only slow")
            if not left or not _TAKEN.search(server.last_words()):
                raise CotreeError(f"model `{name}`: {server.ended()}; fix that, then run the same command again")

    try:
        with first_cotree_error():
            async with asyncio.TaskGroup() as group:
                for number, devices in enumerate(gpus):
                    group.create_task(start(number, devices))
        yield [servers[number] for number in range(len(gpus))]
    finally:
        await asyncio.gather(*(server.stop() for server in servers.values()))


def _start(command: Sequence[str], devices: tuple[str, ...], *, name: str, log: Path) -> Server:
    """Start a server at a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    key = secrets.token_urlsafe(32)
    environment = {name: value for name, value in os.environ.items() if not _OF_TORCHRUN.fullmatch(name)}
    environment["VLLM_API_KEY"] = key  # not among the arguments, which every user of the machine sees
    if devices:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    watched = [sys.executable, "-I", supervise.__file__, str(os.getpid()), *command]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        begin = file.tell()
        process = subprocess.Popen(
            [*watched, "--host", "127.0.0.1", "--port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C is for this process, which then ends its servers
        )
        return Server(name, f"http://127.0.0.1:{port}", key, log, begin, process)


async def _is_ready(server: Server, deadline: float) -> bool:
    """Wait for its health; False if it ends before or the deadline passes."""
    import aiohttp

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session:
        while server.process.poll() is None and time.monotonic() < deadline:
            try:
                async with session.get(f"{server.url}/health") as reply:
                    if reply.status == 200:
                        return True
            except (aiohttp.ClientError, TimeoutError):
                pass
            await asyncio.sleep(0.2)
    return False

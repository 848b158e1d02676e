"""Run `vllm serve` for a transformers folder as subprocesses on loopback, with a random API key.

Each server has a small parent (`supervise.py`) that ends it and all its workers when this process stops it or dies.
With several GPUs free, a model gets several servers with GPUs of their own.
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

_PORTS = 3  # ports to try if another process takes the chosen one
# torchrun's variables, removed from the environment, because vLLM would use them as its own.
_OF_TORCHRUN = re.compile("(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*")
_TAKEN = re.compile("address already in use", re.I)
# The prefix of vLLM's log lines, and lines that report errors.
_LOG_PREFIX = re.compile(r"^(\(.*?\) )?((INFO|WARNING|ERROR) [\d: -]+\[[^\]]*\] *)?")
_FAULT = re.compile(r"^[\w.: -]*(Error|Exception|error): ")


def vllm_program() -> str | None:
    """The path of the `vllm` program: on PATH, or beside this Python."""
    return shutil.which("vllm") or shutil.which("vllm", path=os.path.dirname(sys.executable))


def visible_gpus() -> tuple[str, ...]:
    """The GPUs in CUDA_VISIBLE_DEVICES, or all if it is unset."""
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
    """Assign GPUs to servers: {model: GPUs of each of its servers}, equally many servers for all models.

    Without a GPU each model gets one server (vLLM's CPU build). If the GPUs do not suffice for one server per model,
    models share them, and each must be limited by `gpu_memory_utilization`.

    Args:
        needs: {model: GPUs per server}.

    Raises:
        UsageError: a server needs more GPUs than there are.
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
            if taken % len(gpus) + need > len(gpus):  # a server's GPUs are adjacent
                taken = 0
            found[name].append(gpus[taken % len(gpus) :][:need])
            taken += need
    return found


def gpus_of_a_server(engine_args: Mapping[str, Any]) -> int:
    """The number of GPUs per server with these arguments."""
    return prod(int(engine_args.get(f"{kind}_parallel_size", 1)) for kind in ("tensor", "pipeline", "data"))


def command_line(engine_args: Mapping[str, Any]) -> list[str]:
    """Convert arguments for `vllm serve`: `{tensor_parallel_size: 2}` to `--tensor-parallel-size 2`, true to `--flag`,
    false to `--no-flag`, a mapping to JSON, a list to several values."""
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
    """A running `vllm serve`. log: its log file, in which this server's output begins at byte `start`."""

    name: str
    url: str
    api_key: str = field(repr=False)
    log: Path
    start: int
    process: subprocess.Popen[bytes]

    def ended(self) -> str:
        """Why the server ended, with the last errors of its log, in one line; "" while it runs."""
        code = self.process.poll()
        return "" if code is None else f"vLLM ended (exit code {code}): {self.last_words()}; its log is {self.log}"

    def last_words(self) -> str:
        """The last three error lines of its log, or else its last three lines."""
        with self.log.open("rb") as file:
            file.seek(max(self.start, file.seek(0, os.SEEK_END) - 2**17))
            text = file.read().decode("utf-8", "replace")
        lines = [line for line in (_LOG_PREFIX.sub("", line).strip() for line in text.splitlines()) if line]
        faults = list(dict.fromkeys(line for line in lines if _FAULT.match(line)))
        return " | ".join(one_line(line)[:300] for line in (faults or lines)[-3:]) or "its log is empty"

    async def stop(self) -> None:
        """Stop the server; returns when all its processes are gone and the GPU is free."""
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
    """Serve a transformers folder while the block runs, with one ready server per entry of `gpus`.

    Args:
        name: served model name.
        gpus: the GPUs of each server; an empty tuple leaves the choice to vLLM.
        logs: folder for the log files `vllm-NAME-NUMBER.log`.
        ready: maximum startup time in seconds.

    Raises:
        UsageError: vLLM is not installed.
        CotreeError: a server ends before it is ready, or takes too long; quotes its log.
    """
    if (program := vllm_program()) is None:
        raise UsageError(f"model `{name}`: `engine: vllm` needs vLLM; pip install 'cotree[vllm]', or put it on PATH")
    # Without sampling defaults from the model's generation_config.json.
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
    """Start a server at a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    key = secrets.token_urlsafe(32)
    environment = {name: value for name, value in os.environ.items() if not _OF_TORCHRUN.fullmatch(name)}
    environment["VLLM_API_KEY"] = key  # not an argument: those are visible to all users of the machine
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
            start_new_session=True,  # so that Ctrl-C reaches this process only, which then stops its servers
        )
        return Server(name, f"http://127.0.0.1:{port}", key, log, begin, process)


async def _is_ready(server: Server, deadline: float) -> bool:
    """Wait until `/health` answers; False if the server ends before or the deadline passes."""
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

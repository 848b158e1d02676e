"""A `vllm` program that is not there: `vllm serve FOLDER ...` with its arguments, workers, logs and faults to order.

It speaks the arguments that vLLM 0.32 was started with and refuses others, answers `/health` (without a key),
`/v1/models` and `/v1/completions` (with its key), and has a worker process, which does not end with it by itself.

`install(folder)` writes an executable `vllm` into a folder, to be put on PATH; `FAKE_VLLM` (JSON) orders its faults:

    slow: seconds until it listens. crash: ends while it starts. taken: so many starts find their port taken.
    crash_after: ends amid the work after so many completions, so many times (`crashes`, by default always).
    starts: a file that gets a line for each start: arguments, GPUs, process ids, the key's length.
    requests: a file that gets each request. knowing: answers as `knowing_reply`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from aiohttp import web
from tests.support.fake_server import FakeServer

ROOT = Path(__file__).parents[2]
WORKER = "import time; print('ready', flush=True); time.sleep(600)"


def install(folder: Path) -> Path:
    """Write the program; returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "vllm"
    paths = f"{ROOT / 'src'}:{ROOT}"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={paths} exec {sys.executable} -m tests.support.fake_vllm "$@"\n')
    program.chmod(0o755)
    return folder


def starts(faults: dict[str, Any]) -> list[dict[str, Any]]:
    """What was written of each start so far, in order."""
    path = Path(faults["starts"])
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vllm", allow_abbrev=False)
    serve = parser.add_subparsers(required=True).add_parser("serve", allow_abbrev=False)
    serve.add_argument("model")
    for name in ("host", "served-model-name", "generation-config", "uvicorn-log-level", "dtype", "quantization"):
        serve.add_argument(f"--{name}")
    for name in ("port", "tensor-parallel-size", "pipeline-parallel-size", "max-model-len"):
        serve.add_argument(f"--{name}", type=int)
    serve.add_argument("--gpu-memory-utilization", type=float)
    serve.add_argument("--override-generation-config", type=json.loads)
    serve.add_argument("--middleware", nargs="+")
    for name in ("enable-prompt-tokens-details", "enable-prefix-caching", "enforce-eager"):
        serve.add_argument(f"--{name}", action=argparse.BooleanOptionalAction)
    return parser.parse_args(words)


class FakeVLLM(FakeServer):
    """The server; it ends its process after so many completions if it is told to."""

    def __init__(self, crash_after: int | None, **options: Any) -> None:
        super().__init__(usage="vllm", only_listed=True, **options)
        self.crash_after = crash_after

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        if self.crash_after is not None and self.calls >= self.crash_after:
            print("(EngineCore pid=9) ERROR 11-29 20:27:56 [core.py:1] torch.OutOfMemoryError: CUDA out of memory.")
            print("RuntimeError: Engine core died.", flush=True)
            os._exit(1)
        return await super()._completions(request)


def main() -> None:
    faults = json.loads(os.environ.get("FAKE_VLLM", "{}"))
    given = parse(sys.argv[1:])
    before = len(starts(faults)) if "starts" in faults else 0
    worker = subprocess.Popen([sys.executable, "-c", WORKER], stdout=subprocess.PIPE)
    assert worker.stdout is not None and worker.stdout.readline() == b"ready\n"
    if "starts" in faults:
        line: dict[str, Any] = {"args": vars(given), "pids": [os.getpid(), worker.pid], "words": sys.argv[1:]}
        line |= {"gpus": os.environ.get("CUDA_VISIBLE_DEVICES"), "key": len(os.environ.get("VLLM_API_KEY", ""))}
        line["torchrun"] = sorted(os.environ.keys() & {"MASTER_PORT", "LOCAL_WORLD_SIZE"})
        with open(faults["starts"], "a") as file:
            file.write(json.dumps(line) + "\n")
    print(f"INFO 11-29 20:29:25 [api_utils.py:286] model {given.model}", flush=True)
    if before < faults.get("taken", 0):
        other = socket.create_server(("127.0.0.1", given.port))
        socket.create_server(("127.0.0.1", other.getsockname()[1]))  # OSError: Address already in use
    time.sleep(faults.get("slow", 0.0))
    if "crash" in faults:
        assert (Path(given.model) / "config.json").is_file()
        raise ValueError(faults["crash"])
    after = faults.get("crash_after") if before < faults.get("crashes", 10**6) else None
    options: dict[str, Any] = {"api_key": os.environ["VLLM_API_KEY"], "models": [given.served_model_name]}
    if faults.get("knowing"):
        from tests.support.knowing import knowing_reply

        options["reply"] = knowing_reply

    async def serve() -> None:
        async with FakeVLLM(after, port=given.port, log=faults.get("requests"), **options):
            await asyncio.Event().wait()

    asyncio.run(serve())


if __name__ == "__main__":
    main()

"""vLLM in processes of its own: started, waited for, asked, and gone without a trace, whatever ends it or us."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from tests.support import fake_vllm
from tests.support.asking import until
from tests.support.tiny_student import tiny_tokenizer

from cotree.base.errors import CotreeError, UsageError
from cotree.models import supervise, vllm
from cotree.models.client import Request
from cotree.models.endpoints import Endpoint, open_endpoints
from cotree.models.resolve import engine_of, identity, parse_model
from cotree.models.settings import Model

Order = Callable[..., dict[str, Any]]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """What vLLM is given: a transformers folder, of which the fake reads nothing but that it is there."""
    folder = tmp_path / "weights"
    tiny_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text('{"max_position_embeddings": 512}')
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Order:
    """Put the fake `vllm` on PATH; a call orders its faults."""
    monkeypatch.setenv("PATH", str(fake_vllm.install(tmp_path / "bin")), prepend=os.pathsep)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def ordered(**faults: Any) -> dict[str, Any]:
        faults |= {"starts": str(tmp_path / "starts.jsonl"), "requests": str(tmp_path / "requests.jsonl")}
        monkeypatch.setenv("FAKE_VLLM", json.dumps(faults))
        return faults

    return ordered


def request(prompt: str = "Say", n: int = 1, **changes: Any) -> Request:
    return Request(prompt, n, 8, 0.0, 1.0, 1, (), **changes)


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def pids_of(faults: dict[str, Any]) -> list[int]:
    return [pid for start in fake_vllm.starts(faults) for pid in start["pids"]]


async def asked(model: Model, ask: Callable[[Endpoint], Any], **options: Any) -> Any:
    async with open_endpoints({"m": model}, **options) as endpoints:
        return await ask(endpoints["m"])


def test_weights_are_served_asked_and_gone(
    weights: Path, order: Order, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = order(slow=0.3)
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    arguments = {
        "tensor_parallel_size": 2,
        "gpu_memory_utilization": 0.5,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "override_generation_config": {"top_k": 5},
        "middleware": ["a.b", "c.d"],
    }
    model = Model(weights=str(weights), engine="vllm", engine_args=arguments)

    async def ask(endpoint: Endpoint) -> Any:
        assert all(map(runs, pids_of(faults)))
        key = endpoint.clients[0].api_key
        assert key and key not in repr(endpoint) and len(key) > 30
        for path, code in ("/health", 200), ("/v1/models", 401):
            async with aiohttp.ClientSession() as session, session.get(endpoint.clients[0].url + path) as reply:
                assert reply.status == code, "only the health is told to everybody"
        return await endpoint.complete(request(n=3, logprobs=True), "q")

    completion = asyncio.run(asked(model, ask, logs=tmp_path / "logs"))
    assert len(completion.choices) == 3 and all(choice.logprob is not None for choice in completion.choices)
    (start,) = fake_vllm.starts(faults)
    assert start["args"] | {"port": 0} == {
        "model": str(weights), "host": "127.0.0.1", "port": 0, "served_model_name": "m", "generation_config": "vllm",
        "uvicorn_log_level": "warning", "enable_prompt_tokens_details": True, "dtype": None, "quantization": None,
        "tensor_parallel_size": 2, "pipeline_parallel_size": None, "max_model_len": None,
        "gpu_memory_utilization": 0.5, "enforce_eager": True, "enable_prefix_caching": False,
        "override_generation_config": {"top_k": 5}, "middleware": ["a.b", "c.d"],
    }  # fmt: skip
    assert start["key"] > 30 and not any("key" in word for word in start["words"])
    assert start["gpus"] is None and not start["torchrun"]
    assert not any(map(runs, start["pids"])), "when the block ends all is gone, not a little later"
    assert (tmp_path / "logs" / "vllm-m-0.log").read_text().count("api_utils") == 1
    (sent,) = Path(faults["requests"]).read_text().splitlines()
    assert json.loads(sent)["model"] == "m"


def test_the_fake_knows_what_vllm_adds_to_a_completion(weights: Path, order: Order) -> None:
    order()
    body = {"model": "m", "prompt": "a b c", "max_tokens": 30, "n": 2, "logprobs": 1, "prompt_logprobs": 1, "seed": 1}

    async def ask(endpoint: Endpoint) -> Any:
        client = endpoint.clients[0]

        def post(**more: Any) -> Any:
            headers = {"Content-Type": "application/json", "Authorization": f"Bearer {client.api_key}"}
            sent = urllib.request.Request(f"{client.url}/v1/completions", json.dumps(body | more).encode(), headers)
            with urllib.request.urlopen(sent) as reply:
                return json.load(reply)["choices"]

        whole = await asyncio.to_thread(post)
        word = whole[0]["text"].split()[1]
        stopped = await asyncio.to_thread(post, stop=[word])
        kept = await asyncio.to_thread(post, stop=[word], include_stop_str_in_output=True)
        return whole, stopped, kept, word

    whole, stopped, kept, word = asyncio.run(asked(Model(weights=str(weights), engine="vllm"), ask))
    assert len(whole) == 2 and len(whole[0]["logprobs"]["token_logprobs"]) == len(whole[0]["text"].split()) + 1
    assert [entry and len(entry) for entry in whole[0]["prompt_logprobs"]] == [None, 1, 1]
    assert kept[0]["text"] == stopped[0]["text"] + word and whole[0]["text"].startswith(kept[0]["text"])


def test_a_taken_port_is_no_fault(weights: Path, order: Order) -> None:
    faults = order(taken=2)
    found = asyncio.run(asked(Model(weights=str(weights), engine="vllm"), lambda m: m.complete(request(), "q")))
    assert found.choices[0].text
    assert len({start["args"]["port"] for start in fake_vllm.starts(faults)}) == 3
    assert not any(map(runs, pids_of(faults)))


@pytest.mark.parametrize(
    ("faults", "timeout", "arguments", "words"),
    [
        ({"crash": "Free memory is less than desired"}, 60, {}, r"exit code 1\): ValueError: Free memory is less"),
        ({}, 60, {"speculation": 3}, r"exit code 2\): vllm: error: unrecognized arguments: --speculation 3"),
        ({"slow": 60}, 2, {}, "not ready after 2 s: "),
        ({"taken": 99}, 60, {}, "Address already in use"),
    ],
)
def test_a_server_that_does_not_start_is_one_line(
    weights: Path,
    order: Order,
    tmp_path: Path,
    faults: dict[str, Any],
    timeout: float,
    arguments: dict[str, Any],
    words: str,
) -> None:
    faults = order(**faults)
    model = Model(weights=str(weights), engine="vllm", engine_args=arguments, timeout=timeout)
    log = tmp_path / "logs" / "vllm-m-0.log"
    with pytest.raises(CotreeError, match=f"(?s)model `m`: .*{words}.*its log is {log}") as raised:
        asyncio.run(asked(model, lambda m: m, logs=log.parent))
    assert "\n" not in str(raised.value)
    assert not any(map(runs, pids_of(faults)))


def test_a_server_that_ends_amid_the_work_is_one_line_at_once(weights: Path, order: Order, tmp_path: Path) -> None:
    faults = order(crash_after=1)

    async def ask(endpoint: Endpoint) -> None:
        await endpoint.complete(request(), "q")
        await endpoint.complete(request("Again"), "q")

    log, started = tmp_path / "vllm-m-0.log", time.monotonic()
    said = rf"vLLM ended \(exit code 1\): .*CUDA out of memory.* \| RuntimeError: Engine core died.; its log is {log}"
    with pytest.raises(CotreeError, match=said) as raised:
        asyncio.run(asked(Model(weights=str(weights), engine="vllm"), ask, logs=tmp_path))
    assert "re-run the same command to resume" in str(raised.value)
    assert time.monotonic() - started < 30
    assert not any(map(runs, pids_of(faults)))


def test_several_gpus_are_several_servers(
    weights: Path, order: Order, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has GPUs of its own; where one ends, the other is asked in its place."""
    faults = order()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    model = Model(weights=str(weights), engine="vllm", engine_args={"tensor_parallel_size": 2})

    async def ask(endpoint: Endpoint) -> list[str]:
        assert len(endpoint.clients) == 2
        owners = {endpoint.servers_for(f"q{n}")[0].url: f"q{n}" for n in range(50)}
        for question in owners.values():
            await endpoint.complete(request(), question)
        assert [client.counters.requests for client in endpoint.clients] == [1, 1]
        for start in fake_vllm.starts(faults):
            if endpoint.clients[0].url.endswith(str(start["args"]["port"])):
                os.kill(start["pids"][0], signal.SIGKILL)
        await endpoint.complete(request(), owners[endpoint.clients[0].url])
        assert endpoint.clients[1].counters.requests == 2
        for _ in range(3000):  # its supervisor needs a moment to say how it ended
            if endpoint.clients[0].ended():
                break
            await asyncio.sleep(0.01)
        return endpoint.lost

    (lost,) = asyncio.run(asked(model, ask, logs=tmp_path))
    assert "vLLM ended (exit code 137)" in lost and str(tmp_path / "vllm-m-0.log") in lost
    assert sorted(start["gpus"] for start in fake_vllm.starts(faults)) == ["4,5", "6,7"]
    assert len({start["key"] for start in fake_vllm.starts(faults)}) == 1
    assert not any(map(runs, pids_of(faults)))


@pytest.mark.parametrize(
    ("visible", "needs", "shares"),
    [
        ("", {"a": 2}, {"a": [()]}),
        ("-1", {"a": 2}, {"a": [()]}),
        ("0", {"a": 1, "b": 1}, {"a": [("0",)], "b": [("0",)]}),
        ("0,1,2,3", {"a": 1}, {"a": [("0",), ("1",), ("2",), ("3",)]}),
        ("0,1,2,3", {"a": 3}, {"a": [("0", "1", "2")]}),
        ("0,1,2,3", {"a": 1, "b": 1}, {"a": [("0",), ("1",)], "b": [("2",), ("3",)]}),
        ("0,1,2,3", {"a": 2, "b": 4}, {"a": [("0", "1")], "b": [("0", "1", "2", "3")]}),
        ("GPU-a, GPU-b", {"a": 1, "b": 1}, {"a": [("GPU-a",)], "b": [("GPU-b",)]}),
        ("0,1", {}, {}),
    ],
)
def test_gpus_are_shared_out(
    visible: str, needs: dict[str, int], shares: dict[str, list[tuple[str, ...]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert vllm.share_gpus(needs) == shares


def test_a_server_larger_than_the_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    need = vllm.gpus_of_a_server({"tensor_parallel_size": 2, "pipeline_parallel_size": 2})
    with pytest.raises(UsageError, match="model `a`: a server of it takes 4 GPUs, 2 are visible"):
        vllm.share_gpus({"a": need})


def test_gpus_are_those_that_the_driver_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text(
        "#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-1)'; echo 'GPU 1: NVIDIA H200'\n"
    )
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    vllm._gpus_here.cache_clear()
    assert vllm.visible_gpus() == ("0", "1")
    vllm._gpus_here.cache_clear()


KEPT = """
import asyncio, sys
from pathlib import Path
from cotree.models.vllm import serve

async def main():
    async with serve(Path(sys.argv[1]), {}, name="m", gpus=[()], logs=Path(sys.argv[2]), ready=60):
        print("ready", flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("ready", [True, False], ids=["ready", "starting"])
def test_however_we_end_no_process_is_left(
    weights: Path, order: Order, tmp_path: Path, end: signal.Signals, ready: bool
) -> None:
    faults = order(slow=0 if ready else 60)
    command = [sys.executable, "-c", KEPT, str(weights), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as ours:
        assert ours.stdout is not None
        if ready:
            assert ours.stdout.readline() == b"ready\n"
        else:
            asyncio.run(until(lambda: bool(fake_vllm.starts(faults))))
        assert len(pids_of(faults)) == 2 and all(map(runs, pids_of(faults)))
        ours.send_signal(end)
        ours.wait(30)
    deadline = time.monotonic() + 20
    while any(map(runs, pids_of(faults))) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(runs, pids_of(faults)))


STUBBORN = """
import os, signal, subprocess, sys, time
if sys.argv[1] == "child":
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    subprocess.Popen([sys.executable, "-c", os.environ["STUBBORN"], "child", sys.argv[2]])
with open(sys.argv[2], "a") as file:
    file.write(f"{os.getpid()}\\n")
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="what leaves its group is found on Linux only")
def test_what_heeds_nothing_and_left_its_group_is_gone_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUBBORN", STUBBORN)
    path = tmp_path / "pids"
    code = "import os, sys; from cotree.models import supervise; supervise._GRACE = 0.3\n"
    code += "sys.exit(supervise.supervise(os.getppid(), sys.argv[1:]))"
    command = [sys.executable, "-c", code, sys.executable, "-c", STUBBORN, "leader", str(path)]
    with subprocess.Popen(command) as supervisor:
        asyncio.run(until(lambda: path.exists() and path.read_text().count("\n") == 2))
        pids = [*map(int, path.read_text().split())]
        assert all(map(runs, pids))
        supervisor.terminate()
        assert supervisor.wait(20) == 0
    assert not any(map(runs, pids)), "gone before the supervisor is"


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process that its parent is gone")
def test_the_server_ends_when_the_process_that_watches_it_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    code = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text(f'{os.getpid()}\\n'); time.sleep(600)"
    watched = [sys.executable, "-I", supervise.__file__, str(os.getpid()), sys.executable, "-c", code, str(path)]
    with subprocess.Popen(watched) as supervisor:
        asyncio.run(until(lambda: path.exists() and path.read_text().endswith("\n")))
        supervisor.kill()
    asyncio.run(until(lambda: not runs(int(path.read_text()))))


def test_the_engine_is_what_is_written_or_what_the_machine_has(
    weights: Path, order: Order, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order()
    folder, gguf = Model(weights=str(weights)), tmp_path / "tiny.gguf"
    gguf.write_bytes(b"GGUF")
    assert engine_of(folder) == "llama.cpp", "no GPU"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert engine_of(folder) == "vllm"
    assert engine_of(folder.model_copy(update={"engine": "llama.cpp"})) == "llama.cpp"
    assert engine_of(Model(weights=str(gguf))) == "llama.cpp", "it is no folder"
    with pytest.raises(UsageError, match=r"serves transformers folders; .*tiny.gguf is a GGUF file"):
        engine_of(Model(weights=str(gguf), engine="vllm"))
    monkeypatch.setenv("PATH", "/nowhere")
    assert engine_of(folder) == "llama.cpp", "no vLLM"
    with pytest.raises(UsageError, match=r"needs vLLM; pip install 'cotree\[vllm\]'"):
        asyncio.run(asked(Model(weights=str(weights), engine="vllm"), lambda m: m))


def test_what_changes_numbers_is_another_model(weights: Path) -> None:
    def model(**arguments: Any) -> dict[str, Any]:
        found = identity(Model(weights=str(weights), engine="vllm", engine_args=arguments))
        assert found.pop("weights")
        return found

    assert model() == model(tensor_parallel_size=2, max_num_seqs=8) == {"engine": "vllm"}
    assert model(dtype="float32", enforce_eager=True) == {"engine": "vllm", "engine_args": {"dtype": "float32"}}
    assert "gguf" in identity(Model(weights=str(weights), engine="llama.cpp"))


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"weights": "a", "engine_args": {"dtype": "float32"}}, "`engine_args` are of vLLM; add `engine: vllm`"),
        ({"url": "http://a", "mode": "chat", "engine": "vllm"}, "a server has one already"),
        ({"weights": "a", "engine": "vllm", "engine_args": {"port": 1}}, "`engine_args.port` is given by cotree"),
        ({"weights": "a", "engine": "vllm", "engine_args": {"--dtype": "x"}}, "is no argument with a value"),
        ({"weights": "a", "engine": "vllm", "engine_args": {"dtype": None}}, "is no argument with a value"),
        ({"weights": "a", "engine": "vllm", "engine_args": {"max_model_len": "8k"}}, "must be a whole number from 1"),
        ({"weights": "a", "engine": "vllm", "engine_args": {"x": {"y": date(2026, 1, 1)}}}, "must be text, a number"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        Model(**settings)


def test_one_word_with_options_is_a_model_too(weights: Path) -> None:
    model = parse_model(str(weights), engine="vllm", engine_args=["max_model_len=4096", "dtype=float32"])
    assert model.engine == "vllm" and model.engine_args == {"max_model_len": 4096, "dtype": "float32"}
    with pytest.raises(UsageError, match="max_model_len=8192"):
        parse_model(str(weights), engine="vllm", engine_args=["fast"])

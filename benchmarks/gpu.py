"""All that needs a GPU to be shown, in one command: gradients, flex_attention, speed beside TRL, memory.

    make bench-gpu                                 one CUDA device, at most 8 minutes, nothing from a hub
    make bench-gpu ARGS="--sections speed"         one section with all the time
    python -m benchmarks.gpu --tiny                the same at tiny sizes, on a CPU too: the numbers mean nothing

Weights are drawn at random in the shapes of Qwen2.5-0.5B and Llama-3.2-1B. Each section is a process of its own, so
that a kernel that breaks the device, or memory that does not suffice, ends that section only; what it has found until
then is kept. A section that is over its part of the time is ended and reported as cut; what one does not need goes to
the next. Writes benchmarks/out/gpu.json after every number, and prints tables, with the goals at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "out" / "gpu.json"
# Each section's part of the time, in the order in which they run.
PARTS = {"masks": 0.04, "attention": 0.18, "gradients": 0.16, "memory": 0.12, "speed": 0.5}
Results = dict[str, dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--minutes", type=float, default=8.0, help="of all sections together (default 8)")
    parser.add_argument("--sections", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--students", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run_items(arguments.child, arguments.tiny, arguments.students, arguments.out)
        return
    import torch

    if not torch.cuda.is_available() and not arguments.tiny:
        parser.error("torch finds no CUDA device; --tiny runs the same at tiny sizes on a CPU")
    started, total = time.monotonic(), 60 * arguments.minutes
    found: dict[str, Any] = {"settings": settings(arguments), "sections": {}, "goals": []}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    whole, used = sum(PARTS[name] for name in arguments.sections), 0.0
    with tempfile.TemporaryDirectory() as folder:
        for name in (name for name in PARTS if name in arguments.sections):
            used += PARTS[name]
            with (Path(folder) / f"{name}.log").open("w+") as log:
                section(name, found, arguments, log=log, deadline=started + total * used / whole)
    print("\n".join(f"{name}: {value}" for name, value in found["settings"].items()))
    for name, results in found["sections"].items():
        print(f"\n{name}: {results['status']}, {results['seconds']:.0f} s\n{table(results['items'])}")
    print("\ngoals\n" + table({goal.pop("goal"): goal for goal in goals(found["sections"])}))


def section(name: str, found: dict[str, Any], arguments: argparse.Namespace, *, log: TextIO, deadline: float) -> None:
    """Run a section in a process until it ends or its time does; `found` and the file have each number at once.

    Args:
        name: of the section.
        found: all results so far; gets those of this section.
        arguments: of the command.
        log: gets what the process prints; the weights and what it finds are kept beside it.
        deadline: by the monotonic clock.
    """
    began, folder = time.monotonic(), Path(log.name).parent
    records = folder / f"{name}.jsonl"
    records.touch()
    results: dict[str, Any] = {"status": "cut", "seconds": 0.0, "items": {}}
    found["sections"][name] = results
    command = [sys.executable, "-m", "benchmarks.gpu", "--child", name, "--students", str(folder)]
    command += ["--out", str(records)] + ["--tiny"] * arguments.tiny
    print(f"{datetime.now(UTC):%H:%M:%S} {name}", file=sys.stderr, flush=True)
    # Nothing compiled is there when the first section begins, so that compiling is timed.
    caches = {f"{each}_CACHE_DIR": str(folder / each.lower()) for each in ("TORCHINDUCTOR", "TRITON")}
    environment = {**os.environ, **caches, "HF_HUB_OFFLINE": "1"}
    # A session of its own: torch's compiler has processes, which end with it.
    child = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=environment, start_new_session=True)
    lines = 0
    try:
        while child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
            told = records.read_text().splitlines()
            if len(told) > lines:
                lines = len(told)
                merge(results["items"], told)
                write(arguments.out, found)
        code = child.poll()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    merge(results["items"], records.read_text().splitlines())
    results["seconds"] = time.monotonic() - began
    if code is not None:
        results["status"] = "done" if code == 0 else f"ended with code {code}"
    if code != 0:
        log.seek(0)
        results["log"] = log.read()[-2000:]
        print(results["log"], file=sys.stderr)
    for item in results["items"].values():
        if item["status"] in ("waits", "runs"):
            item["status"] = "cut" if code is None else "lost"
    write(arguments.out, found)


def run_items(name: str, tiny: bool, students: Path, records: Path) -> None:
    """Run a section's items in this process; each number is a line in `records` as soon as it is found."""
    import torch
    from benchmarks.gpu_sections import REAL, TINY, free, in_a_line, sections

    items = sections(TINY if tiny else REAL, students)[name]
    # Twice torch's: two models are in this process, where training has one.
    with records.open("a") as file, torch._dynamo.config.patch(recompile_limit=16):

        def tell(item: str, values: dict[str, Any]) -> None:
            file.write(json.dumps({item: values}) + "\n")
            file.flush()

        for item in items:
            tell(item, {"status": "waits"})
        for item, compute in items.items():
            tell(item, {"status": "runs"})
            try:
                for values in compute():
                    tell(item, values)
                tell(item, {"status": "done"})
            except Exception as error:  # noqa: BLE001 - whatever fails in an item must not end the others
                tell(item, {"status": "failed", "error": in_a_line(error)})
            free()


def merge(items: Results, lines: list[str]) -> None:
    """Add what a section has told; a line that it was about to write when it was ended is left out."""
    for line in lines:
        try:
            told = json.loads(line)
        except ValueError:
            continue
        for item, values in told.items():
            items.setdefault(item, {}).update(values)


def goals(sections: dict[str, Any]) -> list[dict[str, Any]]:
    """What is aimed at, beside what was measured: the worst over all items that have it, `-` where none has."""

    def values(section: str, key: str) -> list[float]:
        return [item[key] for item in sections.get(section, {}).get("items", {}).values() if key in item]

    def goal(name: str, aim: float, measured: float | None, reached: bool) -> dict[str, Any]:
        return {"goal": name, "aim": aim, "measured": measured, "reached": None if measured is None else reached}

    share = min(values("speed", "flop_share"), default=None)
    noise = max(values("gradients", "of_noise"), default=None)
    peaks: dict[str, list[float]] = {}
    for item, found in sections.get("memory", {}).get("items", {}).items():
        if found.get("status") == "done":
            peaks.setdefault(item.split()[0], []).append(found["peak_gb"])
    growth = max((each[-1] / each[0] for each in peaks.values() if len(each) > 1), default=None)
    return [
        goal("speed-up over the FLOP ratio, at least", 0.9, share, share is not None and share >= 0.9),
        goal("bf16 gradient's distance over bf16's noise, at most", 1.1, noise, noise is not None and noise <= 1.1),
        goal("memory, most over fewest leaves, at most", 1.2, growth, growth is not None and growth <= 1.2),
    ]


def table(items: Results) -> str:
    """The numbers and words of some items as columns; what is nested is in the file only."""
    keys = dict.fromkeys(key for item in items.values() for key, value in item.items() if not isinstance(value, dict))
    keys.pop("error", None)
    rows = [["", *keys], *([name, *(_cell(item.get(key)) for key in keys)] for name, item in items.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    errors = [f"{name}: {item['error']}" for name, item in items.items() if "error" in item]
    return "\n".join([*lines, *errors])


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on, the code aside."""
    import torch

    def version_of(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    names = ("torch", "triton", "transformers", "accelerate", "trl", "flash-attn")
    there = torch.cuda.is_available()
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "device": torch.cuda.get_device_name() if there else f"CPU, {torch.get_num_threads()} threads",
        "cuda": torch.version.cuda if there else None,
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in names},
        "sizes": "tiny" if arguments.tiny else "real",
        "minutes": arguments.minutes,
    }


def write(path: Path, found: dict[str, Any]) -> None:
    found["goals"] = goals(found["sections"])
    path.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a section's process ends, too
    main()

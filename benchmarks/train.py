"""Training speed at equal gradients, side by side in one run: cotree's forests and TRL's trainers.

    make bench-train                                 all shapes with the real SmolLM2-135M: about half an hour
    make bench-train ARGS="--run runs/laptop"        `demo` is the first step of a run, not pairs written by rule
    make bench-train ARGS="--shapes late mcts"       some; they join the file's if its settings are equal
    python -m benchmarks.train --tiny                a minute: shows that it runs, the numbers mean little

Writes benchmarks/out/train.json. Every side computes loss and gradient of the same optimizer step. The fair side is the
fastest of several micro-batches, each tried once; then it and cotree alternate. A speed-up is a ratio of medians, with
the smallest and the largest of the ratios of a repetition. Memory is the peak of a fresh process for one step, also a
ratio of medians: with glibc's allocator the same step may take a tenth more or less.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.train_shapes import Shape, demo, shapes

from cotree.base.machine import peak_bytes
from cotree.train.forest import Forest, Scored, multiplicities, packs

OUT = Path(__file__).parent / "out" / "train.json"
RECIPE = Path(__file__).parents[1] / "recipes" / "laptop.yaml"
TINY = {"prompt": 12, "thought": 6, "vocabulary": 290}
MICRO_BATCHES = (1, 2, 3, 6)
COLUMNS = {
    "speedup_fair": "fair",
    "speedup_as_is": "as is",
    "token_ratio": "tokens",
    "flop_ratio": "FLOPs",
    "peak_memory_ratio_bs1": "memory",
    "gradient_rel_l2": "gradient",
}


def make_student(tiny: bool, folder: Path) -> Path:
    """SmolLM2-135M-Instruct, or random weights of its shape in small, as a transformers folder."""
    from cotree.models.weights import locate
    from cotree.train.model import quiet
    from cotree.train.student import convert_gguf

    source = locate("smollm2-135m-instruct")
    student = convert_gguf(source, folder / "student")
    if tiny:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(student)
        config.update({"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": None})
        config.update({"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32})
        with quiet():
            AutoModelForCausalLM.from_config(config).save_pretrained(student)
    return student


def sides(
    student: Path, shape: Shape, pack_tokens: int
) -> dict[str, Callable[..., tuple[Any, Callable[[int], float]]]]:
    """For each side what makes its model and its step."""
    from benchmarks.train_sides import cotree_step, trl_step

    return {
        "cotree": partial(cotree_step, student, shape, pack_tokens),
        "fair": partial(trl_step, student, shape, True),
        "as_is": partial(trl_step, student, shape, False),
    }


def timed(name: str, model: Any, step: Any, micro_batch: int) -> tuple[float, float]:
    """Seconds and loss of a step from no gradient."""
    from benchmarks.train_sides import clear

    clear(model)
    started = time.perf_counter()
    loss = step(micro_batch)
    seconds = time.perf_counter() - started
    print(f"  {datetime.now(UTC):%H:%M:%S} {name} {seconds:.2f} s", file=sys.stderr, flush=True)
    return seconds, loss


def measure(student: Path, shape: Shape, arguments: argparse.Namespace) -> dict[str, Any]:
    """Every number of a shape."""
    from benchmarks.train_sides import gradient_of

    made, rows = sides(student, shape, arguments.pack_tokens), shape.rows
    sizes = sorted({min(size, len(rows)) for size in MICRO_BATCHES if len(rows) % min(size, len(rows)) == 0})
    ours, fair = made["cotree"](), made["fair"]()
    _, loss = timed(f"{shape.name}: cotree, first step", *ours, 0)
    first: dict[int, float] = {}
    for size in sizes:  # the last holds all rows: TRL's SFT term is the mean of its micro-batch
        first[size], their_loss = timed(f"{shape.name}: fair, micro-batch {size}", *fair, size)
    apart = distance(gradient_of(ours[0]), gradient_of(fair[0]))
    fastest = min(first, key=lambda size: first[size])
    seconds: dict[str, list[float]] = {"cotree": [], "fair": [], "as_is": []}
    for _ in range(arguments.repeats):
        seconds["cotree"].append(timed(f"{shape.name}: cotree", *ours, 0)[0])
        seconds["fair"].append(timed(f"{shape.name}: fair, micro-batch {fastest}", *fair, fastest)[0])
    del ours, fair
    seconds["as_is"].append(timed(f"{shape.name}: as is, micro-batch {fastest}", *made["as_is"](), fastest)[0])
    peaks: dict[str, list[int]] = {"cotree": [], "fair": []}
    for _ in range(arguments.repeats):
        for side, found in peaks.items():
            found.append(_peak(shape, side, student, arguments))
    median = {side: statistics.median(values) for side, values in seconds.items()}
    ratios = [fair / ours for ours, fair in zip(seconds["cotree"], seconds["fair"], strict=True)]
    tokens, flops = work(student, rows, arguments.pack_tokens, masked=shape.loss == "dpo")
    return {
        "loss": shape.loss,
        "loss_cotree": loss,
        "loss_trl": their_loss,
        "speedup_fair": median["fair"] / median["cotree"],
        "speedup_fair_range": [min(ratios), max(ratios)],
        "speedup_as_is": median["as_is"] / median["cotree"],
        "token_ratio": tokens,
        "flop_ratio": flops,
        "peak_memory_ratio_bs1": statistics.median(peaks["cotree"]) / statistics.median(peaks["fair"]),
        "gradient_rel_l2": apart,
        "seconds": seconds,
        "fair_seconds_by_micro_batch": first,
        "peak_bytes": peaks,
        "rows": len(rows),
        "source": str(arguments.run) if shape.name == "demo" and arguments.run else "by rule",
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }


def work(student: Path, rows: Sequence[Any], pack_tokens: int, *, masked: bool) -> tuple[float, float]:
    """Tokens and floating-point operations of the plain computation over those of the packs.

    Counted: the layers' matrices, attention over what a token sees, and the vocabulary where a token is scored. masked:
    what the sides of a pair share is not scored.
    """
    config = json.loads((student / "config.json").read_text())
    width = config["hidden_size"]
    head = config.get("head_dim") or width // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    layer = width * (2 * queries + 2 * keys + 3 * config["intermediate_size"])

    def flops(tokens: int, seen: int, scored: int) -> int:
        layers: int = config["num_hidden_layers"]
        vocabulary: int = config["vocab_size"]
        return int(2 * layers * (layer * tokens + 2 * queries * seen) + 2 * width * vocabulary * scored)

    plain = [(len(row.prompt), ids) for row in rows for ids in row.sequences]
    lengths = [len(ids) - 1 for _, ids in plain]
    before = (sum(lengths), sum(n * (n + 1) // 2 for n in lengths), sum(len(ids) - first for first, ids in plain))
    after = [0, 0, 0]
    for pack in packs(rows, pack_tokens):
        forest = Forest([ids for row in pack for ids in row.sequences])
        after[0] += len(forest.ids)
        after[1] += int(forest.positions.sum()) + len(forest.ids)
        firsts = [len(row.prompt) + (row.prefix if masked else 0) for row in pack]
        scored = [Scored(ids, first) for first, row in zip(firsts, pack, strict=True) for ids in row.sequences]
        after[2] += round(sum(float((1 / count.double()).sum()) for count in multiplicities(scored)))
    return before[0] / after[0], flops(*before) / flops(*after)


def distance(left: dict[str, Any], right: dict[str, Any]) -> float:
    """Of two gradients, relative to the second."""
    difference = sum((left[name] - right[name]).double().square().sum() for name in left)
    return float((difference / sum(values.double().square().sum() for values in right.values())) ** 0.5)


def _peak(shape: Shape, side: str, student: Path, arguments: argparse.Namespace) -> int:
    """Peak memory in bytes of a process that computes one step; TRL's with one row at a time, no reference model."""
    command = [sys.executable, "-m", "benchmarks.train", "--child", side, "--shapes", shape.name]
    command += ["--student", str(student), "--pack-tokens", str(arguments.pack_tokens), "--seed", str(arguments.seed)]
    command += ["--tiny"] * arguments.tiny + (["--run", str(arguments.run)] if arguments.run else [])
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on, the code aside."""
    import torch

    cpu = Path("/proc/cpuinfo")
    names = [line.split(": ")[1] for line in cpu.read_text().splitlines() if line.startswith("model name")]
    return {
        "machine": f"{os.cpu_count()} x {(names or [platform.processor()])[0]}, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
        "python": platform.python_version(),
        "student": "random, tiny" if arguments.tiny else "SmolLM2-135M-Instruct, fp32",
        "seed": arguments.seed,
        "repeats": arguments.repeats,
        "pack_tokens": arguments.pack_tokens,
    }


def chosen_shapes(arguments: argparse.Namespace, student: Path) -> list[Shape]:
    found = [*shapes(arguments.seed, **(TINY if arguments.tiny else {})), demo(arguments.run, student, RECIPE)]
    return [shape for shape in found if not arguments.shapes or shape.name in arguments.shapes]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pack-tokens", type=int, default=2048)
    parser.add_argument("--shapes", nargs="*")
    parser.add_argument("--run", type=Path, help="a finished run, for the shape `demo`")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--student", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        (shape,) = chosen_shapes(arguments, arguments.student)
        make = sides(arguments.student, shape, arguments.pack_tokens)[arguments.child]
        timed(f"{shape.name}: memory of {arguments.child}", *make(reference=False), 1)
        print(peak_bytes())
        return
    known = settings(arguments)
    results: dict[str, Any] = {}
    if arguments.shapes and arguments.out.exists():
        before = json.loads(arguments.out.read_text())
        results = before["shapes"] if before.get("settings") == known else {}
    with tempfile.TemporaryDirectory() as folder:
        student = arguments.student or make_student(arguments.tiny, Path(folder))
        for shape in chosen_shapes(arguments, student):
            results[shape.name] = measure(student, shape, arguments)
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps({"settings": known, "shapes": results}, indent=2) + "\n")
    print("\n".join(f"{name}: {value}" for name, value in known.items()))
    print(f"{'shape':14}{'loss':7}{'cotree s':>9}{'fair s':>8}" + "".join(f"{each:>10}" for each in COLUMNS.values()))
    for name, row in results.items():
        taken = [statistics.median(row["seconds"][side]) for side in ("cotree", "fair")]
        low, high = row["speedup_fair_range"]
        numbers = "".join(f"{row[each]:>10.3g}" for each in COLUMNS)
        print(f"{name:14}{row['loss']:7}{taken[0]:>9.2f}{taken[1]:>8.2f}{numbers}  fair {low:.2f}-{high:.2f}")


if __name__ == "__main__":
    main()

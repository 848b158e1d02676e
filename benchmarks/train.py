"""Training speed at equal gradients, side by side in one run: cotree's forests and TRL's trainers.

    make bench-train                                 all shapes with the real SmolLM2-135M (not yet timed in full)
    make bench-train ARGS="--run runs/laptop"        and the first step of a run's own trees
    python -m benchmarks.train --tiny                a minute: shows that it runs, the numbers mean little

Writes benchmarks/out/train.json. Every side computes the same optimizer step. The fair side is the fastest of several
micro-batches, each tried once; then it and cotree alternate. Memory is the peak of a fresh process for one step.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.train_shapes import Shape, demo, shapes

from cotree.train.encode import Chain
from cotree.train.forest import Forest, packs

OUT = Path(__file__).parent / "out" / "train.json"
TINY = {"prompt": 12, "thought": 6, "vocabulary": 290}
COLUMNS = ("speedup_fair", "speedup_as_is", "token_ratio", "flop_ratio", "peak_memory_ratio_bs1", "gradient_rel_l2")


def make_student(tiny: bool, folder: Path) -> Path:
    """SmolLM2-135M-Instruct, or random weights of its shape in small, as a transformers folder."""
    from cotree.llm.embedded import locate
    from cotree.train.student import load_student, quiet

    source = locate("smollm2-135m-instruct")
    student = load_student(source, folder / "student")
    if tiny:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(student)
        config.update({"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": None})
        config.update({"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32})
        with quiet():
            AutoModelForCausalLM.from_config(config).save_pretrained(student)
    return student


def sides(student: Path, shape: Shape, chains: list[Chain] | None, pack_tokens: int) -> dict[str, Any]:
    """For each side what makes it, given a micro-batch where that matters."""
    from benchmarks import train_sides

    if chains is not None:
        ours, theirs, what = train_sides.cotree_sft_step, train_sides.trl_sft_step, chains
    else:
        ours, theirs, what = train_sides.cotree_step, train_sides.trl_step, shape  # type: ignore[assignment]
    return {
        "cotree": partial(ours, student, what, pack_tokens),  # type: ignore[arg-type]
        "fair": partial(theirs, student, what, fair=True),  # type: ignore[arg-type]
        "as_is": partial(theirs, student, what, fair=False),  # type: ignore[arg-type]
    }


def timed(model: Any, step: Any) -> tuple[float, float]:
    """Seconds and loss of a step from no gradient."""
    from benchmarks.train_sides import clear

    clear(model)
    started = time.perf_counter()
    loss = step()
    return time.perf_counter() - started, loss


def measure(student: Path, shape: Shape, chains: list[Chain] | None, arguments: argparse.Namespace) -> dict[str, Any]:
    """Every number of a shape."""
    from benchmarks.train_sides import gradient_of

    made = sides(student, shape, chains, arguments.pack_tokens)
    rows: Sequence[Any] = chains if chains is not None else shape.pairs
    sizes = [size for size in (1, 2, 3, 6) if len(rows) % size == 0 and size <= len(rows)] or [1]
    model, step = made["cotree"]()
    _, loss = timed(model, step)
    ours = gradient_of(model)
    first: dict[int, float] = {}
    fastest: Any = None
    for size in sizes:
        candidate = made["fair"](size)
        first[size], their_loss = timed(*candidate)
        distance = _distance(ours, gradient_of(candidate[0])) if size == sizes[-1] else 0.0
        if first[size] == min(first.values()):
            fastest = candidate
    del ours
    seconds: dict[str, list[float]] = {"cotree": [], "fair": []}
    for _ in range(arguments.repeats):
        seconds["cotree"].append(timed(model, step)[0])
        seconds["fair"].append(timed(*fastest)[0])
    del model, step, fastest, candidate
    as_is = timed(*made["as_is"](sizes[0]))[0]
    peaks = {side: _peak(shape, side, student, arguments) for side in ("cotree", "fair")}
    median = {side: statistics.median(values) for side, values in seconds.items()}
    tokens, flops = work(student, rows, arguments.pack_tokens)
    return {
        "loss": "sft" if chains is not None else shape.loss,
        "loss_cotree": loss,
        "loss_trl": their_loss,
        "speedup_fair": median["fair"] / median["cotree"],
        "speedup_as_is": as_is / median["cotree"],
        "token_ratio": tokens,
        "flop_ratio": flops,
        "peak_memory_ratio_bs1": peaks["cotree"] / peaks["fair"],
        "gradient_rel_l2": distance,
        "seconds": seconds,
        "fair_first_seconds_by_micro_batch": first,
        "peak_bytes": peaks,
    }


def work(student: Path, rows: Sequence[Any], pack_tokens: int) -> tuple[float, float]:
    """Tokens and floating-point operations of the plain computation over those of the packs.

    Counted: the layers' matrices, attention over what a token sees, and the vocabulary where a token is scored.
    """
    config = json.loads((student / "config.json").read_text())
    width, head = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    layer = width * (2 * queries + 2 * keys + 3 * config["intermediate_size"])

    def flops(tokens: int, seen: int, scored: int) -> int:
        layers: int = config["num_hidden_layers"]
        return 2 * layers * (layer * tokens + 2 * queries * seen) + 2 * width * config["vocab_size"] * scored

    def scored(chains: Sequence[tuple[int, Sequence[int]]]) -> int:
        return len({tuple(ids[:end]) for first, ids in chains for end in range(first + 1, len(ids) + 1)})

    plain = [(len(row.prompt), ids) for row in rows for ids in row.chains]
    lengths = [len(ids) - 1 for _, ids in plain]
    before = (sum(lengths), sum(n * (n + 1) // 2 for n in lengths), sum(len(ids) - first for first, ids in plain))
    after = [0, 0, 0]
    for pack in packs(rows, pack_tokens):
        forest = Forest([ids for row in pack for ids in row.chains])
        after[0] += len(forest.ids)
        after[1] += int(forest.positions.sum()) + len(forest.ids)
        after[2] += scored([(len(row.prompt), ids) for row in pack for ids in row.chains])
    return before[0] / after[0], flops(*before) / flops(*after)


def _distance(left: dict[str, Any], right: dict[str, Any]) -> float:
    difference = sum((left[name] - right[name]).double().square().sum() for name in left)
    return float((difference / sum(values.double().square().sum() for values in right.values())) ** 0.5)


def _peak(shape: Shape, side: str, student: Path, arguments: argparse.Namespace) -> int:
    """Peak memory in bytes of a process that computes one step; TRL's with one row at a time."""
    command = [sys.executable, "-m", "benchmarks.train", "--child", side, "--shapes", shape.name]
    command += ["--student", str(student), "--pack-tokens", str(arguments.pack_tokens), "--seed", str(arguments.seed)]
    command += ["--tiny"] * arguments.tiny + (["--run", str(arguments.run)] if arguments.run else [])
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def chosen_shapes(arguments: argparse.Namespace) -> list[tuple[Shape, list[Chain] | None]]:
    found: list[tuple[Shape, list[Chain] | None]] = [
        (shape, None) for shape in shapes(arguments.seed, **(TINY if arguments.tiny else {}))
    ]
    early = found[0][0]
    correct = {tuple(pair.chosen): Chain(pair.prompt, pair.chosen) for pair in early.pairs}
    wrong = {tuple(pair.rejected): Chain(pair.prompt, pair.rejected) for pair in early.pairs}
    found.append((Shape("sft_4_chains", "dpo", early.pairs), [*correct.values(), *wrong.values()][:4]))
    if arguments.run:
        found.append((demo(arguments.run), None))
    return [each for each in found if not arguments.shapes or each[0].name in arguments.shapes]


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
        ((shape, chains),) = chosen_shapes(arguments)
        make = sides(arguments.student, shape, chains, arguments.pack_tokens)[arguments.child]
        timed(*(make() if arguments.child == "cotree" else make(1)))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        student = arguments.student or make_student(arguments.tiny, Path(folder))
        print(f"{'shape':14}{'loss':7}" + "".join(f"{name:>23}" for name in COLUMNS), flush=True)
        for shape, chains in chosen_shapes(arguments):
            found = results[shape.name] = measure(student, shape, chains, arguments)
            print(f"{shape.name:14}{found['loss']:7}" + "".join(f"{found[n]:>23.3g}" for n in COLUMNS), flush=True)
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps({"seed": arguments.seed, "shapes": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()

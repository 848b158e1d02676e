"""The trees that training is measured on: token ids of pairs, drawn by seed, those of a run, or written by rule."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cotree.models.encode import EncodedChain, EncodedPair, encode_dpo, prefix_tokens

PAIRS = 6
END = 2


@dataclass(frozen=True)
class Shape:
    """The rows of one step, and the loss that they are trained with: chains with `sft`, else pairs."""

    name: str
    loss: Literal["joint", "dpo", "sft"]
    rows: list[Any]


def shapes(seed: int, prompt: int = 120, thought: int = 60, vocabulary: int = 40_000) -> list[Shape]:
    """The design's shapes, whose leaves are alternately correct and wrong; and SFT on 4 chains of the first."""
    source = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [source.randrange(3, vocabulary) for _ in range(count)]

    def binary(first: int, last: int) -> list[list[int]]:
        """Chains of 5 thoughts that branch in two at the depths from `first` to `last`."""
        chains: list[list[int]] = [[]]
        for depth in range(1, 6):
            ways = 2 if first <= depth <= last else 1
            chains = [chain + tokens(thought) for chain in chains for _ in range(ways)]
        return chains

    def grown() -> list[list[int]]:
        """Ten leaves at depth 4 or 5, grown one thought at a time at a place drawn at random."""
        nodes: list[tuple[int, list[int]]] = [(0, [])]
        inner: set[int] = set()
        while sum(depth >= 4 for number, (depth, _) in enumerate(nodes) if number not in inner) < 10:
            parent = source.choice([number for number, (depth, _) in enumerate(nodes) if depth < 5])
            depth, path = nodes[parent]
            inner.add(parent)
            nodes.append((depth + 1, path + tokens(source.randint(thought // 2, thought * 3 // 2))))
        return [path for number, (depth, path) in enumerate(nodes) if depth >= 4 and number not in inner]

    def pairs(chains: list[list[int]]) -> list[EncodedPair]:
        beginning = tokens(prompt)
        ended = [[*chain, END] for chain in chains]
        every = [
            EncodedPair(beginning, good, bad, prefix_tokens(good, bad)) for good in ended[::2] for bad in ended[1::2]
        ]
        return source.sample(every, len(every))

    shortest = [min(pairs(grown()), key=lambda pair: pair.prefix) for _ in range(2)]
    early = pairs(binary(1, 3))[:PAIRS]
    sides = [tuple(pair.chosen) for pair in early] + [tuple(pair.rejected) for pair in early]
    chains = [EncodedChain(early[0].prompt, list(side)) for side in dict.fromkeys(sides)]
    return [
        Shape("early", "joint", early),
        Shape("mcts", "joint", pairs(grown())[:PAIRS]),
        Shape("late", "dpo", pairs(binary(3, 5))[:PAIRS]),
        Shape("one_pair", "joint", shortest),
        Shape("sft_4_chains", "sft", chains[:4]),
    ]


def wide(leaves: int, tokens: int, vocabulary: int, seed: int = 0) -> Shape:
    """SFT on all chains of a tree: each of its six equal stretches branches in two until there are enough leaves.

    Args:
        leaves: a power of two, at most 64.
        tokens: of each completion, about.
    """
    source = random.Random(seed)
    chains: list[list[int]] = [[]]
    for _ in range(6):
        ways = 2 if len(chains) < leaves else 1
        chains = [
            chain + [source.randrange(3, vocabulary) for _ in range(tokens // 6)]
            for chain in chains
            for _ in range(ways)
        ]
    return Shape(f"{leaves}_leaves", "sft", [EncodedChain([3] * 8, [*chain, END]) for chain in chains])


def demo(run: Path | None, student: Path, recipe_of_rule: Path) -> Shape:
    """The first step of a run; without one as many pairs, each of a question of arithmetic, written by rule."""
    from cotree.experiment.recipe import load_recipe
    from cotree.models.tokenizer import load_tokenizer
    from cotree.train.rows import encode_file, fixed_steps
    from cotree.train.settings import DPO

    node = load_recipe(run or recipe_of_rule).nodes["students/dpo"]
    settings, tokenizer = node.settings.training, load_tokenizer(student)
    assert isinstance(settings, DPO)
    if run:
        found = encode_file(run / "datasets" / node.settings.data / "train.parquet", tokenizer, settings).rows
    else:
        found = encode_dpo(tokenizer, _by_rule(), sys.maxsize).rows
    step = fixed_steps(found, settings, node.seed)[0]
    return Shape("demo", "joint" if settings.alpha else "dpo", [found[index] for index in step])


def _by_rule() -> list[dict[str, Any]]:
    """One pair a question, as the laptop's recipe has it; rejected goes wrong in its thinking."""
    from cotree.tasks import task

    arithmetic = task("arithmetic")
    families = [arithmetic.worked_examples(question) for question in arithmetic.questions("train", 4)]
    rows = []
    for example in {each.question: each for examples in families for each in examples}.values():
        steps, wrong = example.steps, str(int(example.answer) + 1)
        bad = steps["thinking"].replace(example.answer, wrong)
        chosen = [steps["sub_task"], steps["thinking"], f"The answer is: \\boxed{{{example.answer}}}"]
        rejected = [steps["sub_task"], bad, steps["double_check"], f"The answer is: \\boxed{{{wrong}}}"]
        prompt = [{"role": "user", "content": example.question}]
        rows.append({"prompt": prompt, "chosen": _assistant(chosen), "rejected": _assistant(rejected)})
    return rows


def _assistant(lines: list[str]) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": "\n".join(lines)}]

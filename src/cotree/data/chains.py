"""Chains (root to judged answer) out of stored trees, as the student is to read them.

Invariants: a chain's verdict is the task's, also after its reflections were cut; its text comes once in a tree; its
tokens are what the trainer sees. Nothing is cut to fit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING

from cotree.experiment.recipe import Build, TextForm
from cotree.models.encode import encode_chains, unfinished_turn
from cotree.search.prompts import chain_text
from cotree.search.store import StoredNode, StoredTree
from cotree.search.thoughts import PATTERNS, Pattern
from cotree.tasks.base import Verdict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Judge = Callable[[StoredTree, str], Verdict]


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain as the student is trained on it; `tokens` are the completion's ids, end of turn included.

    verdict: "no_answer" is a path that max_tokens cut off; its turn has no end.
    value: the mean of v/n over its thoughts. nodes: their ids, those that the student does not see left out.
    """

    tree_id: str
    leaf_id: int
    text: str
    verdict: str
    reward: float
    pattern: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    value: float = 0.0
    nodes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Reading:
    """What a build's settings cannot say of its trees: thoughts that the student does not see, own patterns, and who
    judges chains whose reflections were cut."""

    left_out: Collection[str] = frozenset()
    patterns: Mapping[str, Pattern] = field(default_factory=lambda: PATTERNS)
    judge: Judge | None = None


PLAIN = Reading()


def chains_of(
    tree: StoredTree, tokenizer: PreTrainedTokenizerBase, settings: Build, reading: Reading
) -> tuple[list[Chain], int]:
    """All chains that end in a judged answer, once each by text, in leaf order; and how many ended without an answer
    and were left out. With `dpo.unanswered` a path that max_tokens cut off is a chain too.

    A chain whose reflections were cut is judged again: its answer may no longer follow.
    """
    cuts = settings.reflections == "cut"
    found: dict[str, tuple[StoredNode, list[StoredNode], str, float]] = {}
    no_answer = 0
    for leaf in tree.nodes:
        if leaf.verdict is None:
            continue
        unfinished = leaf.verdict == "no_answer" and leaf.type != "answer" and leaf.finish_reason == "length"
        if leaf.verdict == "no_answer" and not (settings.dpo.unanswered and unfinished):
            no_answer += 1
            continue
        whole = tree.chain(leaf.node_id)
        kept = cut_reflections(whole, reading.patterns[tree.pattern]) if cuts else whole
        thoughts = [node for node in kept if node.type not in reading.left_out]
        text = form(thoughts, settings.text, unfinished=unfinished)
        verdict, reward = leaf.verdict, float(leaf.reward or 0.0)
        if len(kept) < len(whole) and reading.judge is not None and not unfinished:
            judged = reading.judge(tree, text)
            verdict, reward = judged.kind, judged.reward
        if verdict == "no_answer" and not unfinished:
            no_answer += 1
        else:
            found.setdefault(text, (leaf, thoughts, verdict, reward))
    encoded = encode_chains(tokenizer, [(tree.messages, [{"role": "assistant", "content": text}]) for text in found])
    chains = [
        Chain(
            tree_id=tree.tree_id,
            leaf_id=leaf.node_id,
            text=text,
            verdict=verdict,
            reward=reward,
            pattern=tree.pattern,
            tokens=tuple(unfinished_turn(ids).completion if verdict == "no_answer" else ids.completion),
            prompt_tokens=len(ids.prompt),
            value=fmean(mean_value(node) for node in thoughts),
            nodes=tuple(node.node_id for node in thoughts),
        )
        for (text, (leaf, thoughts, verdict, reward)), ids in zip(found.items(), encoded, strict=True)
    ]
    return chains, no_answer


def mean_value(node: StoredNode) -> float:
    """v/n: the mean reward of the judged leaves at or below a node."""
    return node.value / node.visits if node.visits else 0.0


def form(thoughts: Sequence[StoredNode], text: TextForm, *, unfinished: bool = False) -> str:
    """The assistant's words. `tags`: each thought between its type's tags; `think`: all before the answer inside
    `<think>`; `plain`: a thought a line. An unfinished path was cut before it could close its last tag."""
    if text == "plain":
        return chain_text(thoughts)
    if text == "think" and unfinished:
        return f"<think>\n{chain_text(thoughts)}"
    if text == "think":
        return f"<think>\n{chain_text(thoughts[:-1])}\n</think>\n\n{chain_text(thoughts[-1:])}"
    blocks: list[list[StoredNode]] = []
    for thought in thoughts:
        # A mini-step that broke off and what continues it are one thought.
        if blocks and blocks[-1][-1].is_open and not thought.prefix:
            blocks[-1].append(thought)
        else:
            blocks.append([thought])
    names = [str(block[0].type).replace("_", "-") for block in blocks]
    words = "\n".join(f"<{n}>{chain_text(b).strip()}</{n}>" for n, b in zip(names, blocks, strict=True))
    return words.removesuffix(f"</{names[-1]}>") if unfinished else words


def cut_reflections(thoughts: Sequence[StoredNode], pattern: Pattern) -> list[StoredNode]:
    """A chain without the thinking that a reflection found wrong, as if it had been right at once.

    What goes is everything after the last thought at which the pattern branches (its row has more than one child of a
    type), up to the reflection itself.
    """
    kept: list[StoredNode] = []
    for thought in thoughts:
        if thought.type != "reflection":
            kept.append(thought)
            continue
        while kept and max(pattern.get(str(kept[-1].type), {}).values(), default=1) < 2:
            kept.pop()
    return kept

"""What a search came to: counts over its trees, for each task, and for each model that wrote.

Invariant: every number is computed from the stored trees, so a resumed run and an uninterrupted one report the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from cotree.search.store import StoredTree


def summarize(trees: Iterable[StoredTree]) -> dict[str, Any]:
    """`counts` (all, by task, by model) and the `tokens` of a search."""
    parts: dict[str, list[StoredTree]] = {}
    for tree in trees:
        parts.setdefault(tree.task, []).append(tree)
    everything = [tree for part in parts.values() for tree in part]
    return {
        "counts": {
            **_counts(everything),
            "by_task": {name: _counts(part) for name, part in sorted(parts.items())},
            "by_model": _by_model(everything),
        },
        "tokens": {
            "prompt": sum(t.prompt_tokens - t.cached_tokens for t in everything),
            "cached": sum(t.cached_tokens for t in everything),
            "completion": sum(t.completion_tokens for t in everything),
        },
    }


def repaired(tree: StoredTree) -> set[int]:
    """The reflections of a tree that a correct answer follows, by node id."""
    correct = [node.node_id for node in tree.nodes if node.verdict == "correct"]
    return {node.node_id for leaf in correct for node in tree.chain(leaf) if node.type == "reflection"}


def _counts(trees: Sequence[StoredTree]) -> dict[str, Any]:
    answers = [n for tree in trees for n in tree.nodes if n.type == "answer"]
    kinds = [{n.verdict for n in tree.nodes if n.verdict} for tree in trees]
    return {
        "trees": len(trees),
        "thoughts": sum(len(tree.nodes) - 1 for tree in trees),
        "rollouts": sum(tree.rollouts for tree in trees),
        "answers": len(answers),
        **{kind: sum(n.verdict == kind for n in answers) for kind in ("correct", "wrong", "no_answer")},
        "cut": sum(n.verdict is not None and n.type != "answer" for tree in trees for n in tree.nodes),
        "questions_with_correct": sum("correct" in found for found in kinds) / max(len(trees), 1),
        "questions_with_both": sum({"correct", "wrong"} <= found for found in kinds) / max(len(trees), 1),
        "reflections": sum(n.type == "reflection" for tree in trees for n in tree.nodes),
        "repaired": sum(len(repaired(tree)) for tree in trees),
        "stopped": dict(sorted(Counter(tree.stopped for tree in trees).items())),
    }


def _by_model(trees: Sequence[StoredTree]) -> dict[str, dict[str, int]]:
    """Which model wrote how many thoughts and tokens, and how many of its reflections a correct answer followed."""
    counts: dict[str, dict[str, int]] = {}
    for tree in trees:
        fixed = repaired(tree)
        for node in tree.nodes:
            if node.model:
                own = counts.setdefault(node.model, dict.fromkeys(("thoughts", "tokens", "reflections", "repaired"), 0))
                own["thoughts"] += 1
                own["tokens"] += node.tokens
                own["reflections"] += node.type == "reflection"
                own["repaired"] += node.node_id in fixed
    return dict(sorted(counts.items()))

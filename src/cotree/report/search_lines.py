"""The search in words: which model wrote what, and whether the tree was worth its tokens.

Invariant: a method is called ahead only where its 95% interval lies wholly above the other's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cotree.eval.metrics import wilson
from cotree.report.format import number, percent
from cotree.report.summary import Search


def model_lines(search: Search) -> list[str]:
    """Who wrote what, where more than one model wrote."""
    lines = []
    for name, own in search.by_model.items() if len(search.by_model) > 1 else ():
        repaired = f"{number(own.repaired)} of its {number(own.reflections)} reflections"
        if own.reflections:
            repaired += f": {share([own.repaired / own.reflections, *wilson(own.repaired, own.reflections)])}"
        told = f"{name} wrote {number(own.thoughts)} thoughts ({number(own.tokens)} tokens)"
        lines.append(f"{told}; a correct answer followed {repaired}")
    return lines


def comparison_lines(search: Search) -> list[str]:
    """The search beside best-of-n at equal generated tokens: what each found, and who is ahead where one is."""
    lines = [
        f"{row['method']:<9}  correct chain {share(row['correct'])}  both kinds {share(row['both'])}  "
        f"vote {share(row['vote'])}  pairs a question {row['pairs_per_question']:.2f}  tokens a pair "
        f"{number(row['tokens_per_pair'] and round(row['tokens_per_pair']))}  ({number(row['tokens'])} generated, "
        f"{number(row['uncached_prompt_tokens'])} prompt tokens)"
        for row in search.compared
    ]
    return [*lines, f"at equal tokens: {verdict(search.compared)}"] if lines else []


def verdict(compared: Sequence[Mapping[str, Any]]) -> str:
    """Where one method is ahead of the other with intervals that do not overlap; that none is, otherwise."""
    mcts, other = compared
    ahead = []
    for name, key in (
        ("questions with a correct chain", "correct"), ("questions with both kinds", "both"), ("majority vote", "vote"),
    ):  # fmt: skip
        for row, behind in ((mcts, other), (other, mcts)):
            if row[key][1] > behind[key][2]:
                ahead.append(f"{row['method']} is ahead in {name}")
    return "; ".join(ahead) if ahead else "no interval tells the two apart"


def share(values: Sequence[float]) -> str:
    """A share with its interval, in percent."""
    share, low, high = values
    return f"{percent(share)}% ({percent(low)}–{percent(high)})"

"""When a tree stops growing before its rollouts are spent: a pure function of its judged chains and its cost."""

from __future__ import annotations

from dataclasses import dataclass, field

from cotree.search.mcts import Node
from cotree.search.prompts import chain_text
from cotree.search.settings import Stop


@dataclass(slots=True)
class DistinctChains:
    """The chains of a tree so far, correct and wrong ones apart; equal texts count once.

    judged: leaves with a verdict or a reward, equal ones included. correct_leaves: those of them that are correct.
    """

    judged: int = 0
    correct_leaves: int = 0
    correct: set[str] = field(default_factory=set)
    wrong: set[str] = field(default_factory=set)

    def add(self, leaf: Node) -> None:
        """Count one more judged leaf, and its chain."""
        self.judged += 1
        self.correct_leaves += leaf.verdict is not None and leaf.verdict.kind == "correct"
        if leaf.verdict is not None and leaf.verdict.kind != "no_answer":
            chains = self.correct if leaf.verdict.kind == "correct" else self.wrong
            chains.add(chain_text(leaf.chain()))

    @property
    def has_both(self) -> bool:
        """Whether there are correct and wrong chains: more rollouts would make more pairs."""
        return bool(self.correct and self.wrong)

    def stop_reason(self, stop: Stop, tokens: int, seconds: float) -> str | None:
        """Which stop condition is met after so many generated tokens and seconds: its name, or None."""
        wanted = stop.correct or stop.wrong
        if wanted and len(self.correct) >= stop.correct and len(self.wrong) >= stop.wrong:
            return "enough"
        if stop.easy is not None and self.correct_leaves == self.judged >= stop.easy:
            return "easy"
        if stop.hopeless is not None and self.judged >= stop.hopeless and not self.correct:
            return "hopeless"
        if stop.tokens is not None and tokens >= stop.tokens:
            return "tokens"
        if stop.seconds is not None and seconds >= stop.seconds:
            return "deadline"
        return None

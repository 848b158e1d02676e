"""When a tree has had enough: the recipe's stop conditions, as a pure function of what was judged and spent.

Invariant: chains count once by their text, so writing the same chain again satisfies nothing; without a deadline the
decision depends on the tree alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cotree.experiment.recipe import Stop
from cotree.search.mcts import Node
from cotree.search.prompts import chain_text


@dataclass(slots=True)
class Tally:
    """The distinct chains of a tree so far, by verdict, and how many leaves were judged."""

    judged: int = 0
    right: int = 0
    correct: set[str] = field(default_factory=set)
    wrong: set[str] = field(default_factory=set)

    def add(self, leaf: Node) -> None:
        """Count a judged leaf."""
        self.judged += 1
        self.right += leaf.verdict is not None and leaf.verdict.kind == "correct"
        if leaf.verdict is not None and leaf.verdict.kind != "no_answer":
            chains = self.correct if leaf.verdict.kind == "correct" else self.wrong
            chains.add(chain_text(leaf.chain()))

    @property
    def promising(self) -> bool:
        """Whether both kinds of chains have appeared: more rollouts make more pairs."""
        return bool(self.correct and self.wrong)

    def reason(self, stop: Stop, tokens: int, seconds: float) -> str | None:
        """Why the tree should stop now, in one word, or None."""
        wanted = stop.correct or stop.wrong
        if wanted and len(self.correct) >= stop.correct and len(self.wrong) >= stop.wrong:
            return "enough"
        if stop.easy is not None and self.right == self.judged >= stop.easy:
            return "easy"
        if stop.hopeless is not None and self.judged >= stop.hopeless and not self.correct:
            return "hopeless"
        if stop.tokens is not None and tokens >= stop.tokens:
            return "tokens"
        if stop.seconds is not None and seconds >= stop.seconds:
            return "deadline"
        return None

"""Merge rollouts of one question into a tree: completions share nodes along their common token prefixes.

Invariant: the chain to a leaf is exactly its rollout (except leading blank lines). Each rollout has its own leaf, with
at least its last line, or its last token if it is a single line.
"""

from __future__ import annotations

import hashlib
import sys
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cotree.data.rollouts import Rollout, RolloutTask
from cotree.search.store import StoredNode, StoredTree
from cotree.search.thoughts import split_paragraphs
from cotree.search.trees import tree_key
from cotree.tasks import Question, Verdict
from cotree.tasks.base import VERDICT_VERSION

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class _Chain:
    """A rollout with its token ids and their start and end offsets in the text."""

    rollout: Rollout
    verdict: Verdict
    ids: list[int]
    spans: list[tuple[int, int]]

    @property
    def shareable(self) -> int:
        """The maximum number of leading tokens to share."""
        text = self.rollout.text.rstrip()
        last_line = text.rfind("\n") + 1
        whole = bisect_right([end for _, end in self.spans], last_line) if last_line else len(self.ids) - 1
        return max(min(whole, len(self.ids) - 1), 0)

    def is_cut_at(self, number: int) -> bool:
        """Whether the text can be split before a token: not inside a multi-token character."""
        return 0 < number < len(self.spans) and self.spans[number][0] >= self.spans[number - 1][1]


class _Nodes(list[StoredNode]):
    """The nodes of a tree being built; parents come before children."""

    def grow(self, parent: int, chains: Sequence[_Chain], tokens: int, start: int) -> None:
        """Add chains that share their first `tokens` tokens below `parent`, from character `start` on."""
        if len(chains) == 1:
            self._add_leaf(parent, chains[0], start)
            return
        first, shared = chains[0], tokens
        most = min(chain.shareable for chain in chains)
        while shared < most and len({chain.ids[shared] for chain in chains}) == 1:
            shared += 1
        end = next((n for n in range(shared, 0, -1) if all(chain.is_cut_at(n) for chain in chains)), 0)
        at = first.spans[end - 1][1] if end else 0
        if at > start and len({chain.rollout.text[start:at] for chain in chains}) == 1:
            parent, start = self._add(parent, first, start, at), at
        groups: defaultdict[int | None, list[_Chain]] = defaultdict(list)
        for chain in chains:  # chains with no more tokens to share become leaves
            groups[chain.ids[shared] if chain.shareable > shared else None].append(chain)
        for token, group in groups.items():
            if token is None:
                for chain in group:
                    self._add_leaf(parent, chain, start)
            else:
                self.grow(parent, group, shared + 1, start)

    def _add(self, parent: int, chain: _Chain, start: int, end: int, *, open_end: bool = True) -> int:
        """Add a part of a chain, one thought per paragraph; returns the last node's id."""
        pieces = split_paragraphs(chain.rollout.text[start:end], sys.maxsize)
        ends = [end for _, end in chain.spans]
        for number, piece in enumerate(pieces):
            tokens = bisect_right(ends, start + len(piece)) - bisect_right(ends, start)
            goes_on = open_end and number == len(pieces) - 1  # mid-line: no newline after it
            node = StoredNode(len(self), parent, "thinking", piece, model=chain.rollout.model, tokens=tokens)
            node.depth, node.finish_reason = self[parent].depth + 1, "length" if goes_on else "stop"
            self.append(node)
            parent, start = node.node_id, start + len(piece)
        return parent

    def _add_leaf(self, parent: int, chain: _Chain, start: int) -> None:
        """Add the rest of a chain with its verdict."""
        leaf = self[self._add(parent, chain, start, len(chain.rollout.text), open_end=False)]
        verdict = chain.verdict
        leaf.verdict, leaf.reward, leaf.answer, leaf.detail = (
            verdict.kind,
            verdict.reward,
            verdict.answer,
            verdict.detail,
        )
        leaf.finish_reason = "length" if chain.rollout.cut else "stop"
        if not (chain.rollout.cut and verdict.kind == "no_answer"):
            leaf.type = "answer"
        step: int | None = leaf.node_id
        while step is not None and verdict.kind != "undecided":
            self[step].visits, self[step].value = self[step].visits + 1, self[step].value + verdict.reward
            step = self[step].parent_id


def tree_of_rollouts(
    task: RolloutTask,
    question: Question,
    rollouts: Sequence[Rollout],
    *,
    tokenizer: PreTrainedTokenizerBase,
    config: str,
    correct_at: float,
) -> StoredTree:
    """Build the tree of all rollouts of a question.

    Args:
        tokenizer: defines the shared tokens. config: hash of everything but the question that affects the tree.
        correct_at: minimum reward of a correct rollout; lower ones are scaled by 1 / `correct_at`.
    """
    encoded = tokenizer([each.text for each in rollouts], add_special_tokens=False, return_offsets_mapping=True)
    verdicts = [_verdict(task, question, rollout, correct_at) for rollout in rollouts]
    each = zip(rollouts, verdicts, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    chains = [_Chain(*parts) for parts in each]
    nodes = _Nodes([StoredNode(0, None, None, "")])
    nodes.grow(0, chains, 0, 0)
    return StoredTree(
        tree_id=hashlib.sha256(f"{tree_key(task, question)}/{config}".encode()).hexdigest()[:16],
        task=question.task,
        question_id=question.id,
        turn=0,
        config=config,
        family=question.family,
        messages=list(question.messages),
        gold=question.gold,
        pattern="imported",
        rollouts=len(rollouts),
        stopped="imported",
        calls=0,
        prompt_tokens=0,
        cached_tokens=0,
        completion_tokens=sum(len(chain.ids) for chain in chains),
        nodes=list(nodes),
        verdict_version=VERDICT_VERSION,
    )


def _verdict(task: RolloutTask, question: Question, rollout: Rollout, correct_at: float) -> Verdict:
    """The verdict by the task, or by the rollout's reward; undecided without either."""
    if task.judged_by is not None:
        return task.judge(question, rollout.text, "length" if rollout.cut else "stop")
    if rollout.reward is None:
        return Verdict("undecided", 0.0, None, "no reward, and no task that judges it")
    if rollout.reward >= correct_at:
        return Verdict("correct", 1.0)
    worth = max(rollout.reward / correct_at, 0.0)
    return Verdict("no_answer" if rollout.cut else "wrong", worth, None, f"reward {rollout.reward:g}")

"""Select a tree's chains for dataset rows by relative length, value or at random; pairs by shortest common prefix.

Trees are read once, one at a time; a row's rank is its index among the rows of its tree.

Invariants: every verified SFT chain and every `chosen` was judged correct, every `rejected` wrong (or cut off, or
longer and correct, if set); each chain is in at most one pair; ties are broken by seed. Lengths are student tokens,
relative to the chain's own tree (paper, Thoughts Length Balance). Gates run before selection, because the longest chain
is often a loop.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, permutations
from typing import Any, Literal

from cotree.base.rows import Row
from cotree.data.chains import Chain, mean_value, read_chains
from cotree.data.gates import Rules, text_of_messages
from cotree.data.settings import Dataset, Length
from cotree.models.encode import prefix_tokens
from cotree.search.store import StoredNode, StoredTree
from cotree.search.thoughts import chain_text, draw


@dataclass(frozen=True, slots=True)
class Pair:
    """A chosen and a rejected chain of one tree.

    better, worse: the sibling thoughts at which a step pair diverges.
    """

    chosen: Chain
    rejected: Chain
    better: StoredNode | None = None
    worse: StoredNode | None = None

    @property
    def prefix_tokens(self) -> int:
        """The length of the completions' common prefix in tokens."""
        return prefix_tokens(self.chosen.tokens, self.rejected.tokens)


def drawn_length(lengths: Mapping[Length, int], tree_id: str, seed: int) -> Length:
    """Draw a tree's relative length from a mixture by seed."""
    weights = sorted(lengths.items())  # independent of the order in the recipe
    ends = list(accumulate(weight for _, weight in weights))
    drawn = draw(f"{seed}/length/{tree_id}", ends[-1])
    return weights[bisect_right(ends, drawn)][0]


def in_order(
    chains: Iterable[Chain], by: Mapping[Length, int] | Length | Literal["value", "random"], seed: int
) -> list[Chain]:
    """Sort one tree's chains by preference, ties by seed.

    by: a relative length (or a mixture to draw from): nearest first. `value`: best reward, then best mean v/n along the
        chain, first. `random`: shuffled by seed.
    """
    found = list(chains)
    if not found:
        return []
    order = drawn_length(by, found[0].tree_id, seed) if isinstance(by, Mapping) else by
    median = sorted(len(chain.tokens) for chain in found)[len(found) // 2]
    keys: Mapping[str, Callable[[Chain], Any]] = {
        "longest": lambda chain: -len(chain.tokens),
        "shortest": lambda chain: len(chain.tokens),
        "medium": lambda chain: abs(len(chain.tokens) - median),
        "value": lambda chain: (-chain.reward, -chain.value),
        "random": lambda _: 0,
    }
    source = f"control/{seed}" if order == "random" else str(seed)
    found.sort(key=lambda chain: draw(f"{source}/{chain.tree_id}/{chain.leaf_id}", 2**32))
    return sorted(found, key=keys[order])


def select_sft(chains: Iterable[Chain], settings: Dataset, seed: int) -> list[Chain]:
    """Select one tree's SFT chains, correct or unverified, by length (paper: longest), value or at random."""
    found = (chain for chain in chains if chain.verdict == "correct" or not settings.verified)
    by = settings.lengths if settings.select == "length" else settings.select
    return in_order(found, by, seed)[: settings.per_tree]


def select_dpo(chains: Iterable[Chain], settings: Dataset, seed: int) -> list[Pair]:
    """Select one tree's preference pairs, using each chain once. chosen: by relative length (paper: shortest correct).
    rejected: the wrong (or longer correct) chain with the shortest common prefix in student tokens; ties by relative
    length, then seed."""
    correct = in_order((chain for chain in chains if chain.verdict == "correct"), settings.lengths, seed)
    wrong = in_order((chain for chain in chains if chain.verdict != "correct"), settings.lengths, seed)
    brevity, used, pairs = settings.rejected == "longer_correct", set[int](), list[Pair]()
    for chosen in correct:
        if chosen.leaf_id in used or len(pairs) == settings.per_tree:
            continue
        partners = [
            Pair(chosen, chain)
            for chain in (correct if brevity else wrong)
            if chain.leaf_id not in used
            and (not brevity or len(chain.tokens) > len(chosen.tokens))
            # A path that was cut off can be the very beginning of a right one.
            and chosen.tokens[: len(chain.tokens)] != chain.tokens
        ]
        if partners:
            pairs.append(min(partners, key=lambda pair: pair.prefix_tokens))
            used |= {chosen.leaf_id, pairs[-1].rejected.leaf_id}
    return pairs


def select_step_pairs(tree: StoredTree, chains: Iterable[Chain], settings: Dataset, seed: int) -> list[Pair]:
    """Select one tree's step pairs: sibling thoughts of one type with v/n at least `min_gap` apart, widest gap first.

    Both sides are completed to an answer, so that they are whole turns: the better sibling by the shortest correct
    chain through it, the worse one by the shortest wrong chain. Each chain is used once per side.
    """
    siblings: dict[tuple[int | None, str | None], list[StoredNode]] = {}
    for node in tree.nodes[1:]:
        if node.type != "answer" and node.visits >= settings.min_visits:
            siblings.setdefault((node.parent_id, node.type), []).append(node)
    gaps = [
        (mean_value(better) - mean_value(worse), better, worse)
        for nodes in siblings.values()
        for better, worse in permutations(nodes, 2)
        if better.text.strip() != worse.text.strip()  # equal texts are no preference
    ]
    clear = [found for found in gaps if found[0] >= settings.min_gap]
    clear.sort(key=lambda found: (-found[0], found[1].node_id, found[2].node_id))
    unused, pairs = in_order(chains, "shortest", seed), list[Pair]()
    for _, better, worse in clear:
        chosen = next((c for c in unused if c.verdict == "correct" and better.node_id in c.nodes), None)
        rejected = next((c for c in unused if c.verdict == "wrong" and worse.node_id in c.nodes), None)
        if chosen is not None and rejected is not None and len(pairs) < settings.per_tree:
            unused = [chain for chain in unused if chain not in (chosen, rejected)]
            pairs.append(Pair(chosen, rejected, better, worse))
    return pairs


def tree_rows(trees: Iterable[StoredTree], rules: Rules) -> Iterator[tuple[int, Row]]:
    """Yield the candidate rows of all trees as (rank, row); counts every chain left out with the reason."""
    counts = rules.counts
    for tree in trees:
        judged = sum(node.verdict is not None for node in tree.nodes)
        counts.trees += 1
        counts.chains += judged
        if reason := _why_tree_left_out(tree, rules):
            counts.leave_out(reason, chains=judged)
            continue
        usable = []
        for chain in read_chains(tree, rules):
            tokens, answered = chain.prompt_tokens + len(chain.tokens), chain.verdict != "no_answer"
            failed = rules.failed_gate(chain.text, tree.messages, tokens, answered=answered)
            if failed is None:
                usable.append(chain)
            else:
                counts.leave_out(failed, chains=1)
        rows = list(_selected_rows(tree, usable, rules))
        used = {row.get(leaf) for row in rows for leaf in ("leaf_id", "chosen_leaf", "rejected_leaf")}
        for chain in usable:
            if chain.leaf_id not in used:
                counts.leave_out(_why_not_selected(chain, usable, rules.settings), chains=1)
        yield from enumerate(rows)


def _why_tree_left_out(tree: StoredTree, rules: Rules) -> str | None:
    """The reason to leave out a whole tree, or None."""
    if rules.settings.gates.contamination and (tree.task, tree.question_id) in rules.contaminated:
        return "contaminated"
    if not rules.allows_question(tree.task, tree.question_id, tree.messages):
        return "questions_of"
    low, high = rules.settings.solve_rate or (0.0, 1.0)
    return None if low <= pass_rate(tree) <= high else "solve_rate"


def pass_rate(tree: StoredTree) -> float:
    """The share of correct leaves among a tree's judged leaves; no_answer counts as not correct."""
    verdicts = [node.verdict for node in tree.nodes if node.verdict not in (None, "undecided")]
    return verdicts.count("correct") / max(len(verdicts), 1)


def _why_not_selected(chain: Chain, usable: Sequence[Chain], settings: Dataset) -> str:
    """The reason why a chain that passed the gates was not selected."""
    verdicts = {other.verdict for other in usable}
    brevity, pairs = settings.rejected == "longer_correct", settings.rows in ("dpo", "step_pairs")
    if chain.verdict == "wrong" and (brevity or (settings.rows == "sft" and settings.verified)):
        return "wrong"
    if pairs and "correct" not in verdicts:
        return "no_correct"
    return "no_wrong" if pairs and verdicts == {"correct"} and not brevity else "not_chosen"


def _selected_rows(tree: StoredTree, chains: Sequence[Chain], rules: Rules) -> Iterator[Row]:
    """Build rows of the dataset's kind from the chains of a tree that passed the gates."""
    settings, seed = rules.settings, rules.seed
    row = {name: getattr(tree, name) for name in ("tree_id", "task", "question_id")}
    row |= {"prompt": tree.messages, "pass_rate": pass_rate(tree)}
    if settings.rows == "sft":
        by_length = sorted(chains, key=lambda chain: len(chain.tokens))
        for chain in select_sft(chains, settings, seed):
            row |= {name: getattr(chain, name) for name in ("leaf_id", "reward", "value")}
            sizes = {"length_tokens": len(chain.tokens), "length_rank": by_length.index(chain) + 1}
            yield row | {"completion": chain.messages, "pattern": tree.pattern} | sizes
    elif settings.rows == "stepwise":
        for chain in in_order(chains, "random", seed)[: settings.per_tree]:
            steps = [tree.nodes[node_id] for node_id in chain.nodes]
            values = [mean_value(step) for step in steps]
            row |= {"prompt": text_of_messages(tree.messages), "completions": [step.text.strip() for step in steps]}
            row |= {"labels": [value > settings.label_above for value in values], "values": values}
            yield row | {"visits": [step.visits for step in steps], "leaf_id": chain.leaf_id}
    elif settings.rows == "dpo":
        yield from (row | _pair_columns(pair, tree) for pair in select_dpo(chains, settings, seed))
    else:
        yield from (row | _pair_columns(pair, tree) for pair in select_step_pairs(tree, chains, settings, seed))


def _pair_columns(pair: Pair, tree: StoredTree) -> Row:
    """The columns of a pair; for a step pair also the sibling thoughts, their values, visits and shared context."""
    columns: Row = {"prefix_tokens": pair.prefix_tokens, "rejected_finished": pair.rejected.verdict != "no_answer"}
    for side, chain, step in (("chosen", pair.chosen, pair.better), ("rejected", pair.rejected, pair.worse)):
        columns |= {side: chain.messages, f"{side}_leaf": chain.leaf_id, f"{side}_tokens": len(chain.tokens)}
        if step is not None:
            columns |= {f"{side}_step": step.text, f"{side}_value": mean_value(step), f"{side}_visits": step.visits}
    if pair.better is not None:
        before = pair.chosen.nodes[: pair.chosen.nodes.index(pair.better.node_id)]
        columns |= {"step_type": pair.better.type, "prefix": chain_text([tree.nodes[node_id] for node_id in before])}
    return columns

"""Which chains of a tree become rows: by relative length, value or chance; pairs with the shortest common prefix.

Trees are read once, one at a time; a row's rank is its place among the rows of its tree.

Invariants: every verified SFT chain and every `chosen` was judged correct, every `rejected` wrong (or cut off, or
longer and correct, where that was asked for); no chain comes twice in the pairs of a tree; ties fall by seed. Lengths
are student tokens, relative to the chain's own tree (paper, Thoughts Length Balance). Selection sees only what passed
the gates: the longest chain is often a loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, combinations
from typing import Any, Literal

from cotree.base.rows import Row
from cotree.data.chains import Chain, mean_value, read_chains
from cotree.data.gates import Rules, joined
from cotree.data.settings import Dataset, Length
from cotree.models.encode import prefix_tokens
from cotree.search.prompts import chain_text
from cotree.search.store import StoredNode, StoredTree
from cotree.search.thoughts import draw


@dataclass(frozen=True, slots=True)
class Pair:
    """Two chains of one tree, of which the first is preferred.

    better, worse: the sibling thoughts at which a step pair parts.
    """

    chosen: Chain
    rejected: Chain
    better: StoredNode | None = None
    worse: StoredNode | None = None

    @property
    def prefix_tokens(self) -> int:
        """How many tokens the two completions share at their start."""
        return prefix_tokens(self.chosen.tokens, self.rejected.tokens)


def drawn_length(settings: Dataset, tree_id: str, seed: int) -> Length:
    """The relative length that a tree's chains are chosen by: of a mixture one is drawn, with its weights."""
    lengths = sorted(settings.lengths.items())  # equal settings draw equally, in whatever order they are written
    ends = list(accumulate(weight for _, weight in lengths))
    drawn = draw(f"{seed}/length/{tree_id}", ends[-1])
    return next(length for (length, _), end in zip(lengths, ends, strict=True) if drawn < end)


def in_order(chains: Iterable[Chain], by: Length | Literal["value", "random"], seed: int) -> list[Chain]:
    """Chains in order of preference, ties by seed: nearest to a relative length first, the best by reward and then by
    the mean of v/n along the chain, or as drawn."""
    found = list(chains)
    lengths = sorted(len(chain.tokens) for chain in found)
    median = lengths[len(found) // 2] if found else 0
    keys: Mapping[str, Callable[[Chain], Any]] = {
        "longest": lambda chain: -len(chain.tokens),
        "shortest": lambda chain: len(chain.tokens),
        "medium": lambda chain: abs(len(chain.tokens) - median),
        "value": lambda chain: (-chain.reward, -chain.value),
        "random": lambda _: 0,
    }
    source = f"control/{seed}" if by == "random" else str(seed)
    found.sort(key=lambda chain: draw(f"{source}/{chain.tree_id}/{chain.leaf_id}", 2**32))
    return sorted(found, key=keys[by])


def select_sft(chains: Sequence[Chain], settings: Dataset, seed: int) -> list[Chain]:
    """One tree's SFT chains: the correct ones, or unverified ones, by length (paper: the longest), value or chance."""
    found = [chain for chain in chains if chain.verdict == "correct" or not settings.verified]
    if not found:
        return []
    by = drawn_length(settings, found[0].tree_id, seed) if settings.select == "length" else settings.select
    return in_order(found, by, seed)[: settings.per_tree]


def select_dpo(chains: Sequence[Chain], settings: Dataset, seed: int) -> list[Pair]:
    """One tree's pairs: chosen by relative length (paper: the shortest correct), rejected = of the wrong chains, or of
    the longer correct ones, that which shares the fewest student tokens with it (shortest common prefix), ties by
    relative length, then seed; each chain once."""
    if not chains:
        return []
    length, brevity = drawn_length(settings, chains[0].tree_id, seed), settings.rejected == "longer_correct"
    correct = in_order((chain for chain in chains if chain.verdict == "correct"), length, seed)
    wrong = in_order((chain for chain in chains if chain.verdict != "correct"), length, seed)
    used, pairs = set[int](), list[Pair]()
    for chosen in correct:
        if chosen.leaf_id in used or len(pairs) == settings.per_tree:
            continue
        others = [
            Pair(chosen, chain)
            for chain in (correct if brevity else wrong)
            if chain.leaf_id not in used
            and (not brevity or len(chain.tokens) > len(chosen.tokens))
            # A path that was cut off can be the very beginning of a right one.
            and chosen.tokens[: len(chain.tokens)] != chain.tokens
        ]
        if others:
            pairs.append(min(others, key=lambda pair: pair.prefix_tokens))
            used |= {chosen.leaf_id, pairs[-1].rejected.leaf_id}
    return pairs


def select_step_pairs(tree: StoredTree, chains: Sequence[Chain], settings: Dataset, seed: int) -> list[Pair]:
    """One tree's step pairs: sibling thoughts of one type whose v/n differ clearly, widest gap first.

    Each side goes on to an answer, so that it ends as an assistant's turn ends: the better sibling with the shortest
    correct chain through it, the worse one with the shortest wrong chain through it. A chain is used once a side.
    """
    children: dict[tuple[int, str], list[StoredNode]] = {}
    for node in tree.nodes:
        if node.parent_id is not None and node.type != "answer" and node.visits >= settings.min_visits:
            children.setdefault((node.parent_id, str(node.type)), []).append(node)
    siblings = [
        (a, b) if mean_value(a) > mean_value(b) else (b, a)
        for nodes in children.values()
        for a, b in combinations(nodes, 2)
        if a.text.strip() != b.text.strip()  # the same step cannot be better than itself
        and abs(mean_value(a) - mean_value(b)) >= settings.min_gap
    ]
    siblings.sort(key=lambda both: (mean_value(both[1]) - mean_value(both[0]), both[0].node_id, both[1].node_id))
    unused, pairs = in_order(chains, "shortest", seed), list[Pair]()
    for better, worse in siblings:
        chosen = next((c for c in unused if c.verdict == "correct" and better.node_id in c.nodes), None)
        rejected = next((c for c in unused if c.verdict == "wrong" and worse.node_id in c.nodes), None)
        if chosen is not None and rejected is not None and len(pairs) < settings.per_tree:
            unused = [chain for chain in unused if chain not in (chosen, rejected)]
            pairs.append(Pair(chosen, rejected, better, worse))
    return pairs


def tree_rows(trees: Iterable[StoredTree], rules: Rules) -> Iterator[tuple[int, Row]]:
    """The candidate rows of all trees, each with its rank; every chain that is in none is counted."""
    counts = rules.counts
    for tree in trees:
        judged = sum(node.verdict is not None for node in tree.nodes)
        counts.trees += 1
        counts.chains += judged
        if reason := _failed_by_tree(tree, rules):
            counts.leave_out(reason, chains=judged)
            continue
        usable = []
        for chain in read_chains(tree, rules):
            fits = chain.prompt_tokens + len(chain.tokens) <= rules.settings.max_tokens
            answered = chain.verdict != "no_answer"
            failed = rules.failed_gate(chain.text, tree.messages, answered=answered) if fits else "too_long"
            if failed is None:
                usable.append(chain)
            else:
                counts.leave_out(failed, chains=1)
        rows = list(_selected(tree, usable, rules))
        used = {row.get(leaf) for row in rows for leaf in ("leaf_id", "chosen_leaf", "rejected_leaf")}
        for chain in usable:
            if chain.leaf_id not in used:
                counts.leave_out(_why_not_selected(chain, usable, rules), chains=1)
        yield from enumerate(rows)


def _failed_by_tree(tree: StoredTree, rules: Rules) -> str | None:
    """Why a whole tree gives nothing, or None."""
    if (tree.task, tree.question_id) in rules.contaminated:
        return "contaminated"
    if not rules.wants(tree.task, tree.question_id, tree.messages):
        return "questions_of"
    low, high = rules.settings.solve_rate or (0.0, 1.0)
    return None if low <= pass_rate(tree) <= high else "solve_rate"


def pass_rate(tree: StoredTree) -> float:
    """The share of a tree's judged answers that are correct; a missing answer is one that is not."""
    verdicts = [node.verdict for node in tree.nodes if node.verdict in ("correct", "wrong", "no_answer")]
    return verdicts.count("correct") / max(len(verdicts), 1)


def _why_not_selected(chain: Chain, usable: Sequence[Chain], rules: Rules) -> str:
    """The reason why a chain that passed the gates is in no row."""
    settings, verdicts = rules.settings, {other.verdict for other in usable}
    brevity, pairs = settings.rejected == "longer_correct", settings.rows in ("dpo", "step_pairs")
    if chain.verdict == "wrong" and (brevity or (settings.rows == "sft" and settings.verified)):
        return "wrong"
    if pairs and "correct" not in verdicts:
        return "no_correct"
    return "no_wrong" if pairs and verdicts == {"correct"} and not brevity else "not_chosen"


def _selected(tree: StoredTree, chains: Sequence[Chain], rules: Rules) -> Iterator[Row]:
    """The rows of the dataset's kind, made of those chains of a tree that passed the gates."""
    settings, seed = rules.settings, rules.seed
    row = {name: getattr(tree, name) for name in ("tree_id", "task", "question_id")}
    row |= {"prompt": tree.messages, "pass_rate": pass_rate(tree)}
    if settings.rows == "sft":
        answered = [chain for chain in chains if chain.verdict != "no_answer"]
        by_length = sorted(answered, key=lambda chain: len(chain.tokens))
        for chain in select_sft(chains, settings, seed):
            yield row | _sft(chain, tree.pattern) | {"length_rank": by_length.index(chain) + 1}
    elif settings.rows == "stepwise":
        for chain in in_order(chains, "random", seed)[: settings.per_tree]:
            yield row | {"prompt": joined(tree.messages)} | _stepwise(chain, tree, settings.label_above)
    else:
        select = select_dpo if settings.rows == "dpo" else partial(select_step_pairs, tree)
        yield from (row | _pair(pair, tree) for pair in select(chains, settings, seed))


def _sft(chain: Chain, pattern: str) -> Row:
    row: Row = {name: getattr(chain, name) for name in ("leaf_id", "reward", "value")}
    return row | {"completion": _message(chain), "length_tokens": len(chain.tokens), "pattern": pattern}


def _pair(pair: Pair, tree: StoredTree) -> Row:
    """Of a step pair also the sibling thoughts, their values and visits, and the words before them that the student
    sees."""
    row: Row = {"prefix_tokens": pair.prefix_tokens, "rejected_finished": pair.rejected.verdict != "no_answer"}
    for side, chain, node in (("chosen", pair.chosen, pair.better), ("rejected", pair.rejected, pair.worse)):
        row |= {side: _message(chain), f"{side}_leaf": chain.leaf_id, f"{side}_tokens": len(chain.tokens)}
        if node is not None:
            row |= {f"{side}_step": node.text, f"{side}_value": mean_value(node), f"{side}_visits": node.visits}
    if pair.better is not None:
        before = pair.chosen.nodes[: pair.chosen.nodes.index(pair.better.node_id)]
        row |= {"step_type": pair.better.type, "prefix": chain_text([tree.nodes[node_id] for node_id in before])}
    return row


def _stepwise(chain: Chain, tree: StoredTree, label_above: float) -> Row:
    """The thoughts of a chain as steps; a step is right if its v/n is above `label_above`."""
    nodes = [tree.nodes[node_id] for node_id in chain.nodes]
    values = [mean_value(node) for node in nodes]
    return {
        "completions": [node.text.strip() for node in nodes],
        "labels": [value > label_above for value in values],
        "values": values,
        "visits": [node.visits for node in nodes],
        "leaf_id": chain.leaf_id,
    }


def _message(chain: Chain) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": chain.text}]

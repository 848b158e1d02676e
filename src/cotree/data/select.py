"""Which chains of a tree become rows: by value or relative length, pairs with the shortest common prefix, steps.

Invariants: every SFT chain and every `chosen` was judged correct, every `rejected` wrong (or cut off, where that was
asked for); no pair and no SFT chain comes twice; ties fall by seed. Lengths are student tokens, relative to the chain's
own tree (paper, Thoughts Length Balance). Selection sees only what passed the gates: the longest chain is often a loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from cotree.data.chains import Chain, mean_value
from cotree.experiment.recipe import BuildDPO, BuildSFT, BuildStepPairs, Length
from cotree.models.encode import prefix_tokens
from cotree.search.store import StoredNode, StoredTree
from cotree.search.thoughts import draw


@dataclass(frozen=True, slots=True)
class Pair:
    """A preference within one tree; `prefix_tokens` is what the two completions share at their start.

    better, worse: the sibling thoughts at which a step pair parts.
    """

    chosen: Chain
    rejected: Chain
    prefix_tokens: int
    better: StoredNode | None = None
    worse: StoredNode | None = None


def by_length(chains: Iterable[Chain], length: Length, seed: int) -> list[Chain]:
    """Chains in order of preference: nearest to the wanted relative length first, ties by seed."""
    found = list(chains)
    median = sorted(len(chain.tokens) for chain in found)[len(found) // 2] if found else 0

    def distance(chain: Chain) -> int:
        tokens = len(chain.tokens)
        return {"longest": -tokens, "shortest": tokens, "medium": abs(tokens - median)}[length]

    return sorted(found, key=lambda chain: (distance(chain), _lot(chain, seed)))


def by_value(chains: Iterable[Chain], seed: int) -> list[Chain]:
    """Chains in order of preference: reward, then the mean of v/n along the chain, ties by seed."""
    return sorted(chains, key=lambda chain: (-chain.reward, -chain.value, _lot(chain, seed)))


def _lot(chain: Chain, seed: int | str) -> int:
    return draw(f"{seed}/{chain.tree_id}/{chain.leaf_id}", 2**32)


def select_sft(chains: Sequence[Chain], settings: BuildSFT, seed: int) -> list[Chain]:
    """One tree's SFT chains: correct ones, the best by value or by relative length (paper: the longest)."""
    correct = [chain for chain in chains if chain.verdict == "correct"]
    ordered = by_value(correct, seed) if settings.select == "value" else by_length(correct, settings.length, seed)
    return ordered[: settings.chains_per_tree]


def select_dpo(chains: Sequence[Chain], settings: BuildDPO, seed: int) -> list[Pair]:
    """One tree's pairs: chosen by relative length (paper: the shortest correct), rejected = the wrong chain that shares
    the fewest student tokens with it (shortest common prefix), ties by relative length, then seed; each chain once."""
    correct = by_length((c for c in chains if c.verdict == "correct"), settings.length, seed)
    wrong = by_length((c for c in chains if c.verdict != "correct"), settings.length, seed)
    pairs: list[Pair] = []
    for chosen in correct:
        if len(pairs) == settings.pairs_per_tree:
            break
        # A path that was cut off can be the very beginning of a right one.
        others = [chain for chain in wrong if chosen.tokens[: len(chain.tokens)] != chain.tokens]
        if not others:
            continue
        rejected = min(others, key=lambda chain: prefix_tokens(chosen.tokens, chain.tokens))
        wrong.remove(rejected)
        pairs.append(Pair(chosen, rejected, prefix_tokens(chosen.tokens, rejected.tokens)))
    return pairs


def select_step_pairs(tree: StoredTree, chains: Sequence[Chain], settings: BuildStepPairs, seed: int) -> list[Pair]:
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
    shortest, used, pairs = by_length(chains, "shortest", seed), set[tuple[str, int]](), list[Pair]()
    for better, worse in siblings:
        chosen = _through(shortest, better, "correct", used)
        rejected = _through(shortest, worse, "wrong", used)
        if chosen is not None and rejected is not None and len(pairs) < settings.pairs_per_tree:
            used |= {("correct", chosen.leaf_id), ("wrong", rejected.leaf_id)}
            pairs.append(Pair(chosen, rejected, prefix_tokens(chosen.tokens, rejected.tokens), better, worse))
    return pairs


def _through(chains: Sequence[Chain], node: StoredNode, verdict: str, used: set[tuple[str, int]]) -> Chain | None:
    fits = (c for c in chains if c.verdict == verdict and node.node_id in c.nodes and (verdict, c.leaf_id) not in used)
    return next(fits, None)


def draw_chains(chains: Sequence[Chain], limit: int, seed: int) -> list[Chain]:
    """Up to `limit` unverified chains of a tree, right or wrong, drawn by seed.

    What a control student learns from them, training on verified chains cannot claim.
    """
    return sorted(chains, key=lambda chain: _lot(chain, f"control/{seed}"))[:limit]

"""Chains (root to judged answer) out of stored trees, and which of them become rows.

Invariants: every SFT completion and every `chosen` was judged correct, every `rejected` wrong; a row is never cut;
no pair and no SFT chain comes twice; ties fall by seed. Lengths are student tokens, relative to the chain's own tree
(paper, Thoughts Length Balance).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cotree.config import BuildDPO, BuildSFT, Length
from cotree.search.prompts import chain_text
from cotree.search.thoughts import draw
from cotree.store import StoredTree
from cotree.train.encode import encode_chains, prefix_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Chain:
    """A finished chain as the student is trained on it; `tokens` are the completion's ids, end of turn included."""

    tree_id: str
    leaf_id: int
    text: str
    verdict: str
    reward: float
    pattern: str
    tokens: tuple[int, ...]
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Pair:
    """A preference within one tree; `prefix_tokens` is what the two completions share at their start."""

    chosen: Chain
    rejected: Chain
    prefix_tokens: int


def chains_of(
    tree: StoredTree, tokenizer: PreTrainedTokenizerBase, left_out: Collection[str] = frozenset()
) -> list[Chain]:
    """All chains that end in a judged `answer`, once each by text, in leaf order.

    left_out: thought types whose text the student does not see.
    """
    leaves = [n for n in tree.nodes if n.type == "answer" and n.verdict in ("correct", "wrong")]
    texts: dict[str, int] = {}
    for leaf in leaves:
        text = chain_text(node for node in tree.chain(leaf.node_id) if node.type not in left_out)
        texts.setdefault(text, leaf.node_id)
    encoded = encode_chains(tokenizer, [(tree.messages, [{"role": "assistant", "content": text}]) for text in texts])
    chains = []
    for (text, leaf_id), ids in zip(texts.items(), encoded, strict=True):
        leaf = tree.nodes[leaf_id]
        chains.append(
            Chain(
                tree_id=tree.tree_id,
                leaf_id=leaf_id,
                text=text,
                verdict=str(leaf.verdict),
                reward=float(leaf.reward or 0.0),
                pattern=tree.pattern,
                tokens=tuple(ids.completion),
                prompt_tokens=len(ids.prompt),
            )
        )
    return chains


def by_length(chains: Iterable[Chain], length: Length, seed: int) -> list[Chain]:
    """Chains in order of preference: nearest to the wanted relative length first, ties by seed."""
    found = list(chains)
    median = sorted(len(chain.tokens) for chain in found)[len(found) // 2] if found else 0

    def distance(chain: Chain) -> int:
        tokens = len(chain.tokens)
        return {"longest": -tokens, "shortest": tokens, "medium": abs(tokens - median)}[length]

    return sorted(found, key=lambda chain: (distance(chain), draw(f"{seed}/{chain.tree_id}/{chain.leaf_id}", 2**32)))


def select_sft(chains: Sequence[Chain], settings: BuildSFT, seed: int) -> list[Chain]:
    """One tree's SFT chains: correct ones by relative length (paper: the longest)."""
    return by_length((c for c in chains if c.verdict == "correct"), settings.length, seed)[: settings.chains_per_tree]


def select_dpo(chains: Sequence[Chain], settings: BuildDPO, seed: int) -> list[Pair]:
    """One tree's pairs: chosen by relative length (paper: the shortest correct), rejected = the wrong chain that shares
    the fewest student tokens with it (shortest common prefix), ties by relative length, then seed; each chain once."""
    correct = by_length((c for c in chains if c.verdict == "correct"), settings.length, seed)
    wrong = by_length((c for c in chains if c.verdict == "wrong"), settings.length, seed)
    pairs = []
    for chosen in correct[: settings.pairs_per_tree]:
        if not wrong:
            break
        rejected = min(wrong, key=lambda chain: prefix_tokens(chosen.tokens, chain.tokens))
        wrong.remove(rejected)
        pairs.append(Pair(chosen, rejected, prefix_tokens(chosen.tokens, rejected.tokens)))
    return pairs


def select_control(trees: Sequence[Sequence[Chain]], rows: int, seed: int) -> list[Chain]:
    """`rows` unverified chains for the control student: one drawn by seed from each tree, right or wrong, in turn.

    What this student learns, training on verified chains cannot claim.
    """
    drawn: list[Chain] = []
    left = [sorted(chains, key=lambda c: draw(f"control/{seed}/{c.tree_id}/{c.leaf_id}", 2**32)) for chains in trees]
    while len(drawn) < rows and any(left):
        for chains in left:
            if chains and len(drawn) < rows:
                drawn.append(chains.pop(0))
    return drawn

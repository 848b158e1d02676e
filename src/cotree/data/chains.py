"""Extract chains (paths from the root to a judged answer) from stored trees as training text with token ids.

Invariants: a chain's verdict comes from the verifier, also after reflections are cut; texts are unique per tree; its
tokens are those of the trainer; nothing is truncated; each judged leaf becomes a chain or is counted as left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from cotree.data.annotations import chain_hash
from cotree.data.gates import Rules
from cotree.data.settings import TextForm
from cotree.models.encode import RowError, encode_each, unfinished_turn
from cotree.search.store import StoredNode, StoredTree
from cotree.search.thoughts import Pattern, chain_text


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain as training text.

    Attributes:
        verdict: `correct`, `wrong`, or `no_answer` for a path cut by max_tokens, which has no end of turn.
        tokens: completion token ids, end of turn included. prompt_tokens: number of tokens before them.
        value: mean v/n of its thoughts.
        nodes: node ids of its thoughts, without those removed by `leave_out`.
    """

    tree_id: str
    leaf_id: int
    text: str
    verdict: str
    reward: float
    tokens: tuple[int, ...] = ()
    prompt_tokens: int = 0
    value: float = 0.0
    nodes: tuple[int, ...] = ()

    @property
    def messages(self) -> list[dict[str, str]]:
        """The chain as a list of one assistant message, the format of a dataset row."""
        return [{"role": "assistant", "content": self.text}]


def read_chains(tree: StoredTree, rules: Rules) -> list[Chain]:
    """The distinct usable chains of a tree, in leaf order; counts those left out.

    With `unanswered`, includes paths cut by max_tokens.
    """
    found: dict[str, Chain] = {}
    for leaf in tree.nodes:
        if leaf.verdict is not None:
            chain = _chain_or_reason(tree, leaf, leaf.verdict, rules)
            if isinstance(chain, str):
                rules.counts.leave_out(chain, chains=1)
            elif found.setdefault(chain.text, chain) is not chain:
                rules.counts.leave_out("repeated_in_tree", chains=1)
    chats = [(tree.messages, chain.messages) for chain in found.values()]
    chains = []
    for chain, ids in zip(found.values(), encode_each(rules.tokenizer, chats), strict=True):
        if isinstance(ids, RowError):
            rules.counts.leave_out(ids.reason, chains=1)
            if not rules.counts.template_faults:
                rules.counts.template_faults.append(f"tree {chain.tree_id}: {ids}")
            continue
        seen = unfinished_turn(ids) if chain.verdict == "no_answer" else ids
        chains.append(replace(chain, tokens=tuple(seen.completion), prompt_tokens=len(ids.prompt)))
    return chains


def _chain_or_reason(tree: StoredTree, leaf: StoredNode, verdict: str, rules: Rules) -> Chain | str:
    """Build the chain to a judged leaf, without tokens yet; or return the reason to leave it out."""
    settings, reward, whole = rules.settings, leaf.reward or 0.0, tree.chain(leaf.node_id)
    is_cut_off = leaf.is_cut
    if settings.annotations is not None and (found := _annotated(tree, leaf, whole, rules)) is not None:
        return found
    if verdict == "undecided":
        return verdict
    if verdict == "no_answer" and not (is_cut_off and settings.unanswered):
        return "thought_cut" if is_cut_off else "no_answer"
    if leaf.is_forced and not settings.forced:
        return "forced_answer"
    kept = whole
    if settings.reflections == "cut":  # sampled chains have neither pattern nor reflections
        kept = cut_reflections(whole, rules.patterns.get(tree.pattern, {}))
    thoughts = [node for node in kept if node.type not in settings.leave_out]
    if not thoughts:  # `leave_out` removed all thoughts of an unfinished path
        return "thought_cut"
    text = assistant_text(thoughts, settings.text, unfinished=is_cut_off)
    if len(kept) < len(whole) and not is_cut_off:
        assert rules.judge is not None
        judged = rules.judge(tree, text)
        verdict, reward = judged.kind, judged.reward
        if verdict in ("no_answer", "undecided"):
            return verdict
    value, nodes = fmean(map(mean_value, thoughts)), tuple(node.node_id for node in thoughts)
    return Chain(tree.tree_id, leaf.node_id, text, verdict, reward=reward, value=value, nodes=nodes)


def _annotated(tree: StoredTree, leaf: StoredNode, whole: Sequence[StoredNode], rules: Rules) -> Chain | str | None:
    """Apply annotations to a chain: its corrected version, the reason to leave it out, or None to keep it."""
    settings, counts = rules.settings, rules.counts
    found = (rules.annotations or {}).get((tree.tree_id, leaf.node_id))
    if found is not None and found.chain != chain_hash(whole):
        found = None  # annotated with another text, before the tree was grown again
    if settings.rows in ("sft", "stepwise") or leaf.verdict == "correct":
        if found is not None and found.rejected:
            counts.use_annotation("rejected")
            return "rejected"
        if settings.annotations == "require_accept":
            if found is None or not found.accepted:
                return "not_accepted"
            counts.use_annotation("accepted")
    if settings.annotations != "use_fixed" or found is None or found.rejected or not found.fixed:
        return None
    counts.use_annotation("fixed")
    assert rules.judge is not None
    judged = rules.judge(tree, found.fixed)
    if judged.kind != "correct":
        return "fix_not_correct"
    text, value = found.fixed.strip(), fmean(map(mean_value, whole))
    if settings.text == "think":
        thinking, answer = _split_answer(text, leaf.prefix)
        text = f"<think>\n{thinking}\n</think>\n\n{answer}"
    nodes = tuple(node.node_id for node in whole)
    return Chain(tree.tree_id, leaf.node_id, text, "correct", reward=judged.reward, value=value, nodes=nodes)


def _split_answer(text: str, prefix: str) -> tuple[str, str]:
    """Split a corrected text before its answer: at the chain's answer prefix, else before the last line."""
    thinking, begins, answer = text.rpartition(prefix or "\n")
    if not begins:
        thinking, begins, answer = text.rpartition("\n")
    return thinking.strip(), f"{begins}{answer}".strip()


def mean_value(node: StoredNode) -> float:
    """v/n: mean reward of the judged leaves at or below a node."""
    return node.value / node.visits if node.visits else 0.0


def assistant_text(thoughts: Sequence[StoredNode], form: TextForm, *, unfinished: bool = False) -> str:
    """Format thoughts as an assistant message. `tags`: each thought in its type's tags; `think`: all before the answer
    inside `<think>`; `plain`: one thought per line. The last tag of an unfinished path stays open.
    """
    if form == "plain":
        return chain_text(thoughts)
    if form == "think" and unfinished:
        return f"<think>\n{chain_text(thoughts)}"
    if form == "think":
        return f"<think>\n{chain_text(thoughts[:-1])}\n</think>\n\n{chain_text(thoughts[-1:])}"
    blocks: list[list[StoredNode]] = []
    for thought in thoughts:
        # A mini-step that broke off and what continues it are one thought.
        if blocks and blocks[-1][-1].is_open and not thought.prefix:
            blocks[-1].append(thought)
        else:
            blocks.append([thought])
    tags = [str(block[0].type).replace("_", "-") for block in blocks]
    text = "\n".join(f"<{tag}>{chain_text(block).strip()}</{tag}>" for tag, block in zip(tags, blocks, strict=True))
    return text.removesuffix(f"</{tags[-1]}>") if unfinished else text


def cut_reflections(thoughts: Sequence[StoredNode], pattern: Pattern) -> list[StoredNode]:
    """Remove reflections and the wrong thinking before them from a chain, as if it had been right at once.

    Cuts from after the last branching thought (the pattern's row has more than one child of a type) up to and including
    the reflection.
    """
    kept: list[StoredNode] = []
    for thought in thoughts:
        if thought.type != "reflection":
            kept.append(thought)
            continue
        while kept and max(pattern.get(str(kept[-1].type), {}).values(), default=1) < 2:
            kept.pop()
    return kept

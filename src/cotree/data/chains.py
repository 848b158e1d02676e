"""Chains (paths from the root to a judged answer) out of stored trees, as the student is to read them.

Invariants: a chain's verdict is the task's, also after its reflections were cut; its text comes once in a tree; its
tokens are what the trainer sees; nothing is cut to fit; each judged leaf is a chain or counted as left out.
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
    """A chain as the student is trained on it.

    Attributes:
        verdict: `correct`, `wrong`, or `no_answer` for a path that max_tokens cut off, whose turn has no end.
        tokens: the completion's ids, end of turn included. prompt_tokens: how many come before them.
        value: the mean of v/n over its thoughts.
        nodes: the ids of its thoughts, those that the student does not see left out.
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
        """The chain as the one message that a row's side has."""
        return [{"role": "assistant", "content": self.text}]


def read_chains(tree: StoredTree, rules: Rules) -> list[Chain]:
    """The chains of a tree that end in a judged answer, one for each text, in leaf order; the others are counted.

    With `unanswered` a path that max_tokens cut off is a chain too.
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
    """The chain to a judged leaf, its tokens not yet counted, or the reason why it is left out."""
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
    if settings.reflections == "cut":  # a sampled chain has no pattern of thoughts, and no reflection
        kept = cut_reflections(whole, rules.patterns.get(tree.pattern, {}))
    thoughts = [node for node in kept if node.type not in settings.leave_out]
    if not thoughts:  # all that was written before the cut is left out
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
    """What annotators made of a chain: its corrected version, or the reason why it is left out; None: it stays."""
    settings, counts = rules.settings, rules.counts
    found = (rules.annotations or {}).get((tree.tree_id, leaf.node_id))
    if found is not None and found.chain != chain_hash(whole):
        found = None  # the tree was grown again with other words
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
        thinking, answer = _answer_apart(text, leaf.prefix)
        text = f"<think>\n{thinking}\n</think>\n\n{answer}"
    nodes = tuple(node.node_id for node in whole)
    return Chain(tree.tree_id, leaf.node_id, text, "correct", reward=judged.reward, value=value, nodes=nodes)


def _answer_apart(text: str, prefix: str) -> tuple[str, str]:
    """A corrected text in two: what comes before its answer, and the answer, which begins with the prefix that the
    chain's own has, or else is the last line."""
    thinking, begins, answer = text.rpartition(prefix or "\n")
    if not begins:
        thinking, begins, answer = text.rpartition("\n")
    return thinking.strip(), f"{begins}{answer}".strip()


def mean_value(node: StoredNode) -> float:
    """v/n: the mean reward of the judged leaves at or below a node."""
    return node.value / node.visits if node.visits else 0.0


def assistant_text(thoughts: Sequence[StoredNode], form: TextForm, *, unfinished: bool = False) -> str:
    """The thoughts as the assistant's message. `tags`: each thought between its type's tags; `think`: all before the
    answer inside `<think>`; `plain`: a thought a line. An unfinished path was cut before it could close its last tag.
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
    """A chain without the thinking that a reflection found wrong, as if it had been right at once.

    What goes is everything after the last thought at which the pattern branches (its row has more than one child of a
    type), up to the reflection itself.
    """
    kept: list[StoredNode] = []
    for thought in thoughts:
        if thought.type != "reflection":
            kept.append(thought)
            continue
        while kept and max(pattern.get(str(kept[-1].type), {}).values(), default=1) < 2:
            kept.pop()
    return kept

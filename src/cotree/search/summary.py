"""Summary statistics of stored trees, and the comparison of search with sampling at equal tokens.

All numbers come from stored trees, so resumed and uninterrupted runs report the same.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cotree.base.statistics import ratio_interval, wilson_interval
from cotree.search.journal import Journal
from cotree.search.store import StoredNode, StoredTree
from cotree.search.stores import Stores
from cotree.search.thoughts import chain_text, names_of_turns
from cotree.search.trees import trees_of
from cotree.tasks.base import Asked

_ALL = ""  # key of the total, among task names


def summarize(
    store: Stores, journal: Journal, questions: Sequence[Asked], config: str, *, beside: Sequence[Path] = ()
) -> dict[str, Any]:
    """Compute summary statistics of the trees of these questions.

    Args:
        beside: journals of the run's other shards, which hold completions of some of the trees.

    Returns:
        Plain data over all trees:
        trees, thoughts; rollouts: descents to a judged leaf; answers: judged chains, split by verdict into `correct`,
        `wrong` and `no_answer`; forced: answers that began with a prefix of the search; cut: chains cut by max_tokens
        before an answer, not in `answers`; questions_with_correct, questions_with_both: shares of trees with a correct
        chain, and with both a correct and a wrong one; reflections; repaired: reflections that a correct answer
        follows; stopped: {stop reason: trees}.
        by_task: {task: the same}. by_pattern: {pattern: trees, answers and correct answers}.
        by_model: {model: thoughts, tokens, reflections and repaired that it wrote}.
        tokens: uncached prompt tokens (`prompt`), `cached` prompt tokens, generated tokens (`completion`).
        unused: completions, and their tokens, that no current tree of these questions uses: from earlier settings or
            unfinished trees.
    """
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter, {_ALL: Counter(trees=0)})
    stopped: defaultdict[str, Counter[str]] = defaultdict(Counter)
    models: defaultdict[str, Counter[str]] = defaultdict(Counter)
    patterns: defaultdict[str, Counter[str]] = defaultdict(Counter)
    tokens = Counter(prompt=0, cached=0, completion=0)
    for tree in trees_of(store, questions, config):
        repaired, own = _repaired_reflections(tree), _counts_of_tree(tree)
        patterns[tree.pattern].update({name: own[name] for name in ("trees", "answers", "correct")})
        for part in (_ALL, tree.task):
            counts[part].update(own, repaired=len(repaired))
            stopped[part][tree.stopped] += 1
        cached = tree.cached_tokens
        tokens.update(prompt=tree.prompt_tokens - cached, cached=cached, completion=tree.completion_tokens)
        for node in tree.nodes[1:]:
            if node.model:
                reflections = {"reflections": node.type == "reflection", "repaired": node.node_id in repaired}
                models[node.model].update(thoughts=1, tokens=node.tokens, **reflections)
    parts = {part: _with_shares(counts[part], stopped[part]) for part in sorted({_ALL, *counts})}
    return {
        **parts.pop(_ALL),
        "by_task": parts,
        "by_pattern": {pattern: dict(patterns[pattern]) for pattern in sorted(patterns)},
        "by_model": {model: dict(models[model]) for model in sorted(models)},
        "tokens": dict(tokens),
        "unused": _unused(journal, beside, [name for _, question in questions for name in names_of_turns(question)]),
    }


def _unused(journal: Journal, beside: Sequence[Path], names: Sequence[str]) -> dict[str, int]:
    """Count the completions for which no journal records a current tree."""
    by_path: dict[Path, dict[bytes, int]] = {}
    found = journal.unused(names)
    for path in beside:
        with Journal(path, reading=True) as other:
            by_path[path] = other.unused(sorted(other.questions.intersection(names)))
            found |= {key: by_path[path][key] for key in journal.missing_keys(by_path[path])}
    for path in beside if found else ():
        with Journal(path, reading=True) as other:
            used = found.keys() - by_path[path].keys() - set(other.missing_keys(found))
        for key in used:
            del found[key]
    return {"completions": len(found), "tokens": sum(found.values())}


def _with_shares(counts: Counter[str], stopped: Counter[str]) -> dict[str, Any]:
    """Convert counts of questions to shares and add the stop reasons."""
    shares = {
        name: counts[name] / max(counts["trees"], 1) for name in ("questions_with_correct", "questions_with_both")
    }
    return {**counts, **shares, "stopped": dict(sorted(stopped.items()))}


def _repaired_reflections(tree: StoredTree) -> set[int]:
    """The node ids of reflections that a correct answer follows."""
    correct = [node.node_id for node in tree.nodes if node.verdict == "correct"]
    return {node.node_id for leaf in correct for node in tree.chain(leaf) if node.type == "reflection"}


def _counts_of_tree(tree: StoredTree) -> dict[str, int]:
    """One tree's counts under the names of `summarize`."""
    answers = Counter(node.verdict for node in tree.nodes if node.verdict is not None and not node.is_cut)
    verdicts = {node.verdict for node in tree.nodes}
    return {
        "trees": 1,
        "thoughts": len(tree.nodes) - 1,
        "rollouts": tree.rollouts,
        "answers": answers.total(),
        "correct": answers["correct"],
        "wrong": answers["wrong"],
        "no_answer": answers["no_answer"],
        "undecided": answers["undecided"],
        "forced": sum(node.is_forced for node in tree.nodes),
        "cut": sum(node.is_cut for node in tree.nodes),
        "questions_with_correct": "correct" in verdicts,
        "questions_with_both": {"correct", "wrong"} <= verdicts,
        "reflections": sum(node.type == "reflection" for node in tree.nodes),
    }


# (value, low, high) with a 95% interval
Measured = tuple[float, float, float]


@dataclass(frozen=True)
class MethodResult:
    """Accuracy, pair yield and cost of one method (search or sampling) over a set of questions.

    chains: without undecided ones. accuracy: share of correct chains; cut ones and those without an answer are not.
    correct, both, vote: shares of questions with a correct chain, with a correct and a wrong one, and with a correct
    majority vote. 95% intervals: Wilson, or bootstrap over questions.
    pairs_per_question, pairs_per_1000_tokens: preference pairs that use each chain once.
    shared: share of the pairs' tokens in the common prefix, pairing chains that share most; None without pairs.
    tokens: generated. tokens_per_pair: None without pairs.
    """

    method: str
    questions: int
    chains: int
    accuracy: Measured
    correct: Measured
    both: Measured
    vote: Measured
    pairs_per_question: float
    pairs_per_1000_tokens: Measured
    shared: float | None
    tokens: int
    uncached_prompt_tokens: int
    tokens_per_pair: float | None


def compare_methods(trees: Mapping[str, Iterable[StoredTree]]) -> list[MethodResult]:
    """Compare methods on the same questions, given {method: its trees}."""
    found = {method: [_found_in(tree) for tree in of_method] for method, of_method in trees.items()}
    # Sort, because the bootstrap draws trees by index.
    return [_method_result(method, sorted(of, key=lambda tree: sorted(tree.items()))) for method, of in found.items()]


def _found_in(tree: StoredTree) -> Counter[str]:
    """One tree's contribution to the sums of its method."""
    ends = [node for node in tree.nodes if node.verdict not in (None, "undecided")]
    leaves = [leaf for leaf in ends if leaf.verdict in ("correct", "wrong")]
    # Equal chains count once for pairs, but each has a vote.
    distinct = {chain_text(tree.chain(leaf.node_id)): leaf for leaf in leaves}
    chains = Counter(leaf.verdict for leaf in distinct.values())
    # The first answer wins a tie: a Counter keeps the order of arrival.
    majority = Counter(leaf.answer for leaf in leaves).most_common(1)
    pairs = min(chains["correct"], chains["wrong"])
    shared, of = _shared_tokens(tree, list(distinct.values()), pairs)
    return Counter(
        chains=len(ends),
        correct_chains=sum(leaf.verdict == "correct" for leaf in ends),
        correct=chains["correct"] > 0,
        both=pairs > 0,
        vote=any(leaf.verdict == "correct" and leaf.answer == majority[0][0] for leaf in leaves),
        pairs=pairs,
        shared=shared,
        of=of,
        tokens=tree.completion_tokens,
        uncached_prompt_tokens=tree.prompt_tokens - tree.cached_tokens,
    )


def _shared_tokens(tree: StoredTree, leaves: Sequence[StoredNode], pairs: int) -> tuple[int, int]:
    """Shared-prefix tokens of `pairs` greedily matched pairs (counted in both chains), and all their tokens."""
    paths = {leaf.node_id: {node.node_id: node.tokens for node in tree.chain(leaf.node_id)} for leaf in leaves}
    right, wrong = ([leaf.node_id for leaf in leaves if leaf.verdict == kind] for kind in ("correct", "wrong"))
    common = {
        (a, b): sum(tokens for node, tokens in paths[a].items() if node in paths[b]) for a in right for b in wrong
    }
    shared = of = 0
    for _ in range(pairs):
        a, b = max(common, key=common.__getitem__)
        shared, of = shared + 2 * common[a, b], of + sum(paths[a].values()) + sum(paths[b].values())
        common = {pair: tokens for pair, tokens in common.items() if pair[0] != a and pair[1] != b}
    return shared, of


def _method_result(method: str, found: Sequence[Counter[str]]) -> MethodResult:
    n, total = len(found), sum(found, Counter[str]())
    pairs, tokens = total["pairs"], total["tokens"]

    def ratio(part: str, whole: str, scale: int = 1) -> Measured:
        low, high = ratio_interval([tree[part] for tree in found], [tree[whole] for tree in found])
        return scale * total[part] / max(total[whole], 1), scale * low, scale * high

    shares = {name: (total[name] / n, *wilson_interval(total[name], n)) for name in ("correct", "both", "vote")}
    return MethodResult(
        method=method,
        questions=n,
        chains=total["chains"],
        accuracy=ratio("correct_chains", "chains"),
        **shares,
        pairs_per_question=pairs / n,
        pairs_per_1000_tokens=ratio("pairs", "tokens", 1000),
        shared=total["shared"] / total["of"] if total["of"] else None,
        tokens=tokens,
        uncached_prompt_tokens=total["uncached_prompt_tokens"],
        tokens_per_pair=tokens / pairs if pairs else None,
    )

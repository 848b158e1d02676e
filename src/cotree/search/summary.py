"""The counts of a search over its stored trees, and search beside sampling at equal tokens.

Every number is computed from stored trees, so a resumed run and an uninterrupted one report the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from cotree.base.statistics import wilson_interval
from cotree.search.journal import Journal
from cotree.search.store import StoredTree, TreeStore
from cotree.search.thoughts import question_name
from cotree.search.trees import trees_of
from cotree.tasks.base import Asked


@dataclass(frozen=True)
class TreeCounts:
    """What some trees hold.

    rollouts: descents to a judged leaf. answers: judged ones, by verdict in `correct`, `wrong` and `no_answer`.
    cut: thoughts other than answers that max_tokens ended. questions_with_correct, questions_with_both: the share of
    trees with a correct chain, and with a correct and a wrong one. repaired: reflections that a correct answer follows.
    stopped: why the trees ended, with their number.
    """

    trees: int
    thoughts: int
    rollouts: int
    answers: int
    correct: int
    wrong: int
    no_answer: int
    cut: int
    questions_with_correct: float
    questions_with_both: float
    reflections: int
    repaired: int
    stopped: Mapping[str, int]


@dataclass(frozen=True)
class WriterCounts:
    """What one model wrote; `repaired` of its reflections were followed by a correct answer."""

    thoughts: int
    tokens: int
    reflections: int
    repaired: int


@dataclass(frozen=True)
class TreeTokens:
    """What the trees cost: prompt tokens that no cache had, cached ones, and generated ones."""

    prompt: int
    cached: int
    completion: int


@dataclass(frozen=True)
class UnusedCompletions:
    """What was paid for these questions in this run and is in no current tree: of earlier settings, or cut short."""

    completions: int
    tokens: int


@dataclass(frozen=True)
class SearchSummary(TreeCounts):
    """The counts of all trees of a node, of each task's, and of each model that wrote."""

    by_task: Mapping[str, TreeCounts]
    by_model: Mapping[str, WriterCounts]
    tokens: TreeTokens
    unused: UnusedCompletions


def summarize(store: TreeStore, journal: Journal, questions: Sequence[Asked], config: str) -> SearchSummary:
    """Count the trees of these questions, reading one at a time."""
    tasks: dict[str, Counter[str]] = {}
    models: dict[str, Counter[str]] = {}
    for tree in trees_of(store, questions, config):
        repaired = repaired_reflections(tree)
        tasks.setdefault(tree.task, Counter()).update(_counted(tree, repaired))
        for node in tree.nodes[1:]:
            if node.model:
                models.setdefault(node.model, Counter()).update(
                    thoughts=1,
                    tokens=node.tokens,
                    reflections=node.type == "reflection",
                    repaired=node.node_id in repaired,
                )
    everything = sum(tasks.values(), Counter())
    turns = [replace(first, turn=turn) for _, first in questions for turn in range(1 + len(first.later))]
    return SearchSummary(
        **vars(_tree_counts(everything)),
        by_task={name: _tree_counts(counts) for name, counts in sorted(tasks.items())},
        by_model={name: _writer_counts(counts) for name, counts in sorted(models.items())},
        tokens=TreeTokens(everything["prompt"], everything["cached"], everything["completion"]),
        unused=UnusedCompletions(*journal.unused([question_name(question) for question in turns])),
    )


def repaired_reflections(tree: StoredTree) -> set[int]:
    """The node ids of the reflections of a tree that a correct answer follows."""
    correct = [node.node_id for node in tree.nodes if node.verdict == "correct"]
    return {node.node_id for leaf in correct for node in tree.chain(leaf) if node.type == "reflection"}


_STOPPED = "stopped: "


def _counted(tree: StoredTree, repaired: Collection[int]) -> Counter[str]:
    answers = Counter(node.verdict for node in tree.nodes if node.type == "answer")
    verdicts = {node.verdict for node in tree.nodes}
    return Counter(
        {
            "trees": 1,
            "thoughts": len(tree.nodes) - 1,
            "rollouts": tree.rollouts,
            "answers": answers.total(),
            **{verdict: answers[verdict] for verdict in ("correct", "wrong", "no_answer")},
            "cut": sum(node.verdict is not None and node.type != "answer" for node in tree.nodes),
            "with_correct": "correct" in verdicts,
            "with_both": {"correct", "wrong"} <= verdicts,
            "reflections": sum(node.type == "reflection" for node in tree.nodes),
            "repaired": len(repaired),
            "prompt": tree.prompt_tokens - tree.cached_tokens,
            "cached": tree.cached_tokens,
            "completion": tree.completion_tokens,
            f"{_STOPPED}{tree.stopped}": 1,
        }
    )


def _tree_counts(counts: Counter[str]) -> TreeCounts:
    trees = max(counts["trees"], 1)
    return TreeCounts(
        trees=counts["trees"],
        thoughts=counts["thoughts"],
        rollouts=counts["rollouts"],
        answers=counts["answers"],
        correct=counts["correct"],
        wrong=counts["wrong"],
        no_answer=counts["no_answer"],
        cut=counts["cut"],
        questions_with_correct=counts["with_correct"] / trees,
        questions_with_both=counts["with_both"] / trees,
        reflections=counts["reflections"],
        repaired=counts["repaired"],
        stopped={key.removeprefix(_STOPPED): n for key, n in sorted(counts.items()) if key.startswith(_STOPPED)},
    )


def _writer_counts(counts: Counter[str]) -> WriterCounts:
    return WriterCounts(counts["thoughts"], counts["tokens"], counts["reflections"], counts["repaired"])


@dataclass(frozen=True)
class MethodResult:
    """What one method found over a set of questions, and at what cost.

    correct, both, vote: shares of the questions with a correct chain, with a correct and a wrong one, and with a
    correct majority answer, each as (share, low, high) with its 95% Wilson interval. pairs_per_question: preference
    pairs that use no chain twice. tokens: generated. tokens_per_pair: None where there is no pair.
    """

    method: str
    questions: int
    correct: tuple[float, float, float]
    both: tuple[float, float, float]
    vote: tuple[float, float, float]
    pairs_per_question: float
    tokens: int
    uncached_prompt_tokens: int
    tokens_per_pair: float | None


def compare_methods(trees: Mapping[str, Iterable[StoredTree]]) -> list[MethodResult]:
    """Compare methods by the trees that each made for the same questions: {method's name: its trees}."""
    return [_method_result(method, [_found_in(tree) for tree in of_method]) for method, of_method in trees.items()]


@dataclass(frozen=True, slots=True)
class _Found:
    """One tree's distinct correct and wrong chains, whether its majority answer is correct, and its tokens."""

    correct: int
    wrong: int
    vote_correct: bool
    tokens: int
    uncached_prompt_tokens: int

    @property
    def pairs(self) -> int:
        return min(self.correct, self.wrong)


def _found_in(tree: StoredTree) -> _Found:
    leaves = [node for node in tree.nodes if node.type == "answer" and node.verdict in ("correct", "wrong")]
    # Equal chains are one chain, but each of them has a vote.
    texts = {"\n".join(node.text for node in tree.chain(leaf.node_id)): leaf.verdict for leaf in leaves}
    kinds = Counter(texts.values())
    # The first answer wins a tie: a Counter keeps the order of arrival.
    majority = Counter(leaf.answer for leaf in leaves).most_common(1)
    return _Found(
        correct=kinds["correct"],
        wrong=kinds["wrong"],
        vote_correct=any(leaf.verdict == "correct" and leaf.answer == majority[0][0] for leaf in leaves),
        tokens=tree.completion_tokens,
        uncached_prompt_tokens=tree.prompt_tokens - tree.cached_tokens,
    )


def _method_result(method: str, found: Sequence[_Found]) -> MethodResult:
    n, pairs, tokens = len(found), sum(each.pairs for each in found), sum(each.tokens for each in found)

    def share(count: int) -> tuple[float, float, float]:
        return (count / n, *wilson_interval(count, n))

    return MethodResult(
        method=method,
        questions=n,
        correct=share(sum(each.correct > 0 for each in found)),
        both=share(sum(each.pairs > 0 for each in found)),
        vote=share(sum(each.vote_correct for each in found)),
        pairs_per_question=pairs / n,
        tokens=tokens,
        uncached_prompt_tokens=sum(each.uncached_prompt_tokens for each in found),
        tokens_per_pair=tokens / pairs if pairs else None,
    )

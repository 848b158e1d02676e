"""Is the search worth it? Best-of-n and self-consistency beside it, at the same number of generated tokens.

Invariant: a question's baseline gets the same worked examples, first prefix, thinker and sampling as its tree, and as
many generated tokens as the tree cost (reflector's and judge's included), to the nearest whole chain; every token that
it generates is counted.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from cotree.base.statistics import wilson
from cotree.models.client import Choice, Counters
from cotree.search.driver import Asked, Grower
from cotree.search.growth import Growth
from cotree.search.store import StoredTree
from cotree.search.thoughts import draw, prefix_of
from cotree.tasks import Question, Task


@dataclass(frozen=True, slots=True)
class Found:
    """What one method found for one question: distinct chains by verdict, its majority answer, its cost."""

    correct: int
    wrong: int
    vote_correct: bool
    tokens: int
    uncached: int

    @property
    def pairs(self) -> int:
        """Preference pairs that use no chain twice."""
        return min(self.correct, self.wrong)


async def compare(
    grower: Grower, questions: Sequence[Asked], on_question: Callable[[int, int, str], None]
) -> list[dict[str, object]]:
    """A row for the search and one for best-of-n over the same questions, with each method's majority vote.

    Args:
        grower: has grown the trees of all questions.
        on_question: called with (done, wanted, remark) after each.
    """
    grown = grower.grown(questions)
    found = await best_of_n(grower, grown, on_question)
    return [worth("mcts", [of_tree(tree) for _, _, tree in grown]), worth("best_of_n", found)]


async def best_of_n(
    grower: Grower,
    grown: Sequence[tuple[Task, Question, StoredTree]],
    on_question: Callable[[int, int, str], None] = lambda done, wanted, remark: None,
) -> list[Found]:
    """Independent whole chains for each question, as many as its tree's generated tokens buy; family after family."""
    gate = asyncio.Semaphore(grower.settings.trees_in_flight)
    done = 0

    async def one(task: Task, question: Question, tree: StoredTree) -> Found:
        nonlocal done
        async with gate:
            growth = Growth(task, question, tree.tree_id, grower.calls, grower.roles, grower.settings, 0)
            found = await _sample(growth, tree.completion_tokens)
        done += 1
        on_question(done, len(grown), "")
        return found

    async with asyncio.TaskGroup() as group:  # as in the search, shared worked examples stay warm
        ordered = sorted(grown, key=lambda asked: (asked[1].task, asked[1].family))
        tasks = [group.create_task(one(*asked)) for asked in ordered]
    return [task.result() for task in tasks]


async def whole_chains(
    growth: Growth, budget: int | None, most: int | None = None
) -> AsyncIterator[list[tuple[str, Choice]]]:
    """Independent whole chains, a request at a time: as many as come nearest to `budget` generated tokens, or `most`.

    They begin as the tree does: with its worked examples, first prefix, thinker and sampling.
    """
    first = next(iter(growth.search.pattern["root"]))
    free_text = growth.task.answer_form == "text"
    rounds = samples = 0
    n = 1
    while n > 0:
        key = f"best_of_n/{growth.tree_id}/{rounds}"
        prefix = prefix_of(first, key, growth.search.prefixes)
        completion = await growth.ask(
            growth.writer(first, key),
            prefix,
            n=n,
            max_tokens=growth.settings.max_thought_tokens * 4,
            seed=draw(f"request:{key}", 2**31),
            stop=() if free_text else ("}\n",),
        )
        chains = []
        for choice in completion.choices:
            text = f"{prefix}{choice.text}"
            # The stop string took the box's brace with it.
            if not free_text and choice.finish_reason == "stop" and text.count("{") > text.count("}"):
                text += "}"
            chains.append((text, choice))
        yield chains
        rounds += 1
        samples += len(chains)
        left = growth.settings.widest if most is None else most - samples
        # Some servers withhold a text; the budget must end even if they withhold all of them.
        spent = max(growth.spent.completion_tokens, samples)
        n = min(growth.settings.widest, left, left if budget is None else affordable(budget, spent, samples))


def affordable(budget: int, spent: int, count: int) -> int:
    """How many more of what `count` took `spent` tokens for come nearest to the budget."""
    return round((budget - spent) * count / max(spent, 1))


async def _sample(growth: Growth, budget: int) -> Found:
    answered: list[tuple[str, str, str]] = []
    async for written in whole_chains(growth, budget):
        for text, choice in written:
            verdict = await growth.task.judge_async(growth.question, text, choice.finish_reason)
            if verdict.answer is not None:
                answered.append((text, verdict.answer, verdict.kind))
    return _found(answered, growth.spent)


def of_tree(tree: StoredTree) -> Found:
    """The same of a tree: its chains, the majority of its answers, its tokens."""
    leaves = [node for node in tree.nodes if node.type == "answer" and node.verdict in ("correct", "wrong")]
    # Identical siblings are one node, so a chain's text names it.
    texts = ["\n".join(node.text for node in tree.chain(leaf.node_id)) for leaf in leaves]
    return _found([(text, str(leaf.answer), str(leaf.verdict)) for text, leaf in zip(texts, leaves, strict=True)], tree)


def _found(answered: Sequence[tuple[str, str, str]], spent: Counters | StoredTree) -> Found:
    """Of chains with an answer (the chain's text, the answer, the verdict), and what they cost."""
    kinds = Counter({text: kind for text, _, kind in answered}.values())
    # The first answer wins a tie: Counter keeps the order of arrival.
    votes = Counter(answer for _, answer, _ in answered).most_common(1)
    vote_correct = any(kind == "correct" and answer == votes[0][0] for _, answer, kind in answered)
    uncached = spent.prompt_tokens - spent.cached_tokens
    return Found(kinds["correct"], kinds["wrong"], vote_correct, spent.completion_tokens, uncached)


def worth(method: str, found: Sequence[Found]) -> dict[str, object]:
    """The row of a method over all questions (`report.summary.Worth`): what its tokens bought.

    A share is [share, low, high] with its 95% interval (Wilson over questions).
    """
    n = len(found)
    pairs, tokens = sum(f.pairs for f in found), sum(f.tokens for f in found)

    def share(count: int) -> list[float]:
        return [count / n, *wilson(count, n)]

    return {
        "method": method,
        "questions": n,
        "correct": share(sum(f.correct > 0 for f in found)),
        "both": share(sum(f.pairs > 0 for f in found)),
        "vote": share(sum(f.vote_correct for f in found)),
        "pairs_per_question": pairs / n,
        "tokens": tokens,
        "uncached_prompt_tokens": sum(f.uncached for f in found),
        "tokens_per_pair": tokens / pairs if pairs else None,
    }

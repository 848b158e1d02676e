"""Is the search worth it? Best-of-n and self-consistency beside it, at the same number of generated tokens.

Invariant: a question's baseline gets the same worked examples, first prefix, thinker and sampling as its tree, and as
many generated tokens as the tree cost (reflector's and judge's included), to the nearest whole chain; every token that
it generates is counted.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from cotree.config import Role, Search
from cotree.eval.metrics import wilson
from cotree.llm.client import Choice
from cotree.search.calls import Calls
from cotree.search.driver import Grower
from cotree.search.growth import Growth, patterns_of
from cotree.search.thoughts import draw, prefix_of
from cotree.store import StoredTree
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
    grower: Grower, questions: Sequence[tuple[Task, Question]], on_question: Callable[[int, int, str], None]
) -> list[dict[str, object]]:
    """A row for the search and one for best-of-n over the same questions, with each method's majority vote.

    Args:
        grower: has grown the trees of all questions.
        on_question: called with (done, wanted, remark) after each.
    """
    grown = grower.grown(questions)
    found = await best_of_n(grower.calls, grower.roles, grower.settings, grown, on_question)
    return [worth("mcts", [of_tree(tree) for _, _, tree in grown]), worth("best_of_n", found)]


async def best_of_n(
    calls: Calls,
    roles: Mapping[str, Role],
    settings: Search,
    asked: Sequence[tuple[Task, Question, StoredTree]],
    on_question: Callable[[int, int, str], None],
) -> list[Found]:
    """Independent whole chains for each question, as many as its tree's generated tokens buy."""
    gate = asyncio.Semaphore(settings.trees_in_flight)
    done = 0

    async def one(task: Task, question: Question, tree: StoredTree) -> Found:
        nonlocal done
        async with gate:
            found = await _sample(calls, roles, settings, task, question, tree)
        done += 1
        on_question(done, len(asked), "")
        return found

    # Family after family, as the search: shared worked examples stay warm.
    order = sorted(range(len(asked)), key=lambda i: (asked[i][1].task, asked[i][1].family))
    async with asyncio.TaskGroup() as group:
        tasks = {i: group.create_task(one(*asked[i])) for i in order}
    return [tasks[i].result() for i in range(len(asked))]


async def whole_chains(
    growth: Growth, budget: int | None, most: int | None = None
) -> AsyncIterator[list[tuple[str, Choice]]]:
    """Independent whole chains, a request at a time: as many as come nearest to `budget` generated tokens, or `most`.

    They begin as the tree does: with its worked examples, first prefix, thinker and sampling.
    """
    first = next(iter(patterns_of(growth.settings)[growth.pattern]["root"]))
    free_text = growth.task.answer_form == "text"
    tokens = rounds = samples = 0
    n = 1
    while n > 0:
        key = f"best_of_n/{growth.tree_id}/{rounds}"
        writer, prefix = growth.writer(first, key), prefix_of(first, key, growth.search.prefixes)
        completion = await growth.ask(
            writer,
            growth.prompt(writer.model),
            prefix,
            n=n,
            max_tokens=growth.settings.max_thought_tokens * 4,
            seed=draw(f"request:{key}", 2**31),
            stop=() if free_text else ("}\n",),
            logprobs=growth.judge.logprobs,
        )
        rounds += 1
        chains = []
        for choice in completion.choices:
            # Some servers withhold a text; the budget must end even if they withhold all of them.
            tokens += max(choice.tokens, 1)
            text = f"{prefix}{choice.text}"
            # The stop string took the box's brace with it.
            if not free_text and choice.finish_reason == "stop" and text.count("{") > text.count("}"):
                text += "}"
            chains.append((text, choice))
        yield chains
        samples += len(chains)
        left = growth.settings.widest if most is None else most - samples
        n = min(growth.settings.widest, left, left if budget is None else affordable(budget, tokens, samples))


def affordable(budget: int, spent: int, count: int) -> int:
    """How many more of what `count` took `spent` tokens for come nearest to the budget."""
    return round((budget - spent) * count / max(spent, 1))


async def _sample(
    calls: Calls, roles: Mapping[str, Role], settings: Search, task: Task, question: Question, tree: StoredTree
) -> Found:
    growth = Growth(task, question, tree.tree_id, calls, roles, settings, 0)
    tokens = 0
    chains: dict[str, str] = {}
    answers: list[tuple[str, bool]] = []
    async for written in whole_chains(growth, tree.completion_tokens):
        for text, choice in written:
            tokens += max(choice.tokens, 1)
            verdict = await task.judge_async(question, text, choice.finish_reason)
            if verdict.answer is not None:
                chains[text] = verdict.kind
                answers.append((verdict.answer, verdict.kind == "correct"))
    return _found(chains, answers, tokens, growth.spent.prompt_tokens - growth.spent.cached_tokens)


def of_tree(tree: StoredTree) -> Found:
    """The same of a tree: its chains, the majority of its answers, its tokens."""
    leaves = [node for node in tree.nodes if node.type == "answer" and node.verdict in ("correct", "wrong")]
    # Identical siblings are one node, so a chain's text names it.
    chains = {"\n".join(n.text for n in tree.chain(leaf.node_id)): str(leaf.verdict) for leaf in leaves}
    answers = [(str(leaf.answer), leaf.verdict == "correct") for leaf in leaves]
    return _found(chains, answers, tree.completion_tokens, tree.prompt_tokens - tree.cached_tokens)


def _found(chains: Mapping[str, str], answers: Sequence[tuple[str, bool]], tokens: int, uncached: int) -> Found:
    kinds = Counter(chains.values())
    votes = Counter(answer for answer, _ in answers)
    # The first answer wins a tie: Counter keeps the order of arrival.
    winner = votes.most_common(1)[0][0] if votes else None
    vote_correct = any(correct for answer, correct in answers if answer == winner)
    return Found(kinds["correct"], kinds["wrong"], vote_correct, tokens, uncached)


@dataclass(frozen=True, slots=True)
class Worth:
    """One method over all questions; a share is [share, low, high] with its 95% interval (Wilson over questions)."""

    method: str
    questions: int
    correct: list[float]
    both: list[float]
    vote: list[float]
    pairs_per_question: float
    tokens: int
    uncached_prompt_tokens: int
    tokens_per_pair: float | None


def worth(method: str, found: Sequence[Found]) -> dict[str, object]:
    """The row of a method: what its tokens bought."""
    n = len(found)
    pairs = sum(f.pairs for f in found)
    tokens = sum(f.tokens for f in found)

    def share(count: int) -> list[float]:
        return [count / n, *wilson(count, n)]

    row = Worth(
        method=method,
        questions=n,
        correct=share(sum(f.correct > 0 for f in found)),
        both=share(sum(f.correct > 0 and f.wrong > 0 for f in found)),
        vote=share(sum(f.vote_correct for f in found)),
        pairs_per_question=pairs / n,
        tokens=tokens,
        uncached_prompt_tokens=sum(f.uncached for f in found),
        tokens_per_pair=tokens / pairs if pairs else None,
    )
    return asdict(row)

"""Independent whole chains for a question (rejection sampling, best-of-n, self-consistency), to compare search with.

They begin as the question's tree does: with its worked examples, the prefix (or fixed text) of its pattern's first
thought, its thinker and its temperature. Every generated token counts.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from cotree.models.client import Choice
from cotree.search.growth import Growth
from cotree.search.mcts import Node
from cotree.search.settings import Thought
from cotree.search.thoughts import draw, draw_prefix

# A whole chain may be as long as so many thoughts.
_THOUGHTS = 4


async def sample_chains(growth: Growth, *, budget: int | None, most: int | None = None) -> AsyncIterator[list[Node]]:
    """Sample whole chains, a request at a time; each is a scored leaf below the root of the growth's tree.

    Args:
        budget: generated tokens to spend, met to the nearest chain; None: no limit.
        most: chains at most; None: no limit.
    """
    first = next(iter(growth.search.pattern["root"]))
    fixed = growth.settings.thoughts.get(first, Thought()).text
    free_text = growth.task.answer_form == "text"
    requests = 0
    n = 1  # the first tells what a chain costs
    while n > 0:
        # Like a thought's, a request's seed depends on its place alone; only the last one's n depends on the budget.
        key = f"{growth.search.seed}/chains/{requests}"
        prefix = f"{fixed.strip()}\n" if fixed else draw_prefix(first, key, growth.search.prefixes)
        writer, seed = growth.draw_writer(first, key), draw(f"request:{key}", 2**31)
        completion = await growth.continue_text(
            writer,
            prefix,
            n=n,
            max_tokens=growth.settings.max_thought_tokens * _THOUGHTS,
            seed=seed,
            stop=() if free_text else ("}\n",),
        )
        leaves = []
        for sample, choice in enumerate(completion.choices):
            text = _chain_text(prefix, choice, free_text)
            leaf = Node(growth.search.root, "answer", text, f"chains{requests}.{sample}/", depth=1)
            leaf.prefix, leaf.model, leaf.seed, leaf.seconds = prefix, writer.model, seed, completion.seconds
            leaf.tokens, leaf.finish_reason, leaf.logprob = choice.tokens, choice.finish_reason, choice.logprob or 0.0
            leaf.verdict, leaf.reward = await growth.scorer.score_answer(growth, leaf)
            growth.search.add_leaf(leaf)
            leaves.append(leaf)
        yield leaves
        requests += 1
        samples = growth.search.rollouts
        left = growth.settings.widest if most is None else most - samples
        # Some servers withhold a text; the budget must end even if they withhold all of them.
        spent = max(growth.spent.completion_tokens, samples)
        n = min(growth.settings.widest, left, left if budget is None else affordable(budget, spent, samples))


def _chain_text(prefix: str, choice: Choice, free_text: bool) -> str:
    text = f"{prefix}{choice.text}"
    # The stop string took the box's brace with it.
    if not free_text and choice.finish_reason == "stop" and text.count("{") > text.count("}"):
        text += "}"
    return text


def affordable(budget: int, spent: int, count: int) -> int:
    """How many more, at what `count` of them have cost so far (`spent`), come nearest to the budget."""
    return round((budget - spent) * count / max(spent, 1))

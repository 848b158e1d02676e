"""Independent whole chains for a question (rejection sampling, best-of-n, self-consistency), to compare search with.

They begin as the question's tree does: with its worked examples, the prefix (or fixed text) of its pattern's first
thought, its thinker and its temperature. Every generated token counts.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from cotree.search.growth import Growth
from cotree.search.mcts import Node, ThoughtRequest
from cotree.search.thoughts import draw_prefix


async def sample_chains(growth: Growth, *, budget: int | None, most: int | None = None) -> AsyncIterator[list[Node]]:
    """Sample whole chains, a request at a time; each is a scored leaf below the root of the growth's tree.

    Args:
        budget: generated tokens to spend, met to the nearest chain; None: no limit.
        most: chains at most; None: no limit.
    """
    search, settings = growth.search, growth.settings
    first_type = next(iter(search.pattern["root"]))
    fixed = settings.thought(first_type).text
    # A line of a worked example closes a box and ends; other texts end with the model's turn.
    ends_with_box = settings.ends == "line" and growth.task.answer_form != "text"
    requests = 0
    n = 1  # the first says what a chain costs
    while n > 0:
        # Like a thought's, a request's seed depends on its place alone; only the last one's n depends on the budget.
        key = f"{search.seed}/chains/{requests}"
        prefix = f"{fixed.strip()}\n" if fixed else draw_prefix(search.prefixes[first_type], key)
        leaves = await growth.sample(
            ThoughtRequest(search.root, "answer", n, place=requests, prefix=prefix, seed_key=key),
            growth.draw_writer(first_type, key),
            max_tokens=settings.max_chain_tokens,
            stop=("}\n",) if ends_with_box else (),
        )
        for leaf in leaves:
            leaf.text = f"{leaf.prefix}{leaf.text}"
            # The stop string took the box's brace with it.
            if ends_with_box and leaf.finish_reason == "stop" and leaf.text.count("{") > leaf.text.count("}"):
                leaf.text += "}"
            await growth.score(leaf)
            search.add_leaf(leaf)
        yield leaves
        requests += 1
        chains = search.rollouts
        n = settings.widest if most is None else min(settings.widest, most - chains)
        if budget is not None:
            # Some servers withhold a text; the budget must end even if they withhold all of them.
            n = min(n, repeats_within(budget, max(growth.spent.completion_tokens, chains), chains))


def repeats_within(budget: int, spent: int, done: int) -> int:
    """How often what was `done` times for `spent` tokens can be done again to come nearest to the budget."""
    return round((budget - spent) * done / max(spent, 1))

"""Independent whole chains for a question (rejection sampling, best-of-n, self-consistency): the baseline for search.

The prompt, first thought's prefix (or fixed text), thinker and temperature are those of the question's tree. Every
generated token counts.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from cotree.search.growth import Growth
from cotree.search.mcts import Node, ThoughtRequest
from cotree.search.thoughts import draw_prefix


async def sample_chains(growth: Growth, *, budget: int | None, most: int | None = None) -> AsyncIterator[list[Node]]:
    """Sample whole chains one request at a time; yields each request's chains, scored, as leaves below the root.

    Args:
        budget: generated tokens to spend, to the nearest chain; None: no limit.
        most: maximum number of chains; None: no limit.
    """
    search, settings = growth.search, growth.settings
    first_type = next(iter(search.pattern["root"]))
    fixed = settings.thought(first_type).text
    # Chains in lines stop after the closed box, as in the worked examples; others at the end of the model's turn.
    ends_with_box = settings.ends == "line" and growth.task.answer_form != "text"
    requests = 0
    n = 1  # the first request measures the cost of a chain
    while n > 0:
        # The seed depends on the request's number only; the budget changes only the last request's n.
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
            # The stop string removed the closing brace.
            if ends_with_box and leaf.finish_reason == "stop" and leaf.text.count("{") > leaf.text.count("}"):
                leaf.text += "}"
            await growth.score(leaf)
            search.add_leaf(leaf)
        yield leaves
        requests += 1
        chains = search.rollouts
        n = settings.widest if most is None else min(settings.widest, most - chains)
        if budget is not None:
            # Some servers return no text and no tokens; count at least one token a chain so that the loop ends.
            n = min(n, repeats_within(budget, max(growth.spent.completion_tokens, chains), chains))


def repeats_within(budget: int, spent: int, done: int) -> int:
    """How many more repeats, at the mean cost of `done` for `spent` tokens, come nearest to the token budget."""
    return round((budget - spent) * done / max(spent, 1))

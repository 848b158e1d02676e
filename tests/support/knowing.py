"""What a fake server writes that knows the answers; without the libraries that training needs, so it loads fast."""

from __future__ import annotations

from typing import Any

from tests.support.fake_server import draw

from cotree.tasks import task

TASKS = ("arithmetic", "letters")


def knowing_reply(prompt: str, seed: int, index: int) -> str:
    """Thoughts of 1 to 6 words; a box is closed on the right answer of the question asked, or on a wrong one."""
    last = max((prompt.rfind(q.messages[-1]["content"]), q.gold) for name in TASKS for q in _questions(name))
    if not prompt.rstrip().endswith("\\boxed{"):
        return (
            " ".join(f"w{draw(prompt, seed, index, n) % 50}" for n in range(1 + draw(prompt, seed, index) % 6)) + "\n"
        )
    right = draw(prompt, seed, index) % 2
    return f"{last[1] if right else 7919}}}\n"


_KNOWN: dict[str, list[Any]] = {}


def _questions(name: str) -> list[Any]:
    if name not in _KNOWN:
        _KNOWN[name] = [*task(name).questions("train", 6)]
    return _KNOWN[name]

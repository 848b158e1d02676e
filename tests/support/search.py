"""What the search's tests share: a small search against a server on loopback, and the content of its stores."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from tests.support.fake_server import FakeServerThread, count_tokens

from cotree.base.settings import hashed_settings
from cotree.models.client import Client
from cotree.models.endpoints import Endpoint
from cotree.search.journal import Journal, Progress
from cotree.search.settings import Trees
from cotree.search.store import StoredTree, TreeStore
from cotree.search.trees import TreeGrower, trees_of
from cotree.tasks import task
from cotree.tasks.base import Asked

SHORT = {"root": {"thinking": 2}, "thinking": {"answer": 1}, "reflection": {"thinking": 1}}


class PlainTemplate:
    """The least a tokenizer must do for prompts."""

    chat_template = "its own"
    bos_token = None

    def apply_chat_template(self, messages: list[dict[str, str]], **_: object) -> str:
        return "".join(f"[{m['role']}] {m['content']}\n" for m in messages) + "[assistant] "


PLAIN = PlainTemplate()


class ThinkingTemplate(PlainTemplate):
    """The template of a reasoning model: it opens the assistant's thinking, and leaves that of earlier turns out."""

    chat_template = "lays out <think> and </think>"

    def apply_chat_template(self, messages: list[dict[str, str]], **_: object) -> str:
        return super().apply_chat_template(messages) + "<think>\n"


class BaseTemplate(PlainTemplate):
    """A base model's tokenizer, which has no template."""

    chat_template = ""


def reply(prompt: str, seed: int, index: int) -> str:
    """Words for a thought; for an answer one of three numbers, so that both verdicts occur."""
    if prompt.endswith("{"):
        return str(1 + (seed + index) % 3)
    return f" step {(seed + 7 * index) % 11}"


def whole_reply(prompt: str, seed: int, index: int) -> str:
    """The same, and a whole chain where one is asked for."""
    if prompt.endswith(("{", "[assistant] ")) or "\n" in prompt[-40:]:
        return reply(prompt, seed, index)
    return f" I count.\nThe answer is: \\boxed{{{1 + (seed + index) % 3}}}\nmore"


def settings(**changes: Any) -> Trees:
    """A small search with a pattern of its own."""
    base = {"questions": {"letters": 16}, "roles": {"thinker": "one"}, "rollouts": 6, "leaves_per_round": 2}
    base |= {"ends": "line"}
    return Trees.model_validate(
        base | {"patterns": {"short": SHORT}, "max_reflections": 1, "trees_in_flight": 4} | changes
    )


def letters(count: int, start: int = 0) -> list[Asked]:
    known = task("letters")
    return [(known, question) for question in known.questions("train", start + count)[start:]]


def config_of(trees: Trees) -> str:
    """A stand-in for the fingerprint of a node's settings."""
    content = {key: value for key, value in hashed_settings(trees).items() if key != "questions"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@asynccontextmanager
async def endpoints_at(
    url: str, names: Iterable[str], *, template: Any = PLAIN, **options: Any
) -> AsyncIterator[dict[str, Endpoint]]:
    """A model of each name, all behind one URL; the options are the client's."""
    options = dict[str, Any](max_in_flight=64, count_tokens=count_tokens, backoff=0.01) | options
    async with AsyncExitStack() as stack:
        found = {}
        for name in names:
            client = Client(name, url, name, **options)
            await stack.enter_async_context(client)
            found[name] = Endpoint(name, (client,), template, name)
        yield found


async def grow(
    url: str,
    path: Path,
    trees: Trees,
    asked: Sequence[Asked] | None = None,
    *,
    journal: Path | None = None,
    others: Path | None = None,
    seed: int = 3,
    **options: Any,
) -> tuple[list[StoredTree], Progress]:
    """Grow the trees of the questions into a store; the trees in the questions' order. The journal is beside it."""
    asked = letters(sum(trees.questions.values())) if asked is None else asked
    async with endpoints_at(url, trees.writers, **options) as endpoints:
        with ExitStack() as stack:
            store = stack.enter_context(TreeStore(path))
            kept = stack.enter_context(Journal(journal or path.with_suffix(".journal")))
            config, budgets = config_of(trees), None
            if others is not None:
                other = stack.enter_context(TreeStore(others))
                budgets = {tree.question_name: tree.completion_tokens for tree in other.trees()}
            grower = TreeGrower(store, kept, trees, endpoints=endpoints, config=config, seed=seed, budgets=budgets)
            progress = await grower.grow(asked)
            return list(trees_of(store, asked, config)), progress


def run(path: Path, trees: Trees, **more: Any) -> tuple[list[StoredTree], Progress]:
    """`grow` against a fake server of its own (`server`: its options)."""
    with FakeServerThread(**({"reply": reply} | more.pop("server", {}))) as server:
        return asyncio.run(grow(server.url, path, trees, **more))


def unused(journal: Journal, questions: Sequence[str]) -> tuple[int, int]:
    """How many completions of the questions are in no current tree, and their tokens."""
    found = journal.unused(questions)
    return len(found), sum(found.values())


def content(trees: Iterable[StoredTree]) -> list[tuple[Any, ...]]:
    """What trees hold, without their ids, their configs and the seconds."""
    return [
        (
            tree.task, tree.question_id, tree.turn, tree.pattern, tree.rollouts, tree.stopped, tree.calls,
            tree.prompt_tokens, tree.completion_tokens, tuple(map(str, tree.messages)),
            *((n.node_id, n.parent_id, n.type, n.text, n.prefix, n.model, n.depth, n.visits, n.value, n.verdict,
               n.reward, n.answer, n.tokens, n.finish_reason, n.seed) for n in tree.nodes),
        )
        for tree in trees
    ]  # fmt: skip


def stored(path: Path) -> list[tuple[Any, ...]]:
    """The content of every tree in a store, with their ids."""
    with TreeStore(path) as store:
        trees = list(store.trees())
    return [(tree.tree_id, *row) for tree, row in zip(trees, content(trees), strict=True)]

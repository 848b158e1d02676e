"""Grow trees: ask the search for places, the models for text, the verifier for verdicts, and store what came.

Invariant: within a tree the rounds are serial and a round's rollouts are told in the order they were asked, so which
text stands where does not depend on latency or on how many trees grow at once. Every completion is journalled before
it is used.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from cotree.config import Search
from cotree.llm.client import Completion, Request
from cotree.llm.endpoints import Endpoint
from cotree.search.mcts import Rollout, Thought, TreeSearch
from cotree.search.prompts import ANSWER_STOPS, THOUGHT_STOPS, continuation, search_prompt, thought_text
from cotree.search.thoughts import PATTERNS, PREFIXES, ThoughtType, draw
from cotree.store import StoredNode, StoredTree, TreeStore
from cotree.tasks import Question, Task, Verdict


@dataclass
class Spent:
    """What one tree cost, journalled calls included; the model's own count of generated tokens."""

    calls: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def add(self, completion: Completion) -> None:
        """Count one completion."""
        self.calls += 1
        self.prompt_tokens += completion.prompt_tokens
        self.cached_tokens += completion.cached_tokens
        self.completion_tokens += completion.completion_tokens


@dataclass
class Progress:
    """What a search has done so far in this process, for whoever shows it."""

    trees_wanted: int
    trees: int = 0
    thoughts: int = 0
    calls: int = 0
    recalled: int = 0
    tokens: int = 0
    verdicts: dict[str, int] = field(default_factory=lambda: {"correct": 0, "wrong": 0, "no_answer": 0})


def role_of(kind: ThoughtType, roles: Mapping[str, str]) -> str:
    """The model's name for a thought type: its own role, else the reflector's for checking types, else the thinker."""
    if kind in roles:
        return roles[kind]
    if kind in ("reflection", "double_check") and "reflector" in roles:
        return roles["reflector"]
    return roles["thinker"]


def config_hash(settings: Search, roles: Mapping[str, str], identities: Mapping[str, str], seed: int) -> str:
    """Names everything that decides a tree: search settings, prefixes, patterns, who writes what, and the seed."""
    grown = {
        "search": settings.model_dump(exclude={"trees_in_flight"}),
        "patterns": {name: PATTERNS[name] for name in settings.patterns},
        "prefixes": dict(PREFIXES),
        "roles": {role: identities[model] for role, model in roles.items()},
        "seed": seed,
    }
    return hashlib.sha256(json.dumps(grown, sort_keys=True).encode()).hexdigest()[:16]


class Grower:
    """Grows the trees of one search config into one store."""

    def __init__(
        self,
        store: TreeStore,
        endpoints: Mapping[str, Endpoint],
        roles: Mapping[str, str],
        settings: Search,
        seed: int,
    ) -> None:
        self.store, self.endpoints, self.roles, self.settings, self.seed = store, endpoints, roles, settings, seed
        self.config = config_hash(settings, roles, {name: e.identity for name, e in endpoints.items()}, seed)

    async def grow_all(
        self, questions: Sequence[tuple[Task, Question]], on_progress: Callable[[Progress], None] | None = None
    ) -> Progress:
        """Grow one tree a question, `trees_in_flight` at once; trees that the store has are not grown again."""
        finished = self.store.finished(self.config)
        left = [(task, question) for task, question in questions if (question.task, question.id) not in finished]
        # Family after family: its trees share their worked examples, which then stay warm in the servers' caches.
        left.sort(key=lambda item: (item[0].name, item[1].family))
        progress = Progress(trees_wanted=len(questions), trees=len(questions) - len(left))
        gate = asyncio.Semaphore(self.settings.trees_in_flight)

        async def one(task: Task, question: Question) -> None:
            async with gate:
                await self.grow(task, question, progress)
            progress.trees += 1
            if on_progress is not None:
                on_progress(progress)

        async with asyncio.TaskGroup() as group:
            for task, question in left:
                group.create_task(one(task, question))
        return progress

    def _tree_id(self, question: Question) -> str:
        return hashlib.sha256(f"{question.task}/{question.id}/{self.config}".encode()).hexdigest()[:16]

    def _pattern(self, question: Question) -> str:
        """The pattern's name, drawn by seed for each tree."""
        return self.settings.patterns[draw(f"pattern/{self._tree_id(question)}", len(self.settings.patterns))]

    async def grow(self, task: Task, question: Question, progress: Progress) -> None:
        """Grow one question's tree and store it."""
        settings = self.settings
        tree_id = self._tree_id(question)
        name = self._pattern(question)
        examples = task.worked_examples(question)
        prompts = {m: search_prompt(endpoint.tokenizer, examples, question) for m, endpoint in self.endpoints.items()}
        search = TreeSearch(
            PATTERNS[name],
            f"{self.seed}/{tree_id}",
            rollouts=settings.rollouts,
            exploration=settings.exploration,
            max_depth=settings.max_depth,
            max_reflections=settings.max_reflections,
        )
        spent = Spent()
        while not search.done:
            rollouts = search.ask(settings.leaves_per_round)
            async with asyncio.TaskGroup() as group:
                for rollout in rollouts:
                    group.create_task(self._roll(rollout, task, question, prompts, tree_id, spent, progress))
            for rollout in rollouts:
                search.tell(rollout)
                for node in rollout.written:
                    progress.thoughts += 1
                    if node.verdict is not None:
                        progress.verdicts[node.verdict.kind] += 1
        self.store.put(_stored(search, question, tree_id, self.config, name, spent))

    async def _roll(
        self,
        rollout: Rollout,
        task: Task,
        question: Question,
        prompts: Mapping[str, str],
        tree_id: str,
        spent: Spent,
        progress: Progress,
    ) -> None:
        """Write one rollout's thoughts until it has reached a judged leaf."""
        settings = self.settings
        while (wanted := rollout.wanted) is not None:
            answer = wanted.kind == "answer"
            model = role_of(wanted.kind, self.roles)
            seed = draw(f"request:{wanted.seed_key}", 2**31)
            request = Request(
                prompt=continuation(prompts[model], wanted.node, wanted.prefix),
                n=wanted.n,
                max_tokens=settings.max_thought_tokens,
                temperature=settings.temperature,
                top_p=settings.top_p,
                seed=seed,
                stop=ANSWER_STOPS if answer else THOUGHT_STOPS,
            )
            completion = await self._complete(model, request, tree_id, progress)
            spent.add(completion)
            thoughts = []
            for choice in completion.choices:
                text = thought_text(wanted.kind, wanted.prefix, choice.text)
                verdict: Verdict | None = None
                if choice.finish_reason == "length":
                    verdict = Verdict("no_answer", 0.0, None, "thought cut by max_thought_tokens")
                elif answer:
                    verdict = task.judge(question, text)
                thoughts.append(Thought(text, choice.tokens, choice.finish_reason, verdict))
            rollout.feed(thoughts, model, seed, completion.seconds)

    async def _complete(self, model: str, request: Request, tree_id: str, progress: Progress) -> Completion:
        """From the journal, or from the model and then into the journal."""
        endpoint = self.endpoints[model]
        key = request.key(endpoint.identity)
        recalled = self.store.recall(key)
        if recalled is not None:
            progress.recalled += 1
            return Completion.from_json(recalled)
        completion = await endpoint.client.complete(request)
        self.store.journal(key, tree_id, model, completion.to_json())
        progress.calls += 1
        progress.tokens += completion.completion_tokens
        return completion


def _stored(
    search: TreeSearch, question: Question, tree_id: str, config: str, pattern: str, spent: Spent
) -> StoredTree:
    nodes = []
    for node in search.nodes:
        verdict = node.verdict
        nodes.append(
            StoredNode(
                node_id=node.id,
                parent_id=None if node.parent is None else node.parent.id,
                type=node.kind,
                text=node.text,
                prefix=node.prefix,
                model=node.model,
                depth=node.depth,
                visits=node.visits,
                value=node.value,
                verdict=None if verdict is None else verdict.kind,
                reward=None if verdict is None else verdict.reward,
                answer=None if verdict is None else verdict.answer,
                tokens=node.tokens,
                finish_reason=node.finish_reason,
                seed=node.seed,
                seconds=node.seconds,
            )
        )
    return StoredTree(
        tree_id, question.task, question.id, config, question.family, list(question.messages), question.gold, pattern,
        spent.calls, spent.prompt_tokens, spent.cached_tokens, spent.completion_tokens, nodes,
    )  # fmt: skip

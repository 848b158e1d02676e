"""One question's tree while it grows: what the search wants is asked of the models, what comes is judged and told.

Invariant: rounds are serial and a round's rollouts are told in the order in which they were asked, so which text stands
where does not depend on latency or on how many trees grow at once. A round that fails leaves no trace in the tree.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass

from cotree.config import Role, Search, Writer
from cotree.config import Thought as ThoughtSettings
from cotree.llm.client import Completion, Request
from cotree.llm.endpoints import Prompt
from cotree.search.calls import Calls
from cotree.search.mcts import Rollout, Thought, TreeSearch, Wanted
from cotree.search.prompts import (
    ANSWER_STOPS,
    THOUGHT_STOPS,
    chain_text,
    continuation,
    search_messages,
    thought_text,
)
from cotree.search.reward import JUDGE_PREFIX, RewardFunction, call, judge_messages, share_of_yes
from cotree.search.stopping import Tally
from cotree.search.thoughts import PATTERNS, PREFIXES, draw
from cotree.store import StoredNode, StoredTree
from cotree.tasks import Question, Task, Verdict

_AS_SHIPPED = ThoughtSettings()


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


def writers_of(kind: str, roles: Mapping[str, Role]) -> Role:
    """Who writes a thought type: its own role, else the reflector for checking types, else the thinker."""
    if kind in roles:
        return roles[kind]
    if kind in ("reflection", "double_check") and "reflector" in roles:
        return roles["reflector"]
    return roles["thinker"]


def patterns_of(settings: Search) -> dict[str, Mapping[str, Mapping[str, int]]]:
    """The patterns that a search draws from, by name: shipped ones and the recipe's own."""
    return {name: settings.own_patterns.get(name) or PATTERNS[name] for name in settings.patterns}


def prefixes_of(settings: Search) -> dict[str, tuple[str, ...]]:
    """The words each thought type may begin with, the recipe's own in place of the shipped ones."""
    own = {kind: thought.prefixes for kind, thought in settings.thoughts.items() if thought.prefixes}
    return {**PREFIXES, **own}


class Growth:
    """The tree of one question: `run` grows it until its budget or a stop condition ends it."""

    def __init__(
        self,
        task: Task,
        question: Question,
        tree_id: str,
        calls: Calls,
        roles: Mapping[str, Role],
        settings: Search,
        seed: int,
        reward: RewardFunction | None = None,
    ) -> None:
        self.task, self.question, self.tree_id = task, question, tree_id
        self.calls, self.roles, self.settings, self.reward = calls, roles, settings, reward
        patterns = patterns_of(settings)
        self.pattern = settings.patterns[draw(f"pattern/{tree_id}", len(settings.patterns))]
        self.search = TreeSearch(
            patterns[self.pattern],
            f"{seed}/{tree_id}",
            rollouts=settings.rollouts,
            exploration=settings.exploration,
            max_depth=settings.max_depth,
            max_reflections=settings.max_reflections,
            prefixes=prefixes_of(settings),
        )
        self.tally = Tally()
        self.spent = Spent()
        self.stopped: str | None = None
        self._messages = search_messages(task.worked_examples(question), question)
        self._prompts: dict[str, Prompt] = {}

    async def run(self) -> None:
        """Rounds until the search is done."""
        started = time.monotonic()
        while not self.search.done:
            await self._round()
            seconds = time.monotonic() - started
            self.stopped = self.tally.reason(self.settings.stop, self.spent.completion_tokens, seconds)
            if self.stopped is not None:
                self.search.stop()

    def extend(self, rollouts: int) -> None:
        """More rollouts than the recipe's, for `run` to spend."""
        self.search.extend(rollouts)

    async def _round(self) -> None:
        rollouts = self.search.ask(self.settings.leaves_per_round)
        try:
            if len(rollouts) == 1:
                await self._roll(rollouts[0])
            else:
                async with asyncio.TaskGroup() as group:
                    for rollout in rollouts:
                        group.create_task(self._roll(rollout))
        except BaseException:
            for rollout in rollouts:
                self.search.fail(rollout)
            raise
        progress = self.calls.progress
        for rollout in rollouts:
            self.search.tell(rollout)
            progress.thoughts += len(rollout.written)
            for node in rollout.written:
                if node.verdict is not None:
                    self.tally.add(node)
                    progress.verdicts[node.verdict.kind] += 1

    async def _roll(self, rollout: Rollout) -> None:
        """Write one rollout's thoughts until it has reached a judged leaf."""
        while (wanted := rollout.wanted) is not None:
            how = self.settings.thoughts.get(wanted.kind, _AS_SHIPPED)
            if how.text is not None:
                rollout.feed([Thought(how.text.strip(), 0, "stop", None)], "", 0, 0.0)
                continue
            writer = self._writer(wanted)
            seed = draw(f"request:{wanted.seed_key}", 2**31)
            completion = await self._ask(
                writer,
                self._prompt(writer.model),
                continuation(wanted.node, wanted.prefix),
                n=wanted.n,
                max_tokens=how.max_tokens or self.settings.max_thought_tokens,
                seed=seed,
                stop=ANSWER_STOPS if wanted.kind == "answer" else THOUGHT_STOPS,
            )
            thoughts = [
                await self._thought(wanted, how, choice.text, choice.tokens, choice.finish_reason)
                for choice in completion.choices
            ]
            rollout.feed(thoughts, writer.model, seed, completion.seconds)

    def _writer(self, wanted: Wanted) -> Writer:
        writers = writers_of(wanted.kind, self.roles)
        return writers[draw(f"writer:{wanted.seed_key}", len(writers)) if len(writers) > 1 else 0]

    def _prompt(self, model: str) -> Prompt:
        if model not in self._prompts:
            self._prompts[model] = self.calls.endpoints[model].begin(self._messages)
        return self._prompts[model]

    async def _ask(
        self, writer: Writer, prompt: Prompt, text: str, *, n: int, max_tokens: int, seed: int, stop: tuple[str, ...]
    ) -> Completion:
        settings = self.settings
        request = Request(
            prompt=prompt.text + text,
            n=n,
            max_tokens=max_tokens,
            temperature=settings.temperature if writer.temperature is None else writer.temperature,
            top_p=settings.top_p if writer.top_p is None else writer.top_p,
            seed=seed,
            stop=stop,
            messages=prompt.messages,
        )
        completion = await self.calls.complete(writer.model, request, self.tree_id)
        self.spent.add(completion)
        return completion

    async def _thought(
        self, wanted: Wanted, how: ThoughtSettings, written: str, tokens: int, finish_reason: str
    ) -> Thought:
        in_line = wanted.node.is_open and wanted.kind == wanted.node.kind and not wanted.prefix
        cut = finish_reason == "length"
        is_open = cut and how.ends == "tokens"
        text = thought_text(wanted.kind, wanted.prefix, written, in_line=in_line, is_open=is_open)
        if cut and not is_open:
            verdict = Verdict("no_answer", 0.0, None, "thought cut by max_tokens")
            return Thought(text, tokens, finish_reason, verdict)
        if wanted.kind != "answer":
            return Thought(text, tokens, finish_reason, None)
        verdict = await self.task.judge_async(self.question, text)
        return Thought(text, tokens, finish_reason, verdict, await self._reward(wanted, text, verdict))

    async def _reward(self, wanted: Wanted, answer: str, verdict: Verdict) -> float:
        settings = self.settings.reward
        if settings is None or verdict.kind == "no_answer":
            return verdict.reward
        before = chain_text(wanted.node.chain())
        text = f"{before}\n{answer}" if before else answer
        if self.reward is not None:
            return call(self.reward, self.question, text, verdict)
        assert settings.judge is not None
        completion = await self._ask(
            Writer(model=settings.judge),
            self.calls.endpoints[settings.judge].begin(judge_messages(self.question, text)),
            JUDGE_PREFIX,
            n=settings.samples,
            max_tokens=4,
            seed=draw(f"judge:{wanted.seed_key}", 2**31),
            stop=("\n",),
        )
        return share_of_yes([choice.text for choice in completion.choices])

    def stored(self, config: str) -> StoredTree:
        """The tree as the store keeps it."""
        question, spent, search = self.question, self.spent, self.search
        stopped = self.stopped or ("exhausted" if search.root.open_below == 0 else "rollouts")
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
                    reward=None if verdict is None else node.reward,
                    answer=None if verdict is None else verdict.answer,
                    tokens=node.tokens,
                    finish_reason=node.finish_reason,
                    seed=node.seed,
                    seconds=node.seconds,
                )
            )
        return StoredTree(
            self.tree_id, question.task, question.id, question.turn, config, question.family, list(question.messages),
            question.gold, self.pattern, search.rollouts, stopped, spent.calls, spent.prompt_tokens,
            spent.cached_tokens, spent.completion_tokens, nodes,
        )  # fmt: skip

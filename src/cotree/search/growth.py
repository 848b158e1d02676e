"""One question's tree while it grows: what the search wants is asked of the models, what comes is judged and told.

Who judges is a part: `Verified` is the search's own, decoding brings one that has no gold (`decode.WithoutGold`).

Invariant: rounds are serial and a round's rollouts are told in the order in which they were asked, so which text stands
where does not depend on latency or on how many trees grow at once. A round that fails leaves no trace in the tree.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from cotree.config import Reward, Role, Search, Writer
from cotree.config import Thought as ThoughtSettings
from cotree.llm.client import Choice, Completion, Request
from cotree.llm.endpoints import Prompt
from cotree.search.calls import Calls
from cotree.search.mcts import Node, Rollout, Thought, TreeSearch, Wanted
from cotree.search.prompts import (
    THOUGHT_STOPS,
    chain_text,
    continuation,
    in_box,
    search_messages,
    thought_text,
)
from cotree.search.reward import (
    JUDGE_PREFIX,
    RewardFunction,
    call,
    combined,
    judge_messages,
    share_of_yes,
    steps_messages,
)
from cotree.search.stopping import Tally
from cotree.search.thoughts import ANSWERS, PATTERNS, PREFIXES, draw
from cotree.store import StoredNode, StoredTree
from cotree.tasks import Question, Task, Verdict
from cotree.tasks.base import AnswerForm

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


def prefixes_of(settings: Search, form: AnswerForm = "boxed") -> dict[str, tuple[str, ...]]:
    """The words each thought type may begin with, the recipe's own in place of the shipped ones.

    A free text always begins after its tag, by which the verifier finds it; an own answer prefix opens a box.
    """
    own = {kind: thought.prefixes for kind, thought in settings.thoughts.items() if thought.prefixes}
    return {**PREFIXES, **own, **({"answer": (ANSWERS[form].prefix,)} if form == "text" else {})}


class Judge(Protocol):
    """What an answer is worth, and which answers are doubted. `logprobs`: it needs the tokens' probabilities."""

    logprobs: bool

    async def worth(self, growth: Growth, answer: Node) -> tuple[Verdict | None, float]:
        """The verdict, None where nobody can know it, and the reward of an answer that ends its chain.

        Its `path` seeds what is asked about it.
        """

    async def doubts(self, growth: Growth, new: Sequence[Node]) -> Sequence[Node]:
        """After a round that brought these leaves: the answers that earn a reflection."""


class Verified:
    """The task's verifier, and the recipe's reward where it has one. A wrong answer is doubted."""

    logprobs = False

    def __init__(self, function: RewardFunction | None = None) -> None:
        self.function = function

    async def worth(self, growth: Growth, answer: Node) -> tuple[Verdict, float]:
        """The verifier's verdict; its reward, or the recipe's for an answer."""
        verdict = await growth.task.judge_async(growth.question, answer.text)
        if growth.settings.reward is None or verdict.kind == "no_answer":
            return verdict, verdict.reward
        return verdict, await growth.reward(answer, verdict, self.function)

    async def doubts(self, growth: Growth, new: Sequence[Node]) -> Sequence[Node]:
        """The wrong ones of the round."""
        return [leaf for leaf in new if leaf.verdict is not None and leaf.verdict.kind == "wrong"]


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
        judge: Judge | None = None,
    ) -> None:
        self.task, self.question, self.tree_id = task, question, tree_id
        self.calls, self.roles, self.settings, self.judge = calls, roles, settings, judge or Verified()
        patterns = patterns_of(settings)
        self.pattern = settings.patterns[draw(f"pattern/{tree_id}", len(settings.patterns))]
        self.search = TreeSearch(
            patterns[self.pattern],
            f"{seed}/{tree_id}",
            rollouts=settings.rollouts,
            exploration=settings.exploration,
            max_depth=settings.max_depth,
            max_reflections=settings.max_reflections,
            prefixes=prefixes_of(settings, task.answer_form),
        )
        self.tally = Tally()
        self.spent = Spent()
        self.stopped: str | None = None
        self._messages = search_messages(task, question)
        self._prompts: dict[str, Prompt] = {}

    async def run(self) -> None:
        """Rounds until the search is done."""
        started = time.monotonic()
        while not self.search.done:
            await self.round()
            seconds = time.monotonic() - started
            self.stopped = self.tally.reason(self.settings.stop, self.spent.completion_tokens, seconds)
            if self.stopped is not None:
                self.search.stop()

    def extend(self, rollouts: int) -> None:
        """More rollouts than the recipe's, for `run` to spend."""
        self.search.extend(rollouts)

    async def round(self) -> None:
        """Up to `leaves_per_round` rollouts at once, told in the order in which they were asked."""
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
        progress, leaves = self.calls.progress, list[Node]()
        for rollout in rollouts:
            self.search.tell(rollout)
            progress.thoughts += len(rollout.written)
            leaves += [node for node in rollout.written if node.reward is not None]
        for leaf in leaves:
            self.tally.add(leaf)
            if leaf.verdict is not None:
                progress.verdicts[leaf.verdict.kind] += 1
        for doubted in await self.judge.doubts(self, leaves):
            self.search.reflect(doubted)

    async def _roll(self, rollout: Rollout) -> None:
        """Write one rollout's thoughts until it has reached a judged leaf."""
        while (wanted := rollout.wanted) is not None:
            rollout.feed(*await self.write(wanted))

    async def write(self, wanted: Wanted) -> tuple[list[Thought], str, int, float]:
        """The thoughts that are wanted, judged where they end a chain; the model that wrote, its seed and seconds."""
        how = self.settings.thoughts.get(wanted.kind, _AS_SHIPPED)
        if how.text is not None:
            return [Thought(how.text.strip(), 0, "stop", None)], "", 0, 0.0
        writer = self.writer(wanted.kind, wanted.seed_key)
        seed = draw(f"request:{wanted.seed_key}", 2**31)
        completion = await self.ask(
            writer,
            self.prompt(writer.model),
            continuation(wanted.node, wanted.prefix),
            n=wanted.n,
            max_tokens=how.max_tokens or self.settings.max_thought_tokens,
            seed=seed,
            stop=ANSWERS[self.task.answer_form].stops if wanted.kind == "answer" else THOUGHT_STOPS,
            logprobs=self.judge.logprobs,
        )
        thoughts = [await self._thought(wanted, how, choice) for choice in completion.choices]
        return thoughts, writer.model, seed, completion.seconds

    def writer(self, kind: str, key: str) -> Writer:
        """Who writes a thought type; of several one is drawn by the key."""
        writers = writers_of(kind, self.roles)
        return writers[draw(f"writer:{key}", len(writers)) if len(writers) > 1 else 0]

    def prompt(self, model: str) -> Prompt:
        """The question with its worked examples, as the model reads it."""
        if model not in self._prompts:
            self._prompts[model] = self.calls.endpoints[model].begin(self._messages)
        return self._prompts[model]

    async def ask(
        self,
        writer: Writer,
        prompt: Prompt,
        text: str,
        *,
        n: int,
        max_tokens: int,
        seed: int,
        stop: tuple[str, ...],
        logprobs: bool = False,
    ) -> Completion:
        """n continuations of `text` by a writer, counted in `spent`."""
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
            logprobs=logprobs,
        )
        completion = await self.calls.complete(writer.model, request, self.tree_id)
        self.spent.add(completion)
        return completion

    async def _thought(self, wanted: Wanted, how: ThoughtSettings, choice: Choice) -> Thought:
        written, finish_reason, above = choice.text, choice.finish_reason, wanted.node
        in_line = wanted.node.is_open and wanted.kind == wanted.node.kind and not wanted.prefix
        form = self.task.answer_form
        closed = wanted.kind == "answer" and form == "boxed" and in_box(written)[1]
        cut = finish_reason == "length" and not closed
        is_open = cut and how.ends == "tokens"
        text = thought_text(wanted.kind, wanted.prefix, written, form, in_line=in_line, is_open=is_open)
        if cut and not is_open:
            worth: tuple[Verdict | None, float | None] = (
                Verdict("no_answer", 0.0, None, "thought cut by max_tokens"),
                None,
            )
        elif wanted.kind != "answer":
            worth = None, None
        else:
            worth = await self.judge.worth(
                self,
                Node(
                    above, wanted.kind, text, wanted.seed_key, above.depth + 1, wanted.prefix,
                    tokens=choice.tokens, logprob=choice.logprob or 0.0,
                ),
            )  # fmt: skip
        return Thought(text, choice.tokens, finish_reason, *worth, choice.logprob or 0.0)

    async def reward(self, answer: Node, verdict: Verdict | None, function: RewardFunction | None) -> float:
        """What the settings' `reward` says that a chain is worth so far; `function` is theirs, loaded."""
        settings = self.settings.reward
        assert settings is not None
        text = chain_text(answer.chain())
        if function is not None:
            return call(function, self.question, text, verdict)
        if settings.process is not None:
            return await self._score(settings, settings.process, [node.text for node in answer.chain()])
        assert settings.judge is not None
        completion = await self.ask(
            Writer(model=settings.judge),
            self.calls.endpoints[settings.judge].begin(judge_messages(self.question, text)),
            JUDGE_PREFIX,
            n=settings.samples,
            max_tokens=4,
            seed=draw(f"judge:{answer.path}", 2**31),
            stop=("\n",),
        )
        return share_of_yes([choice.text for choice in completion.choices])

    async def _score(self, settings: Reward, model: str, thoughts: Sequence[str]) -> float:
        """The process reward of a chain."""
        messages = steps_messages(self.question, thoughts, settings.separator)
        request = Request("", 1, 1, 0.0, 1.0, 0, (), messages, scores=True)
        completion = await self.calls.complete(model, request, self.tree_id)
        self.spent.add(completion)
        return combined(json.loads(completion.choices[0].text), len(thoughts), settings.combine)

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
                    reward=node.reward,
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

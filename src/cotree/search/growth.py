"""One question's tree while it grows: what the search wants is asked of the models, what comes is judged and told.

Who judges is a part: `Verified` is the search's own, decoding brings one that has no gold (`decode.WithoutGold`).

Invariant: rounds are serial and a round's rollouts are told in the order in which they were asked, so which text stands
where does not depend on latency or on how many trees grow at once. A round that fails leaves no trace in the tree.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from cotree.experiment.recipe import Role, Search, Thought, Writer
from cotree.models.chat import Prompt
from cotree.models.client import Choice, Completion, Counters, Request
from cotree.search.calls import Calls
from cotree.search.mcts import Node, Rollout, TreeSearch, Wanted
from cotree.search.prompts import THOUGHT_STOPS, continuation, in_box, search_messages, thought_text
from cotree.search.reward import reward_of
from cotree.search.stopping import Tally
from cotree.search.store import StoredNode, StoredTree
from cotree.search.thoughts import ANSWERS, PATTERNS, PREFIXES, draw
from cotree.tasks import Question, Task, Verdict
from cotree.tasks.base import AnswerForm, Message

_AS_SHIPPED = Thought()


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
        """The verdict, None where nobody can know it, and the reward of an answer that ends its chain."""

    async def doubts(self, growth: Growth, new: Sequence[Node]) -> Sequence[Node]:
        """After a round that brought these leaves: the answers that earn a reflection."""


class Verified:
    """The task's verifier, and the recipe's reward where it has one. A wrong answer is doubted."""

    logprobs = False

    async def worth(self, growth: Growth, answer: Node) -> tuple[Verdict, float]:
        """The verifier's verdict; its reward, or the recipe's for an answer."""
        verdict = await growth.task.judge_async(growth.question, answer.text)
        if growth.settings.reward is None or verdict.kind == "no_answer":
            return verdict, verdict.reward
        return verdict, await reward_of(growth, answer.chain(), verdict)

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
        self.pattern = settings.patterns[draw(f"pattern/{tree_id}", len(settings.patterns))]
        pattern, prefixes = patterns_of(settings)[self.pattern], prefixes_of(settings, task.answer_form)
        self.search = TreeSearch(pattern, f"{seed}/{tree_id}", settings, prefixes)
        self.tally = Tally()
        self.spent = Counters()  # of this tree alone, journalled calls included
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
                self.search.rollouts_left = 0

    async def round(self) -> None:
        """Up to `leaves_per_round` rollouts at once, told in the order in which they were asked."""
        rollouts = self.search.ask(self.settings.leaves_per_round)
        try:
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
            rollout.feed(await self.write(wanted))

    async def write(self, wanted: Wanted) -> list[Node]:
        """The thoughts that are wanted, judged where they end a chain."""
        how = self.settings.thoughts.get(wanted.kind, _AS_SHIPPED)
        if how.text is not None:
            return [wanted.thought(0, how.text.strip())]
        writer = self.writer(wanted.kind, wanted.seed_key)
        seed = draw(f"request:{wanted.seed_key}", 2**31)
        completion = await self.ask(
            writer,
            continuation(wanted.node, wanted.prefix),
            n=wanted.n,
            max_tokens=how.max_tokens or self.settings.max_thought_tokens,
            seed=seed,
            stop=ANSWERS[self.task.answer_form].stops if wanted.kind == "answer" else THOUGHT_STOPS,
        )
        thoughts = []
        for sample, choice in enumerate(completion.choices):
            thought = await self._thought(wanted, how, sample, choice)
            thought.model, thought.seed, thought.seconds = writer.model, seed, completion.seconds
            thoughts.append(thought)
        return thoughts

    async def _thought(self, wanted: Wanted, how: Thought, sample: int, choice: Choice) -> Node:
        above, form = wanted.node, self.task.answer_form
        closed = wanted.kind == "answer" and form == "boxed" and in_box(choice.text)[1]
        cut = choice.finish_reason == "length" and not closed
        is_open, in_line = cut and how.ends == "tokens", above.is_open and wanted.kind == above.kind
        text = thought_text(wanted.kind, wanted.prefix, choice.text, form, in_line=in_line, is_open=is_open)
        thought = wanted.thought(sample, text)
        thought.tokens, thought.finish_reason = choice.tokens, choice.finish_reason
        thought.logprob = choice.logprob or 0.0
        if cut and not is_open:
            thought.verdict, thought.reward = Verdict("no_answer", 0.0, None, "thought cut by max_tokens"), 0.0
        elif wanted.kind == "answer":
            thought.verdict, thought.reward = await self.judge.worth(self, thought)
        return thought

    def writer(self, kind: str, key: str) -> Writer:
        """Who writes a thought type; of several one is drawn by the key."""
        writers = writers_of(kind, self.roles)
        return writers[draw(f"writer:{key}", len(writers))]

    async def ask(
        self,
        writer: Writer,
        text: str,
        *,
        n: int,
        max_tokens: int,
        seed: int,
        stop: tuple[str, ...],
        messages: Sequence[Message] | None = None,
    ) -> Completion:
        """n continuations of `text`, the assistant's words so far, in answer to `messages` (by default the question
        with its worked examples)."""
        endpoint, settings = self.calls.endpoints[writer.model], self.settings
        if messages is not None:
            prompt = endpoint.begin(messages)
        elif writer.model in self._prompts:
            prompt = self._prompts[writer.model]
        else:
            prompt = self._prompts[writer.model] = endpoint.begin(self._messages)
        return await self.complete(
            writer.model,
            Request(
                prompt=prompt.text + text,
                n=n,
                max_tokens=max_tokens,
                temperature=settings.temperature if writer.temperature is None else writer.temperature,
                top_p=settings.top_p if writer.top_p is None else writer.top_p,
                seed=seed,
                stop=stop,
                messages=prompt.messages,
                logprobs=self.judge.logprobs,
            ),
        )

    async def complete(self, model: str, request: Request) -> Completion:
        """A completion, counted in `spent`."""
        completion = await self.calls.complete(model, request, self.tree_id)
        self.spent.requests += 1
        self.spent.add(completion)
        return completion

    def stored(self, config: str) -> StoredTree:
        """The tree as the store keeps it."""
        question, spent, search = self.question, self.spent, self.search
        stopped = self.stopped or ("exhausted" if search.root.open_below == 0 else "rollouts")
        nodes = [
            StoredNode(
                node.id, None if node.parent is None else node.parent.id, node.kind, node.text, node.prefix, node.model,
                node.depth, node.visits, node.value, None if node.verdict is None else node.verdict.kind, node.reward,
                None if node.verdict is None else node.verdict.answer, node.tokens, node.finish_reason, node.seed,
                node.seconds,
            )
            for node in search.nodes
        ]  # fmt: skip
        return StoredTree(
            self.tree_id, question.task, question.id, question.turn, config, question.family, list(question.messages),
            question.gold, self.pattern, search.rollouts, stopped, spent.requests, spent.prompt_tokens,
            spent.cached_tokens, spent.completion_tokens, nodes,
        )  # fmt: skip

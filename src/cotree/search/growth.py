"""One question's tree while it grows: the search's requests are asked of the models, and what comes back is scored.

How answers are scored is a part of its own: `VerifierScorer` here, one that knows no gold answer in `decode`.

Invariant: rounds are serial, and a round's rollouts are merged in the order in which they were asked, so which text
stands where does not depend on latency or on how many trees grow at once.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol

from cotree.models.client import Completion, Counters, Request
from cotree.models.wire import Prompt
from cotree.search.journal import SearchModels
from cotree.search.mcts import Node, Rollout, ThoughtRequest, TreeSearch
from cotree.search.reward import chain_reward
from cotree.search.settings import Role, Search, Thought, Writer
from cotree.search.thoughts import (
    ANSWER_FORMATS,
    PREFIXES,
    THOUGHT_STOPS,
    chain_text,
    draw,
    draw_pattern,
    question_name,
    read_box,
    search_messages,
    thought_text,
)
from cotree.tasks import Question, Task, Verdict


class Scorer(Protocol):
    """Gives answers their rewards, and names those that a reflection should follow.

    needs_logprobs: requests ask for the probabilities of tokens.
    """

    needs_logprobs: bool

    async def score_answer(self, growth: Growth, answer: Node) -> tuple[Verdict | None, float]:
        """The verdict (None where nobody can know it) and the reward in [0, 1] of an answer."""

    async def answers_to_reflect_on(self, growth: Growth, new: Sequence[Node]) -> Sequence[Node]:
        """The answers that a reflection should follow, after a round that added the leaves `new`."""


class VerifierScorer:
    """Scores answers by the task's verifier, or by the recipe's `reward` if it has one; reflects on wrong ones."""

    needs_logprobs = False

    async def score_answer(self, growth: Growth, answer: Node) -> tuple[Verdict, float]:
        """The verifier's verdict, and its reward or the recipe's; without an answer the reward is the verifier's, 0."""
        verdict = await growth.task.judge_async(growth.question, answer.text, answer.finish_reason)
        if growth.settings.reward is None or verdict.kind in ("no_answer", "undecided"):
            return verdict, verdict.reward
        return verdict, await chain_reward(growth, answer.chain(), verdict)

    async def answers_to_reflect_on(self, growth: Growth, new: Sequence[Node]) -> Sequence[Node]:
        """The wrong ones of the new answers."""
        return [leaf for leaf in new if leaf.verdict == "wrong"]


class Growth:
    """Grows the tree of one question.

    seed: seeds the pattern, and with its place in the tree every thought's prefix, writer and request. Budgets, C and
        stop conditions play no part in these, so a search that is repeated with others asks the same requests.
    scorer: `VerifierScorer` by default.

    `spent` counts what this tree was sent and cost, requests that the journal answered included; `used` are the keys of
    their completions; `stopped` is the stop condition that ended it, None as long as none has.
    """

    def __init__(
        self,
        task: Task,
        question: Question,
        models: SearchModels,
        settings: Search,
        *,
        roles: Mapping[str, Role],
        seed: str,
        scorer: Scorer | None = None,
    ) -> None:
        self.task, self.question, self.models, self.settings = task, question, models, settings
        self.roles, self.seed, self.scorer = roles, seed, scorer or VerifierScorer()
        self.answer_format = ANSWER_FORMATS[task.answer_form]
        self.pattern = draw_pattern(settings.patterns, seed)
        self.search = TreeSearch(settings.patterns[self.pattern], seed, settings, self._prefixes())
        self.spent = Counters()
        self.used: list[bytes] = []
        self.stopped: str | None = None
        self.started = time.monotonic()
        self._messages = search_messages(task, question)
        self._prompts: dict[str, Prompt] = {}

    def _prefixes(self) -> dict[str, Sequence[str]]:
        """The prefixes of each thought type, the recipe's own in place of the shipped ones."""
        # A type that is a fixed text needs none.
        prefixes: dict[str, Sequence[str]] = {**dict.fromkeys(self.settings.thoughts, ("",)), **PREFIXES}
        prefixes |= {kind: thought.prefixes for kind, thought in self.settings.thoughts.items() if thought.prefixes}
        if self.task.answer_form == "text":
            # The verifier finds a free text by its tag; an own answer prefix opens a box.
            prefixes["answer"] = [self.answer_format.prefix]
        return prefixes

    async def run(self) -> None:
        """Grow in rounds until the rollouts are spent, nothing is left to grow, or a stop condition is met."""
        self.started = time.monotonic()
        while not self.search.done:
            await self.grow_round()
            self.stopped = self.stop_condition()
            if self.stopped is not None:
                self.search.rollouts_left = 0

    def stop_condition(self) -> str | None:
        """The name of the condition of `settings.stop` that is met by now, None as long as none is."""
        stop, leaves = self.settings.stop, self.search.leaves
        correct = sum(leaf.verdict == "correct" for leaf in leaves)
        # Chains of equal text count once.
        chains = {(chain_text(leaf.chain()), leaf.verdict) for leaf in leaves} if stop.correct or stop.wrong else set()
        distinct = Counter(verdict for _, verdict in chains)
        met = {
            "enough": chains and distinct["correct"] >= stop.correct and distinct["wrong"] >= stop.wrong,
            "easy": stop.easy is not None and correct == len(leaves) >= stop.easy,
            "hopeless": stop.hopeless is not None and not correct and len(leaves) >= stop.hopeless,
            "tokens": stop.tokens is not None and self.spent.completion_tokens >= stop.tokens,
            "deadline": stop.seconds is not None and time.monotonic() - self.started >= stop.seconds,
        }
        return next((name for name, is_met in met.items() if is_met), None)

    async def grow_round(self) -> None:
        """Make up to `leaves_per_round` rollouts at once, and merge them in the order in which they were asked."""
        rollouts, before = self.search.ask(self.settings.leaves_per_round), len(self.search.leaves)
        async with asyncio.TaskGroup() as group:
            for rollout in rollouts:
                group.create_task(self._write_rollout(rollout))
        for rollout in rollouts:
            self.search.tell(rollout)
        for answer in await self.scorer.answers_to_reflect_on(self, self.search.leaves[before:]):
            self.search.add_reflection(answer)

    async def _write_rollout(self, rollout: Rollout) -> None:
        """Write a rollout's thoughts until it has reached a judged leaf."""
        while (request := rollout.pending) is not None:
            rollout.feed(await self.write_thoughts(request))

    async def write_thoughts(self, request: ThoughtRequest) -> list[Node]:
        """The thoughts of a request, one node a sample; scored where they end a chain."""
        settings, above, form = self.settings.thought(request.type), request.node, self.task.answer_form
        if settings.text is not None:
            return [request.thought(0, settings.text.strip())]
        thoughts = await self.sample(
            request,
            self.draw_writer(request.type, request.seed_key),
            max_tokens=settings.max_tokens or self.settings.max_thought_tokens,
            stop=self.answer_format.stops if request.type == "answer" else THOUGHT_STOPS,
        )
        for thought in thoughts:
            closed = request.type == "answer" and form == "boxed" and read_box(thought.text)[1]
            cut = thought.finish_reason == "length" and not closed
            is_open, in_line = cut and settings.ends == "tokens", above.is_open and request.type == above.type
            thought.text = thought_text(
                request.type, request.prefix, thought.text, form, in_line=in_line, is_open=is_open
            )
            if cut and not is_open:
                thought.verdict, thought.reward = "no_answer", 0.0
            elif request.type == "answer":
                await self.score(thought)
        return thoughts

    async def sample(
        self, request: ThoughtRequest, writer: Writer, *, max_tokens: int, stop: tuple[str, ...]
    ) -> list[Node]:
        """A node for each sample that continues a request's chain and prefix; its text is what the model wrote."""
        beginning = chain_text([*request.node.chain(), request.thought(0, request.prefix)])
        if writer.model not in self._prompts:
            self._prompts[writer.model] = self.models.endpoints[writer.model].prompt(self._messages)
        prompt, seed = self._prompts[writer.model], draw(f"request:{request.seed_key}", 2**31)
        completion = await self.continue_text(
            writer, prompt, beginning, n=request.n, max_tokens=max_tokens, seed=seed, stop=stop
        )
        thoughts = []
        for number, choice in enumerate(completion.choices):
            thought = request.thought(number, choice.text)
            thought.model, thought.seed, thought.seconds = writer.model, seed, completion.seconds
            thought.tokens, thought.finish_reason = choice.tokens, choice.finish_reason
            thought.logprob = choice.logprob or 0.0
            thoughts.append(thought)
        return thoughts

    async def score(self, answer: Node) -> None:
        """Give an answer its verdict and its reward."""
        verdict, answer.reward = await self.scorer.score_answer(self, answer)
        if verdict is not None:
            answer.verdict, answer.answer, answer.detail = verdict.kind, verdict.answer, verdict.detail

    def draw_writer(self, thought_type: str, key: str) -> Writer:
        """The writer of a thought type; of several one is drawn by the key."""
        writers = writers_of(thought_type, self.roles, self.settings.thought(thought_type))
        return writers[draw(f"writer:{key}", len(writers))]

    async def continue_text(
        self, writer: Writer, prompt: Prompt, text: str, *, n: int, max_tokens: int, seed: int, stop: tuple[str, ...]
    ) -> Completion:
        """n continuations of `text`, which is what the assistant has said so far in answer to the prompt."""
        request = Request(
            prompt=prompt.text + text,
            n=n,
            max_tokens=max_tokens,
            temperature=self.settings.temperature if writer.temperature is None else writer.temperature,
            top_p=self.settings.top_p if writer.top_p is None else writer.top_p,
            seed=seed,
            stop=stop,
            messages=prompt.messages,
            logprobs=self.scorer.needs_logprobs,
        )
        return await self.complete(writer.model, request)

    async def complete(self, model: str, request: Request) -> Completion:
        """The completion of a request, counted in `spent` and `used`."""
        key, completion = await self.models.complete(model, request, question_name(self.question))
        self.used.append(key)
        self.spent.requests += 1
        self.spent.add(completion)
        return completion


def writers_of(thought_type: str, roles: Mapping[str, Role], thought: Thought) -> Role:
    """The writers of a thought type: of the role that its entry in the recipe names, else of the role of its own name,
    else the reflector for reflections and double checks, else the thinker."""
    checking = "reflector" if thought_type in ("reflection", "double_check") else "thinker"
    return next(
        roles[role] for role in (thought.role or thought_type, thought_type, checking, "thinker") if role in roles
    )

"""One question's tree while it grows: the search's requests are asked of the models, and what comes back is scored.

How answers are scored is a part of its own: `VerifierScorer` here, one that knows no gold answer in `decode`.

Invariant: rounds are serial, and a round's rollouts are merged in the order in which they were asked, so which text
stands where does not depend on latency or on how many trees grow at once. A round that fails leaves no trace.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from cotree.models.chat import Prompt
from cotree.models.client import Choice, Completion, Counters, Request
from cotree.search.completer import Completer
from cotree.search.mcts import Node, Rollout, ThoughtRequest, TreeSearch
from cotree.search.prompts import THOUGHT_STOPS, boxed_part, continuation, search_messages, thought_text
from cotree.search.reward import chain_reward
from cotree.search.settings import Role, Search, Thought, Writer
from cotree.search.stopping import DistinctChains
from cotree.search.store import StoredNode, StoredTree
from cotree.search.thoughts import ANSWER_FORMATS, PREFIXES, draw, draw_pattern, question_name
from cotree.tasks import Question, Task, Verdict
from cotree.tasks.base import AnswerForm, Message

_AS_SHIPPED = Thought()


def writers_of(kind: str, roles: Mapping[str, Role], thought: Thought = _AS_SHIPPED) -> Role:
    """The writers of a thought type: of the role that its entry in the recipe names, else of the role of its own name,
    else the reflector for reflections and double checks, else the thinker."""
    checking = "reflector" if kind in ("reflection", "double_check") else "thinker"
    return next(roles[role] for role in (thought.role or kind, kind, checking, "thinker") if role in roles)


def prefixes_of(settings: Search, form: AnswerForm = "boxed") -> dict[str, tuple[str, ...]]:
    """The prefixes of each thought type, the recipe's own in place of the shipped ones.

    A free text always begins after its tag, by which the verifier finds it; an own answer prefix opens a box.
    """
    own = {kind: thought.prefixes for kind, thought in settings.thoughts.items() if thought.prefixes}
    return {**PREFIXES, **own, **({"answer": (ANSWER_FORMATS[form].prefix,)} if form == "text" else {})}


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
        if growth.settings.reward is None or verdict.kind == "no_answer":
            return verdict, verdict.reward
        return verdict, await chain_reward(growth, answer.chain(), verdict)

    async def answers_to_reflect_on(self, growth: Growth, new: Sequence[Node]) -> Sequence[Node]:
        """The wrong ones of the new answers."""
        return [leaf for leaf in new if leaf.verdict is not None and leaf.verdict.kind == "wrong"]


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
        completer: Completer,
        settings: Search,
        *,
        roles: Mapping[str, Role],
        seed: str,
        scorer: Scorer | None = None,
    ) -> None:
        self.task, self.question, self.completer, self.settings = task, question, completer, settings
        self.roles, self.seed, self.scorer = roles, seed, scorer or VerifierScorer()
        self.pattern = draw_pattern(settings.patterns, seed)
        self.search = TreeSearch(
            settings.patterns[self.pattern], seed, settings, prefixes_of(settings, task.answer_form)
        )
        self.chains = DistinctChains()
        self.spent = Counters()
        self.used: list[bytes] = []
        self.stopped: str | None = None
        self._messages = search_messages(task, question)
        self._prompts: dict[str, Prompt] = {}

    async def run(self) -> None:
        """Grow in rounds until the rollouts are spent, nothing is left to grow, or a stop condition is met."""
        started = time.monotonic()
        while not self.search.done:
            await self.grow_round()
            seconds = time.monotonic() - started
            self.stopped = self.chains.stop_reason(self.settings.stop, self.spent.completion_tokens, seconds)
            if self.stopped is not None:
                self.search.rollouts_left = 0

    async def grow_round(self) -> None:
        """Make up to `leaves_per_round` rollouts at once, and merge them in the order in which they were asked."""
        rollouts = self.search.ask(self.settings.leaves_per_round)
        try:
            async with asyncio.TaskGroup() as group:
                for rollout in rollouts:
                    group.create_task(self._write_rollout(rollout))
        except BaseException:
            for rollout in rollouts:
                self.search.fail(rollout)
            raise
        leaves: list[Node] = []
        for rollout in rollouts:
            self.search.tell(rollout)
            self.completer.progress.thoughts += len(rollout.written)
            leaves += [node for node in rollout.written if node.reward is not None]
        self.count_leaves(leaves)
        for answer in await self.scorer.answers_to_reflect_on(self, leaves):
            self.search.add_reflection(answer)

    def count_leaves(self, leaves: Sequence[Node]) -> None:
        """Count new judged leaves, for the stop conditions and for the progress line."""
        for leaf in leaves:
            self.chains.add(leaf)
            if leaf.verdict is not None:
                self.completer.progress.verdicts[leaf.verdict.kind] += 1

    async def _write_rollout(self, rollout: Rollout) -> None:
        """Write a rollout's thoughts until it has reached a judged leaf."""
        while (request := rollout.pending) is not None:
            rollout.feed(await self.write_thoughts(request))

    async def write_thoughts(self, request: ThoughtRequest) -> list[Node]:
        """The thoughts of a request, one node a sample; scored where they end a chain."""
        how = self.settings.thoughts.get(request.kind, _AS_SHIPPED)
        if how.text is not None:
            return [request.thought(0, how.text.strip())]
        writer = self.draw_writer(request.kind, request.seed_key)
        seed = draw(f"request:{request.seed_key}", 2**31)
        completion = await self.continue_text(
            writer,
            continuation(request.node, request.prefix),
            n=request.n,
            max_tokens=how.max_tokens or self.settings.max_thought_tokens,
            seed=seed,
            stop=ANSWER_FORMATS[self.task.answer_form].stops if request.kind == "answer" else THOUGHT_STOPS,
        )
        thoughts = []
        for sample, choice in enumerate(completion.choices):
            thought = await self._thought(request, how, sample, choice)
            thought.model, thought.seed, thought.seconds = writer.model, seed, completion.seconds
            thoughts.append(thought)
        return thoughts

    async def _thought(self, request: ThoughtRequest, how: Thought, sample: int, choice: Choice) -> Node:
        above, form = request.node, self.task.answer_form
        closed = request.kind == "answer" and form == "boxed" and boxed_part(choice.text)[1]
        cut = choice.finish_reason == "length" and not closed
        is_open, in_line = cut and how.ends == "tokens", above.is_open and request.kind == above.kind
        text = thought_text(request.kind, request.prefix, choice.text, form, in_line=in_line, is_open=is_open)
        thought = request.thought(sample, text)
        thought.tokens, thought.finish_reason = choice.tokens, choice.finish_reason
        thought.logprob = choice.logprob or 0.0
        if cut and not is_open:
            thought.verdict, thought.reward = Verdict("no_answer", 0.0, None, "thought cut by max_tokens"), 0.0
        elif request.kind == "answer":
            thought.verdict, thought.reward = await self.scorer.score_answer(self, thought)
        return thought

    def draw_writer(self, kind: str, key: str) -> Writer:
        """The writer of a thought type; of several one is drawn by the key."""
        writers = writers_of(kind, self.roles, self.settings.thoughts.get(kind, _AS_SHIPPED))
        return writers[draw(f"writer:{key}", len(writers))]

    async def continue_text(
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
        endpoint, settings = self.completer.endpoints[writer.model], self.settings
        if messages is not None:
            prompt = endpoint.prompt(messages)
        elif writer.model in self._prompts:
            prompt = self._prompts[writer.model]
        else:
            prompt = self._prompts[writer.model] = endpoint.prompt(self._messages)
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
                logprobs=self.scorer.needs_logprobs,
            ),
        )

    async def complete(self, model: str, request: Request) -> Completion:
        """The completion of a request, counted in `spent` and `used`."""
        key = self.completer.key(model, request)
        completion = await self.completer.complete(model, request, key, question_name(self.question))
        self.used.append(key)
        self.spent.requests += 1
        self.spent.add(completion)
        return completion

    def to_stored(self, tree_id: str, config: str, *, pattern: str | None = None) -> StoredTree:
        """The tree as the store keeps it; `pattern` in place of the one that was drawn, for chains that have none."""
        question, spent, search = self.question, self.spent, self.search
        return StoredTree(
            tree_id=tree_id,
            task=question.task,
            question_id=question.id,
            turn=question.turn,
            config=config,
            family=question.family,
            messages=list(question.messages),
            gold=question.gold,
            pattern=pattern or self.pattern,
            rollouts=search.rollouts,
            stopped=self.stopped or ("exhausted" if search.root.open_below == 0 else "rollouts"),
            calls=spent.requests,
            prompt_tokens=spent.prompt_tokens,
            cached_tokens=spent.cached_tokens,
            completion_tokens=spent.completion_tokens,
            nodes=[_stored_node(node) for node in search.nodes],
        )


def _stored_node(node: Node) -> StoredNode:
    return StoredNode(
        node_id=node.id,
        parent_id=None if node.parent is None else node.parent.id,
        type=node.kind,
        text=node.text,
        prefix=node.prefix,
        model=node.model,
        depth=node.depth,
        visits=node.visits,
        value=node.value,
        verdict=None if node.verdict is None else node.verdict.kind,
        reward=node.reward,
        answer=None if node.verdict is None else node.verdict.answer,
        tokens=node.tokens,
        finish_reason=node.finish_reason,
        seed=node.seed,
        seconds=node.seconds,
    )

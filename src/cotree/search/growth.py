"""Grow the tree of one question: send the search's requests to models, parse completions into thoughts, score answers.

Scoring is pluggable: `VerifierScorer` here; `decode` has one that needs no gold answer.

Invariant: rounds are serial and a round's rollouts merge in the order of `ask`, so the tree does not depend on latency
or on how many trees grow concurrently.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from cotree.models.client import Completion, Counters, Request
from cotree.models.wire import Prompt
from cotree.search.journal import SearchModels
from cotree.search.mcts import Node, Rollout, ThoughtRequest, TreeSearch, next_thought
from cotree.search.reward import chain_reward
from cotree.search.settings import Role, Search, Thought, Writer
from cotree.search.thoughts import (
    ANSWER_FORMATS,
    PREFIXES,
    THOUGHT_STOPS,
    Pattern,
    chain_text,
    draw,
    draw_pattern,
    examples_shown,
    question_name,
    read_box,
    search_messages,
    split_paragraphs,
    thought_text,
)
from cotree.tasks import Question, Task, Verdict
from cotree.tasks.extract import after_thinking, has_answer_tag


class Scorer(Protocol):
    """Scores answers and selects those that get a reflection.

    needs_logprobs: whether requests ask for logprobs.
    """

    needs_logprobs: bool

    async def score_answer(self, growth: Growth, answer: Node) -> tuple[Verdict | None, float]:
        """The verdict (None without a verifier) and the reward in [0, 1] of an answer."""

    async def answers_to_reflect_on(self, growth: Growth, new: Sequence[Node]) -> Sequence[Node]:
        """Select the answers that get a reflection, after a round that added the leaves `new`."""


class VerifierScorer:
    """Scores answers by the task's verifier, or by the recipe's `reward` if set; reflects on wrong answers."""

    needs_logprobs = False

    async def score_answer(self, growth: Growth, answer: Node) -> tuple[Verdict, float]:
        """The verifier's verdict, and its reward or the recipe's; no_answer and undecided keep the verifier's."""
        text = chain_text(answer.chain())
        verdict = await growth.task.judge_async(growth.question, text, answer.finish_reason)
        if growth.settings.reward is None or verdict.kind in ("no_answer", "undecided"):
            return verdict, verdict.reward
        return verdict, await chain_reward(growth, answer.chain(), verdict)

    async def answers_to_reflect_on(self, growth: Growth, new: Sequence[Node]) -> Sequence[Node]:
        """The wrong answers among the new leaves."""
        return [leaf for leaf in new if leaf.verdict == "wrong"]


class Growth:
    """Grows the tree of one question.

    seed: seeds the pattern and, with the place in the tree, every thought's prefix, writer and request. Budgets, C and
        stop conditions do not, so a search that repeats with others sends the same requests.
    scorer: `VerifierScorer` by default.

    `spent` counts requests and tokens of this tree, including those that the journal answered; `used` holds the keys of
    their completions; `stopped` names the stop condition that ended it, else None.
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
        shown = examples_shown(settings.examples, models.endpoints[roles["thinker"][0].model].kind)
        self._messages = search_messages(task, question, shown=shown, ends=settings.ends)
        self._prompts: dict[str, Prompt] = {}

    def _prefixes(self) -> dict[str, Sequence[str]]:
        """{thought type: prefixes}, the recipe's where given, else the shipped ones."""
        # A fixed text needs no prefix.
        prefixes: dict[str, Sequence[str]] = {**dict.fromkeys(self.settings.thoughts, ("",)), **PREFIXES}
        prefixes |= {kind: thought.prefixes for kind, thought in self.settings.thoughts.items() if thought.prefixes}
        if self.task.answer_form == "text":
            # The verifier finds a free-text answer by its tag; the recipe's answer prefixes open a box.
            prefixes["answer"] = [self.answer_format.prefix]
        return prefixes

    async def run(self) -> None:
        """Grow in rounds until the rollouts are spent, the tree is exhausted, or a stop condition is met."""
        self.started = time.monotonic()
        while not self.search.done:
            await self.grow_round()
            self.stopped = self.stop_condition()
            if self.stopped is not None:
                self.search.rollouts_left = 0

    def stop_condition(self) -> str | None:
        """The name of the first condition of `settings.stop` that is met, else None."""
        stop = self.settings.stop
        leaves = [leaf for leaf in self.search.leaves if leaf.verdict != "undecided"]
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
        """Run up to `leaves_per_round` rollouts concurrently, merge them in the order of `ask`, add reflections."""
        rollouts, before = self.search.ask(self.settings.leaves_per_round), len(self.search.leaves)
        async with asyncio.TaskGroup() as group:
            for rollout in rollouts[1:]:
                group.create_task(self._write_rollout(rollout))
            for rollout in rollouts[:1]:  # without a task of its own, which costs as much CPU as reading a reply
                await self._write_rollout(rollout)
        for rollout in rollouts:
            self.search.tell(rollout)
        for answer in await self.scorer.answers_to_reflect_on(self, self.search.leaves[before:]):
            self.search.add_reflection(answer)

    async def _write_rollout(self, rollout: Rollout) -> None:
        """Generate a rollout's thoughts down to a judged leaf."""
        while (request := rollout.pending) is not None:
            rollout.feed(await self.write_thoughts(request))

    async def write_thoughts(self, request: ThoughtRequest, *, ahead: bool = True) -> list[list[Node]]:
        """Generate a request's samples, each a list of consecutive thoughts; the last of a finished chain is scored.

        ahead: let a sample run to the end of its turn if the next thoughts would be requested the same way.
        """
        if (fixed := self.settings.thought(request.type).text) is not None:
            return [[request.thought(0, fixed.strip())]]
        ends = self.settings.ends_of(request.type)
        whole_turn = ends == "open" or (ahead and self._writes_ahead(request.type))
        if request.type == "answer" and after_thinking(chain_text(request.node.chain())) is None:
            request = replace(request, prefix=f"\n</think>\n\n{request.prefix.lstrip()}")
        thoughts = await self.sample(
            request,
            self.draw_writer(request.type, request.seed_key),
            max_tokens=self._max_tokens(request, whole_turn=whole_turn),
            stop=self.answer_format.stops if request.type == "answer" else () if whole_turn else THOUGHT_STOPS[ends],
        )
        if request.type == "answer":
            return [[await self._read_answer(thought)] for thought in thoughts]
        return [await self._read_thoughts(request, thought, ends, whole_turn=whole_turn) for thought in thoughts]

    def _writes_ahead(self, thought_type: str) -> bool:
        """Whether all following thoughts are paragraphs without prefixes by one writer, so one request suffices."""
        pattern, kind, seen = self.search.pattern, thought_type, set[str]()
        writers = writers_of(kind, self.roles, self.settings.thought(kind))
        while kind not in seen and len(writers) == 1:  # with several, each thought draws its own
            thought = self.settings.thought(kind)
            if self.settings.ends_of(kind) != "paragraph" or thought.max_tokens is not None:
                return False
            seen.add(kind)
            kind = next(iter(pattern[kind]))
            if any(self.search.prefixes[kind]) or writers_of(kind, self.roles, self.settings.thought(kind)) != writers:
                return False
        return len(writers) == 1

    def _max_tokens(self, request: ThoughtRequest, *, whole_turn: bool) -> int:
        """max_tokens of a request: the rest of `max_chain_tokens`, or the limit of one thought."""
        if whole_turn:
            return max(1, self.settings.max_chain_tokens - sum(thought.tokens for thought in request.node.chain()))
        thought = self.settings.thought(request.type)
        return thought.max_tokens or thought.thought_tokens or self.settings.max_thought_tokens

    async def _read_answer(self, answer: Node) -> Node:
        """Parse and score a completion after an answer prefix; one cut by max_tokens is no_answer."""
        form = self.task.answer_form
        cut = answer.finish_reason == "length" and not (form == "boxed" and read_box(answer.text)[1])
        answer.text = thought_text("answer", answer.prefix, answer.text, form)
        if cut:
            answer.verdict, answer.reward = "no_answer", 0.0
        else:
            await self.score(answer)
        return answer

    async def _read_thoughts(self, request: ThoughtRequest, first: Node, ends: str, *, whole_turn: bool) -> list[Node]:
        """Split one sample into consecutive thoughts; from where the model answers, the rest is the answer, scored.

        whole_turn: the request had no stop string, so the sample runs to the end of the turn.
        """
        form, cut = self.task.answer_form, first.finish_reason == "length"
        in_line, is_open = request.node.is_open and request.type == request.node.type, cut and ends == "tokens"
        first.text = thought_text(request.type, first.prefix, first.text, form, in_line=in_line, is_open=is_open)
        if not first.text:
            return [first]
        chain = chain_text(first.chain())
        above = chain[: len(chain) - len(first.text)]
        parts = (
            split_paragraphs(first.text, self.settings.max_depth - request.node.depth) if whole_turn else [first.text]
        )
        answering = self._answering_part(above, parts, first.finish_reason, whole_turn=whole_turn)
        steps, answer = parts[:answering], "" if answering is None else "".join(parts[answering:])
        if ends == "open" and steps:
            steps = ["".join(steps)]
        thoughts = _nodes_of(first, [*steps, answer] if answer else steps, self.search.pattern)
        last = thoughts[-1]
        if answer:
            last.type = "answer"
            await self.score(last)
        elif cut and not is_open:
            last.verdict, last.reward = "no_answer", 0.0
        else:
            last.ended = whole_turn and ends == "paragraph"
        return thoughts

    def _answering_part(self, above: str, parts: Sequence[str], finish_reason: str, *, whole_turn: bool) -> int | None:
        """The index of the first part with which the chain, starting with `above`, has an answer in the task's form."""
        for number, part in enumerate(parts):
            above += part
            is_last = number == len(parts) - 1
            if self.task.answer_form == "text" and not (whole_turn and is_last):
                found = has_answer_tag(above)
            else:
                found = self.task.extract(above, finish_reason if is_last else "stop", "strict") is not None
            if found:
                return number
        return None

    async def sample(
        self, request: ThoughtRequest, writer: Writer, *, max_tokens: int, stop: tuple[str, ...]
    ) -> list[Node]:
        """Send a request; returns one node per sample with the completion as its text.

        If the chat template opens the thinking (`<think>`), that opening goes in front of the first thought's prefix.
        """
        endpoint = self.models.endpoints[writer.model]
        if writer.model not in self._prompts:
            self._prompts[writer.model] = endpoint.prompt(self._messages)
        prompt, seed = self._prompts[writer.model], draw(f"request:{request.seed_key}", 2**31)
        if request.node is self.search.root and not request.prefix.startswith(prompt.opened):
            request = replace(request, prefix=prompt.opened + request.prefix)
        beginning = chain_text([*request.node.chain(), request.thought(0, request.prefix)])
        stop = stop if "\n" in stop else (*stop, *endpoint.turn_stops)
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
        """Set an answer's verdict and reward."""
        verdict, answer.reward = await self.scorer.score_answer(self, answer)
        if verdict is not None:
            answer.verdict, answer.answer, answer.detail = verdict.kind, verdict.answer, verdict.detail

    def draw_writer(self, thought_type: str, key: str) -> Writer:
        """The writer of a thought type; with several, one is drawn by the key."""
        writers = writers_of(thought_type, self.roles, self.settings.thought(thought_type))
        return writers[draw(f"writer:{key}", len(writers))]

    async def continue_text(
        self, writer: Writer, prompt: Prompt, text: str, *, n: int, max_tokens: int, seed: int, stop: tuple[str, ...]
    ) -> Completion:
        """Sample n continuations of `text`, the assistant's turn so far."""
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
        """Send a request or recall it from the journal, and count it in `spent` and `used`."""
        key, completion = await self.models.complete(model, request, question_name(self.question))
        self.used.append(key)
        self.spent.requests += 1
        self.spent.add(completion)
        return completion


def _nodes_of(first: Node, texts: Sequence[str], pattern: Pattern) -> list[Node]:
    """Split the sample of `first` into one node per text; its token count is divided by text length."""
    nodes, total, length = [first], first.tokens, max(1, sum(map(len, texts)))
    finish_reason, first.text, before = first.finish_reason, texts[0], 0
    for text in texts[1:]:
        last = nodes[-1]
        last.finish_reason = "stop"
        following = next_thought(last, next(iter(pattern[str(last.type)])), text)
        following.seed, following.seconds, following.logprob = first.seed, first.seconds, first.logprob
        nodes.append(following)
    nodes[-1].finish_reason = finish_reason
    for node in nodes:
        node.tokens = round(total * (before + len(node.text)) / length) - round(total * before / length)
        before += len(node.text)
    return nodes


def writers_of(thought_type: str, roles: Mapping[str, Role], thought: Thought) -> Role:
    """The writers of a thought type, from the first of these roles that is set: the one that `thoughts` names, the one
    with the type's name, the reflector (for reflections and double checks), the thinker."""
    checking = "reflector" if thought_type in ("reflection", "double_check") else "thinker"
    for role in (thought.role or thought_type, thought_type, checking):
        if role in roles:
            return roles[role]
    return roles["thinker"]

"""Generate a model's replies to all questions concurrently, and judge them.

Every model gets the same plain prompt and max_tokens. Each sample is journalled once judged, so an interrupted
evaluation resumes and gives the numbers of an uninterrupted one. A stored sample is requested again only if its prompt
changed, and judged again only if its verdict may have changed.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cotree.base.errors import UsageError
from cotree.base.progress import Update
from cotree.eval.journal import EvalSample, SampleKey, append_line, content_hash, read_all_lines
from cotree.eval.samplers import Sampler, conversation
from cotree.eval.settings import AskSettings
from cotree.models.encode import render_prompt
from cotree.models.endpoints import Endpoint
from cotree.models.tokenizer import token_counter
from cotree.tasks import task as task_of
from cotree.tasks.base import VERDICT_VERSION, Asked, Question, Split, Task
from cotree.tasks.extract import visible_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ModelContext = AbstractAsyncContextManager[Endpoint]


def ask(
    model: ModelContext,
    questions: Sequence[Asked],
    journal: Path,
    asking: AskSettings,
    *,
    sampler_of: Callable[[Endpoint], Sampler],
    on_sample: Update = lambda done, wanted, remark: None,
    on_damage: Callable[[int], None] = lambda lines: None,
) -> tuple[list[EvalSample], int]:
    """Generate and judge the samples that the journal lacks.

    Returns all samples, ordered by question and turn, and the number of tokens that this call generated.

    In a conversation the model reads its own replies, without their thinking; every turn is a sample.

    Args:
        model: entered only if a sample is missing.
        journal: JSON lines, read and appended to.
        on_sample: called after each sample with the number finished, the number wanted, and a remark.
        on_damage: called first with the number of damaged journal lines, if any.
    """
    turns = [turn for _, question in questions for turn in turns_of(question)]
    wanted = [_sample_key(turn, number) for turn in turns for number in range(asking.samples)]
    evaluation = _RunningEvaluation(journal, asking, len(wanted), on_sample)
    if evaluation.damaged:
        on_damage(evaluation.damaged)
    asyncio.run(evaluation.ask_all(questions, model, sampler_of))
    return [evaluation.samples[key] for key in wanted], evaluation.new_tokens


class _RunningEvaluation:
    """Takes samples from the journal, and requests missing ones from the model.

    samples: {key: current sample}. new_tokens: generated in this run. damaged: unreadable lines of the journal.
    """

    def __init__(self, journal: Path, asking: AskSettings, wanted: int, on_sample: Update) -> None:
        self.samples: dict[SampleKey, EvalSample] = {}
        self.new_tokens = 0
        self._journal, self._asking, self._wanted, self._on_sample = journal, asking, wanted, on_sample
        lines, self.damaged = read_all_lines(journal)
        self._last_lines = {sample.key: sample for sample in lines}
        self._by_prompt = {(sample.key, sample.prompt_hash): sample for sample in lines}
        self._added, self._started = Counter[str](), time.monotonic()

    async def ask_all(
        self, questions: Sequence[Asked], model: ModelContext, sampler_of: Callable[[Endpoint], Sampler]
    ) -> None:
        """Get all samples of all turns of the questions; opens the model at the first missing one."""
        opened: list[Sampler] = []
        opening = asyncio.Lock()

        async def sampler() -> Sampler:
            async with opening:
                if not opened:
                    opened.append(sampler_of(await exits.enter_async_context(model)))
            return opened[0]

        async with AsyncExitStack() as exits, asyncio.TaskGroup() as group:
            # Sorted by family, as in the search, so that prefix caches hit: the prompts share worked examples.
            for task, question in sorted(questions, key=lambda asked: (asked[1].task, asked[1].family)):
                group.create_task(self._ask_turn(task, question, range(self._asking.samples), sampler))

    async def _ask_turn(
        self, task: Task, question: Question, numbers: range, open_sampler: Callable[[], Awaitable[Sampler]]
    ) -> None:
        """Get the samples with these numbers for one turn of a conversation, then for its later turns."""
        if not all([await self._recall(task, question, number) for number in numbers]):
            sampler = await open_sampler()
            async with asyncio.TaskGroup() as group:
                for first in range(0, len(numbers), sampler.samples_per_call):
                    part = numbers[first : first + sampler.samples_per_call]
                    group.create_task(self._request(sampler, task, question, part))
        # After the first reply, each sample has its own conversation.
        async with asyncio.TaskGroup() as group:
            for number in numbers:
                following = question.follow_up(visible_text(self.samples[_sample_key(question, number)].response))
                if following is not None:
                    group.create_task(self._ask_turn(task, following, range(number, number + 1), open_sampler))

    async def _request(self, sampler: Sampler, task: Task, question: Question, numbers: range) -> None:
        """Request these samples if any is missing; judge and journal the missing ones."""
        missing = [number for number in numbers if _sample_key(question, number) not in self.samples]
        if not missing:
            return
        sampled = await sampler.sample(task, question, numbers)
        for number in missing:
            choice = sampled.choices[number - numbers.start]
            sample = EvalSample(
                task=question.task,
                id=question.id,
                turn=question.turn,
                sample=number,
                response=choice.text,
                finish_reason=choice.finish_reason,
                tokens=choice.tokens,
                prompt_tokens=sampled.prompt_tokens if number == numbers.start else 0,
                prompt_hash=content_hash(conversation(task, question, self._asking)),
                decoding=sampled.decoding,
                seconds=round(sampled.seconds, 3),
                tree_answers=sampled.tree_answers,
                **self._asking.sampling(),
            )
            sample = await _judge(task, question, sample)
            append_line(self._journal, asdict(sample))
            self.samples[sample.key] = sample
            self.new_tokens += sample.tokens
            self._added.update([sample.verdict, "samples"])
            correct, no_answer = (self._added[verdict] / self._added["samples"] for verdict in ("correct", "no_answer"))
            speed = self.new_tokens / max(time.monotonic() - self._started, 1e-9)
            remark = f"{correct:.0%} correct, {no_answer:.0%} no answer; {speed:.0f} tokens/s"
            self._on_sample(len(self.samples), self._wanted, remark)

    async def _recall(self, task: Task, question: Question, number: int) -> bool:
        """Take a sample from the journal, judging it again if needed; returns whether it has one for this prompt."""
        key, prompt_hash = _sample_key(question, number), content_hash(conversation(task, question, self._asking))
        sample = self._by_prompt.get((key, prompt_hash))
        if sample is None:
            return False
        judged_by = (sample.verdict_version, sample.reference_hash)
        undecided = "undecided" in (sample.verdict, sample.lenient_verdict) or None in (sample.tree_correct or ())
        if undecided or judged_by != (VERDICT_VERSION, _reference_hash(task, question)):
            sample = await _judge(task, question, sample)
        if sample != self._last_lines[key]:
            append_line(self._journal, asdict(sample))
        self.samples[key] = sample
        return True


def _sample_key(question: Question, number: int) -> SampleKey:
    """The key of one sample of one turn of a question."""
    return question.task, question.id, question.turn, number


async def _judge(task: Task, question: Question, sample: EvalSample) -> EvalSample:
    """Return a copy of a sample with verdicts by the current code and reference answer."""
    verdict = await task.judge_async(question, sample.response, sample.finish_reason)
    lenient = verdict
    # Free texts have one extraction mode, and if strict extraction finds an answer, lenient finds the same.
    if lenient.kind == "no_answer" and task.answer_form != "text":
        lenient = await asyncio.to_thread(task.judge, question, sample.response, sample.finish_reason, "lenient")
    tree_correct = None
    if sample.tree_answers is not None:
        tree_correct = [await _is_correct(task, question, answer) for answer in sample.tree_answers]
    return replace(
        sample,
        verdict=verdict.kind,
        lenient_verdict=lenient.kind,
        answer=verdict.answer,
        detail=verdict.detail,
        gold=question.gold,
        family=question.family,
        tree_correct=tree_correct,
        verdict_version=VERDICT_VERSION,
        reference_hash=_reference_hash(task, question),
    )


async def _is_correct(task: Task, question: Question, answer: str | None) -> bool | None:
    """Whether the answer of a tree's chain is correct; None if undecided."""
    if answer is None:
        return False
    kind = (await asyncio.to_thread(task.verify, answer, question)).kind
    return None if kind == "undecided" else kind == "correct"


def _reference_hash(task: Task, question: Question) -> str:
    """A hash of the verdict's inputs other than the reply and cotree's code: reference answer and verifier."""
    return content_hash([question.gold, question.family, sorted(question.spec.items()), task.verifier_version])[:16]


def load_questions(
    counts: Iterable[tuple[str, int | None]], split: Split, *, data: str | Path | None = None, family: str | None = None
) -> list[Asked]:
    """The first `count` questions of each task (None: all), with their tasks; optionally of one family only.

    Raises:
        UsageError: tasks with fewer questions (names all of them), or two questions with the same task and id.
    """
    asked: list[Asked] = []
    problems = []
    for name, count in counts:
        try:
            known = task_of(name, data)
            there = known.questions(split, count if family is None else None)
        except UsageError as error:
            problems.append(str(error))
            continue
        chosen = [question for question in there if family in (None, question.family)][:count]
        if len(chosen) < (count or 1):
            families = ", ".join(sorted({question.family for question in there}))
            problems.append(f"{known.name} has {len(chosen)} questions of family `{family}`; its families: {families}")
        asked += [(known, question) for question in chosen]
    if problems:
        raise UsageError("; ".join(problems))
    for (task, id_), count in Counter((question.task, question.id) for _, question in asked).items():
        if count > 1:
            what = f"two {split} questions of task `{task}` are called `{id_}`"
            raise UsageError(f"{what}; give each an id of its own, and each task a name of its own")
    return asked


def check_lengths(
    context: int | None,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Asked],
    asking: AskSettings,
    *,
    name: str,
) -> int:
    """The maximum tokens of a question with its replies, checked against the model's context length.

    Args:
        context: the model's context length in tokens, None if unknown.

    Raises:
        UsageError: it is too short; names the longest question and the model (`name`).
    """
    needed = [tokens_needed(tokenizer, *asked, asking) for asked in questions]
    longest = max(needed)
    if context is not None and longest > context:
        question = questions[needed.index(longest)][1]
        raise UsageError(
            f"question `{question.id}` of task `{question.task}` may need {longest} tokens, `{name}`"
            f" takes {context}; lower `max_tokens` (--max-tokens), or evaluate on other tasks"
        )
    return longest


def tokens_needed(tokenizer: PreTrainedTokenizerBase, task: Task, question: Question, asking: AskSettings) -> int:
    """The maximum tokens of a question's last turn, prompt and reply, if every reply is `max_tokens` long."""
    *earlier, last = turns_of(question)
    prompt = render_prompt(tokenizer, conversation(task, last, asking))
    # The server may add a begin-of-sequence token.
    return token_counter(tokenizer)(prompt) + (len(earlier) + 1) * asking.max_tokens + 1


def turns_of(question: Question) -> Iterator[Question]:
    """Yield a question and its later turns with empty replies in between, to count before a model replies."""
    following: Question | None = question
    while following is not None:
        yield following
        following = following.follow_up("")

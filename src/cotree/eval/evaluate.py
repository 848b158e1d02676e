"""Greedy evaluation of one model on held-out questions, through the engine that also serves the teacher.

Invariants: every model gets the same plain prompt, GGUF type and max_tokens; a sample is written as soon as it is
judged, so an interrupted evaluation goes on where it stopped and its numbers are those of an uninterrupted one.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cotree.errors import CotreeError
from cotree.eval.metrics import Sample, constant_baseline
from cotree.llm.chat import render
from cotree.llm.client import Client, Request
from cotree.llm.embedded import serve
from cotree.llm.tokenizer import token_counter
from cotree.search.prompts import example_messages
from cotree.tasks import Question, Task
from cotree.tasks.base import VerdictKind
from cotree.tasks.extract import spoken

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Narrow slots keep the KV cache small: 768 tokens are wide enough for most prompts, and where some are longer, fewer
# slots share `_ROOM` tokens.
_SLOTS, _ROOM_FOR_PROMPT, _ROOM = 16, 768, 32_768


@dataclass(frozen=True, slots=True)
class EvalSample:
    """One line of `samples_*.jsonl`: what a model said to one question, and the verdict."""

    task: str
    id: str
    response: str
    finish_reason: str
    tokens: int
    prompt_tokens: int
    kind: VerdictKind
    answer: str | None
    gold: str
    turn: int = 0

    @property
    def part(self) -> str:
        """The row of the table that it counts in: its task, and each later turn of a conversation apart, so that a
        row has one sample a question."""
        return f"{self.task}, turn {self.turn + 1}" if self.turn else self.task

    def judged(self) -> Sample:
        """As the metrics take it."""
        return Sample(self.kind, self.tokens, self.finish_reason, self.answer)


def evaluate(
    gguf: Path,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[tuple[Task, Question]],
    samples: Path,
    *,
    max_tokens: int,
    examples: bool = False,
    on_sample: Callable[[int, int, str], None] | None = None,
) -> list[EvalSample]:
    """Ask a GGUF every question greedily and judge; `samples` (JSONL) is both output and memory.

    In a conversation the model reads its own replies, their thinking left out; every turn is a sample.

    Args:
        examples: put the search's worked examples before the question.
        on_sample: called with (done, wanted, remark) after each.
    """
    done = {(s.task, s.id, s.turn): s for s in read_samples(samples)}
    wanted = [
        (question.task, question.id, turn)
        for _, question in questions
        for turn in range(question.turn, question.turn + 1 + len(question.later))
    ]
    left = [
        asked for asked in questions if (asked[1].task, asked[1].id, asked[1].turn + len(asked[1].later)) not in done
    ]
    # Family after family, as the search: a slot then has most of the next prompt warm, the worked examples above all.
    left.sort(key=lambda asked: (asked[1].task, asked[1].family))
    if left:
        longest = max(tokens_needed(tokenizer, *asked, max_tokens, examples) for asked in questions)
        context = max(_ROOM_FOR_PROMPT + max_tokens, longest)
        slots = max(1, min(_SLOTS, _ROOM // context))
        with serve(gguf, slots=slots, context=context) as url:
            asyncio.run(_ask(url, slots, tokenizer, left, samples, done, max_tokens, examples, len(wanted), on_sample))
    return [done[key] for key in wanted]


def tokens_needed(
    tokenizer: PreTrainedTokenizerBase, task: Task, question: Question, max_tokens: int, examples: bool
) -> int:
    """The most tokens that a question's last turn can take, prompt and reply, when every reply is `max_tokens` long."""
    turns, following = 1, question.follow_up("")
    while following is not None:
        turns, question, following = turns + 1, following, following.follow_up("")
    # The server may add a token of beginning.
    return token_counter(tokenizer)(_prompt(tokenizer, task, question, examples)) + turns * max_tokens + 1


def _prompt(tokenizer: PreTrainedTokenizerBase, task: Task, question: Question, examples: bool) -> str:
    shown = example_messages(task.worked_examples(question), task.answer_form) if examples else []
    return render(tokenizer, [*shown, *question.messages])


async def _ask(
    url: str,
    slots: int,
    tokenizer: PreTrainedTokenizerBase,
    left: Sequence[tuple[Task, Question]],
    samples: Path,
    done: dict[tuple[str, str, int], EvalSample],
    max_tokens: int,
    examples: bool,
    wanted: int,
    on_sample: Callable[[int, int, str], None] | None,
) -> None:
    async with Client(
        "student", url, "default", max_in_flight=slots, count_tokens=token_counter(tokenizer), timeout=600.0
    ) as client:

        async def one(task: Task, question: Question) -> EvalSample:
            prompt = _prompt(tokenizer, task, question, examples)
            completion = await client.complete(Request(prompt, 1, max_tokens, 0.0, 1.0, 0, ()))
            choice = completion.choices[0]
            verdict = await task.judge_async(question, choice.text, choice.finish_reason)
            sample = EvalSample(
                task.name, question.id, choice.text, choice.finish_reason, choice.tokens, completion.prompt_tokens,
                verdict.kind, verdict.answer, question.gold, question.turn,
            )  # fmt: skip
            append_line(samples, asdict(sample))
            done[question.task, question.id, question.turn] = sample
            if on_sample is not None:
                on_sample(len(done), wanted, "")
            return sample

        async def converse(task: Task, question: Question) -> None:
            following: Question | None = question
            while following is not None:
                sample = done.get((following.task, following.id, following.turn)) or await one(task, following)
                following = following.follow_up(spoken(sample.response))

        async with asyncio.TaskGroup() as group:
            for task, question in left:
                group.create_task(converse(task, question))


def constant_baselines(questions: Sequence[tuple[Task, Question]]) -> list[dict[str, Any]]:
    """For each task what the best constant answer scores on the first turns; a free text has no such answer."""
    golds: dict[str, list[str]] = {}
    for task, question in questions:
        if task.answer_form != "text":
            golds.setdefault(task.name, []).append(question.gold)
    best = {name: constant_baseline(found) for name, found in golds.items()}
    return [{"task": name, "answer": answer, "accuracy": accuracy} for name, (answer, accuracy) in best.items()]


def read_samples(path: Path) -> list[EvalSample]:
    """The samples of a file; a last line that a kill cut in half is dropped from the file."""
    if not path.is_file():
        return []
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if len(whole) < len(raw):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return [EvalSample(**json.loads(line)) for line in whole.split(b"\n") if line]


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON line, whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            before = os.fstat(descriptor).st_size
            line = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8")
            # A nearly full disk takes a part and says so only by the count.
            if os.write(descriptor, line) < len(line):
                os.ftruncate(descriptor, before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)
    except OSError as error:
        fix = "free some space, then re-run the same command to resume"
        raise CotreeError(f"cannot write {path}: {error.strerror}; {fix}") from None

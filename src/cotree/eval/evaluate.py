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
from cotree.eval.metrics import Sample
from cotree.llm.chat import render
from cotree.llm.client import Client, Request
from cotree.llm.embedded import serve
from cotree.llm.tokenizer import token_counter
from cotree.search.prompts import example_messages
from cotree.tasks import Question, Task
from cotree.tasks.base import VerdictKind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Wide enough for the worked examples, the question and max_tokens; narrow keeps the KV cache small.
_SLOTS, _ROOM_FOR_PROMPT = 16, 768


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

    Args:
        examples: put the search's worked examples before the question.
        on_sample: called with (done, wanted, remark) after each.
    """
    done = {(s.task, s.id): s for s in read_samples(samples)}
    left = [(task, question) for task, question in questions if (question.task, question.id) not in done]
    # Family after family, as the search: a slot then has most of the next prompt warm, the worked examples above all.
    left.sort(key=lambda asked: (asked[1].task, asked[1].family))
    if left:
        with serve(gguf, slots=_SLOTS, context=_ROOM_FOR_PROMPT + max_tokens) as url:
            asyncio.run(_ask(url, tokenizer, left, samples, done, max_tokens, examples, len(questions), on_sample))
    return [done[question.task, question.id] for _, question in questions]


async def _ask(
    url: str,
    tokenizer: PreTrainedTokenizerBase,
    left: Sequence[tuple[Task, Question]],
    samples: Path,
    done: dict[tuple[str, str], EvalSample],
    max_tokens: int,
    examples: bool,
    wanted: int,
    on_sample: Callable[[int, int, str], None] | None,
) -> None:
    async with Client(
        "student", url, "default", max_in_flight=_SLOTS, count_tokens=token_counter(tokenizer), timeout=600.0
    ) as client:

        async def one(task: Task, question: Question) -> None:
            shown = example_messages(task.worked_examples(question), task.answer_form) if examples else []
            prompt = render(tokenizer, [*shown, *question.messages])
            completion = await client.complete(Request(prompt, 1, max_tokens, 0.0, 1.0, 0, ()))
            choice = completion.choices[0]
            verdict = await task.judge_async(question, choice.text, choice.finish_reason)
            sample = EvalSample(
                task.name, question.id, choice.text, choice.finish_reason, choice.tokens, completion.prompt_tokens,
                verdict.kind, verdict.answer, question.gold,
            )  # fmt: skip
            append_line(samples, asdict(sample))
            done[question.task, question.id] = sample
            if on_sample is not None:
                on_sample(len(done), wanted, "")

        async with asyncio.TaskGroup() as group:
            for task, question in left:
                group.create_task(one(task, question))


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

"""Ask a model every question and judge what it says, many at once, through whatever serves it.

Invariants: every model gets the same plain prompt and max_tokens; a sample is written as soon as it is judged, so an
interrupted evaluation goes on where it stopped and its numbers are those of an uninterrupted one. How a question is
answered is a `Sampler`'s business; plain sampling is one.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cotree.base.errors import UsageError
from cotree.eval.journal import EvalSample, append_line, read_samples
from cotree.experiment.recipe import Model
from cotree.models.client import Choice, Client, Request
from cotree.models.embedded import serve
from cotree.models.endpoints import Endpoint, open_endpoints
from cotree.models.tokenizer import token_counter
from cotree.search.prompts import example_messages
from cotree.tasks import Message, Question, Task
from cotree.tasks.extract import spoken

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Asked = tuple[Task, Question]
Key = tuple[str, str, int, int]  # task, id, turn, sample

# Narrow slots keep the KV cache small: 768 tokens are wide enough for most prompts, and where some are longer, fewer
# slots share `_ROOM` tokens.
_SLOTS, _ROOM_FOR_PROMPT, _ROOM = 16, 768, 32_768


@dataclass(frozen=True, slots=True)
class Sampling:
    """How every question is asked: `samples` completions of up to `max_tokens` tokens, greedy at temperature 0.

    together: at most so many samples come from one call of the sampler. examples: the search's worked examples stand
    before the question.
    """

    max_tokens: int
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    together: int = _SLOTS
    examples: bool = False

    def conversation(self, task: Task, question: Question) -> list[Message]:
        """What the model is asked, before its chat template."""
        shown = example_messages(task.worked_examples(question), task.answer_form) if self.examples else []
        return [*shown, *question.messages]


@dataclass(frozen=True, slots=True)
class Reply:
    """What a sampler says to a question, a choice a sample; a choice's tokens are all that was generated for it.

    decoding: the search that chose it, for readers; "" for plain sampling. tree: of a tree the answers of all its
    chains, in the order in which they ended.
    """

    choices: Sequence[Choice]
    prompt_tokens: int
    decoding: str = ""
    tree: Sequence[str | None] | None = None


# Answers a question: the samples of these numbers, in their order.
Sampler = Callable[[Task, Question, range], Awaitable[Reply]]
# A way of answering.
Strategy = Callable[[Endpoint, Sampling], Sampler]


def plain(endpoint: Endpoint, how: Sampling) -> Sampler:
    """The samples of a question are independent completions of its prompt."""
    # A base model has no token that ends a turn: it would ask itself the next question.
    base = endpoint.tokenizer is not None and not endpoint.tokenizer.chat_template
    stop = ("\nQuestion:",) if base else ()

    async def sample(task: Task, question: Question, numbers: range) -> Reply:
        prompt = endpoint.begin(how.conversation(task, question))
        seed = how.seed + numbers.start
        request = Request(
            prompt.text, len(numbers), how.max_tokens, how.temperature, how.top_p, seed, stop, prompt.messages
        )
        completion = await endpoint.client(question.id).complete(request)
        return Reply(completion.choices, completion.prompt_tokens)

    return sample


def ask(
    model: AbstractAsyncContextManager[Endpoint],
    questions: Sequence[Asked],
    journal: Path,
    how: Sampling,
    *,
    strategy: Strategy = plain,
    on_sample: Callable[[int, int, str], None] | None = None,
) -> list[EvalSample]:
    """Ask and judge; `journal` (JSON lines) is both output and memory.

    In a conversation the model reads its own replies, their thinking left out; every turn is a sample.

    Args:
        model: opened only if something is left to ask.
        on_sample: called with (done, wanted, remark) after each.

    Returns:
        All samples, question by question, turn by turn.
    """
    wanted = [
        (question.task, question.id, question.turn, number)
        for _, first in questions
        for question in turns_of(first)
        for number in range(how.samples)
    ]
    done = {_key(sample): sample for sample in read_samples(journal)}
    counts, started = Counter[str](), time.monotonic()

    def keep(sample: EvalSample) -> None:
        append_line(journal, asdict(sample))
        done[_key(sample)] = sample
        counts.update([sample.kind, "samples"], tokens=sample.tokens)
        if on_sample is not None:
            speed = counts["tokens"] / max(time.monotonic() - started, 1e-9)
            shares = (counts[kind] / counts["samples"] for kind in ("correct", "no_answer"))
            told = "{:.0%} correct, {:.0%} no answer; {:.0f} tokens/s".format(*shares, speed)
            on_sample(len(done), len(wanted), told)

    if any(key not in done for key in wanted):
        asyncio.run(_ask(model, questions, how, strategy, done, keep))
    return [done[key] for key in wanted]


async def _ask(
    model: AbstractAsyncContextManager[Endpoint],
    questions: Sequence[Asked],
    how: Sampling,
    strategy: Strategy,
    done: Mapping[Key, EvalSample],
    keep: Callable[[EvalSample], None],
) -> None:
    """Get what is not `done` yet; `keep` adds it."""

    async def converse(task: Task, question: Question, numbers: range) -> None:
        left = [number for number in numbers if (question.task, question.id, question.turn, number) not in done]
        if left:
            reply = await sampler(task, question, numbers)
            for number in left:
                keep(await _judged(task, question, how, reply, number - numbers.start, number))
        async with asyncio.TaskGroup() as replies:
            for number in numbers:
                said = done[question.task, question.id, question.turn, number].response
                following = question.follow_up(spoken(said))
                if following is not None:  # each conversation goes its own way
                    replies.create_task(converse(task, following, range(number, number + 1)))

    async with model as endpoint, asyncio.TaskGroup() as group:
        sampler = strategy(endpoint, how)
        # Family after family, as the search: a slot then has most of the next prompt warm, the worked examples above
        # all.
        for task, question in sorted(questions, key=lambda asked: (asked[1].task, asked[1].family)):
            for first in range(0, how.samples, how.together):
                numbers = range(first, min(first + how.together, how.samples))
                group.create_task(converse(task, question, numbers))


async def _judged(task: Task, question: Question, how: Sampling, reply: Reply, index: int, number: int) -> EvalSample:
    choice, tree = reply.choices[index], None
    verdict = await task.judge_async(question, choice.text, choice.finish_reason)
    lenient = verdict
    # A free text has one extraction, and where the strict one finds an answer the lenient one finds the same.
    if verdict.kind == "no_answer" and task.answer_form != "text":
        lenient = await asyncio.to_thread(task.judge, question, choice.text, choice.finish_reason, "lenient")
    if reply.tree is not None:
        tree = [
            answer is not None and (await asyncio.to_thread(task.verify, answer, question)).kind == "correct"
            for answer in reply.tree
        ]
    said = json.dumps(how.conversation(task, question), ensure_ascii=False)
    return EvalSample(
        task.name, question.id, choice.text, choice.finish_reason, choice.tokens,
        reply.prompt_tokens if index == 0 else 0, verdict.kind, verdict.answer, question.gold, question.turn,
        number, lenient.kind, verdict.detail, question.family, hashlib.sha256(said.encode()).hexdigest(),
        how.max_tokens, how.temperature, how.top_p, reply.decoding, tree,
    )  # fmt: skip


def _key(sample: EvalSample) -> Key:
    return sample.task, sample.id, sample.turn, sample.sample


@asynccontextmanager
async def embedded(
    gguf: Path, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Asked], how: Sampling, widest: int = 1
) -> AsyncIterator[Endpoint]:
    """A GGUF in this process, wide enough for the longest question, and for `widest` samples of one request."""
    longest = max(tokens_needed(tokenizer, *asked, how) for asked in questions)
    context = max(_ROOM_FOR_PROMPT + how.max_tokens, longest)
    slots, together = max(1, min(_SLOTS, _ROOM // context)), max(min(how.samples, how.together), widest)
    # The samples of a request share its prompt, if they share their memory.
    with serve(gguf, slots=max(slots, together), context=context, shared=together > 1) as url:
        client = Client(
            "student", url, "default", max_in_flight=max(1, slots // together),
            count_tokens=token_counter(tokenizer), timeout=600.0,
        )  # fmt: skip
        async with client:
            yield Endpoint("student", (client,), tokenizer, str(gguf))


@asynccontextmanager
async def opened_server(model: Model) -> AsyncIterator[Endpoint]:
    """A server, asked whether it is ready."""
    async with open_endpoints({"model": model}) as endpoints:
        yield endpoints["model"]


def check_distinct(questions: Sequence[Asked], split: str) -> None:
    """That a question is known by its task and id, as it is in every file; else UsageError."""
    seen: set[tuple[str, str]] = set()
    for _, question in questions:
        if (question.task, question.id) in seen:
            what = f"two {split} questions of task `{question.task}` are called `{question.id}`"
            raise UsageError(f"{what}; give each an id of its own, and each task a name of its own")
        seen.add((question.task, question.id))


def check_lengths(
    gguf: Path, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Asked], how: Sampling, name: str
) -> None:
    """That every question and its reply fit into a GGUF's context; else UsageError names the question."""
    from cotree.models.gguf_file import GGUF

    file = GGUF(gguf)
    takes = file.get(f"{file['general.architecture']}.context_length")
    for task, question in questions:
        needed = tokens_needed(tokenizer, task, question, how)
        if takes is not None and needed > takes:
            raise UsageError(
                f"question `{question.id}` of task `{question.task}` may need {needed} tokens, `{name}`"
                f" takes {takes}; lower eval.max_tokens (--max-tokens), or evaluate on other tasks"
            )


def tokens_needed(tokenizer: PreTrainedTokenizerBase, task: Task, question: Question, how: Sampling) -> int:
    """The most tokens that a question's last turn can take, prompt and reply, when every reply is `max_tokens` long."""
    from cotree.models.chat import render

    *earlier, last = turns_of(question)
    # The server may add a token of beginning.
    prompt = render(tokenizer, how.conversation(task, last))
    return token_counter(tokenizer)(prompt) + (len(earlier) + 1) * how.max_tokens + 1


def turns_of(question: Question) -> Iterator[Question]:
    """A question and its later turns, as if nothing had been replied between them."""
    following: Question | None = question
    while following is not None:
        yield following
        following = following.follow_up("")

"""The samples file is both output and memory: whole lines only, and it survives a kill."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.support.fake_server import FakeServer, FakeServerThread

from cotree.base.progress import Output
from cotree.eval.asking import ask, tokens_needed
from cotree.eval.evaluate import evaluate_model, open_local, open_server
from cotree.eval.journal import JOURNAL, EvalSample, append_line, read_samples
from cotree.eval.metrics import constant_baselines
from cotree.eval.samplers import PlainSampler, SampledReplies, Sampler
from cotree.eval.scores import ConstantBaseline
from cotree.eval.settings import AskSettings
from cotree.models.client import Choice, Request
from cotree.models.encode import render_prompt
from cotree.models.endpoints import Endpoint
from cotree.models.llama_cpp import serve
from cotree.models.resolve import gguf_at_type
from cotree.models.settings import Model
from cotree.models.tokenizer import load_tokenizer
from cotree.models.weights import locate
from cotree.tasks import Question, Task, Verdict, WorkedExample, task
from cotree.tasks.base import AnswerForm, Asked, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def sample(i: int, text: str = "x") -> EvalSample:
    return EvalSample("letters", str(i), text, "stop", 3, 10, "wrong", "2", "3")


def test_samples_come_back_as_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "s.jsonl"
    samples = [sample(0, "naïve\u2028line\x85\r\n日本"), sample(1, '{"a": "\\n"}')]
    for item in samples:
        append_line(path, asdict(item))
    assert read_samples(path) == samples


def test_a_line_that_a_kill_cut_short_is_dropped_and_its_question_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    append_line(path, asdict(sample(0)))
    whole = path.read_bytes()
    for cut in range(1, len(whole)):
        path.write_bytes(whole + whole[:cut])
        assert read_samples(path) == [sample(0)]
        assert path.read_bytes() == whole + whole[:cut], "who reads must not write: it may be anybody's file"
        append_line(path, asdict(sample(1)))
        assert read_samples(path) == [sample(0), sample(1)]


def test_no_file_is_no_samples(tmp_path: Path) -> None:
    assert read_samples(tmp_path / "none.jsonl") == []


def words() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are words, with a template of one line a message."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    own = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
    return PreTrainedTokenizerFast(tokenizer_object=own, chat_template=template, unk_token="<unk>")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[FakeServerThread, list[dict[str, int]]]]:
    """A fake server in the engine's place, which thinks before it says its prompt's number of lines, and how wide the
    engine would have been."""
    widths: list[dict[str, int]] = []

    def reply(prompt: str, seed: int, index: int) -> str:
        return f"<think>hm</think>The answer is:\nsaid {prompt.count('[user]')}"

    def needed(_: None, tokenizer: object, questions: Sequence[Asked], asking: AskSettings, *, name: str) -> int:
        return max(tokens_needed(words(), *asked, asking) for asked in questions)

    with FakeServerThread(reply=reply) as server:

        @contextmanager
        def serve(gguf: Path, **wide: int) -> Iterator[str]:
            widths.append(wide)
            yield server.url

        monkeypatch.setattr("cotree.eval.evaluate.serve", serve)
        monkeypatch.setattr("cotree.eval.evaluate.context_length", lambda file: None)
        monkeypatch.setattr("cotree.eval.evaluate.check_lengths", needed)
        yield server, widths


def asked_of(path: Path, asked: Sequence[tuple[Task, Question]], asking: AskSettings) -> list[EvalSample]:
    model = open_local(path.parent, words(), asked, asking, name="m")
    return ask(model, asked, path, asking, sampler_of=lambda endpoint: PlainSampler(endpoint, asking))[0]


class Talk(Task):
    """Three turns; the second is answered as it should be."""

    name = "talk"
    description = "generated: conversations"
    prompt_version = "1"
    answer_form: AnswerForm = "text"

    def questions(self, split: object = None, limit: int | None = None) -> list[Question]:
        later = (Turn("And now?", "said 2"), Turn("And then?", "other"))
        return [Question(f"q{i}", "talk", ({"role": "user", "content": f"Say {i}."},), "no", later=later) for i in "ab"]

    def worked_examples(self, question: Question) -> list[WorkedExample]:
        return []

    def verify(self, answer: str, question: Question) -> Verdict:
        correct = answer == question.gold
        return Verdict("correct" if correct else "wrong", float(correct), answer)


def test_every_turn_of_a_conversation_is_asked_on_the_models_own_replies(
    tmp_path: Path, served: tuple[FakeServerThread, list[dict[str, int]]]
) -> None:
    server, _ = served
    talk, path = Talk(), tmp_path / "s.jsonl"
    asked = [(talk, question) for question in talk.questions()]
    samples = asked_of(path, asked, AskSettings(max_tokens=16))
    assert [(s.id, s.turn, s.task_turn, s.verdict) for s in samples] == [
        (id, turn, part, kind)
        for id in ("qa", "qb")
        for turn, part, kind in ((0, "talk", "wrong"), (1, "talk, turn 2", "correct"), (2, "talk, turn 3", "wrong"))
    ]
    last = next(body["prompt"] for body in server.requests if "And then?" in body["prompt"] and "a." in body["prompt"])
    assert last == (
        "[user] Say a.\n[assistant] said 1\n[user] And now?\n[assistant] said 2\n[user] And then?\n[assistant]"
    )
    # Interrupted after a first turn: that one is not asked again.
    whole = path.read_text()
    path.write_text("".join(line for line in whole.splitlines(True) if '"turn": 0' in line))
    before = len(server.requests)
    assert asked_of(path, asked, AskSettings(max_tokens=16)) == samples
    assert len(server.requests) - before == 4


def test_the_engine_is_wide_enough_for_the_longest_prompt(
    tmp_path: Path, served: tuple[FakeServerThread, list[dict[str, int]]]
) -> None:
    _, widths = served
    letters = task("letters")
    short = [(letters, question) for question in letters.questions("test", 3)]
    content = "word " * 5000
    long = [*short, (letters, replace(short[0][1], id="long", messages=({"role": "user", "content": content},)))]
    asked_of(tmp_path / "short.jsonl", short, AskSettings(max_tokens=128))
    asked_of(tmp_path / "long.jsonl", long, AskSettings(max_tokens=128))
    talk = Talk().questions()[0]
    assert widths == [
        {"slots": 16, "context": 896, "shared": False},
        {"slots": 6, "context": 5002 + 128 + 1, "shared": False},
    ]
    assert tokens_needed(words(), Talk(), talk, AskSettings(max_tokens=100)) == 3 * (3 + 1) + 3 * 100 + 1


def test_only_tasks_with_short_answers_have_a_constant_to_beat() -> None:
    letters = task("letters")
    asked = [(letters, question) for question in letters.questions("test", 30)]
    both = [*asked, *((Talk(), question) for question in Talk().questions())]
    (row,) = constant_baselines(both)
    golds = [question.gold for _, question in asked]
    assert row == ConstantBaseline(task="letters", answer=row.answer, accuracy=golds.count(row.answer) / 30)


def letters_asked(n: int) -> list[tuple[Task, Question]]:
    letters = task("letters")
    return [(letters, question) for question in letters.questions("test", n)]


def test_samples_come_from_few_requests_and_only_missing_ones_are_asked_again(
    tmp_path: Path, served: tuple[FakeServerThread, list[dict[str, int]]]
) -> None:
    server, widths = served
    server.server.reply = lambda prompt, seed, index: f"\\boxed{{{(seed + index) % 7}}}"
    path, asking = tmp_path / "s.jsonl", AskSettings(max_tokens=16, samples=20, temperature=0.5, seed=3)
    samples = asked_of(path, letters_asked(3), asking)
    assert [s.sample for s in samples] == [*range(20)] * 3
    assert [tuple(body[key] for key in ("n", "seed", "temperature")) for body in server.requests[:2]] == [
        (16, 3, 0.5),
        (4, 19, 0.5),
    ]
    assert [s.answer for s in samples[:20]] == [str((3 + n) % 7) for n in range(20)]
    assert widths == [{"slots": 16, "context": 784, "shared": True}]
    assert [n for n in range(20) if samples[n].prompt_tokens > 0] == [0, 16]
    # A kill between the lines of one request: the others of it stay as they are.
    path.write_text("".join(path.read_text().splitlines(True)[:-1]))
    before = len(server.requests)
    assert asked_of(path, letters_asked(3), asking) == samples
    assert len(server.requests) == before + 1
    assert asked_of(path, letters_asked(3), asking) == samples
    assert len(widths) == 2, "nothing was left, so no engine was started"


def test_each_sample_of_a_conversation_goes_its_own_way(
    tmp_path: Path, served: tuple[FakeServerThread, list[dict[str, int]]]
) -> None:
    server, _ = served
    server.server.reply = lambda prompt, seed, index: f"{seed + index} after {prompt.count('[user]')}"
    talk, asking = Talk(), AskSettings(max_tokens=16, samples=2, temperature=1.0)
    asked: list[tuple[Task, Question]] = [(talk, talk.questions()[0])]
    samples = asked_of(tmp_path / "s.jsonl", asked, asking)
    assert [(s.turn, s.sample, s.response) for s in samples] == [
        (turn, sample, f"{sample} after {turn + 1}") for turn in range(3) for sample in range(2)
    ]
    assert len({s.prompt_hash for s in samples if s.turn == 0}) == 1
    assert len({s.prompt_hash for s in samples if s.turn == 2}) == 2


def test_a_lenient_verdict_takes_the_last_number(
    tmp_path: Path, served: tuple[FakeServerThread, list[dict[str, int]]]
) -> None:
    server, _ = served
    ((letters, question),) = letters_asked(1)
    server.server.reply = lambda prompt, seed, index: f"I count {question.gold}"
    (sample,) = asked_of(tmp_path / "s.jsonl", [(letters, question)], AskSettings(max_tokens=16))
    assert (sample.verdict, sample.lenient_verdict, sample.max_tokens, sample.family) == (
        "no_answer",
        "correct",
        16,
        question.family,
    )


def test_another_strategy_answers_through_the_same_seam(
    tmp_path: Path, served: tuple[FakeServerThread, list[dict[str, int]]]
) -> None:
    """Two answers of one tree, in this case always the same, and all that the tree has cost."""

    class Tree:
        samples_per_call = 2

        async def sample(self, task: Task, question: Question, numbers: range) -> SampledReplies:
            return SampledReplies([Choice(f"\\boxed{{{n}}}", "stop", 9) for n in numbers], 100, 0.5)

    def tree(endpoint: Endpoint) -> Sampler:
        return Tree()

    asked, asking = letters_asked(2), AskSettings(max_tokens=16, samples=4, temperature=1.0)
    model = open_local(tmp_path, words(), asked, asking, name="m")
    samples, tokens = ask(model, asked, tmp_path / "s.jsonl", asking, sampler_of=tree)
    assert tokens == 9 * 8
    assert [(s.answer, s.prompt_tokens) for s in samples] == [("0", 100), ("1", 0), ("2", 100), ("3", 0)] * 2
    assert served[0].calls == 0


@pytest.mark.timed
async def test_tokens_per_second_are_those_of_raw_requests(tmp_path: Path) -> None:
    """An evaluation beside bare requests to the same server with as many in flight, in turns."""
    import aiohttp

    asked, in_flight = letters_asked(138), 16
    reply = "we count the letters again " * 12 + "\\boxed{3}"
    asking = AskSettings(max_tokens=256)
    async with FakeServer(reply=lambda *_: reply, latency=0.05) as server:
        model = Model(url=server.url, model="fake", mode="chat", max_in_flight=in_flight)
        bodies = [
            Request("", 1, 256, 0.0, 1.0, 0, (), tuple((m["role"], m["content"]) for m in q.messages)).body("fake")
            for _, q in asked
        ]

        async def raw() -> float:
            limit, started = asyncio.Semaphore(in_flight), time.perf_counter()
            async with aiohttp.ClientSession(headers={"Content-Type": "application/json"}) as session:

                async def one(body: bytes) -> None:
                    async with limit, session.post(f"{server.url}/v1/chat/completions", data=body) as answer:
                        await answer.read()

                await asyncio.gather(*map(one, bodies))
            return time.perf_counter() - started

        async def ours(n: int) -> float:
            started = time.perf_counter()
            path = tmp_path / f"{n}.jsonl"
            sampler_of = partial(PlainSampler, asking=asking)
            await asyncio.to_thread(ask, open_server(model, "m", tmp_path), asked, path, asking, sampler_of=sampler_of)
            return time.perf_counter() - started

        pairs = [(await raw(), await ours(n)) for n in range(4)]
    ratios = [bare / evaluated for bare, evaluated in pairs[1:]]
    print(f"tokens/s of an evaluation over raw requests: {', '.join(f'{ratio:.3f}' for ratio in ratios)}")
    assert max(ratios) >= 0.9


@pytest.mark.real
def test_one_greedy_sample_is_plain_generation(tmp_path: Path) -> None:
    """The embedded model asked by `evaluate` says what it says when its prompt is sent by hand."""
    letters = task("letters")
    questions = letters.questions("test", 2)
    evaluate_model(
        "smollm2-135m-instruct", ["letters"], limit=2, max_tokens=16, out=tmp_path, output=Output(quiet=True)
    )
    gguf = gguf_at_type(locate("smollm2-135m-instruct"), "Q8_0")
    said = {}
    with serve(gguf, slots=1, context=1024) as url:
        for question in questions:
            prompt = render_prompt(load_tokenizer(gguf), question.messages)
            body = json.dumps({"prompt": prompt, "max_tokens": 16, "temperature": 0}).encode()
            request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
            said[question.id] = json.load(urllib.request.urlopen(request))["choices"][0]["text"]
    assert {sample.id: sample.response for sample in read_samples(tmp_path / JOURNAL)} == said

"""The samples file is both output and memory: whole lines only, and it survives a kill."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.fake_server import FakeServerThread

from cotree.eval.asking import Sampling, ask, embedded, tokens_needed
from cotree.eval.journal import EvalSample, append_line, read_samples
from cotree.eval.outcome import constant_baselines
from cotree.tasks import Question, Task, Verdict, WorkedExample, task
from cotree.tasks.base import AnswerForm, Turn

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
        assert path.read_bytes() == whole
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

    with FakeServerThread(reply=reply) as server:

        @contextmanager
        def serve(gguf: Path, **wide: int) -> Iterator[str]:
            widths.append(wide)
            yield server.url

        monkeypatch.setattr("cotree.eval.asking.serve", serve)
        yield server, widths


def asked_of(path: Path, asked: Sequence[tuple[Task, Question]], how: Sampling) -> list[EvalSample]:
    return ask(embedded(path.parent, words(), asked, how), asked, path, how)


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
    samples = asked_of(path, asked, Sampling(16))
    assert [(s.id, s.turn, s.part, s.kind) for s in samples] == [
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
    assert asked_of(path, asked, Sampling(16)) == samples
    assert len(server.requests) - before == 4


def test_the_engine_is_wide_enough_for_the_longest_prompt(
    tmp_path: Path, served: tuple[FakeServerThread, list[dict[str, int]]]
) -> None:
    _, widths = served
    letters = task("letters")
    short = [(letters, question) for question in letters.questions("test", 3)]
    content = "word " * 5000
    long = [*short, (letters, replace(short[0][1], id="long", messages=({"role": "user", "content": content},)))]
    asked_of(tmp_path / "short.jsonl", short, Sampling(128))
    asked_of(tmp_path / "long.jsonl", long, Sampling(128))
    talk = Talk().questions()[0]
    assert widths == [
        {"slots": 16, "context": 896, "shared": False},
        {"slots": 6, "context": 5002 + 128 + 1, "shared": False},
    ]
    assert tokens_needed(words(), Talk(), talk, Sampling(100)) == 3 * (3 + 1) + 3 * 100 + 1


def test_only_tasks_with_short_answers_have_a_constant_to_beat() -> None:
    letters = task("letters")
    asked = [(letters, question) for question in letters.questions("test", 30)]
    both = [*asked, *((Talk(), question) for question in Talk().questions())]
    (row,) = constant_baselines(both)
    golds = [question.gold for _, question in asked]
    assert row == {"task": "letters", "answer": row["answer"], "accuracy": golds.count(str(row["answer"])) / 30}

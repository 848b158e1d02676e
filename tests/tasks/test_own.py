"""A user's own tasks: the example of the docs, a class, and faults of a file in one line each."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cotree.base.errors import UsageError
from cotree.experiment.recipe import load_recipe
from cotree.search.settings import Trees
from cotree.search.thoughts import ANSWER_FORMATS, thought_text
from cotree.tasks import task

ROOT = Path(__file__).parents[2]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / "tasks.md").read_text(), re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [{"problem": f"Half of {2 * i}?", "solution": f"\\frac{{{2 * i}}}{{2}}", "unit": "cm"} for i in range(1, 40)]
    (tmp_path / "halves.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "halves.yaml").write_text(blocks("yaml")[0])
    (tmp_path / "my_tasks.py").write_text(blocks("python")[1])
    return tmp_path


def test_a_row_without_the_named_id_is_called_by_its_number(folder: Path) -> None:
    path = folder / "halves.yaml"
    path.write_text(path.read_text().replace("  id: id", "  id: key"))
    rows = [{"problem": "Half of 2?", "solution": "1", "unit": "cm", "id": "x"}] * 2
    (folder / "halves.jsonl").write_text("\n".join(map(json.dumps, [*rows, rows[0] | {"key": "own"}])))
    assert [question.id for question in task(str(path)).questions()] == ["0", "1", "own"]


def test_the_yaml_task_of_the_docs(folder: Path) -> None:
    halves = task(str(folder / "halves.yaml"))
    questions = halves.questions()
    assert len(questions) == 39
    assert questions[2].messages[0]["content"] == "Half of 6? Answer in cm. Put the final answer in \\boxed{}."
    assert halves.judge(questions[2], "So \\boxed{3}").kind == "correct"
    assert halves.judge(questions[2], "So \\boxed{4}").kind == "wrong"
    assert halves.judge(questions[2], "It is 3").kind == "no_answer"
    splits = [{q.id for q in halves.questions(split)} for split in ("train", "dev", "test")]
    assert sum(map(len, splits)) == len(set.union(*splits)) == 39
    example = halves.worked_examples(questions[0])[0]
    assert halves.judge(questions[0], f"\\boxed{{{example.answer}}}").kind == "wrong"
    assert example.question == "Half of 120? Answer in cm. Put the final answer in \\boxed{}."
    with pytest.raises(UsageError, match="halves has 39 questions in all, not 40"):
        halves.questions(limit=40)


def test_the_python_class_of_the_docs(folder: Path) -> None:
    parity = task(f"{folder / 'my_tasks.py'}:Parity")
    question = parity.questions(limit=1)[0]
    assert parity.judge(question, f"\\boxed{{{question.gold}}}").kind == "correct"
    with pytest.raises(UsageError, match=r"has no subclass of cotree\.Task called `Party`"):
        task(f"{folder / 'my_tasks.py'}:Party")


def test_a_class_file_may_hold_dataclasses_and_may_not_end_the_program(folder: Path) -> None:
    imports = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    (folder / "held.py").write_text(f"{imports}@dataclass\nclass A:\n    x: int\n{blocks('python')[1]}")
    assert task(f"{folder / 'held.py'}:Parity").questions(limit=1)
    (folder / "ends.py").write_text("raise SystemExit(3)")
    with pytest.raises(UsageError, match=r"cannot load .*ends\.py: SystemExit: 3"):
        task(f"{folder / 'ends.py'}:Parity")


def test_a_recipe_names_own_tasks(folder: Path) -> None:
    name = str(folder / "halves.yaml")
    recipe = load_recipe(ROOT / "recipes" / "laptop.yaml", [f'trees.train.questions={{"{name}": 3}}'])
    settings = recipe.nodes["trees/train"].settings
    assert isinstance(settings, Trees) and settings.questions == {name: 3}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("verifier: math", "verifier: maths", r"`verifier`: Input should be 'math', 'number' or 'text'"),
        ("prompt:", "promt:", r"`prompt`: Field required"),
        ("{question}", "{problem}", r"`prompt`: String should match pattern .*question"),
        ("gold: solution", "gold: answer", r"halves, row 1: a row has no field `answer`; its fields: "),
        ("gold: solution", "gould: solution", r"`fields` says nothing about gold"),
        ("halves.jsonl", "thirds.jsonl", r"no file or folder at thirds\.jsonl"),
        ("fields:", "fields: [", r"cannot be read as YAML"),
        ("    unit: cm\n", "", r"`examples\.0`: its keys must be answer, question, sub_task, thinking, unit, and"),
        ("    unit: cm", "    unit: cm\n    subtask: typo", r"`examples\.0`: its keys"),
    ],
)
def test_faults_are_one_line(folder: Path, old: str, new: str, message: str) -> None:
    path = folder / "halves.yaml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UsageError, match=message) as error:
        task(str(path)).questions()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("extractor", "verifier", "reply", "kind"),
    [
        ("text", "text", "<think>no</think> \\FRAC{2}{2} \n", "correct"),
        ("text", "text", "<think>no \\frac{2}{2}", "no_answer"),
        ("answer", "number", "The answer is 1.", "correct"),
        ("answer", "number", "The answer is 2.", "wrong"),
        ("answer", "text", "\\boxed{\\frac{2}{2}}", "correct"),
    ],
)
def test_extractors_and_verifiers(folder: Path, extractor: str, verifier: str, reply: str, kind: str) -> None:
    path = folder / "halves.yaml"
    path.write_text(path.read_text().replace("verifier: math", f"verifier: {verifier}\nextractor: {extractor}"))
    own = task(str(path))
    question = own.questions(limit=1)[0]
    assert own.judge(question, reply).kind == kind
    if extractor == "text":
        assert own.judge(question, reply, "length").kind == "no_answer"
        # What the search writes: a tag, and no box around what is compared as it is.
        written = thought_text("answer", ANSWER_FORMATS[own.answer_form].prefix, "\\frac{2}{2}", own.answer_form)
        assert own.judge(question, written).kind == "correct"


def test_a_whole_reply_is_asked_for_as_a_text_and_judged_without_its_tag(folder: Path) -> None:
    path = folder / "halves.yaml"
    path.write_text(path.read_text().replace("verifier: math", "verifier: text\nextractor: text"))
    own = task(str(path))
    assert own.answer_form == "text"
    assert own.judge(own.questions(limit=1)[0], "I halve it.\nThe answer is:\n\\frac{2}{2}").kind == "correct"

"""`cotree check` against real servers on loopback: good ones pass, and each bad habit is found and named."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.support.experiment import KeptOutput
from tests.support.fake_server import ASSISTANT, FakeServerThread, tell

from cotree.base.errors import UsageError
from cotree.base.progress import Output
from cotree.cli import main
from cotree.experiment.check import Finding, check
from cotree.experiment.recipe import build_recipe, recipe_yaml


def written(*models: dict[str, Any], **trees: Any) -> dict[str, Any]:
    """A recipe of models `m0`, `m1`, ..., of which `m0` thinks and is asked, and a student whose weights are not there.

    trees: settings of the trees.
    """
    return {
        "name": "checked",
        "models": {f"m{i}": model for i, model in enumerate(models)} | {"gone": {"weights": "no-such-file.gguf"}},
        "trees": {"train": {"questions": {"letters": 2}, "roles": {"thinker": "m0"}} | trees},
        "datasets": {"chains": {"trees": "train", "rows": "sft"}},
        "students": {"sft": {"from": "gone", "method": "sft", "data": "chains"}},
        "evaluations": {"test": {"models": ["m0"], "questions": {"letters": 2}}},
    }


def problems(*models: dict[str, Any], **trees: Any) -> dict[str, str]:
    """What is wrong with the asked models and the trees, by check."""
    output = KeptOutput()
    with pytest.raises(UsageError, match="checks failed"):  # the student's weights are never there
        check(build_recipe(written(*models, **trees)), output)
    parts = [line[5:].split(": ", 2) for line in output.lines if line.startswith("FAIL")]
    gone = [(subject, name) for subject, name, problem in parts if re.search("no-such-file|^as students/sft", problem)]
    assert gone == [("students/sft", "student"), ("model `gone`", "reach")]
    return {name: problem for subject, name, problem in parts if (subject, name) not in gone}


def chat(url: str | list[str], **more: Any) -> dict[str, Any]:
    return {"url": url, "model": "fake", "mode": "chat", **more}


def test_good_servers_pass_in_both_modes(tokenizer: str) -> None:
    with FakeServerThread(reply=tell) as server, FakeServerThread(reply=tell, chat_only=True) as other:
        completions = {"url": server.url, "model": "fake", "tokenizer": tokenizer}
        assert problems(completions, chat([server.url, other.url])) == {}
        assert {"messages" in body for body in server.requests} == {True, False}
        assert len(other.requests) > 5


def test_an_echo_of_the_assistants_words_is_cut_off() -> None:
    with FakeServerThread(reply=tell, habit="echoes") as server:
        assert problems(chat(server.url)) == {}


@pytest.mark.parametrize("habit", ["restarts", "closes"])
@pytest.mark.parametrize("mode", ["chat", "completions"])
def test_a_server_that_does_not_continue_is_found(habit: str, mode: str, tokenizer: str) -> None:
    with FakeServerThread(reply=tell, habit=habit) as server:
        model = chat(server.url) if mode == "chat" else chat(server.url, mode=mode, tokenizer=tokenizer)
        found = problems(model)
    wanted = "continues" if habit == "restarts" else "exact"
    assert wanted in found
    assert ("continue_final_message" if mode == "chat" else "`tokenizer`") in found[wanted]
    assert set(found) <= {"continues", "exact"}


def test_a_server_that_repeats_the_prompt_is_found(tokenizer: str) -> None:
    with FakeServerThread(reply=tell, habit="echoes") as server:
        found = problems({"url": server.url, "model": "fake", "tokenizer": tokenizer})
    assert "switch the server's `echo` off" in found["continues"]


def test_a_server_that_ignores_stop_is_found() -> None:
    with FakeServerThread(reply=tell, ignores=["stop"]) as server:
        found = problems(chat(server.url))
    assert list(found) == ["stop strings"]
    assert "goes on after the stop string" in found["stop strings"]


def test_a_server_that_keeps_the_stop_string_is_found() -> None:
    with FakeServerThread(reply=tell, keeps_stop=True) as server:
        found = problems(chat(server.url))
    assert list(found) == ["stop strings"]
    assert "keeps the stop string" in found["stop strings"]


def test_a_server_that_ignores_n_is_found() -> None:
    with FakeServerThread(reply=tell, ignores=["n"]) as server:
        found = problems(chat(server.url))
    assert list(found) == ["samples"]
    assert "1 choices came back for n=3 (2 attempts)" in found["samples"]


def test_another_models_tokenizer_is_found(tokenizer: str, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(tokenizer, folder)
    words = json.loads((folder / "tokenizer.json").read_text())
    words["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False}
    (folder / "tokenizer.json").write_text(json.dumps(words))
    with FakeServerThread(reply=tell) as server:
        found = problems({"url": server.url, "model": "fake", "tokenizer": str(folder)})
    assert list(found) == ["usage"]
    assert "the server counts 10 prompt tokens, `tokenizer` 72; is it this model's?" in found["usage"]


def test_usage_that_cannot_be_true_is_found() -> None:
    with FakeServerThread(reply=tell, usage="absurd") as server:
        assert "`usage` cannot be true for max_tokens 48" in problems(chat(server.url))["usage"]


def test_a_template_that_drops_words_is_found(tokenizer: str, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(tokenizer, folder)
    (folder / "chat_template.jinja").write_text("hello" + ASSISTANT)
    with FakeServerThread(reply=tell) as server:
        found = problems({"url": server.url, "model": "fake", "tokenizer": str(folder)})
        assert list(found) == ["template"]
        assert server.calls == 0
        (folder / "chat_template.jinja").write_text("{{ raise_exception('no system role') }}")
        found = problems({"url": server.url, "model": "fake", "tokenizer": str(folder)})
    assert "no system role" in found["template"]


def test_a_process_reward_model_is_asked_for_a_score_a_step() -> None:
    reward = {"process": "m1"}
    with FakeServerThread(reply=tell) as server:
        scoring = {"url": server.url, "model": "fake", "mode": "pooling"}
        assert problems(chat(server.url), scoring, reward=reward) == {}
    with FakeServerThread(reply=tell, step="<other>") as server:
        scoring = {"url": server.url, "model": "fake", "mode": "pooling"}
        assert "1 scores came for 2 thoughts" in problems(chat(server.url), scoring, reward=reward)["scores"]


def test_a_pooling_model_has_no_role_and_only_one_gives_process_rewards() -> None:
    scoring = {"url": "http://127.0.0.1:1", "mode": "pooling"}
    with pytest.raises(UsageError, match="`m0` is `mode: pooling`, which scores and writes nothing"):
        build_recipe(written(scoring))
    with pytest.raises(UsageError, match=r"trees\.train\.reward\.process: `m0` writes; it needs .*`mode: pooling`"):
        build_recipe(written(chat("http://127.0.0.1:1"), reward={"process": "m0"}))
    raw = written(chat("http://127.0.0.1:1"), scoring, reward={"process": "m1"})
    build_recipe(raw)
    with pytest.raises(UsageError, match=r"evaluations\.test: `m1` is `mode: pooling`"):
        build_recipe(raw | {"evaluations": {"test": {"models": ["m1"], "questions": {"letters": 2}}}})


def test_an_empty_reply_is_found() -> None:
    with FakeServerThread(reply=lambda prompt, seed, index: " ") as server:
        assert "is empty" in problems(chat(server.url))["usage"]


def test_a_server_that_is_down_is_named_and_the_others_are_checked() -> None:
    with FakeServerThread(reply=tell) as server:
        found = problems(chat([server.url, "http://127.0.0.1:9"]), chat(server.url))
        assert server.calls > 5
    assert list(found) == ["reach"]
    assert "1 of 2 servers are not ready" in found["reach"]
    assert "http://127.0.0.1:9" in found["reach"]
    assert server.url not in found["reach"]


def test_questions_that_there_are_not_are_found() -> None:
    with FakeServerThread(reply=tell) as server:
        found = problems(chat(server.url), questions={"letters": 99999})
    assert list(found) == ["train questions", "contamination"]
    assert "lower the number" in found["train questions"]


def test_a_full_disk_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 10))
    with FakeServerThread(reply=tell) as server:
        assert "free some space" in problems(chat(server.url))["usable"]


def test_the_verb_says_a_line_a_check_and_exits_with_2(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["cotree", "check", str(tmp_path / "recipe.yaml"), "--runs-dir", str(tmp_path)])
    with FakeServerThread(reply=tell, ignores=["stop"]) as server:
        (tmp_path / "recipe.yaml").write_text(recipe_yaml(build_recipe(written(chat(server.url)))))
        with pytest.raises(SystemExit) as exited:
            main()
    out, err = capfd.readouterr()
    assert exited.value.code == 2
    assert len(err.strip().split("\n")) == 1
    assert err.startswith("cotree: 3 of ")
    assert "ok   model `m0`: exact: its greedy reply cut in two is completed to itself" in out
    assert "FAIL model `m0`: stop strings: " in out
    assert "ok   trees/train: train questions: 2 there" in out
    assert "ok   trees/train: thoughts: a chat model: a paragraph each, chains of at most 512 tokens; 3 worked" in out
    assert "FAIL students/sft: student: " in out
    assert "FAIL model `gone`: reach: " in out
    assert os.listdir(tmp_path) == ["recipe.yaml"]


@pytest.mark.real
def test_the_embedded_model_passes(tmp_path: Path) -> None:
    raw = written({"weights": "smollm2-135m-instruct", "max_in_flight": 4})
    del raw["models"]["gone"]
    raw["students"]["sft"]["from"] = "m0"
    findings = check(build_recipe(raw), Output(quiet=True), tmp_path)
    assert {finding.check for finding in findings} >= {"reach", "continues", "exact", "stop strings", "samples"}
    assert all(isinstance(finding, Finding) and not finding.problem for finding in findings)


def test_a_reward_function_that_does_not_load_is_found() -> None:
    with FakeServerThread(reply=tell) as server:
        found = problems(chat(server.url), reward={"function": "nowhere:f"})
    assert list(found) == ["reward function"]
    assert "cannot load nowhere" in found["reward function"]


def test_questions_that_repeat_are_counted_before_the_search(tmp_path: Path) -> None:
    rows = [{"id": str(i), "question": "How many of the blue apples that Tom bought are left for Ann?", "answer": "1"}
            for i in range(60)]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.yaml").write_text("name: own\ndata: rows.jsonl\nprompt: '{question}'\n")
    own = {str(tmp_path / "own.yaml"): 3}
    with FakeServerThread(reply=tell) as server:
        raw = written(chat(server.url), questions=own)
        raw["evaluations"]["test"]["questions"] = own
        output = KeptOutput()
        with pytest.raises(UsageError, match="checks failed"):
            check(build_recipe(raw), output)
    (line,) = [line for line in output.lines if ": contamination: " in line]
    assert "all 3 questions of its trees repeat one of an evaluation" in line
    assert "gates.contamination: false" in line

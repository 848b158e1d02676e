"""`cotree eval` as a user meets it: files, tables, resuming, and one line for a mistake."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.fake_server import FakeServerThread, draw
from tests.support.tiny_student import tiny_model, tiny_tokenizer, write_tiny_gguf

import cotree
from cotree.base.errors import UsageError
from cotree.base.numbers import paper_form
from cotree.base.progress import Output
from cotree.cli import main
from cotree.eval.journal import JOURNAL, read_samples
from cotree.eval.results import Evaluation, read_evaluations, read_results
from cotree.report.paper_table import paper_table
from cotree.train.student import load_student

QUIET = Output(quiet=True)


def said(prompt: str, seed: int, index: int) -> str:
    """Right, wrong, lenient or nothing, by hash."""
    return ("It is \\boxed{2}.", "It is \\boxed{3}.", "#### 2", "I count 2", "I do not know")[
        draw(prompt, seed, index) % 5
    ]


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["cotree", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


def results(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("results_*.json")
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def sample_rows(folder: Path, task: str) -> list[dict[str, Any]]:
    (path,) = folder.glob(f"samples_{task}_2*.jsonl")
    assert path.name[len("samples_") : path.name.rfind("_")] == task, "as lm-eval finds a file's task"
    return [json.loads(line) for line in path.read_text().splitlines()]


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_the_files_have_the_keys_of_lm_eval(tmp_path: Path) -> None:
    """As EvaluationTracker and evaluator.py of lm-evaluation-harness 0.4 write them."""
    with FakeServerThread(reply=said) as server:
        found = cotree.evaluate(server.url, ["letters"], chat=True, limit=12, out=tmp_path, name="a/b", output=QUIET)
    content = results(tmp_path)
    assert {"results", "configs", "versions", "n-shot", "n-samples", "higher_is_better", "config", "date",
            "model_name", "group_subtasks"} <= content.keys()  # fmt: skip
    row, own = content["results"]["letters"], found.rows[0]
    assert row["exact_match,strict-match"] == own["accuracy"]
    assert row["exact_match,flexible-extract"] == own["lenient"]
    p = own["accuracy"]
    assert row["exact_match_stderr,strict-match"] == pytest.approx((p * (1 - p) / 11) ** 0.5)
    assert content["n-samples"]["letters"] == {"original": 138, "effective": 12}
    assert (content["model_name"], content["model_name_sanitized"]) == ("a/b", "a__b")
    rows = sample_rows(tmp_path, "letters")
    shown = [(row["doc_id"], row["filter"]) for row in rows[:3]]
    assert shown == [(0, "strict-match"), (0, "flexible-extract"), (1, "strict-match")]
    for one in rows:
        assert one.keys() >= {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics",
                              "doc_hash", "prompt_hash", "target_hash", "exact_match"}  # fmt: skip
        assert one["prompt_hash"] == sha(one["arguments"]["gen_args_0"]["arg_0"])
        assert one["doc_hash"] == sha(json.dumps(one["doc"], indent=2, ensure_ascii=False))
        assert one["target_hash"] == sha(one["target"])
        assert one["exact_match"] == (one["filtered_resps"][0] == one["target"])
    strict = [one["exact_match"] for one in rows if one["filter"] == "strict-match"]
    assert sum(strict) / 12 == own["accuracy"]
    assert read_results(tmp_path) == [found]


def test_a_later_turn_is_a_request_for_each_sample(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    turns = [{"prompt": "Greet.", **asked}, {"prompt": "Again.", **asked}]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"id": "1:1:zh", "language": "Chinese", "turns": turns}))
    with FakeServerThread(reply=lambda prompt, seed, index: f"Hi{',' * (seed + index)}") as server:
        found = cotree.evaluate(
            server.url, ["multi_if"], data=path, chat=True, samples=2, temperature=1.0, out=tmp_path / "o", output=QUIET
        )
    (first,), (second,) = (sample_rows(tmp_path / "o", name) for name in ("multi_if", "multi_if_turn_2"))
    assert (first["resps"], second["resps"]) == ([["Hi", "Hi,"]], [["Hi"], ["Hi,"]])
    assert [json.loads(a["arg_0"])[1]["content"] for a in second["arguments"].values()] == ["Hi", "Hi,"]
    assert results(tmp_path / "o")["results"]["multi_if"]["prompt_level_strict_acc,none"] == 0.5
    assert "multi_if IF(Zh)" in paper_table([found]) and "50.0 (0%)" in paper_table([found])


def command(url: str, out: Path) -> list[str]:
    words = f"eval --model {url} --chat --served fake --task letters --limit 60 --name m --out {out}"
    return [sys.executable, "-m", "cotree.cli", *words.split(), "--samples", "3", "--temperature", "0.8"]


def test_a_killed_evaluation_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    def numbers(folder: Path) -> dict[str, Any]:
        content = results(folder)
        return {key: content[key] for key in ("results", "cotree", "task_hashes", "n-samples")}

    with FakeServerThread(reply=said, latency=0.15) as server:
        process = subprocess.Popen(command(server.url, tmp_path / "killed"), stdout=subprocess.DEVNULL)
        journal = tmp_path / "killed" / "journal.jsonl"
        deadline = time.monotonic() + 60
        while not journal.is_file() or journal.read_text().count("\n") < 20:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(0.5)  # requests that were under way are counted too
        samples = Counter(json.loads(line)["id"] for line in journal.read_text().split("\n")[:-1])
        asked, whole = server.calls, list(samples.values()).count(3)
        assert 20 <= samples.total() < 180
        again = subprocess.run(command(server.url, tmp_path / "killed"), capture_output=True, text=True, check=True)
        assert server.calls - asked == 60 - whole
        assert "tokens/s" in again.stdout
        subprocess.run(command(server.url, tmp_path / "whole"), capture_output=True, check=True)
        asked = server.calls
        subprocess.run(command(server.url, tmp_path / "whole"), capture_output=True, check=True)
        assert server.calls == asked
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    assert sample_rows(tmp_path / "killed", "letters") == sample_rows(tmp_path / "whole", "letters")


def evaluation(name: str, **changes: Any) -> Evaluation:
    row = {
        "task": "gsm8k", "n": 100, "samples": 1, "temperature": 0.0, "top_p": 1.0, "decoding": "", "max_tokens": 64,
        "accuracy": 0.874, "low": 0.79, "high": 0.93, "lenient": 0.874, "no_answer": 0.0023, "loop": 0.001,
        "truncated": 0.0013, "finished_without_answer": 0.0, "test_at": {}, "majority": None, "mean_tokens": 9.5,
        "tokens_p50": 9, "tokens_p90": 12, "tokens_p99": 20, "detectable": None, "families": {}, **changes,
    }  # fmt: skip
    return Evaluation(name, [row], [], [])


class Text(HTMLParser):
    """The tags and the texts of cells."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        if tag in ("td", "th"):
            self.texts.append("")

    def handle_data(self, data: str) -> None:
        if self.texts:
            self.texts[-1] += data.replace("\n", "")


@settings(deadline=None)
@given(st.text(st.sampled_from("ab\\{}$&#_%~^<>|`*[]\n\x1b\"'é"), min_size=1).filter(lambda name: "a" in name))
def test_no_name_is_markup(name: str) -> None:
    shown = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    found = [evaluation(name), evaluation("other", task="math500", accuracy=0.51)]
    page = Text(paper_table(found, "html"))
    assert page.tags == {"table", "thead", "tr", "td", "th", "ul", "li"}
    assert page.texts[:6] == ["model", "gsm8k", "math500", shown, "87.4 (0.23%)", "–"]
    latex = paper_table(found, "latex").split("\n")[4].removesuffix(r" \\")
    bare = re.sub(r"\\(text\w+\{\}|[{}$&#_%])", "", latex)
    assert not latex.startswith(("[", "*"))
    assert bare.count("&") == 2 and not re.search(r"[\\{}$#_%~^<>]", bare)
    cell, _, _ = paper_table(found, "markdown").split("\n")[2].removeprefix("| ").rpartition(" | 87.4 (0.23%)")
    assert re.fullmatch(r"(\\.|[^`*_\[\]<|$\\])*", cell)
    assert re.sub(r"\\(.)", r"\1", cell) == shown
    assert all("\x1b" not in paper_table(found, form) for form in ("terminal", "markdown", "latex", "html"))


def test_every_format_has_the_papers_cells_and_what_stands_behind_them() -> None:
    several = {
        "samples": 8, "temperature": 0.8, "lenient": 0.9, "test_at": {"8": [0.95, 0.9, 0.98]}, "detectable": 0.12,
        "majority": [0.9, 0.8, 0.95],
    }  # fmt: skip
    for form in ("terminal", "markdown", "latex", "html"):
        text = paper_table([evaluation("base"), evaluation("dpo", **several)], form)
        text = text.replace("\\", "").replace("--", "–")
        assert text.count("87.4 (0.23%)") == 2
        for told in (
            "of 100, greedy", "79.0–93.0", "Test@8 95.0 [90.0–98.0]", "maj@8 90.0", "lenient 90.0", "max_tokens 64",
            "loop 0.1 + cut off 0.1 + finished 0.0", "differences below 12.0 points",
        ):  # fmt: skip
            assert told in text
    with pytest.raises(UsageError, match="unknown format `pdf`; known: terminal, markdown"):
        paper_table([evaluation("base")], "pdf")
    assert paper_form(0.874, 0.0023) == "87.4 (0.23%)"


def test_the_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    with FakeServerThread(reply=said) as server:
        asked = ("eval", "--model", server.url, "--chat", "--served", "fake", "--task", "letters")
        assert run(monkeypatch, *asked, "--limit", 9, "--seed", 1) == 0
        assert run(monkeypatch, *asked, "--limit", 9, "--name", "b", "--format", "latex") == 0
        assert r"\begin{tabular}" in capsys.readouterr().out
        assert run(monkeypatch, *asked, "--limit", 8) == 2
        assert "holds an evaluation with other settings (seed, limit)" in capsys.readouterr().err
    first, second = tmp_path / "runs" / "evals" / "fake", tmp_path / "runs" / "evals" / "b"
    assert run(monkeypatch, "eval", "--compare", first, second) == 0
    assert "exact McNemar" in capsys.readouterr().out
    assert run(monkeypatch, "eval", "--table", first, "--table", second, "--format", "markdown") == 0
    shown = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()[:4]]
    assert shown == ["| model", "|---|---:|", "| fake", "| b"]
    assert run(monkeypatch, "diagnose", first) == 0
    assert "journal: letters" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a recipe, or --model with --task"),
        (["--model", "smollm2-135m-instruct"], "name a task to evaluate on"),
        (["--model", "nowhere/model", "--task", "letters"], "nothing at nowhere/model"),
        (["--model", "llama-9", "--task", "letters"], "unknown embedded model `llama-9`"),
        (["--model", "http://127.0.0.1:9", "--task", "letters"], "give --tokenizer"),
        (["--model", "http://127.0.0.1:9", "--chat", "--task", "letters"], "start the server"),
        (["--model", "smollm2-135m-instruct", "--chat", "--task", "letters"], "are for servers"),
        (["--model", "x", "--task", "letters", "--samples", "4"], "need a temperature"),
        (
            ["--model", "x", "--task", "letters", "--family", "zebras"],
            "of family `zebras`; its families: ",
        ),
        (["--model", "x", "--task", "letters", "--limit", "999"], "has 138 such questions, not 999"),
        (["--model", "x", "--task", "letters", "--task", "letters"], "two test questions of task `letters`"),
        (["--model", "x", "--task", "leters"], "did you mean `letters`"),
        (["--model", "notes.txt", "--task", "letters"], "unknown embedded model `notes.txt`"),
        (["--model", "bare", "--task", "letters"], "bare has no config.json; give a transformers folder"),
        (["--model", "dpo", "--task", "letters"], "dpo has no config.json; give dpo/model"),
        (["--model", "folder", "--task", "letters"], "cannot export 'mamba' models: supported are llama"),
        (["--model", "smollm2-135m-instruct", "--task", "letters", "--max-tokens", "9000"], "takes 8192; lower"),
        (["--model", "x", "--task", "letters", "--gguf", "Q2"], "unknown GGUF type `Q2`"),
        (["--model", "x", "--task", "letters", "--top-p", "0"], "top_p 0.0 keeps no token"),
        (["--model", "", "--task", "letters"], "name a model: a server's URL"),
        (["--table", "folder/config.json"], "folder/config.json is no folder"),
        (["--compare", "a", "b"], "no samples at a"),
        (["--table", "bare"], "no results of an evaluation in bare"),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bare").mkdir()
    (tmp_path / "dpo" / "model").mkdir(parents=True)
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.txt").write_text("no model")
    (tmp_path / "folder" / "config.json").write_text('{"model_type": "mamba"}')
    (tmp_path / "folder" / "model.safetensors").write_bytes(b"")
    assert run(monkeypatch, "eval", *words) == 2
    told = capsys.readouterr().err
    assert message in told and told.startswith("cotree: ") and told.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_rows_that_changed_under_their_ids_are_another_evaluation(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    how: dict[str, Any] = {"chat": True, "served": "fake", "max_tokens": 16, "output": QUIET}
    with FakeServerThread(reply=said) as server:
        for gold, out in (("2", "out"), ("2", "out"), ("3", "out"), ("3", "rows.jsonl")):
            rows.write_text(json.dumps({"question": "What is 1 + 1?", "answer": f"#### {gold}", "id": "a"}) + "\n")
            fault = "is a file; --out names" if out == "rows.jsonl" else r"with other settings \(questions\)"
            refused = pytest.raises(UsageError, match=fault) if gold == "3" else nullcontext()
            with refused:
                cotree.evaluate(server.url, ["gsm8k"], data=rows, out=tmp_path / out, **how)
        assert server.calls == 1


def test_a_server_with_a_tokenizer_reads_the_rendered_prompt_and_a_base_model_is_stopped(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "chat")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "base")
    with FakeServerThread(reply=said) as server:
        for name in ("chat", "base"):
            cotree.evaluate(
                server.url,
                ["letters"],
                served="fake",
                tokenizer=str(tmp_path / name),
                limit=1,
                out=tmp_path / f"{name}-out",
                output=QUIET,
            )
        chat, base = server.requests
    assert chat["prompt"].startswith("<|im_start|>user\n") and chat["stop"] is None
    assert base["prompt"].startswith("Question: ") and base["stop"] == ["\nQuestion:"]


def test_a_transformers_folder_is_served_like_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights: the folder that was made of a GGUF says what the GGUF says, and its export is made once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = write_tiny_gguf(tiny_model(), tiny_tokenizer(), tmp_path / "tiny.gguf")
    folder = load_student(file, tmp_path / "student")
    said = []
    for model, name in ((file, "file"), (folder, "folder"), (folder, "again")):
        out = tmp_path / name
        cotree.evaluate(
            str(model), ["letters"], limit=2, max_tokens=8, gguf="F32", base=str(file), name=name, out=out, output=QUIET
        )
        said.append({sample.id: sample.response for sample in read_samples(out / JOURNAL)})
    assert said[0] == said[1] == said[2]
    assert len(list((tmp_path / "cache" / "cotree").glob("student-*-F32.gguf"))) == 1
    with pytest.raises(UsageError, match="--base names the GGUF that it was trained from"):
        cotree.evaluate(str(folder), ["letters"], limit=2, output=QUIET)


WRITTEN = (
    "4 + 3 = 7.\n#### 7", "He pays 1,204 dollars.\n#### 1,204", "#### 12\nWait, no: 3 * 5 = 15.\n#### 15",
    "So she has 42 apples", "I do not know", "2 + 2 = 5.\n#### 5", "It is 18.\n#### -18", "Half of 9 is 4.5\n#### 4.5",
)  # fmt: skip
GOLDS = ("7", "1204", "12", "42", "3", "4", "-18", "4.5")


def test_lm_eval_gives_the_same_exact_match_on_the_same_samples(tmp_path: Path) -> None:
    """Its own filters and metric of GSM8K, on answers in GSM8K's form (`#### x`), the first of several by its rule."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install lm_eval==0.4.12 to run this test")
    from importlib.resources import files

    import yaml
    from lm_eval.api.instance import Instance
    from lm_eval.api.metrics import exact_match_fn
    from lm_eval.filters import build_filter_ensemble

    written = [text.split("\nWait")[0] for text in WRITTEN]
    path = tmp_path / "rows.jsonl"
    rows = [{"id": str(i), "question": f"Number {i}?", "answer": gold} for i, gold in enumerate(GOLDS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    by_prompt = {f"Number {i}?": text for i, text in enumerate(written)}
    reply = lambda prompt, *_: next(text for asked, text in by_prompt.items() if asked in prompt)  # noqa: E731
    with FakeServerThread(reply=reply) as server:
        cotree.evaluate(server.url, ["gsm8k"], data=path, chat=True, served="fake", out=tmp_path / "out", output=QUIET)
    theirs = yaml.safe_load(
        re.sub(r"!function.*", "", (files("lm_eval") / "tasks" / "gsm8k" / "gsm8k.yaml").read_text(encoding="utf-8"))
    )
    taken = ("ignore_case", "ignore_punctuation", "regexes_to_ignore")
    options = {key: value for key, value in theirs["metric_list"][0].items() if key in taken}
    ours = results(tmp_path / "out")["results"]["gsm8k"]
    for chosen in theirs["filter_list"]:
        steps = [[step["function"], {k: v for k, v in step.items() if k != "function"}] for step in chosen["filter"]]
        instances = [Instance("generate_until", {}, ("", {}), i, resps=[text]) for i, text in enumerate(written)]
        build_filter_ensemble(chosen["name"], steps).apply(instances)
        found = [instance.filtered_resps[chosen["name"]] for instance in instances]
        right = [
            exact_match_fn(predictions=[answer], references=[gold], **options)["exact_match"]
            for answer, gold in zip(found, GOLDS, strict=True)
        ]
        assert ours[f"exact_match,{chosen['name']}"] == sum(map(float, right)) / len(GOLDS), chosen["name"]


def test_models_of_one_name_are_called_by_their_folders(tmp_path: Path) -> None:
    for name, model in (("one", "dpo"), ("two", "dpo"), ("three", "base")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps({"eval": [{"model": model, "task": "letters"}]}))
    found = read_evaluations([tmp_path / name for name in ("one", "two", "three")])
    assert [evaluation.model for evaluation in found] == ["one: dpo", "two: dpo", "base"]

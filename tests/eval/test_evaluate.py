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
from pathlib import Path
from typing import Any

import pytest
from tests.support.fake_server import FakeServerThread, draw
from tests.support.tiny_student import tiny_model, tiny_tokenizer, write_tiny_gguf

from cotree.base.errors import UsageError
from cotree.base.progress import Output
from cotree.cli import main
from cotree.eval import asking as asking_module
from cotree.eval.compare import compare_evaluations
from cotree.eval.evaluate import evaluate, evaluate_model
from cotree.eval.journal import JOURNAL, read_samples
from cotree.eval.settings import AskSettings
from cotree.models.settings import Model
from cotree.report.table import table_of
from cotree.tasks import Question, Verdict, task
from cotree.tasks.base import VERDICT_VERSION
from cotree.tasks.generated import Letters
from cotree.train.student import convert_gguf

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
        found = evaluate_model(server.url, ["letters"], chat=True, limit=12, out=tmp_path, name="a/b", output=QUIET)
    content = results(tmp_path)
    assert {"results", "configs", "versions", "n-shot", "n-samples", "higher_is_better", "config", "date",
            "model_name", "group_subtasks"} <= content.keys()  # fmt: skip
    assert float(content["total_evaluation_time_seconds"]) > 0 and content["chat_template_sha"] is None
    row, own = content["results"]["letters"], found.rows[0]
    assert row["exact_match,strict-match"] == own.accuracy
    assert row["exact_match,flexible-extract"] == own.lenient
    p = own.accuracy
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
    assert sum(strict) / 12 == own.accuracy
    assert {key: content["cotree"][key] for key in ("model", "rows", "tokens")} == json.loads(
        json.dumps({"model": "a/b", "rows": [own.model_dump()], "tokens": found.tokens.model_dump()})
    )
    assert found.tokens.completion == sum(sample.tokens for sample in read_samples(tmp_path / JOURNAL))


def test_what_could_not_be_judged_is_in_no_metric_of_lm_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsure(self: Letters, answer: str, question: Question) -> Verdict:
        return Verdict.of(None if answer == "3" else answer == question.gold, answer)

    monkeypatch.setattr(Letters, "verify", unsure)
    with FakeServerThread(reply=said) as server:
        found = evaluate_model(server.url, ["letters"], chat=True, limit=12, out=tmp_path, output=QUIET)
        row, own, rows = results(tmp_path)["results"]["letters"], found.rows[0], sample_rows(tmp_path, "letters")
        monkeypatch.setattr(Letters, "extract", lambda self, text, why, mode: "3" if mode == "lenient" else None)
        monkeypatch.setattr(asking_module, "VERDICT_VERSION", VERDICT_VERSION + 1)
        evaluate_model(server.url, ["letters"], chat=True, limit=12, out=tmp_path, output=QUIET)
    assert own.undecided and own.n + own.undecided == 12
    for name, share in (("strict-match", own.accuracy), ("flexible-extract", own.lenient)):
        assert row[f"exact_match,{name}"] == share
        matches = [one["exact_match"] for one in rows if one["filter"] == name]
        assert (len(matches), matches.count(None)) == (12, own.undecided)
        assert sum(match for match in matches if match is not None) / own.n == share
    row = results(tmp_path)["results"]["letters"]
    assert row["exact_match,strict-match"] == 0 and "exact_match,flexible-extract" not in row


def test_a_later_turn_is_a_request_for_each_sample(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    turns = [{"prompt": "Greet.", **asked}, {"prompt": "Again.", **asked}]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"id": "1:1:zh", "language": "Chinese", "turns": turns}))
    with FakeServerThread(reply=lambda prompt, seed, index: f"Hi{',' * (seed + index)}") as server:
        evaluate_model(
            server.url, ["multi_if"], data=path, chat=True, samples=2, temperature=1.0, out=tmp_path / "o", output=QUIET
        )
    (first,), (second,) = (sample_rows(tmp_path / "o", name) for name in ("multi_if", "multi_if_turn_2"))
    assert (first["resps"], second["resps"]) == ([["Hi", "Hi,"]], [["Hi"], ["Hi,"]])
    assert [json.loads(a["arg_0"])[1]["content"] for a in second["arguments"].values()] == ["Hi", "Hi,"]
    assert results(tmp_path / "o")["results"]["multi_if"]["prompt_level_strict_acc,none"] == 0.5
    shown = str(table_of([str(tmp_path / "o")]).render("markdown"))
    assert "IF(Zh)" in shown
    assert "50.0 (0%)" in shown


def command(url: str, out: Path) -> list[str]:
    words = f"eval --model {url} --chat --served fake --task letters --limit 60 --name m --out {out}"
    return [sys.executable, "-m", "cotree.cli", *words.split(), "--samples", "3", "--temperature", "0.8"]


def test_a_killed_evaluation_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    def numbers(folder: Path) -> dict[str, Any]:
        content = results(folder)
        for row in content["cotree"]["rows"]:
            assert row.pop("seconds_p50") <= row.pop("seconds_p95")
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


def test_the_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    with FakeServerThread(reply=said) as server:
        asked = ("eval", "--model", server.url, "--chat", "--served", "fake", "--task", "letters")
        assert run(monkeypatch, *asked, "--limit", 9, "--seed", 1) == 0
        assert run(monkeypatch, *asked, "--limit", 9, "--name", "b", "--format", "latex") == 0
        assert r"\begin{tabular}" in capsys.readouterr().out
    first, second = tmp_path / "runs" / "evals" / "fake", tmp_path / "runs" / "evals" / "b"
    assert run(monkeypatch, "compare", first, second) == 0
    assert "exact McNemar" in capsys.readouterr().out
    assert run(monkeypatch, "compare", tmp_path / "runs", second) == 2
    assert "name one model's folder in it, e.g. " in capsys.readouterr().err
    assert run(monkeypatch, "table", first, second, "--format", "markdown") == 0
    shown = capsys.readouterr().out
    assert "| fake" in shown
    assert "| b" in shown
    assert run(monkeypatch, "diagnose", first) == 0
    assert "fake: letters" in capsys.readouterr().out


def test_more_questions_ask_the_new_ones_only_and_fewer_none(tmp_path: Path) -> None:
    with FakeServerThread(reply=said) as server:

        def evaluated(limit: int, name: str = "out") -> tuple[int, int]:
            before = server.calls
            out = tmp_path / name
            found = evaluate_model(
                server.url, ["letters"], chat=True, served="fake", limit=limit, out=out, output=QUIET
            )
            return server.calls - before, found.rows[0].n

        assert [evaluated(n) for n in (5, 9, 5)] == [(5, 5), (4, 9), (0, 5)]
        evaluated(5, "other")
        (same,) = compare_evaluations(tmp_path / "out", tmp_path / "other")
        assert (same.n, same.changed) == (5, {}), "what the folder is about, not what its journal keeps"
        assert len(list((tmp_path / "out").glob("results_*.json"))) == 1
        assert len(sample_rows(tmp_path / "out", "letters")) == 10
        assert evaluated(9) == (0, 9)


def test_content_of_other_settings_is_kept_and_comes_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with FakeServerThread(reply=said, models=("fake", "other")) as server:

        def evaluated(served: str = "fake", **settings: Any) -> tuple[int, Any]:
            before = server.calls
            found = evaluate_model(
                server.url, ["letters"], chat=True, served=served, limit=4, out=out, output=QUIET, **settings
            )
            return server.calls - before, found.rows

        first = evaluated(max_tokens=64)
        assert first[0] == 4
        other = evaluated(max_tokens=5)
        assert other[0] == 4
        assert len(list((out / "older").iterdir())) == 1
        assert evaluated(max_tokens=64) == (0, first[1])
        assert evaluated(max_tokens=5) == (0, other[1])
        assert evaluated(max_tokens=5, max_in_flight=2) == (0, other[1]), "speed is no content"
        assert evaluated("other", max_tokens=5)[0] == 4, "another model"
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "notes.txt").write_text("mine")
        out = tmp_path / "mine"
        with pytest.raises(UsageError, match="mine holds other files; choose another --out"):
            evaluated()


def test_a_changed_question_is_asked_again_and_a_changed_answer_is_judged_again(tmp_path: Path) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out"
    how: dict[str, Any] = {"data": rows, "chat": True, "served": "fake", "output": QUIET}
    with FakeServerThread(reply=lambda prompt, seed, index: f"It is \\boxed{{{prompt.count('1')}}}.") as server:

        def evaluated(question: str, gold: str) -> tuple[int, float]:
            rows.write_text(json.dumps({"question": question, "answer": f"#### {gold}", "id": "a"}) + "\n")
            before = server.calls
            found = evaluate_model(server.url, ["gsm8k"], out=out, **how)
            return server.calls - before, found.rows[0].accuracy

        assert evaluated("What is 1 + 1?", "2") == (1, 1.0)
        assert evaluated("What is 1 + 1?", "3") == (0, 0.0)
        assert evaluated("What is 1 + 1 + 1?", "3") == (1, 1.0)
        assert evaluated("What is 1 + 1?", "2") == (0, 1.0), "the words are the old ones again"
        (sample,) = read_samples(out / JOURNAL)
        assert (sample.response, sample.gold) == ("It is \\boxed{2}.", "2")
        with pytest.raises(UsageError, match="is a file; choose another --out"):
            evaluate_model(server.url, ["gsm8k"], out=rows, **how)
        (out / "node.json").unlink()
        assert evaluated("What is 1 + 1?", "2") == (0, 1.0), "its journal says what it is"


def test_newer_verdict_code_judges_kept_replies_again_and_asks_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    letters = task("letters")
    asked = [(letters, question) for question in letters.questions("test", 6)]
    with FakeServerThread(reply=said) as server:
        model = Model(url=server.url, model="fake", mode="chat")
        evaluate(model, asked, AskSettings(), tmp_path, name="m", output=QUIET)
    journal = (tmp_path / JOURNAL).read_bytes()
    evaluate(model, asked, AskSettings(), tmp_path, name="m", output=QUIET)
    assert (tmp_path / JOURNAL).read_bytes() == journal, "nothing to judge, and the server is gone"
    monkeypatch.setattr(asking_module, "VERDICT_VERSION", 7)
    monkeypatch.setattr(Letters, "extract", lambda self, completion, finish_reason, mode: "x")
    found = evaluate(model, asked, AskSettings(), tmp_path, name="m", output=QUIET)
    assert (found.rows[0].accuracy, found.rows[0].no_answer, found.rows[0].commonest) == (0, 0, "x")
    samples = read_samples(tmp_path / JOURNAL)
    assert {(sample.verdict_version, sample.answer) for sample in samples} == {(7, "x")}
    assert (tmp_path / JOURNAL).read_bytes().startswith(journal), "what was there stays"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "letters"], "--model"),
        (["--model", "smollm2-135m-instruct"], "--task"),
        (["--model", "./nowhere/model", "--task", "letters"], "nothing at `./nowhere/model`"),
        (["--model", "llama-9", "--task", "letters"], "nothing at `llama-9`"),
        (["--model", "http://127.0.0.1:9", "--task", "letters"], "give --tokenizer"),
        (["--model", "http://127.0.0.1:9", "--chat", "--task", "letters"], "start the server"),
        (["--model", "smollm2-135m-instruct", "--chat", "--task", "letters"], "are for servers"),
        (["--model", "x", "--task", "letters", "--samples", "4"], "need a temperature"),
        (
            ["--model", "x", "--task", "letters", "--family", "zebras"],
            "of family `zebras`; its families: ",
        ),
        (["--model", "x", "--task", "letters", "--limit", "999"], "has 138 questions in split `test`, not 999"),
        (["--model", "x", "--task", "letters", "--task", "letters"], "two test questions of task `letters`"),
        (["--model", "x", "--task", "leters"], "did you mean `letters`"),
        (["--model", "notes.txt", "--task", "letters"], "no weights `notes.txt`"),
        (
            ["--model", "bare", "--task", "letters"],
            "bare has no config.json with model.safetensors or model.safetensors.index.json; give a",
        ),
        (
            ["--model", "dpo", "--task", "letters"],
            "dpo has no config.json with model.safetensors or model.safetensors.index.json; give dpo/model",
        ),
        (["--model", "folder", "--task", "letters"], "cannot export 'mamba' models: supported are llama"),
        (["--model", "smollm2-135m-instruct", "--task", "letters", "--max-tokens", "9000"], "takes 8192; lower"),
        (["--model", "x", "--task", "letters", "--gguf", "Q2"], "`gguf`: must be 'F32', 'F16' or 'Q8_0'"),
        (["--model", "x", "--task", "letters", "--top-p", "0"], "`top_p`: must be greater than 0"),
        (["--model", "", "--task", "letters"], "nothing at ``; give a server's URL"),
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
    (tmp_path / "folder" / "tokenizer.json").write_text("{}")
    assert run(monkeypatch, "eval", *words) == 2
    told = capsys.readouterr().err
    assert message in told and told.startswith("cotree: ") and told.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_server_with_a_tokenizer_reads_the_rendered_prompt_and_a_base_model_is_stopped(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "chat")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "base")
    with FakeServerThread(reply=said) as server:
        for name in ("chat", "base"):
            evaluate_model(
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
    templates = [results(tmp_path / f"{name}-out")["chat_template_sha"] for name in ("chat", "base")]
    assert templates == [sha(tiny_tokenizer().chat_template), None], "as lm-eval hashes it"
    assert base["prompt"].startswith("Question: ") and base["stop"] == ["\nQuestion:"]


def test_a_transformers_folder_is_served_like_the_file_that_it_was_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights: the folder that was made of a GGUF says what the GGUF says, and its export is made once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = write_tiny_gguf(tiny_model(), tiny_tokenizer(), tmp_path / "tiny.gguf")
    folder = convert_gguf(file, tmp_path / "student")
    said = []
    for model, name in ((file, "file"), (folder, "folder"), (folder, "again")):
        out = tmp_path / name
        evaluate_model(str(model), ["letters"], limit=2, max_tokens=8, gguf="F32", name=name, out=out, output=QUIET)
        said.append({sample.id: sample.response for sample in read_samples(out / JOURNAL)})
    assert said[0] == said[1] == said[2]
    assert len(list((tmp_path / "cache" / "cotree").glob("student-*-F32.gguf"))) == 1


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
        evaluate_model(server.url, ["gsm8k"], data=path, chat=True, served="fake", out=tmp_path / "out", output=QUIET)
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

"""Change a value and run again: only what depends on it is made anew, and what was there before comes back."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.experiment.conftest import Done
from tests.support.experiment import KeptOutput, begun, small, step_by_step
from tests.support.fake_server import FakeServerThread
from tests.support.full_disk import full_disk
from tests.support.knowing import knowing_reply

from cotree.base.errors import CotreeError, UsageError
from cotree.base.run_folder import RunFolder
from cotree.experiment.plan import plan
from cotree.experiment.recipe import build_recipe, load_recipe
from cotree.experiment.run import rewrite_report, run
from cotree.search.reward import load_reward_function


def check_changes(written: dict[str, Any], runs: Path, server: FakeServerThread) -> None:
    joint = ["students/joint", "students/masked", "evaluations/test/joint", "evaluations/test/masked"]
    asked = server.calls
    assert begun(written, runs) == []
    assert begun(written, runs, ("students.joint.alpha", 0.5)) == joint
    assert begun(written, runs) == [], "what was there before is found again"
    for speed in (
        ("trees.train.trees_in_flight", 1),
        ("models.far.url", server.url.replace("127.0.0.1", "localhost")),
        ("models.far.price", {"completion": 1.0}),
        ("students.sft.save_steps", 3),
        ("students.masked.pack_tokens", 999),
        ("datasets.pairs.license", "mit"),
    ):
        assert begun(written, runs, speed) == [], speed
    arm = {"like": "joint", "sweep": {"beta": [0.3, 0.5]}}
    added = ["students/beta@beta=0.3", "students/beta@beta=0.5"]
    assert begun(written, runs, ("students.beta", arm)) == added
    assert server.calls == asked, "no request of the search was made again"


def test_only_what_depends_on_a_change_is_made_anew(done: Done, server: FakeServerThread) -> None:
    check_changes(*done, server)


@pytest.mark.slow
def test_the_step_by_step_table(server: FakeServerThread, student: Path, tmp_path: Path) -> None:
    written = step_by_step(server.url, student)
    assert len(begun(written, tmp_path / "runs")) == 1 + 4 + 7 + 8
    check_changes(written, tmp_path / "runs", server)
    # A second round: a student writes trees of its own.
    rounds = ("trees.second", written["trees"]["train"] | {"roles": {"thinker": "masked"}, "rollouts": 2})
    assert begun(written, tmp_path / "runs", rounds) == ["trees/second"]
    with sqlite3.connect(tmp_path / "runs" / "steps" / "trees" / "second" / "trees.db") as db:
        assert db.execute("SELECT count(*) FROM trees").fetchone() == (4,)


def test_more_questions_ask_the_new_ones_only(done: Done, server: FakeServerThread, tmp_path: Path) -> None:
    written, _ = done
    folder = RunFolder(tmp_path / "runs" / "steps")
    journal = folder.node("evaluations/test", "sft").path / "journal.jsonl"
    lines, calls = journal.read_text(), server.calls
    more = ("evaluations.test.questions", {"letters": 2})
    assert "trees/train" not in begun(written, tmp_path / "runs", more)
    assert server.calls == calls
    assert journal.read_text().startswith(lines) and len(journal.read_text()) > len(lines)
    trees = ("trees.train.questions", {"arithmetic": 2, "letters": 3})
    assert begun(written, tmp_path / "runs", trees, only=["trees"]) == ["trees/train"]
    again = server.calls
    assert again > calls
    begun(written, tmp_path / "runs", trees, only=["trees"])
    assert server.calls == again


def test_finished_trees_are_grown_again_only_when_asked(done: Done, server: FakeServerThread, tmp_path: Path) -> None:
    written, _ = done
    calls = server.calls
    changed = ("trees.train.exploration", 0.1)
    with pytest.raises(
        UsageError, match=r"trees/train: 4 finished trees would be grown again \(changed: exploration\)"
    ):
        begun(written, tmp_path / "runs", changed, only=["trees"])
    assert server.calls == calls
    assert begun(written, tmp_path / "runs", changed, only=["trees"], regrow=True) == ["trees/train"]
    assert begun(written, tmp_path / "runs", only=["trees"]) == [], "the first trees were kept"


def test_what_is_gone_is_made_again(done: Done, server: FakeServerThread, tmp_path: Path) -> None:
    written, _ = done
    folder, calls = RunFolder(tmp_path / "runs" / "steps"), server.calls
    (folder.node("datasets/pairs").path / "train.parquet").unlink()
    shutil.rmtree(folder.node("students/joint").path / "model")
    (folder.node("students/masked").path / "model" / "model.safetensors").unlink()
    (folder.node("trees/train").path / "trees.db").unlink()
    (folder.node("evaluations/test", "sft").path / "journal.jsonl").unlink()
    made = begun(written, tmp_path / "runs")
    gone = ["trees/train", "datasets/pairs", "students/joint", "students/masked", "evaluations/test/sft"]
    assert made == gone
    assert server.calls == calls, "the trees were replayed from the journal"
    assert (folder.node("students/masked").path / "model" / "model.safetensors").is_file()


def test_another_run_gives_what_is_equal(done: Done, server: FakeServerThread) -> None:
    written, runs = done
    calls = server.calls
    new, changed = written | {"name": "new"}, ("students.cdpo.label_smoothing", 0.2)
    made = begun(new, runs, changed, source=runs / "steps")
    assert made == ["students/cdpo", "students/joint", "students/masked",
                    "evaluations/test/joint", "evaluations/test/masked"]  # fmt: skip
    assert server.calls == calls
    taken = RunFolder(runs / "new").node("students/sft").record()
    kept = RunFolder(runs / "steps").node("students/sft").record()
    assert taken is not None and kept is not None
    assert taken.origin == "steps" and (taken.seconds, taken.result) == (kept.seconds, kept.result)
    assert begun(new, runs, changed, source=runs / "steps") == [], "the same command again finds all there"
    # What is appended to is a copy: the old run stays as it is.
    for name in ("trees/train/trees.db", "journal.db", "evaluations/test/sft/journal.jsonl"):
        assert not (runs / "new" / name).samefile(runs / "steps" / name), name
    with sqlite3.connect(runs / "new" / "trees" / "train" / "trees.db") as db:
        assert db.execute("SELECT count(*) FROM trees").fetchone() == (4,)
    with pytest.raises(UsageError, match="nothing of it has the settings"):
        begun(written | {"name": "other", "seed": 5}, runs, source=runs / "steps")
    assert not (runs / "other").exists()
    with pytest.raises(UsageError, match="is no run folder"):
        begun(written | {"name": "other"}, runs, source=runs)


def test_an_entry_that_is_renamed_or_seeded_is_not_made_again(done: Done, server: FakeServerThread) -> None:
    written, runs = done
    calls = server.calls
    written["trees"]["grown"] = written["trees"].pop("train")
    written["datasets"] = {name: entry | {"trees": "grown"} for name, entry in written["datasets"].items()}
    for entry in written["datasets"].values():
        entry.pop("like", None)
        entry.setdefault("rows", "dpo")
    written["datasets"]["unverified"] |= {"rows": "sft", "length": "longest"}
    written["students"]["sft"]["seeds"] = [0]
    written["students"]["masked"]["beta"] = 0.1  # its default
    written["evaluations"]["test"]["models"] = ["sft"]
    assert begun(written, runs) == []
    assert server.calls == calls
    names = RunFolder(runs / "steps").nodes()
    assert {"trees/grown", "trees/train", "students/sft", "students/sft@seed=0"} <= set(names)
    summary = json.loads((runs / "steps" / "summary.json").read_text())
    assert list(summary["search"]) == ["grown"]
    assert {row["model"] for row in summary["eval"]} == {"sft@seed=0"}


def test_a_renamed_run_and_renamed_names_are_the_same(done: Done, tmp_path: Path) -> None:
    written, runs = done
    (runs / "steps").rename(runs / "renamed")
    output = KeptOutput()
    folder = run(load_recipe(runs / "renamed"), tmp_path / "elsewhere", output=output)
    assert folder.path == runs / "renamed" and not [line for line in output.lines if line.endswith(": begins")]
    # A model's name in the recipe is no part of anything.
    (runs / "renamed").rename(runs / "steps")
    written["models"]["near"] = written["models"].pop("far")
    written["trees"]["train"]["roles"] = {"thinker": "near"}
    assert begun(written, runs) == []


def test_what_the_recipe_no_longer_says_is_in_no_table(done: Done) -> None:
    written, runs = done

    def shown() -> dict[str, set[str]]:
        rewrite_report(runs / "steps")
        summary = json.loads((runs / "steps" / "summary.json").read_text())
        return {"eval": {row["model"] for row in summary["eval"]}, "train": set(summary["train"])}

    students = {"sft", "cdpo", "joint", "masked"}
    assert shown() == {"eval": {"sft", "joint", "masked"}, "train": students}
    changed = ("students.joint.alpha", 0.5)
    assert begun(written, runs, changed, only=["trees"]) == []
    assert shown() == {"eval": {"sft"}, "train": {"sft", "cdpo"}}, "the others are of another alpha"
    assert begun(written, runs, only=["trees"]) == []
    assert shown() == {"eval": {"sft", "joint", "masked"}, "train": students}, "they are of this one"
    assert begun(written, runs, changed)
    assert shown() == {"eval": {"sft", "joint", "masked"}, "train": students}
    assert begun(written, runs, only=["trees"]) == []
    assert shown() == {"eval": {"sft"}, "train": {"sft", "cdpo"}}, "those of this alpha are kept beside"
    assert begun(written, runs, ("evaluations.test.models", ["sft", "joint"])) == []
    assert shown() == {"eval": {"sft", "joint"}, "train": students}


def test_more_rollouts_ask_for_what_is_new_only(student: Path, tmp_path: Path) -> None:
    def bodies(server: FakeServerThread) -> list[str]:
        return [json.dumps(body, sort_keys=True) for body in server.requests]

    with FakeServerThread(chat_only=True, reply=knowing_reply) as server:
        written = step_by_step(server.url, student)
        few, many = ("trees.train.rollouts", 4), ("trees.train.rollouts", 8)
        begun(written, tmp_path, few, only=["trees"])
        first = server.calls
        with pytest.raises(UsageError, match=r"changed: rollouts\); .* add --regrow"):
            begun(written, tmp_path, many, only=["trees"])
        begun(written, tmp_path, many, only=["trees"], regrow=True)
        again = bodies(server)
        assert len(again) == len(set(again)) > first, "no answered request is made twice"
        server.requests.clear()
        begun(written | {"name": "anew"}, tmp_path, many, only=["trees"])
        assert sorted(bodies(server)) == sorted(again)
    trees = []
    for name in ("steps", "anew"):
        with sqlite3.connect(tmp_path / name / "trees" / "train" / "trees.db") as db:
            rows = "SELECT tree_id, node_id, parent_id, type, text, verdict, visits, value, tokens FROM nodes"
            trees.append(db.execute(f"{rows} ORDER BY tree_id, node_id").fetchall())
    assert len(trees[0]) > 40 and trees[0] == trees[1]


def test_a_failure_is_one_error_and_the_same_call_goes_on(student: Path, tmp_path: Path) -> None:
    reward = tmp_path / "reward.py"
    reward.write_text("def f(question, text, verdict):\n    return 2\n")
    with FakeServerThread(chat_only=True) as server:
        written = step_by_step(server.url, student)
        written["trees"]["train"]["reward"] = {"function": f"{reward}:f"}
        with pytest.raises(CotreeError, match="a reward is in"):  # of four trees at once
            begun(written, tmp_path / "runs", only=["trees"])
        left = RunFolder(tmp_path / "runs" / "steps").node("trees/train").record()
        assert left is not None and not left.done
        calls = server.calls
        reward.write_text("def f(question, text, verdict):\n    return 0.5\n")
        load_reward_function.cache_clear()  # as a new process does
        assert begun(written, tmp_path / "runs", only=["trees"]) == ["trees/train"]
        asked = [json.dumps(body, sort_keys=True) for body in server.requests]
        assert server.calls > calls
        assert len(asked) - len(set(asked)) <= 3, "only what was under way for the other trees was asked again"


def test_another_process_in_the_run_is_refused(done: Done, hold: Callable[[Path], Callable[[], None]]) -> None:
    written, runs = done
    changed = ("students.joint.alpha", 0.5)
    before = sorted(runs.rglob("*"))
    release = hold(runs / "steps")
    with pytest.raises(UsageError, match=r"another cotree works in .*steps; wait for it, or choose another name="):
        begun(written, runs, changed)
    with pytest.raises(UsageError, match="another cotree works in"):
        begun(written | {"name": "new"}, runs, source=runs / "steps")
    assert sorted(runs.rglob("*")) == before
    release()
    assert begun(written, runs) == []


def test_of_two_runs_at_once_one_is_refused_and_nothing_is_asked_twice(student: Path, tmp_path: Path) -> None:
    with FakeServerThread(chat_only=True, reply=knowing_reply, latency=0.05) as server:
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(small(server.url, student), sort_keys=False))
        words = [sys.executable, "-m", "cotree.cli", "run", "r.yaml", "--only", "trees"]
        started = [
            subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            for _ in "ab"
        ]
        ended = sorted((process.wait(), process.communicate()[1]) for process in started)
        asked = [json.dumps(body, sort_keys=True) for body in server.requests]
    assert [code for code, _ in ended] == [0, 2] and len(asked) == len(set(asked)) > 10
    assert ended[1][1].startswith("cotree: another cotree works in ") and ended[1][1].count("\n") == 1


def test_a_full_disk_ends_in_one_line_and_the_same_call_goes_on(done: Done, server: FakeServerThread) -> None:
    written, runs = done  # which has left converted weights in the cache folder
    written |= {"name": "full", "seed": 1}
    written["students"] = {"sft": written["students"]["sft"]}
    written["evaluations"]["test"]["models"] = ["sft"]

    def fails(room: int) -> str:
        with full_disk(room), pytest.raises(CotreeError) as raised:
            begun(written, runs)
        said = str(raised.value)
        assert raised.value.exit_code == 1 and "\n" not in said and "same command" in said
        return said

    assert "recipe.yaml" in fails(100)
    assert ".db" in fails(6_000)
    begun(written, runs, only=["datasets"])
    calls = server.calls
    assert "students/sft" in fails(200_000)
    assert begun(written, runs) == ["students/sft", "evaluations/test/sft"]
    assert server.calls == calls and not [*(runs / "full").rglob("*.draft")]


def test_what_is_no_run_of_today_is_left_alone(student: Path, tmp_path: Path) -> None:
    written, runs = small("http://127.0.0.1:9", student), tmp_path / "runs"
    (runs / "steps").mkdir(parents=True)
    for name, message in (
        ("thesis.txt", "exists and is no run folder; choose another name= or move it away"),
        ("manifest.json", r"is a run of an older cotree, .* \(docs/migration\.md\)"),
    ):
        (runs / "steps" / name).write_text("{}")
        for of in (lambda: begun(written, runs), lambda: plan(build_recipe(written), runs)):
            with pytest.raises(UsageError, match=message):
                of()
    assert sorted(path.name for path in runs.rglob("*")) == ["manifest.json", "steps", "thesis.txt"]
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file is a file; name a folder, or one to be made"):
        begun(written, tmp_path / "file")
    (tmp_path / "steps").touch()
    with pytest.raises(UsageError, match="is a file; choose another name= or move it away"):
        begun(written, tmp_path)


def test_seeds_and_swept_arms_run_as_nodes_of_their_own(done: Done) -> None:
    written, runs = done
    written["students"]["sft"]["seeds"] = [0, 1]
    written["students"] = {name: written["students"][name] for name in ("sft",)}
    written["students"]["beta"] = {
        "from": "sft", "method": "dpo", "data": "pairs", "sweep": {"beta": [0.2]}, "alpha": 0, "mask_prefix": False,
    }  # fmt: skip
    written["evaluations"]["test"]["models"] = ["sft", "beta"]
    seeded, swept = "students/sft@seed=1", [f"students/beta@beta=0.2,seed={seed}" for seed in (0, 1)]
    made = begun(written, runs)
    assert made == [seeded, *swept, *(f"evaluations/test/{name.partition('/')[2]}" for name in (seeded, *swept))]
    summary = json.loads((runs / "steps" / "summary.json").read_text())
    assert [(row["student"], row["seed"]) for row in summary["eval"]] == [
        ("sft", 0), ("sft", 1), ("beta@beta=0.2", 0), ("beta@beta=0.2", 1),
    ]  # fmt: skip
    assert begun(written, runs) == []


def test_a_kill_while_content_is_taken_from_another_run(done: Done, monkeypatch: pytest.MonkeyPatch) -> None:
    written, runs = done
    new = written | {"name": "new"}

    class Killed(BaseException):
        pass

    def killed_at(moment: int) -> None:
        left = [moment]

        def rename(old: Path, new: Path, real: Any = Path.rename) -> Path:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return Path(real(old, new))

        with monkeypatch.context() as patched:
            patched.setattr(Path, "rename", rename)
            with pytest.raises(Killed):
                begun(new, runs, source=runs / "steps")

    for moment in (0, 5, 11, 16):
        killed_at(moment)
    made = begun(new, runs)  # without --from: what was not there yet is made
    assert "trees/train" not in made and "students/sft" not in made, made
    old, now = (RunFolder(runs / name) for name in ("steps", "new"))
    for student in ("sft", "cdpo", "joint", "masked"):
        weights = [run.node(f"students/{student}").path / "model" / "model.safetensors" for run in (old, now)]
        assert weights[0].read_bytes() == weights[1].read_bytes(), student
    assert begun(new, runs, source=runs / "steps") == []


def test_an_own_verifier_that_changed_judges_again_and_asks_nothing(tmp_path: Path) -> None:
    own, rows = tmp_path / "own.yaml", tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"id": "{i}", "question": "Why {i}?", "answer": "1"}}\n' for i in range(40)))
    text = "name: own\ndata: rows.jsonl\nprompt: '{question}'\ndescription: mine\nverifier: number\n"
    with FakeServerThread(chat_only=True, reply=lambda prompt, seed, index: " It is \\boxed{01}.") as server:
        written = {
            "name": "own",
            "models": {"far": {"url": server.url, "model": "fake", "mode": "chat"}},
            "trees": {
                "train": {"questions": {str(own): 2}, "roles": {"thinker": "far"}, "rollouts": 1, "max_reflections": 0}
            },
            "evaluations": {"test": {"models": ["far"], "questions": {str(own): 3}, "split": "train"}},
        }
        found: list[tuple[list[str], float, int]] = []
        for verifier in ("number", "text", "number"):
            own.write_text(text.replace("number", verifier))
            before, made = server.calls, begun(written, tmp_path / "runs")
            (row,) = json.loads((tmp_path / "runs" / "own" / "summary.json").read_text())["eval"]
            found.append((made, row["accuracy"], server.calls - before))
        own.write_text(text.replace("mine", "yours"))
        assert begun(written, tmp_path / "runs") == [], "a description decides nothing"
    both = ["trees/train", "evaluations/test/far"]
    assert [(made, accuracy) for made, accuracy, _ in found] == [(both, 1.0), (both, 0.0), (both, 1.0)]
    assert found[0][2] > 0 and found[1][2] == found[2][2] == 0, "kept completions are judged again"

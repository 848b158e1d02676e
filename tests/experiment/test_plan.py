"""`cotree plan`: each node's state and why, and what a run would cost, without a call, a file or the network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.experiment.conftest import Done
from tests.support.experiment import begun, changed_recipe, small
from tests.support.fake_server import FakeServerThread
from tests.support.tiny_student import sft_row, tiny_model, tiny_tokenizer
from tests.train.test_verb import Recorder

from cotree.base.rows import write_jsonl
from cotree.base.run_folder import RunFolder
from cotree.cli import main
from cotree.experiment.estimates import disk_bytes
from cotree.experiment.plan import NodePlan, plan, plan_lines
from cotree.experiment.recipe import build_recipe, load_recipe
from cotree.models.weights import parameter_count
from cotree.train.settings import SFT, LoRA, Probe
from cotree.train.verb import train_rows

NODE_KEYS = {"name", "state", "why", "reads", "tokens", "seconds", "gpu_hours", "memory_mb", "disk_mb", "processes"}
JOINT = {"students/joint", "students/masked", "evaluations/test"}


def planned(written: dict[str, Any], runs: Path, *changes: tuple[str, Any]) -> dict[str, NodePlan]:
    """The plan by node; making it writes nothing."""
    before = {path: path.stat().st_mtime_ns for path in runs.parent.rglob("*") if path.name != "sha256.json"}
    found = {each.name: each for each in plan(build_recipe(changed_recipe(written, *changes)), runs)}
    now = {path: path.stat().st_mtime_ns for path in runs.parent.rglob("*") if path.name != "sha256.json"}
    assert now == before
    return found


def states(found: dict[str, NodePlan]) -> dict[str, str]:
    return {name: each.state for name, each in found.items()}


def test_before_anything_all_is_new(student: Path, tmp_path: Path) -> None:
    with FakeServerThread(chat_only=True) as server:
        written = small(server.url, student)
        found = planned(written, tmp_path / "runs")
        assert server.calls == 0
    assert set(states(found).values()) == {"new"}
    assert list(found) == list(build_recipe(written).nodes)
    trees, joint, test = (found[name] for name in ("trees/train", "students/joint", "evaluations/test"))
    assert trees.tokens is not None and 4 * 10 < trees.tokens < 4 * 8 * 10 * 64, "bounded by patterns and rollouts"
    assert trees.seconds is None, "no speed was measured yet"
    assert joint.reads == ["students/sft", "datasets/pairs"]
    assert joint.disk_mb is not None and joint.memory_mb and joint.seconds is None, "its rows are not there"
    assert joint.tokens and "; about " in next(line for line in plan_lines([*found.values()]) if "joint" in line)
    assert test.cells is not None and [(cell.model, cell.state) for cell in test.cells] == [
        ("sft", "new"), ("joint", "new"), ("masked", "new"),
    ]  # fmt: skip
    assert test.tokens == 3 * 1 * 8 / 2


def test_what_is_done_is_done_and_what_changed_says_which_key(done: Done, server: FakeServerThread) -> None:
    written, runs = done
    calls = server.calls
    assert set(states(planned(written, runs)).values()) == {"done"}
    found = planned(written, runs, ("students.joint.alpha", 0.5))
    assert {name for name, state in states(found).items() if state != "done"} == JOINT
    assert (found["students/joint"].state, found["students/joint"].why) == ("changed", ["alpha"])
    assert found["students/masked"].why == ["alpha"], "it is like joint"
    pairs = planned(written, runs, ("datasets.pairs.per_tree", 2))
    assert pairs["datasets/pairs"].why == ["per_tree"]
    assert pairs["students/joint"].why == ["what it reads (data)"]
    test = found["evaluations/test"]
    assert test.state == "partial" and test.cells is not None
    assert {cell.model: (cell.state, cell.why) for cell in test.cells} == {
        "sft": ("done", []),
        "joint": ("changed", ["what it reads (model)"]),
        "masked": ("changed", ["what it reads (model)"]),
    }
    joint = found["students/joint"]
    assert joint.tokens and joint.seconds is not None and joint.memory_mb, "its rows are there"
    assert test.tokens and test.seconds, "from what was measured"
    assert server.calls == calls


def test_the_plan_is_what_the_run_does(done: Done) -> None:
    written, runs = done
    for changes in (
        [("students.joint.alpha", 0.5)],
        [("evaluations.test.max_tokens", 9)],
        [("datasets.pairs.per_tree", 2)],
        [("students.masked.save_steps", 2)],
    ):
        found = planned(written, runs, *changes)
        wanted = [name for name, each in found.items() if each.state != "done" and each.cells is None]
        cells = [f"{n}/{c.model}" for n, each in found.items() for c in each.cells or () if c.state != "done"]
        assert begun(written, runs, *changes) == wanted + cells
        assert set(states(planned(written, runs, *changes)).values()) == {"done"}
        before = planned(written, runs)
        assert set(states(before).values()) == {"done"}, "what the first values made was kept"
        assert {reason for each in before.values() for reason in each.why} <= {"comes back from older/"}


def test_growing_finished_trees_again_is_announced(done: Done) -> None:
    written, runs = done
    found = planned(written, runs, ("trees.train.rollouts", 9))
    assert found["trees/train"].state == "changed"
    assert found["trees/train"].why == ["rollouts", "4 finished trees would be grown again: needs --regrow"]
    assert {found[f"datasets/{name}"].state for name in ("longest", "pairs")} == {"changed"}
    more = planned(written, runs, ("trees.train.questions", {"arithmetic": 3, "letters": 2}))
    assert (more["trees/train"].state, more["trees/train"].why) == ("partial", ["questions"])
    assert "regrow" not in json.dumps([each.to_json() for each in more.values()])


def test_unfinished_and_damaged_nodes_are_partial(done: Done) -> None:
    written, runs = done
    run = RunFolder(runs / "steps")
    record = run.node("students/masked").record()
    assert record is not None
    run.node("students/masked").write(record.__class__(**{**vars(record), "done": False}))
    (run.node("datasets/pairs").path / "train.parquet").unlink()
    found = planned(written, runs)
    assert (found["students/masked"].state, found["students/masked"].why) == ("partial", ["not finished"])
    assert (found["datasets/pairs"].state, found["datasets/pairs"].why) == ("partial", ["train.parquet is gone"])
    assert found["students/cdpo"].state == "done", "what it read is equal, wherever it is now"


def test_an_equal_arm_is_done_already(done: Done) -> None:
    written, runs = done
    found = planned(written, runs, ("students.again", {"like": "masked", "mask_prefix": True}))
    assert (found["students/again"].state, found["students/again"].why) == ("done", ["is the same as students/masked"])
    assert begun(written, runs, ("students.again", {"like": "masked"})) == []


def test_lines_name_cells_that_are_not_as_their_node(done: Done) -> None:
    written, runs = done
    lines = plan_lines(list(planned(written, runs).values()))
    assert len(lines) == 10 and all(line.split()[1] == "done" for line in lines)
    lines = plan_lines(list(planned(written, runs, ("students.joint.alpha", 0.5)).values()))
    assert any(line.startswith("students/joint") and "changed (alpha); about" in line for line in lines)
    assert [line.strip() for line in lines if line.startswith("  ")] == [
        "sft: done", "joint: changed (what it reads (model))", "masked: changed (what it reads (model))",
    ]  # fmt: skip
    assert lines[-1].startswith("about ")


def test_the_verbs_json(done: Done, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    written, runs = done
    (runs.parent / "r.yaml").write_text(yaml.safe_dump(written, sort_keys=False))
    words = ["cotree", "plan", str(runs.parent / "r.yaml"), "students.joint.alpha=0.5", "--runs-dir", str(runs)]
    monkeypatch.setattr(sys, "argv", [*words, "--json"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0
    nodes = json.loads(capsys.readouterr().out)["nodes"]
    assert [node["name"] for node in nodes] == list(build_recipe(written).nodes)
    for node in nodes:
        assert set(node) == NODE_KEYS | ({"cells", "engines"} if node["name"].startswith("evaluations/") else set())
    assert all(set(cell) == {"model", "state", "why"} for cell in nodes[-1]["cells"])
    assert nodes[-1]["engines"] == {"joint": "llama.cpp", "masked": "llama.cpp"}
    assert {node["name"] for node in nodes if node["state"] != "done"} == JOINT
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit):
        main()
    assert "students/joint" in capsys.readouterr().out


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """A hub that answers nothing and notes what it is asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def test_what_is_not_here_is_unresolved_and_no_network_is_asked(tmp_path: Path, hub: tuple[str, list[str]]) -> None:
    url, asked = hub
    recipe = {
        "name": "far",
        "models": {
            "m": {"weights": "nobody/nothing:m.gguf"},
            "s": {"url": f"{url}/v1", "tokenizer": "nobody/tokenizer"},
        },
        "trees": {"t": {"questions": {"gsm8k": 20}, "roles": {"thinker": "s"}}},
        "datasets": {
            "d": {"trees": "t", "rows": "sft", "tokenizer": "m"},
            "h": {"hub": "nobody/rows", "rows": "sft", "tokenizer": "s", "gates": {"contamination": False}},
        },
        "students": {"a": {"from": "m", "method": "sft", "data": "d"}},
        "evaluations": {"e": {"models": ["m", "a"], "questions": {"letters": 2}}},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    environment = {key: value for key, value in os.environ.items() if key not in ("COTREE_DATA", "HF_HUB_OFFLINE")}
    environment |= {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "hf"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "cotree.cli", "plan", "r.yaml", "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    found = {node["name"]: node for node in json.loads(done.stdout)["nodes"]}
    assert asked == []
    for name, reason in (
        ("trees/t", "gsm8k"),
        ("datasets/d", "nobody/nothing"),
        ("students/a", "nobody/nothing"),
        ("datasets/h", "nobody/rows"),
    ):
        (why,) = found[name]["why"]
        assert found[name]["state"] == "new" and why.startswith("unresolved: ") and reason in why, (name, why)
    cells = {cell["model"]: cell for cell in found["evaluations/e"]["cells"]}
    assert cells["m"]["why"][0].startswith("unresolved: ") and cells["a"]["why"][0].startswith("unresolved: ")
    assert found["evaluations/e"]["tokens"] == 2 * 2 * 512, "planned from the recipe"
    assert sorted(os.listdir(tmp_path)) == ["r.yaml"]


def test_only_what_is_left_is_priced_and_changed_settings_are_not_priced_as_before(done: Done) -> None:
    written, runs = done
    fewer = planned(written, runs, ("trees.train.questions.letters", 1))["trees/train"]
    assert fewer.tokens == 0, "nothing is asked"
    more = planned(written, runs, ("trees.train.questions.letters", 3))["trees/train"]
    again = planned(written, runs, ("trees.train.rollouts", 80))["trees/train"]
    assert more.tokens and again.tokens and again.tokens > 10 * more.tokens
    short = planned(written, runs, ("evaluations.test.questions.letters", 2))["evaluations/test"]
    long = planned(written, runs, ("evaluations.test.max_tokens", 800))["evaluations/test"]
    assert short.tokens and long.tokens and long.tokens >= 50 * short.tokens


def test_the_disk_of_a_training_is_that_of_the_checkpoints_it_keeps(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    write_jsonl(tmp_path / "rows.jsonl", map(sft_row, range(11)))
    places, settings = (tmp_path / "tiny", tmp_path / "rows.jsonl", tmp_path / "out"), ("batch_size=2", "save_steps=1")
    with pytest.raises(KeyboardInterrupt):
        train_rows("sft", *places, overrides=settings, output=Recorder(stop=5))
    parameters = parameter_count(tmp_path / "tiny")
    kept = [*(tmp_path / "out" / "trainer").glob("checkpoint-*")]
    sizes = [path.stat().st_size for folder in kept for path in (folder / "model.safetensors", folder / "optimizer.pt")]
    assert len(kept) == 2
    found = disk_bytes(parameters, SFT(save_steps=1), 6)
    assert sum(sizes) == pytest.approx(found - 4 * parameters, rel=0.05), "and the model is stored beside them"
    assert found == disk_bytes(parameters, SFT(), None) == 28 * parameters
    assert disk_bytes(parameters, SFT(save_steps=20), 20) == 5 * parameters, "there is no checkpoint at the last step"
    assert disk_bytes(parameters, SFT(lora=LoRA()), None) == 5 * parameters
    assert disk_bytes(parameters, SFT(probe=Probe(keep="best")), 6) == 40 * parameters


def test_students_of_the_paper_are_planned_from_their_shapes(tmp_path: Path) -> None:
    """Neither their weights nor rows are here; a folder with a config alone is as good."""
    tiny_model().config.save_pretrained(tmp_path / "tiny")
    for name, layers in {"bare": 0, "bent": "x"}.items():
        config = json.loads((tmp_path / "tiny" / "config.json").read_text()) | {"num_hidden_layers": layers}
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    shutil.copytree(tmp_path / "tiny", tmp_path / "mute")
    for name in ("tiny", "bare", "bent"):
        tiny_tokenizer().save_pretrained(tmp_path / name)
    for name in ("tiny", "bare", "bent", "mute"):
        (tmp_path / name / "model.safetensors").touch()
    (tmp_path / "rows.jsonl").touch()
    lora = {"lora": {}, "gradient_checkpointing": True}
    written: dict[str, Any] = {
        "name": "paper",
        "models": {
            "llama": {"weights": "meta-llama/Llama-3.1-8B-Instruct"},
            "qwen": {"weights": "Qwen/Qwen2.5-1.5B-Instruct@abc"},
            "none": {"weights": "nobody/none"},
            **{name: {"weights": str(tmp_path / name)} for name in ("tiny", "bare", "bent", "mute")},
        },
        "datasets": {"chains": {"file": str(tmp_path / "rows.jsonl"), "rows": "sft", "tokenizer": "tiny"}},
        "students": {
            name: {"method": "sft", "data": "chains", "precision": "fp32", **student}
            for name, student in dict[str, dict[str, Any]](
                {
                    "full": {"from": "llama"},
                    "lora": {"from": "llama", **lora},
                    "eight": {"from": "llama", "gpus": 8, "shard": True, "batch_size": 8},
                    "little": {"from": "qwen"},
                    "unknown": {"from": "none"},
                    "tiny_student": {"from": "tiny"},
                    "bare_student": {"from": "bare"},
                    "bent_student": {"from": "bent"},
                    "mute_student": {"from": "mute"},
                    "crowd": {"from": "tiny", "gpus": 9, "batch_size": 8},
                }
            ).items()
        },
    }
    found = {each.name.partition("/")[2]: each for each in plan(build_recipe(written), tmp_path / "runs")}
    assert found["unknown"].memory_mb is None
    lines = {line.split()[0].partition("/")[2]: line for line in plan_lines([*found.values()])}
    assert (
        "); 143.5 GB of memory (more than a card of 80 GB has: gpus=8 and shard, or lora), 224.8 GB of disk"
        in lines["full"]
    )
    assert "); 36.2 GB of memory, 40.2 GB of disk" in lines["lora"]
    assert "); 37.0 GB of memory in each of 8 processes, " in lines["eight"]
    assert "); 32.2 GB of memory, " in lines["little"]
    assert lines["tiny_student"].endswith("; 0.0 GB of memory") and found["tiny_student"].memory_mb
    faults = {
        "bare_student": "a model without layers",
        "bent_student": "num_hidden_layers",
        "mute_student": "mute has no tokenizer; copy tokenizer.json",
        "crowd": "gpus is 9, and a",
    }
    for name, fault in faults.items():
        assert fault in lines[name], "nothing is left out in silence"


def test_the_papers_recipe_is_planned_without_its_questions_rows_or_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many questions as it names, writers as large as their names say, students as large as their shapes."""
    monkeypatch.setenv("COTREE_DATA", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    recipe = load_recipe(Path(__file__).parents[2] / "recipes" / "paper" / "llama-3.1-8b.yaml")
    plans = plan(recipe, tmp_path / "runs")
    found = {each.name: each for each in plans}
    trees, masked, greedy = (found[name] for name in ("trees/train", "students/masked", "evaluations/test"))
    assert trees.tokens and trees.gpu_hours == pytest.approx(2 * 72e9 * trees.tokens / 98.9e12 / 3600)
    settings, models = recipe.nodes["trees/train"].settings, len(recipe.nodes["evaluations/test"].settings.models)
    assert masked.tokens and masked.tokens == pytest.approx(8000 * 2 * (100 + settings.max_chain_tokens / 3), abs=1)
    assert masked.gpu_hours == pytest.approx(6 * 8.03e9 * masked.tokens / 395.6e12 / 3600, rel=1e-3)
    asked = sum(recipe.nodes["evaluations/test"].settings.questions.values())
    assert models == 11 and greedy.tokens == models * asked * 600, "alpha stands for three"
    at_k, mcts = found["evaluations/test_at_k"].tokens, found["evaluations/test_at_k_mcts"].tokens
    assert at_k and mcts == 4 * at_k / 2, "four trees, each at the tokens of all samples, of one of the two models"
    lines = plan_lines(plans)
    assert len([line for line in lines if "unresolved: " in line]) < 4, "each reason is said once"
    assert lines[-1].startswith(f"{sum(each.gpu_hours or 0 for each in plans):.0f} GPU-hours in all, of an H100 at 40%")

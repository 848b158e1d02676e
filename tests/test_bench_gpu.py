"""`make bench-gpu` in its tiny form on a CPU: each section computes what it says, and none takes the others with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu import PARTS, goals, main, merge, run_items, table
from benchmarks.gpu_sections import TINY, sections

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("students")


def numbers(students: Path, name: str, item: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for values in sections(TINY, students)[name][item]():
        found |= values
    return found


def test_a_block_mask_equals_that_of_a_test_of_every_pair(students: Path) -> None:
    assert numbers(students, "masks", "300 tokens")["equal"] is True


@pytest.mark.parametrize("item", ["qwen2.5-0.5b bf16", "llama-3.2-1b fp32"])
def test_flex_attention_is_dense_attention(students: Path, item: str) -> None:
    found = numbers(students, "attention", item)
    assert 0 < found["distance"] < 2 * found["noise"] < (1e-2 if "bf16" in item else 1e-6)


@pytest.mark.parametrize("item", ["qwen2.5-0.5b joint", "llama-3.2-1b sft"])
def test_gradients_are_those_of_plain_steps(students: Path, item: str) -> None:
    found = numbers(students, "gradients", item)
    assert found["tree_fp32"] < 1e-5
    assert 1e-3 < found["noise_bf16"] < 2e-2  # bf16 it is
    assert found["tree_bf16"] < 1.5 * found["noise_bf16"]


def test_memory_is_measured_in_packs_of_one_size(students: Path) -> None:
    found = numbers(students, "memory", "qwen2.5-0.5b 8 leaves")
    assert found["packs"] > 1 and found["peak_gb"] > 0


@pytest.mark.parametrize("shape", ["late_2k", "8_leaves"])
def test_speed_is_that_of_the_same_step(students: Path, shape: str) -> None:
    found = numbers(students, "speed", f"qwen2.5-0.5b {shape}")
    assert found["trl_loss"] == pytest.approx(found["cotree_loss"], rel=1e-2)
    assert found["flop_ratio"] > 1
    assert found["flop_share"] == pytest.approx(found["trl_seconds"] / found["cotree_seconds"] / found["flop_ratio"])
    assert found["trl_with"] in found["trl_tries"] and all("seconds" in each for each in found["trl_tries"].values())


def test_sections_over_their_time_are_cut_and_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu", "--tiny", "--minutes", "0", "--out", str(out)])
    main()
    found, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert {name: results["status"] for name, results in found["sections"].items()} == dict.fromkeys(PARTS, "cut")
    assert "speed: cut, 0 s" in printed and "goals" in printed
    assert [goal["measured"] for goal in found["goals"]] == [None, None, None]


def test_an_item_that_fails_does_not_end_the_others(tmp_path: Path) -> None:
    students, records = tmp_path / "students", tmp_path / "memory.jsonl"
    (students / "qwen2.5-0.5b").mkdir(parents=True)  # no model is in it
    run_items("memory", True, students, records)
    items: dict[str, dict[str, Any]] = {}
    merge(items, records.read_text().splitlines())
    statuses = {name: item["status"] for name, item in items.items()}
    assert statuses == {name: "failed" if "qwen" in name else "done" for name in sections(TINY, students)["memory"]}
    assert "qwen2.5-0.5b 2 leaves: ValueError" in table(items)


def test_goals_are_those_of_the_worst_item_and_faults_are_shown() -> None:
    lines = [
        json.dumps({"a early": {"status": "done", "flop_share": 0.95}}),
        json.dumps({"a late": {"status": "waits"}}),
        json.dumps({"a late": {"status": "failed", "error": "OutOfMemoryError: of the card"}}),
        json.dumps({"b early": {"status": "done", "flop_share": 0.85}}),
        '{"b late": {"sta',  # it was ended here
    ]
    items: dict[str, dict[str, Any]] = {}
    merge(items, lines)
    memory = {f"a {leaves} leaves": {"status": "done", "peak_gb": peak} for leaves, peak in ((8, 10.0), (64, 11.0))}
    speed, noise, growth = goals({"speed": {"items": items}, "memory": {"items": memory}})
    assert (speed["measured"], speed["reached"]) == (0.85, False)
    assert (noise["measured"], noise["reached"]) == (None, None)
    assert growth["measured"] == pytest.approx(1.1) and growth["reached"]
    assert "a late: OutOfMemoryError: of the card" in table(items) and "0.85" in table(items)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_real_sizes_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "no CUDA device; --tiny" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_sections_of_the_tiny_form(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--minutes", "14", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True)
    found = json.loads(out.read_text())
    assert list(found["sections"]) == list(PARTS)
    for results in found["sections"].values():
        assert {item["status"] for item in results["items"].values()} == {"done"}
    assert all(goal["measured"] is not None for goal in found["goals"])

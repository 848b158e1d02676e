"""Whole runs on a tiny student: exact steps, kill -9 at any moment, full disks, Ctrl-C, and no memory kept."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import resource
import time
import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.support.slow_child import train_slowly
from tests.support.tiny_student import distance, gradients, same, tiny_model, tiny_tokenizer, weights, write_tiny_gguf
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from cotree.base.errors import CotreeError, UsageError
from cotree.models.encode import EncodedChain, EncodedPair, template_hash
from cotree.train import model as model_module
from cotree.train import run
from cotree.train.callback import StepLog
from cotree.train.dpo import PairTrainer, with_reference
from cotree.train.model import load_model
from cotree.train.rows import encode_file, fixed_steps
from cotree.train.run import train
from cotree.train.settings import DPO, SFT, LoRA
from cotree.train.sft import ChainTrainer
from cotree.train.student import convert_gguf
from cotree.train.trainer import training_arguments

CHAINS = SFT(batch_size=4, pack_tokens=150, epochs=2.0, learning_rate=1e-3, save_steps=2, precision="fp32")
PAIRS = DPO(batch_size=4, pack_tokens=150, epochs=2.0, learning_rate=1e-3, save_steps=2, precision="fp32")
VARIANTS = [
    PAIRS,
    PAIRS.model_copy(update={"sft_norm": "pair"}),
    PAIRS.model_copy(update={"sft_scope": "full"}),
    PAIRS.model_copy(update={"mask_prefix": False}),
    PAIRS.model_copy(update={"mask_prefix": False, "sft_scope": "suffix", "alpha": 0.0}),
    PAIRS.model_copy(update={"loss": "length_normalised", "sft_scope": "dedup"}),
    PAIRS.model_copy(update={"loss": "ld_dpo", "sft_scope": "dedup", "sft_norm": "pair"}),
]


@given(rows=st.integers(1, 40), batch=st.integers(1, 9), epochs=st.floats(0.1, 3.5), seed=st.integers(0, 9))
def test_steps_are_fixed_by_the_seed_and_cover_every_row_once_an_epoch(
    rows: int, batch: int, epochs: float, seed: int
) -> None:
    settings, chains = SFT(batch_size=batch, epochs=epochs), [EncodedChain([row // 3], [row]) for row in range(rows)]
    steps = fixed_steps(chains, settings, seed)
    assert steps == fixed_steps(chains, settings, seed)
    an_epoch = -(-rows // batch)
    assert len(steps) == -(-epochs * an_epoch // 1)
    for at in range(0, len(steps) - an_epoch + 1, an_epoch):
        order = [row for step in steps[at : at + an_epoch] for row in step]
        assert sorted(order) == list(range(rows))
        assert len([1 for left, right in pairwise(order) if left // 3 != right // 3]) == (rows - 1) // 3
    assert all(len(step) == batch for step in steps if step is not steps[-1] and (steps.index(step) + 1) % an_epoch)
    if rows > 12:
        assert steps != fixed_steps(chains, settings, seed + 1) or epochs * rows < 2


def referenced(student: Path, rows: Path, settings: DPO) -> list[EncodedPair]:
    pairs = encode_file(rows, AutoTokenizer.from_pretrained(student), settings).rows
    arguments = training_arguments(student.parent / "unused", settings, 1, 0)
    return with_reference(load_model(student), pairs, arguments, settings)


def test_the_pack_cap_never_changes_an_sft_gradient(student: Path, sft_rows: Path, tmp_path: Path) -> None:
    chains = encode_file(sft_rows, AutoTokenizer.from_pretrained(student), CHAINS).rows[:5]
    arguments = training_arguments(tmp_path, CHAINS, 1, 0)
    expected = None
    for cap in (2000, 200, 1):
        step_trainer = ChainTrainer(
            load_model(student), [chains], arguments, CHAINS.model_copy(update={"pack_tokens": cap})
        )
        loss, found = gradients(step_trainer, chains)
        expected = expected or (loss, found)
        assert loss == pytest.approx(expected[0], rel=1e-6)
        assert distance(found, expected[1]) < 2e-6
    model = AutoModelForCausalLM.from_pretrained(student)  # the definition: one mean over all scored tokens
    total, count = torch.zeros(()), 0
    for chain in chains:
        ids = torch.tensor([chain.prompt + chain.completion])
        logps = model(ids).logits[0, len(chain.prompt) - 1 : -1].log_softmax(-1)
        total = total - logps.gather(1, ids[0, len(chain.prompt) :, None]).sum()
        count += len(chain.completion)
    (total / count).backward()  # type: ignore[no-untyped-call]
    assert expected is not None
    assert expected[0] == pytest.approx((total / count).item(), rel=1e-6)
    assert distance(expected[1], {name: values.grad for name, values in model.named_parameters()}) < 2e-6


@pytest.mark.parametrize("settings", VARIANTS)
def test_the_pack_cap_never_changes_a_dpo_gradient(
    settings: DPO, student: Path, dpo_rows: Path, tmp_path: Path
) -> None:
    pairs = referenced(student, dpo_rows, settings)[:5]
    arguments = training_arguments(tmp_path, settings, 1, 0)
    moved = load_model(student)
    torch.manual_seed(1)
    with torch.no_grad():
        for values in moved.parameters():
            values += 0.02 * torch.randn_like(values)  # away from d = 0, where every pair weighs the same
    expected = None
    for cap in (2000, 200, 1):
        step_trainer = PairTrainer(moved, [pairs], arguments, settings.model_copy(update={"pack_tokens": cap}))
        loss, found = gradients(step_trainer, pairs)
        metrics = step_trainer.metrics
        expected = expected or (loss, found, metrics)
        assert loss == pytest.approx(expected[0], rel=1e-5)
        assert distance(found, expected[1]) < 1e-5
        assert metrics == pytest.approx(expected[2], rel=1e-4, abs=1e-5)
    assert expected is not None
    assert ("sft_loss" in expected[2]) == (settings.alpha > 0), "a term that is not computed is not logged"
    joint = expected[2]["dpo_loss"] + settings.alpha * expected[2].get("sft_loss", 0.0)
    assert expected[0] == pytest.approx(joint, rel=1e-6)


def test_masking_the_prefix_is_a_no_op_in_the_margin_and_real_in_the_sft_term(
    student: Path, dpo_rows: Path, tmp_path: Path
) -> None:
    found: dict[tuple[bool, str], tuple[dict[str, float], dict[str, Tensor]]] = {}
    for masked in (True, False):
        for scope in ("full", "suffix"):
            for alpha in (0.0, 1.0):
                settings = DPO(mask_prefix=masked, sft_scope=scope, alpha=alpha, batch_size=8)
                pairs = referenced(student, dpo_rows, settings)[:8]
                assert any(pair.prefix for pair in pairs)
                step_trainer = PairTrainer(
                    load_model(student), [pairs], training_arguments(tmp_path, settings, 1, 0), settings
                )
                with torch.no_grad():
                    for values in step_trainer.model.parameters():
                        values *= 1.02
                _, gradient = gradients(step_trainer, pairs)
                found[masked, f"{scope} {alpha}"] = (step_trainer.metrics, gradient)
    for case in ("full 0.0", "suffix 0.0", "full 1.0", "suffix 1.0"):
        (masked_metrics, masked_gradient), (plain_metrics, plain_gradient) = found[True, case], found[False, case]
        assert masked_metrics["margin"] == pytest.approx(plain_metrics["margin"], abs=1e-5)
        assert masked_metrics["dpo_loss"] == pytest.approx(plain_metrics["dpo_loss"], abs=1e-5)
        assert distance(masked_gradient, plain_gradient) < 1e-4
        assert masked_metrics["chosen_logps"] > plain_metrics["chosen_logps"] + 1  # what it does change: logged rewards
    assert distance(found[True, "suffix 1.0"][1], found[True, "full 1.0"][1]) > 0.1
    assert DPO().scope == "suffix"
    assert DPO(mask_prefix=False).scope == "full"


@pytest.mark.parametrize("settings", VARIANTS)
def test_every_margin_is_zero_at_step_0(settings: DPO, student: Path, dpo_rows: Path, tmp_path: Path) -> None:
    logs: list[StepLog] = []
    shared = tmp_path / "shared"
    train("dpo", dpo_rows, student, tmp_path / "run", settings=settings, seed=3, on_step=logs.append, references=shared)
    assert abs(logs[0].metrics["margin"]) < 1e-5
    assert logs[0].metrics["dpo_loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert abs(logs[-1].metrics["margin"]) > 1e-3
    (stamp,) = _stamps(shared)  # named by what it depends on
    other = settings.model_copy(update={"beta": 0.2, "epochs": 0.5})
    train("dpo", dpo_rows, student, tmp_path / "other", settings=other, seed=0, references=shared)
    assert _stamps(shared) == [stamp]


def test_two_margins_do_not_share_a_reference(student: Path, dpo_rows: Path, tmp_path: Path) -> None:
    for name, change in (("sum", {}), ("mean", {"loss": "length_normalised"}), ("ld", {"loss": "ld_dpo"})):
        logs: list[StepLog] = []
        settings = PAIRS.model_copy(update={"mask_prefix": False, "epochs": 0.1, **change})
        shared = tmp_path / "shared"
        train(
            "dpo", dpo_rows, student, tmp_path / name, settings=settings, seed=0, on_step=logs.append, references=shared
        )
        assert abs(logs[0].metrics["margin"]) < 1e-5
        assert logs[0].metrics["dpo_loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert len(_stamps(shared)) == 3


def test_accuracy_is_the_share_of_pairs_with_a_positive_margin_and_simpos_target_is_not_in_the_metrics(
    student: Path, dpo_rows: Path, tmp_path: Path
) -> None:
    settings = DPO(loss="simpo", simpo_gamma=50.0, beta=2.0)
    pairs = encode_file(dpo_rows, AutoTokenizer.from_pretrained(student), settings).rows
    arguments = training_arguments(tmp_path, settings, 1, 0)
    logged: list[dict[str, float]] = []
    for rows in ([pairs[0]], [pairs[1]], pairs[:2]):
        step_trainer = PairTrainer(load_model(student), [rows], arguments, settings)
        gradients(step_trainer, rows)
        logged.append(step_trainer.metrics)
    for metrics in logged[:2]:
        assert metrics["margin"] == pytest.approx(2 * (metrics["chosen_logps"] - metrics["rejected_logps"]), abs=1e-4)
        assert metrics["accuracy"] == (metrics["margin"] > 0)
    assert logged[2]["accuracy"] == (logged[0]["accuracy"] + logged[1]["accuracy"]) / 2


def test_a_run_is_a_plain_loop_of_adamw(student: Path, sft_rows: Path, tmp_path: Path) -> None:
    """Learning rate, warm-up, its fall in a line, weight decay and clipping do what they do everywhere."""
    settings = SFT(batch_size=3, epochs=2.0, learning_rate=2e-3, warmup_ratio=0.3, weight_decay=0.1, max_grad_norm=0.5)
    train("sft", sft_rows, student, tmp_path / "run", settings=settings, seed=0)
    encoded = encode_file(sft_rows, AutoTokenizer.from_pretrained(student), settings).rows
    steps = fixed_steps(encoded, settings, 0)
    model = AutoModelForCausalLM.from_pretrained(student)
    decayed = [values for name, values in model.named_parameters() if values.ndim > 1]
    plain = [values for name, values in model.named_parameters() if values.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}])
    warmup = 3  # of 8 steps
    for at, step in enumerate(steps):
        rate = 2e-3 * (at / warmup if at < warmup else (len(steps) - at) / (len(steps) - warmup))
        logps = []
        for row in (encoded[index] for index in step):
            ids = torch.tensor([row.prompt + row.completion])
            logits = model(ids).logits[0, len(row.prompt) - 1 : -1]
            logps.append(logits.log_softmax(-1).gather(1, ids[0, len(row.prompt) :, None]))
        optimizer.zero_grad()
        torch.autograd.backward(-torch.cat(logps).mean())
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5) > 0.5
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    assert len(steps) == 8
    found = weights(tmp_path / "run")
    expected = {name: values.detach() for name, values in model.named_parameters()}
    moved = distance(expected, dict(load_model(student).named_parameters()))
    assert distance({name: found[name] for name in expected}, expected) < 1e-3 * moved


def test_a_run_of_one_step_learns(student: Path, sft_rows: Path, tmp_path: Path) -> None:
    train(
        "sft",
        sft_rows,
        student,
        tmp_path / "run",
        settings=CHAINS.model_copy(update={"batch_size": 11, "epochs": 1.0}),
        seed=0,
    )
    first = {name: values.detach() for name, values in load_model(student).named_parameters()}
    found = weights(tmp_path / "run")
    assert distance({name: found[name] for name in first}, first) > 1e-3


def test_a_run_learns_reports_every_step_and_returns_at_once_when_done(
    student: Path, sft_rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logs: list[StepLog] = []
    out = tmp_path / "run"
    result = train("sft", sft_rows, student, out, settings=CHAINS, seed=0, on_step=logs.append)
    assert capfd.readouterr() == ("", "")
    assert [log.step for log in logs] == list(range(1, 7))
    assert {log.total_steps for log in logs} == {6}
    assert logs[-1].loss < 0.8 * logs[0].loss
    assert (result.steps, result.rows, result.too_long) == (6, 11, 0)
    assert result.first["loss"] == logs[0].loss
    assert result.final["loss"] == logs[-1].loss
    chains = encode_file(sft_rows, AutoTokenizer.from_pretrained(student), CHAINS).rows
    assert result.tokens == 2 * sum(chain.tokens for chain in chains)
    assert sum(log.metrics["tokens"] for log in logs) == 2 * sum(len(chain.completion) for chain in chains)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(log.step, log.loss) for log in logs]
    assert sorted(path.name for path in out.iterdir()) == ["log.jsonl", "model", "result.json"]
    stored = AutoModelForCausalLM.from_pretrained(out / "model")
    assert stored.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(out / "model").chat_template is not None
    assert train("sft", sft_rows, student, out, settings=CHAINS, seed=0, on_step=logs.append) == result
    assert len(logs) == 6


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_files_have_the_mode_of_new_files_and_all_are_in_the_folder(
    mask: int, mode: int, student: Path, dpo_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = os.umask(mask)
    try:
        settings = PAIRS.model_copy(update={"lora": LoRA(rank=2, alpha=4), "epochs": 0.5})
        train("dpo", dpo_rows, student, Path("trained"), settings=settings, seed=0)
        convert_gguf(write_tiny_gguf(tiny_model(), tiny_tokenizer(), tmp_path.with_suffix(".gguf")), Path("start"))
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len([path for path in files if path.suffix == ".safetensors"]) == 3
    assert {path.stat().st_mode & 0o777 for path in files} == {mode}
    assert {path.name for path in tmp_path.iterdir()} == {"trained", "start"}


def test_a_run_goes_on_with_other_settings_of_speed(student: Path, sft_rows: Path, tmp_path: Path) -> None:
    def interrupt(log: StepLog) -> None:
        if log.step == 3:
            raise KeyboardInterrupt

    train("sft", sft_rows, student, tmp_path / "whole", settings=CHAINS, seed=0)
    with pytest.raises(KeyboardInterrupt):
        train("sft", sft_rows, student, tmp_path / "run", settings=CHAINS, seed=0, on_step=interrupt)
    stored: set[str] = set()

    def look(log: StepLog) -> None:
        stored.update(path.name for path in (tmp_path / "run" / "trainer").iterdir())

    settings = CHAINS.model_copy(update={"save_steps": 1})
    train("sft", sft_rows, student, tmp_path / "run", settings=settings, seed=0, on_step=look)
    assert {"checkpoint-3", "checkpoint-4", "checkpoint-5"} <= stored
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(
    student: Path, dpo_rows: Path, tmp_path: Path
) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train("dpo", dpo_rows, student, tmp_path / name, settings=PAIRS, seed=seed)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


@pytest.fixture(scope="module")
def forked() -> Any:
    """Starts processes that have already imported what a run needs, which is most of a short run's time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.slow_child"])
    return context


def kill_after(forked: Any, arguments: tuple[Any, ...], step: int, delay: float) -> None:
    """Start a run (arguments of `train_slowly`), and kill it so many seconds after this step."""
    steps, theirs = forked.Pipe(duplex=False)
    child = forked.Process(target=train_slowly, args=(*arguments, theirs))
    child.start()
    theirs.close()
    while steps.recv() < step:
        pass
    time.sleep(delay)
    child.kill()
    child.join()


def _stamps(folder: Path) -> list[int]:
    return [path.stat().st_mtime_ns for path in folder.iterdir()]


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_killed_run_goes_on_and_ends_in_the_same_weights_bit_for_bit(
    kind: str, student: Path, sft_rows: Path, dpo_rows: Path, tmp_path: Path, forked: Any
) -> None:
    rows: Path = {"sft": sft_rows, "dpo": dpo_rows}[kind]
    settings: Any = {"sft": CHAINS, "dpo": PAIRS}[kind]
    whole = train(kind, rows, student, tmp_path / "whole", settings=settings, seed=0)
    out = tmp_path / "killed"
    kill_after(forked, (kind, rows, student, out, settings, 0.05), 5, 0.02)
    assert not (out / "model").exists()
    assert {path.name for path in (out / "trainer").glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    torn = out / "trainer" / "checkpoint-6"  # what a kill in the middle of a save leaves
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    before = _stamps(out / "trainer" / "reference") if kind == "dpo" else []
    assert len(before) == (kind == "dpo")

    logs: list[StepLog] = []
    stamps: list[list[int]] = []

    def on_step(log: StepLog) -> None:
        logs.append(log)
        stamps.append(_stamps(out / "trainer" / "reference") if kind == "dpo" else [])

    resumed = train(kind, rows, student, out, settings=settings, seed=0, on_step=on_step)
    assert [log.step for log in logs] == list(range(5, resumed.steps + 1))
    assert all(stamp == before for stamp in stamps)
    assert same(weights(out), weights(tmp_path / "whole"))
    assert resumed.final | {"seconds": 0} == whole.final | {"seconds": 0}
    assert resumed.first | {"seconds": 0} == whole.first | {"seconds": 0}
    assert resumed.tokens == whole.tokens
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, resumed.steps + 1))
    assert sorted(path.name for path in out.iterdir()) == ["log.jsonl", "model", "result.json"]


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08])
def test_a_kill_at_any_moment_of_a_save_loses_nothing_before_it(
    delay: float, student: Path, sft_rows: Path, tmp_path: Path, forked: Any
) -> None:
    settings = CHAINS.model_copy(update={"save_steps": 1})
    train("sft", sft_rows, student, tmp_path / "whole", settings=settings, seed=0)
    kill_after(forked, ("sft", sft_rows, student, tmp_path / "killed", settings, 0.0), 3, delay)
    logs: list[StepLog] = []
    train("sft", sft_rows, student, tmp_path / "killed", settings=settings, seed=0, on_step=logs.append)
    assert all(log.step >= 3 for log in logs)
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))


def test_ctrl_c_comes_through_and_the_next_call_goes_on(student: Path, sft_rows: Path, tmp_path: Path) -> None:
    def interrupt(log: StepLog) -> None:
        if log.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train("sft", sft_rows, student, tmp_path / "run", settings=CHAINS, seed=0, on_step=interrupt)
    logs: list[StepLog] = []
    train("sft", sft_rows, student, tmp_path / "run", settings=CHAINS, seed=0, on_step=logs.append)
    assert [log.step for log in logs] == [3, 4, 5, 6]
    train("sft", sft_rows, student, tmp_path / "whole", settings=CHAINS, seed=0)
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


@pytest.mark.parametrize(("limit", "what"), [(100_000, "checkpoint-2"), (500_000, "checkpoint-2")])
def test_a_full_disk_is_one_line_and_nothing_before_it_is_lost(
    limit: int, what: str, student: Path, sft_rows: Path, tmp_path: Path
) -> None:
    """A file size limit makes the kernel refuse writes: to the weights first, or to the optimizer's state."""
    size = (student / "model.safetensors").stat().st_size
    assert 100_000 < size < 500_000 < 2 * size
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        with pytest.raises(CotreeError, match=f"cannot write .*{what}: .*free some space"):
            train("sft", sft_rows, student, tmp_path / "run", settings=CHAINS, seed=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    train("sft", sft_rows, student, tmp_path / "run", settings=CHAINS, seed=0)
    train("sft", sft_rows, student, tmp_path / "whole", settings=CHAINS, seed=0)
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_a_loss_that_is_no_number_stops_the_run(student: Path, sft_rows: Path, tmp_path: Path) -> None:
    with pytest.raises(CotreeError, match=r"the loss became (nan|inf) at step \d: lower learning_rate"):
        train("sft", sft_rows, student, tmp_path, settings=CHAINS.model_copy(update={"learning_rate": 1e30}), seed=0)
    assert not (tmp_path / "model").exists()


def test_rewards_are_logged_where_there_is_a_reference_to_compare_with(
    student: Path, dpo_rows: Path, tmp_path: Path
) -> None:
    for name, change in (("dpo", {}), ("simpo", {"loss": "simpo"}), ("free", {"reference_free": True})):
        logs: list[StepLog] = []
        settings = PAIRS.model_copy(update={**change, "batch_size": 1, "save_steps": 100})
        train("dpo", dpo_rows, student, tmp_path / name, settings=settings, seed=0, on_step=logs.append)
        assert len(logs) >= 10
        assert all(("chosen_reward" in log.metrics) == (name == "dpo") for log in logs)
        assert name == "dpo" or not any(log.warning for log in logs)


def test_rows_that_cannot_be_trained_on_are_refused(student: Path, sft_rows: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no file at .*nowhere"):
        train("sft", tmp_path / "nowhere", student, tmp_path / "run", settings=CHAINS, seed=0)
    with pytest.raises(UsageError, match="has no dpo rows: their columns are prompt, compl"):
        train("dpo", sft_rows, student, tmp_path / "run", settings=PAIRS, seed=0)
    with pytest.raises(UsageError, match=r"all 11 rows are over 8 tokens: raise max_tokens"):
        train("sft", sft_rows, student, tmp_path / "run", settings=CHAINS.model_copy(update={"max_tokens": 8}), seed=0)
    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(UsageError, match=r"text.parquet is no Parquet file"):
        train("sft", tmp_path / "text.parquet", student, tmp_path / "run", settings=CHAINS, seed=0)
    assert not (tmp_path / "run").exists()


def test_rows_built_for_another_chat_template_are_refused(
    student: Path, sft_rows: Path, dpo_rows: Path, tmp_path: Path
) -> None:
    own = template_hash(AutoTokenizer.from_pretrained(student))
    for kind, rows, settings in (("sft", sft_rows, CHAINS), ("dpo", dpo_rows, PAIRS)):
        table = pq.read_table(rows)
        for template, name in ((own, "own"), ("another", "other")):
            noted = {"cotree": json.dumps({"kind": kind, "template": template})}
            pq.write_table(table.replace_schema_metadata(noted), tmp_path / f"{kind}-{name}.parquet")
        with pytest.raises(UsageError, match="for another tokenizer or chat template"):
            train(kind, tmp_path / f"{kind}-other.parquet", student, tmp_path / kind, settings=settings, seed=0)
        assert not (tmp_path / kind).exists()
    assert train("sft", tmp_path / "sft-own.parquet", student, tmp_path / "sft", settings=CHAINS, seed=0).rows > 0


def test_a_run_keeps_no_weights_in_memory(
    student: Path, sft_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three students are trained in one process: a leaked one costs two gigabytes."""
    alive: list[weakref.ref[Any]] = []

    def watched(*arguments: Any, **named: Any) -> Any:
        model = model_module.load_model(*arguments, **named)
        alive.extend(weakref.ref(values) for values in model.parameters())
        return model

    monkeypatch.setattr(run, "load_model", watched)

    def interrupt(log: StepLog) -> None:
        if log.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train("sft", sft_rows, student, tmp_path, settings=CHAINS, seed=0, on_step=interrupt)
    train("sft", sft_rows, student, tmp_path, settings=CHAINS, seed=0)
    gc.collect()
    assert len(alive) > 20
    assert not any(reference() is not None for reference in alive)
    big = sum(each.nbytes for each in gc.get_objects() if type(each) is Tensor and each.nbytes > 50_000)
    assert big == 0


def test_no_thread_or_file_is_left_open(student: Path, dpo_rows: Path, tmp_path: Path) -> None:
    train("dpo", dpo_rows, student, tmp_path / "warm", settings=PAIRS, seed=0)
    before = len(os.listdir("/proc/self/fd"))
    train("dpo", dpo_rows, student, tmp_path / "run", settings=PAIRS, seed=0)
    assert len(os.listdir("/proc/self/fd")) <= before

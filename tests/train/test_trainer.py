"""Whole runs on a tiny student: exact steps, kill -9 at any moment, full disks, Ctrl-C, and no memory kept."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import resource
import shutil
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
from tests.support.tiny_student import distance, gradients, same, weights
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from cotree.base.errors import CotreeError, UsageError
from cotree.experiment.recipe import TrainDPO, TrainSFT
from cotree.models.encode import Pair, template_hash
from cotree.train import model as model_module
from cotree.train import trainer
from cotree.train.dpo import PairTrainer, train_dpo, with_reference
from cotree.train.model import load_model
from cotree.train.resume import weights_hash
from cotree.train.sft import ChainTrainer, train_sft
from cotree.train.trainer import StepLog, encode_file, fixed_steps, training_arguments

SFT = TrainSFT(batch_size=4, pack_tokens=150, epochs=2.0, learning_rate=1e-3, save_steps=2)
DPO = TrainDPO(batch_size=4, pack_tokens=150, epochs=2.0, learning_rate=1e-3, save_steps=2)
VARIANTS = [
    DPO,
    DPO.model_copy(update={"sft_norm": "pair"}),
    DPO.model_copy(update={"sft_scope": "full"}),
    DPO.model_copy(update={"mask_prefix": False}),
    DPO.model_copy(update={"mask_prefix": False, "sft_scope": "suffix", "alpha": 0.0}),
    DPO.model_copy(update={"loss": "length_normalised", "sft_scope": "dedup"}),
    DPO.model_copy(update={"loss": "ld_dpo", "sft_scope": "dedup", "sft_norm": "pair"}),
]


@given(rows=st.integers(1, 40), batch=st.integers(1, 9), epochs=st.floats(0.1, 3.5), seed=st.integers(0, 9))
def test_steps_are_fixed_by_the_seed_and_cover_every_row_once_an_epoch(
    rows: int, batch: int, epochs: float, seed: int
) -> None:
    trees = [row // 3 for row in range(rows)]
    steps = fixed_steps(trees, batch, epochs, seed)
    assert steps == fixed_steps(trees, batch, epochs, seed)
    an_epoch = -(-rows // batch)
    assert len(steps) == -(-epochs * an_epoch // 1)
    for at in range(0, len(steps) - an_epoch + 1, an_epoch):
        order = [row for step in steps[at : at + an_epoch] for row in step]
        assert sorted(order) == list(range(rows))
        assert len([1 for left, right in pairwise(order) if left // 3 != right // 3]) == (rows - 1) // 3
    assert all(len(step) == batch for step in steps if step is not steps[-1] and (steps.index(step) + 1) % an_epoch)
    if rows > 12:
        assert steps != fixed_steps(trees, batch, epochs, seed + 1) or epochs * rows < 2


def referenced(student: Path, rows: Path, settings: TrainDPO) -> list[Pair]:
    pairs = encode_file(rows, AutoTokenizer.from_pretrained(student), settings, 512).rows
    arguments = training_arguments(student.parent / "unused", settings, 1, 0)
    return with_reference(load_model(student), pairs, settings, arguments)


def test_the_pack_cap_never_changes_an_sft_gradient(student: Path, sft_rows: Path, tmp_path: Path) -> None:
    chains = encode_file(sft_rows, AutoTokenizer.from_pretrained(student), SFT, 512).rows[:5]
    arguments = training_arguments(tmp_path, SFT, 1, 0)
    expected = None
    for cap in (2000, 200, 1):
        step_trainer = ChainTrainer(
            load_model(student), [chains], arguments, SFT.model_copy(update={"pack_tokens": cap})
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
    settings: TrainDPO, student: Path, dpo_rows: Path, tmp_path: Path
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
        gauges = step_trainer.gauges
        expected = expected or (loss, found, gauges)
        assert loss == pytest.approx(expected[0], rel=1e-5)
        assert distance(found, expected[1]) < 1e-5
        assert gauges == pytest.approx(expected[2], rel=1e-4, abs=1e-5)
    assert expected is not None
    assert ("sft_loss" in expected[2]) == (settings.alpha > 0), "a term that is not computed is not told"
    joint = expected[2]["dpo_loss"] + settings.alpha * expected[2].get("sft_loss", 0.0)
    assert expected[0] == pytest.approx(joint, rel=1e-6)


def test_masking_the_prefix_is_a_no_op_in_the_margin_and_real_in_the_sft_term(
    student: Path, dpo_rows: Path, tmp_path: Path
) -> None:
    found: dict[tuple[bool, str], tuple[dict[str, float], dict[str, Tensor]]] = {}
    for masked in (True, False):
        for scope in ("full", "suffix"):
            for alpha in (0.0, 1.0):
                settings = TrainDPO(mask_prefix=masked, sft_scope=scope, alpha=alpha, batch_size=8)
                pairs = referenced(student, dpo_rows, settings)[:8]
                assert any(pair.prefix for pair in pairs)
                step_trainer = PairTrainer(
                    load_model(student), [pairs], training_arguments(tmp_path, settings, 1, 0), settings
                )
                with torch.no_grad():
                    for values in step_trainer.model.parameters():
                        values *= 1.02
                _, gradient = gradients(step_trainer, pairs)
                found[masked, f"{scope} {alpha}"] = (step_trainer.gauges, gradient)
    for case in ("full 0.0", "suffix 0.0", "full 1.0", "suffix 1.0"):
        (masked_gauges, masked_gradient), (plain_gauges, plain_gradient) = found[True, case], found[False, case]
        assert masked_gauges["margin"] == pytest.approx(plain_gauges["margin"], abs=1e-5)
        assert masked_gauges["dpo_loss"] == pytest.approx(plain_gauges["dpo_loss"], abs=1e-5)
        assert distance(masked_gradient, plain_gradient) < 1e-4
        assert masked_gauges["chosen_logps"] > plain_gauges["chosen_logps"] + 1  # what it does change: logged rewards
    assert distance(found[True, "suffix 1.0"][1], found[True, "full 1.0"][1]) > 0.1
    assert TrainDPO().scope == "suffix"
    assert TrainDPO(mask_prefix=False).scope == "full"


@pytest.mark.parametrize("settings", VARIANTS)
def test_every_margin_is_zero_at_step_0(settings: TrainDPO, student: Path, dpo_rows: Path, tmp_path: Path) -> None:
    logs: list[StepLog] = []
    train_dpo(dpo_rows, student, tmp_path / "run", settings, 3, 512, logs.append)
    assert abs(logs[0].gauges["margin"]) < 1e-5
    assert logs[0].gauges["dpo_loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert abs(logs[-1].gauges["margin"]) > 1e-3
    (stamp,) = _reference(tmp_path / "run")  # it is kept beside the run, by its content
    other = settings.model_copy(update={"beta": 0.2, "epochs": 0.5})
    train_dpo(dpo_rows, student, tmp_path / "other", other, 0, 512)
    assert _reference(tmp_path / "other") == [stamp]


def test_two_margins_do_not_share_a_reference(student: Path, dpo_rows: Path, tmp_path: Path) -> None:
    for name, change in (("sum", {}), ("mean", {"loss": "length_normalised"}), ("ld", {"loss": "ld_dpo"})):
        logs: list[StepLog] = []
        settings = DPO.model_copy(update={"mask_prefix": False, "epochs": 0.1, **change})
        train_dpo(dpo_rows, student, tmp_path / name, settings, 0, 512, logs.append)
        assert abs(logs[0].gauges["margin"]) < 1e-5
        assert logs[0].gauges["dpo_loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert len(_reference(tmp_path / "sum")) == 3


def test_accuracy_is_the_share_of_pairs_that_are_told_apart_and_simpos_target_is_not_in_the_gauges(
    student: Path, dpo_rows: Path, tmp_path: Path
) -> None:
    settings = TrainDPO(loss="simpo", simpo_gamma=50.0, beta=2.0)
    pairs = encode_file(dpo_rows, AutoTokenizer.from_pretrained(student), settings, 512).rows
    arguments = training_arguments(tmp_path, settings, 1, 0)
    told: list[dict[str, float]] = []
    for rows in ([pairs[0]], [pairs[1]], pairs[:2]):
        step_trainer = PairTrainer(load_model(student), [rows], arguments, settings)
        gradients(step_trainer, rows)
        told.append(step_trainer.gauges)
    for gauges in told[:2]:
        assert gauges["margin"] == pytest.approx(2 * (gauges["chosen_logps"] - gauges["rejected_logps"]), abs=1e-4)
        assert gauges["accuracy"] == (gauges["margin"] > 0)
    assert told[2]["accuracy"] == (told[0]["accuracy"] + told[1]["accuracy"]) / 2


def test_a_run_is_a_plain_loop_of_adamw(student: Path, sft_rows: Path, tmp_path: Path) -> None:
    """Learning rate, warm-up, its fall in a line, weight decay and clipping do what they do everywhere."""
    settings = TrainSFT(
        batch_size=3, epochs=2.0, learning_rate=2e-3, warmup_ratio=0.3, weight_decay=0.1, max_grad_norm=0.5
    )
    train_sft(sft_rows, student, tmp_path / "run", settings, 0, 512)
    encoded = encode_file(sft_rows, AutoTokenizer.from_pretrained(student), settings, 512).rows
    steps = fixed_steps([tuple(row.prompt) for row in encoded], 3, 2.0, 0)
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
    train_sft(sft_rows, student, tmp_path / "run", SFT.model_copy(update={"batch_size": 11, "epochs": 1.0}), 0, 512)
    first = {name: values.detach() for name, values in load_model(student).named_parameters()}
    found = weights(tmp_path / "run")
    assert distance({name: found[name] for name in first}, first) > 1e-3


def test_a_run_learns_reports_every_step_and_returns_at_once_when_done(
    student: Path, sft_rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logs: list[StepLog] = []
    out = tmp_path / "run"
    result = train_sft(sft_rows, student, out, SFT, 0, 512, logs.append)
    assert capfd.readouterr() == ("", "")
    assert [log.step for log in logs] == list(range(1, 7))
    assert {log.total_steps for log in logs} == {6}
    assert logs[-1].loss < 0.8 * logs[0].loss
    assert (result.steps, result.rows, result.too_long) == (6, 11, 0)
    assert result.first["loss"] == logs[0].loss
    assert result.final["loss"] == logs[-1].loss
    chains = encode_file(sft_rows, AutoTokenizer.from_pretrained(student), SFT, 512).rows
    assert result.tokens == 2 * sum(chain.tokens for chain in chains)
    assert sum(log.gauges["tokens"] for log in logs) == 2 * sum(len(chain.completion) for chain in chains)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(log.step, log.loss) for log in logs]
    assert sorted(path.name for path in out.iterdir()) == ["inputs.json", "log.jsonl", "model", "result.json"]
    stored = AutoModelForCausalLM.from_pretrained(out / "model")
    assert stored.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(out / "model").chat_template is not None
    assert train_sft(sft_rows, student, out, SFT, 0, 512, logs.append) == result
    assert len(logs) == 6


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(
    student: Path, dpo_rows: Path, tmp_path: Path
) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_dpo(dpo_rows, student, tmp_path / name, DPO, seed, 512)
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


def _reference(out: Path) -> list[int]:
    return [path.stat().st_mtime_ns for path in (out.parent / "reference").iterdir()]


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_killed_run_goes_on_and_ends_in_the_same_weights_bit_for_bit(
    kind: str, student: Path, sft_rows: Path, dpo_rows: Path, tmp_path: Path, forked: Any
) -> None:
    rows: Path = {"sft": sft_rows, "dpo": dpo_rows}[kind]
    settings: Any = {"sft": SFT, "dpo": DPO}[kind]
    train: Any = {"sft": train_sft, "dpo": train_dpo}[kind]
    whole = train(rows, student, tmp_path / "whole", settings, 0, 512)
    out = tmp_path / "killed"
    kill_after(forked, (rows, student, out, settings, 0.05), 5, 0.02)
    assert not (out / "model").exists()
    assert [path.name for path in (out / "trainer").glob("checkpoint-*")] == ["checkpoint-4"]
    torn = out / "trainer" / "checkpoint-6"  # what a kill in the middle of a save leaves
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    before = _reference(out) if kind == "dpo" else []

    logs: list[StepLog] = []
    stamps: list[list[int]] = []

    def on_step(log: StepLog) -> None:
        logs.append(log)
        stamps.append(_reference(out) if kind == "dpo" else [])

    resumed = train(rows, student, out, settings, 0, 512, on_step)
    assert [log.step for log in logs] == list(range(5, resumed.steps + 1))
    assert all(stamp == before for stamp in stamps)
    assert same(weights(out), weights(tmp_path / "whole"))
    assert resumed.final | {"seconds": 0} == whole.final | {"seconds": 0}
    assert resumed.first | {"seconds": 0} == whole.first | {"seconds": 0}
    assert resumed.tokens == whole.tokens
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, resumed.steps + 1))
    assert sorted(path.name for path in out.iterdir()) == ["inputs.json", "log.jsonl", "model", "result.json"]


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08])
def test_a_kill_at_any_moment_of_a_save_loses_nothing_before_it(
    delay: float, student: Path, sft_rows: Path, tmp_path: Path, forked: Any
) -> None:
    settings = SFT.model_copy(update={"save_steps": 1})
    train_sft(sft_rows, student, tmp_path / "whole", settings, 0, 512)
    kill_after(forked, (sft_rows, student, tmp_path / "killed", settings, 0.0), 3, delay)
    logs: list[StepLog] = []
    train_sft(sft_rows, student, tmp_path / "killed", settings, 0, 512, logs.append)
    assert all(log.step >= 3 for log in logs)
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))


def test_ctrl_c_comes_through_and_the_next_call_goes_on(student: Path, sft_rows: Path, tmp_path: Path) -> None:
    def interrupt(log: StepLog) -> None:
        if log.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_sft(sft_rows, student, tmp_path / "run", SFT, 0, 512, interrupt)
    logs: list[StepLog] = []
    train_sft(sft_rows, student, tmp_path / "run", SFT, 0, 512, logs.append)
    assert [log.step for log in logs] == [3, 4, 5, 6]
    train_sft(sft_rows, student, tmp_path / "whole", SFT, 0, 512)
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
            train_sft(sft_rows, student, tmp_path / "run", SFT, 0, 512)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    train_sft(sft_rows, student, tmp_path / "run", SFT, 0, 512)
    train_sft(sft_rows, student, tmp_path / "whole", SFT, 0, 512)
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_a_loss_that_is_no_number_stops_the_run(student: Path, sft_rows: Path, tmp_path: Path) -> None:
    with pytest.raises(CotreeError, match=r"the loss became (nan|inf) at step \d: lower learning_rate"):
        train_sft(sft_rows, student, tmp_path, SFT.model_copy(update={"learning_rate": 1e30}), 0, 512)
    assert not (tmp_path / "model").exists()


def test_other_inputs_in_the_same_folder_are_refused(
    student: Path, sft_rows: Path, dpo_rows: Path, tmp_path: Path
) -> None:
    def stop(log: StepLog) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_sft(sft_rows, student, tmp_path, SFT, 0, 512, stop)
    with pytest.raises(UsageError, match="was begun with other seed: delete it"):
        train_sft(sft_rows, student, tmp_path, SFT, 1, 512)
    with pytest.raises(UsageError, match=r"was begun with other settings\.epochs, max_tokens: delete"):
        train_sft(sft_rows, student, tmp_path, SFT.model_copy(update={"epochs": 1.0}), 0, 500)
    with pytest.raises(UsageError, match=r"was begun with other settings\.loss, .*, \.\.\.: delete"):
        train_dpo(dpo_rows, student, tmp_path, DPO, 0, 512)
    claimed = (tmp_path / "inputs.json").stat().st_ino
    done = train_sft(sft_rows, student, tmp_path, SFT, 0, 512)
    assert (tmp_path / "inputs.json").stat().st_ino == claimed, "processes that find it need not write it, all at once"
    assert train_sft(sft_rows, student, tmp_path, SFT, 0, 512) == done
    with pytest.raises(UsageError, match="was begun with other seed: delete it"):
        train_sft(sft_rows, student, tmp_path, SFT, 1, 512)


def test_a_student_is_known_by_weights_and_config_and_not_by_its_tokenizer(student: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(student, tmp_path / "copy"))
    (copy / "tokenizer_config.json").write_text("{}")
    assert weights_hash(copy) == weights_hash(student)
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert weights_hash(copy) != weights_hash(student)


def test_rewards_are_told_where_there_is_a_reference_to_compare_with(
    student: Path, dpo_rows: Path, tmp_path: Path
) -> None:
    for name, change in (("dpo", {}), ("simpo", {"loss": "simpo"}), ("free", {"reference_free": True})):
        logs: list[StepLog] = []
        settings = DPO.model_copy(update={**change, "batch_size": 1, "save_steps": 100})
        train_dpo(dpo_rows, student, tmp_path / name, settings, 0, 512, logs.append)
        assert len(logs) >= 10
        assert all(("chosen_reward" in log.gauges) == (name == "dpo") for log in logs)
        assert name == "dpo" or not any(log.warnings for log in logs)


def test_rows_that_cannot_be_trained_on_are_refused(student: Path, sft_rows: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no file at .*nowhere"):
        train_sft(tmp_path / "nowhere", student, tmp_path / "run", SFT, 0, 512)
    with pytest.raises(UsageError, match="has no dpo rows: their columns are prompt, compl"):
        train_dpo(sft_rows, student, tmp_path / "run", DPO, 0, 512)
    with pytest.raises(UsageError, match=r"all 11 rows are over 8 tokens: raise build.max_tokens"):
        train_sft(sft_rows, student, tmp_path / "run", SFT, 0, 8)
    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(UsageError, match=r"text.parquet is no Parquet file"):
        train_sft(tmp_path / "text.parquet", student, tmp_path / "run", SFT, 0, 512)
    assert not (tmp_path / "run").exists()


def test_rows_built_for_another_chat_template_are_refused(
    student: Path, sft_rows: Path, dpo_rows: Path, tmp_path: Path
) -> None:
    own = template_hash(AutoTokenizer.from_pretrained(student))
    for kind, rows, settings, train in (("sft", sft_rows, SFT, train_sft), ("dpo", dpo_rows, DPO, train_dpo)):
        table = pq.read_table(rows)
        for template, name in ((own, "own"), ("another", "other")):
            noted = {"cotree": json.dumps({"kind": kind, "template": template})}
            pq.write_table(table.replace_schema_metadata(noted), tmp_path / f"{kind}-{name}.parquet")
        with pytest.raises(UsageError, match="was built for another tokenizer or chat template"):
            train(tmp_path / f"{kind}-other.parquet", student, tmp_path / kind, settings, 0, 512)  # type: ignore[arg-type]
        assert not (tmp_path / kind).exists()
    assert train_sft(tmp_path / "sft-own.parquet", student, tmp_path / "sft", SFT, 0, 512).rows > 0


def test_a_run_keeps_no_weights_in_memory(
    student: Path, sft_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three students are trained in one process: a leaked one costs two gigabytes."""
    alive: list[weakref.ref[Any]] = []

    def watched(*arguments: Any) -> Any:
        model = model_module.load_model(*arguments)
        alive.extend(weakref.ref(values) for values in model.parameters())
        return model

    monkeypatch.setattr(trainer, "load_model", watched)

    def interrupt(log: StepLog) -> None:
        if log.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_sft(sft_rows, student, tmp_path, SFT, 0, 512, interrupt)
    train_sft(sft_rows, student, tmp_path, SFT, 0, 512)
    gc.collect()
    assert len(alive) > 20
    assert not any(reference() is not None for reference in alive)
    big = sum(each.nbytes for each in gc.get_objects() if type(each) is Tensor and each.nbytes > 50_000)
    assert big == 0


def test_no_thread_or_file_is_left_open(student: Path, dpo_rows: Path, tmp_path: Path) -> None:
    train_dpo(dpo_rows, student, tmp_path / "warm", DPO, 0, 512)
    before = len(os.listdir("/proc/self/fd"))
    train_dpo(dpo_rows, student, tmp_path / "run", DPO, 0, 512)
    assert len(os.listdir("/proc/self/fd")) <= before

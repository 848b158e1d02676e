"""The settings of training: adapters, precision, checkpointing, compiling, reporters; its plan, and out of memory."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from tensorboardX.proto.event_pb2 import Event
from tests.support.tiny_student import distance, gradients, tiny_model, tiny_tokenizer, weights, write_tiny_gguf
from tests.train.test_checkpoint_layers import Counted
from transformers import AutoModelForCausalLM, AutoTokenizer

from cotree.base.errors import CotreeError, UsageError
from cotree.models.checksums import check_weights
from cotree.train import trainer
from cotree.train.callback import StepLog
from cotree.train.model import load_model
from cotree.train.plan import plan
from cotree.train.rows import encode_file
from cotree.train.run import train
from cotree.train.settings import DPO, SFT, LoRA, Probe
from cotree.train.sft import ChainTrainer
from cotree.train.student import convert_gguf
from cotree.train.trainer import cpu_has_bf16, explain_out_of_memory, resolve_precision, training_arguments

CHAINS = SFT(batch_size=4, epochs=1.0, learning_rate=1e-2, save_steps=2)
PAIRS = DPO(batch_size=5, epochs=2.0, learning_rate=1e-2)
ADAPTER = LoRA(rank=4, alpha=8)


@pytest.mark.parametrize("start", ["new adapter", "merged adapter", "continued adapter"])
def test_every_margin_is_zero_at_step_0_with_an_adapter(
    start: str, student: Path, sft_rows: Path, dpo_rows: Path, tmp_path: Path
) -> None:
    """A continued adapter must not make the base the reference: it is merged into what the new one starts from."""
    checkpoint = student
    if start != "new adapter":
        train("sft", sft_rows, student, tmp_path / "sft", settings=CHAINS.model_copy(update={"lora": ADAPTER}), seed=0)
        checkpoint = tmp_path / "sft" / "model"
        merged = weights(tmp_path / "sft")
        assert distance(merged, dict(load_file(student / "model.safetensors"))) > 1e-3
        if start == "continued adapter":
            AutoTokenizer.from_pretrained(student).save_pretrained(checkpoint / "adapter")
            checkpoint = checkpoint / "adapter"
            found = {name: values.detach() for name, values in load_model(checkpoint).named_parameters()}
            assert distance(found, {name: merged[name] for name in found}) < 1e-6
    logs: list[StepLog] = []
    train(
        "dpo",
        dpo_rows,
        checkpoint,
        tmp_path / "dpo",
        settings=PAIRS.model_copy(update={"lora": ADAPTER}),
        seed=0,
        on_step=logs.append,
    )
    assert abs(logs[0].metrics["margin"]) < 1e-5
    assert logs[0].metrics["dpo_loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert abs(logs[-1].metrics["margin"]) > 1e-4
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dpo" / "model")
    assert model.dtype == torch.float32
    adapter = tmp_path / "dpo" / "model" / "adapter"
    assert adapter.exists() == (start != "continued adapter"), "no folder holds what it would go on top of"
    if adapter.exists():
        merged = dict(load_model(adapter).named_parameters())
        assert distance({name: values.detach() for name, values in merged.items()}, weights(tmp_path / "dpo")) < 1e-6


def step(student: Path, sft_rows: Path, out: Path, **changes: Any) -> tuple[float, dict[str, torch.Tensor]]:
    chains = encode_file(sft_rows, AutoTokenizer.from_pretrained(student), CHAINS).rows
    settings = CHAINS.model_copy(update=changes)
    trainer = ChainTrainer(load_model(student), [chains], training_arguments(out, settings, 1, 0), settings)
    return gradients(trainer, chains)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_checkpointing_changes_no_gradient(student: Path, sft_rows: Path, tmp_path: Path) -> None:
    loss, expected = step(student, sft_rows, tmp_path)
    again, found = step(student, sft_rows, tmp_path, gradient_checkpointing=True)
    assert again == pytest.approx(loss, rel=1e-6)
    assert distance(found, expected) < 1e-5


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_an_adapter_is_trained_on_with_all_its_weights(
    kind: str, student: Path, sft_rows: Path, dpo_rows: Path, tmp_path: Path
) -> None:
    train("sft", sft_rows, student, tmp_path / "adapter", settings=CHAINS.model_copy(update={"lora": ADAPTER}), seed=0)
    start = tmp_path / "adapter" / "model" / "adapter"
    AutoTokenizer.from_pretrained(student).save_pretrained(start)
    logs: list[StepLog] = []
    if kind == "sft":
        train("sft", sft_rows, start, tmp_path / "run", settings=CHAINS, seed=0, on_step=logs.append)
        assert logs[-1].loss < logs[0].loss
    else:
        train("dpo", dpo_rows, start, tmp_path / "run", settings=PAIRS, seed=0, on_step=logs.append)
        assert logs[0].metrics["dpo_loss"] == pytest.approx(0.6931472, abs=1e-6)
    before = weights(tmp_path / "adapter")
    assert all(not torch.equal(values, before[name]) for name, values in weights(tmp_path / "run").items())


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [({}, False), ({"avx512_bf16": False}, False), ({"avx512_bf16": True}, True), ({"amx_bf16": True}, True)],
)
def test_auto_precision_is_bf16_where_the_cpu_multiplies_it(
    capabilities: dict[str, bool], fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert cpu_has_bf16() == fast
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in torch 2.6
    assert not cpu_has_bf16()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(trainer, "cpu_has_bf16", lambda: fast)
    assert resolve_precision(SFT()).precision == ("bf16" if fast else "fp32")
    assert resolve_precision(SFT(precision="fp32")).precision == "fp32"


def test_a_bf16_step_is_near_to_fp32(student: Path, sft_rows: Path, tmp_path: Path) -> None:
    logs: list[StepLog] = []
    for precision in ("fp32", "bf16"):
        settings = SFT(batch_size=11, precision=precision)
        train("sft", sft_rows, student, tmp_path / precision, settings=settings, seed=0, on_step=logs.append)
    plain, low = logs
    assert low.loss != plain.loss
    assert low.loss == pytest.approx(plain.loss, rel=5e-3)
    assert low.metrics["grad_norm"] == pytest.approx(plain.metrics["grad_norm"], rel=3e-2)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, ADAPTER])
def test_weights_are_stored_in_bf16(lora: LoRA | None, student: Path, sft_rows: Path, tmp_path: Path) -> None:
    """The rounded weights of the same training, in half of the file, and transformers takes them as they are."""
    for name in ("fp32", "bf16"):
        settings = SFT(batch_size=11, lora=lora, save_dtype=name)
        train("sft", sft_rows, student, tmp_path / name, settings=settings, seed=0)
    files = [tmp_path / name / "model" / "model.safetensors" for name in ("fp32", "bf16")]
    whole, half = (load_file(file) for file in files)
    assert whole.keys() == half.keys()
    assert all(torch.equal(values.to(torch.bfloat16), half[name]) for name, values in whole.items())
    assert files[1].stat().st_size < 0.6 * files[0].stat().st_size
    assert AutoModelForCausalLM.from_pretrained(files[1].parent).dtype == torch.bfloat16
    check_weights(files[1].parent)


def test_a_compiled_run_has_the_losses_and_gradients_of_a_plain_one(
    student: Path, dpo_rows: Path, tmp_path: Path
) -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    logs: dict[str, list[StepLog]] = {"plain": [], "compiled": []}
    for name, each in logs.items():
        probe = Probe(every=2, questions=1, max_tokens=8)
        change = {"compile": name == "compiled", "pack_tokens": 150, "probe": probe}
        train(
            "dpo",
            dpo_rows,
            student,
            tmp_path / name / "run",
            settings=PAIRS.model_copy(update=change),
            seed=0,
            on_step=each.append,
        )
    assert 0 < counters["stats"]["unique_graphs"] < 20, "it must not be compiled for every pack"
    for plain, compiled in zip(*logs.values(), strict=True):
        for name in ("loss", "margin", "chosen_logps", "grad_norm"):
            left, right = ({"loss": log.loss} | log.metrics for log in (plain, compiled))
            assert right[name] == pytest.approx(left[name], rel=1e-4, abs=1e-5), name
    assert distance(*(weights(tmp_path / name / "run") for name in logs)) < 1e-4


def test_whole_runs_with_checkpointing_and_bf16(student: Path, sft_rows: Path, tmp_path: Path) -> None:
    products = dict[str, int]()
    for name, change in (("plain", {}), ("saved", {"gradient_checkpointing": True}), ("low", {"precision": "bf16"})):
        with Counted() as counted:
            train("sft", sft_rows, student, tmp_path / name, settings=CHAINS.model_copy(update=change), seed=0)
        products[name] = counted.calls["mm"]
    assert products["plain"] == products["low"]
    assert 1.2 < products["saved"] / products["plain"] < 1.34, "layers are computed again for the backward pass"
    plain, saved, low = (weights(tmp_path / name) for name in ("plain", "saved", "low"))
    assert distance(saved, plain) < 1e-3
    assert 1e-6 < distance(low, plain) < 0.3


def test_the_plan_is_what_the_run_then_does(sft_rows: Path, dpo_rows: Path, tmp_path: Path) -> None:
    file = write_tiny_gguf(tiny_model(), tiny_tokenizer(), tmp_path / "tiny.gguf")
    student = convert_gguf(file, tmp_path / "student")
    for method, rows, settings in (("sft", sft_rows, CHAINS), ("dpo", dpo_rows, PAIRS)):
        planned = plan(rows, file, settings, 0)
        assert replace(plan(rows, student, settings, 0), seconds=planned.seconds) == planned, "of the folder too"
        done = train(method, rows, student, tmp_path / method, settings=settings, seed=0)
        assert (planned.rows, planned.steps, planned.tokens) == (done.rows, done.steps, done.tokens)
        assert planned.packed_tokens == done.packed < done.tokens
        assert planned.packs >= planned.steps
        assert planned.peak_bytes > 16 * 50_000
        assert planned.seconds > 0
    full = plan(dpo_rows, file, PAIRS, 0)
    adapter = plan(dpo_rows, file, PAIRS.model_copy(update={"lora": ADAPTER}), 0)
    assert adapter.peak_bytes < full.peak_bytes
    smaller = plan(dpo_rows, file, PAIRS.model_copy(update={"pack_tokens": 1}), 0)
    assert smaller.packs == PAIRS.epochs * smaller.rows
    assert plan(dpo_rows, file, PAIRS.model_copy(update={"max_tokens": 85}), 0).too_long == 4
    with pytest.raises(UsageError, match=r"all 10 rows are over 60 tokens: raise max_tokens"):
        plan(dpo_rows, file, PAIRS.model_copy(update={"max_tokens": 60}), 0)
    noted = {"cotree": json.dumps({"kind": "sft", "template": "another"})}
    pq.write_table(pq.read_table(sft_rows).replace_schema_metadata(noted), tmp_path / "other.parquet")
    with pytest.raises(UsageError, match="for another tokenizer or chat template"):
        plan(tmp_path / "other.parquet", file, CHAINS, 0)


class Greedy(ChainTrainer):
    """A trainer that asks for more memory than there is."""

    def pack_loss(self, model: torch.nn.Module, rows: Any, weights: Any, step_rows: int) -> Any:
        return super().pack_loss(model, rows, weights, step_rows)[0] + torch.zeros(2**45).sum(), {}


@pytest.mark.parametrize(
    ("cap", "message"),
    [
        (2048, r"step 1, in a pack of 11 rows and \d+ tokens: lower pack_tokens \(now 2048\), or set gradient_ch"),
        (1, r"step 1, in a pack of 1 rows and \d+ tokens: lower max_tokens, or set gradient_checkpointing"),
    ],
)
def test_out_of_memory_says_which_pack_and_what_to_lower(
    cap: int, message: str, student: Path, sft_rows: Path, tmp_path: Path
) -> None:
    chains = encode_file(sft_rows, AutoTokenizer.from_pretrained(student), CHAINS).rows
    settings = CHAINS.model_copy(update={"pack_tokens": cap})
    trainer = Greedy(load_model(student), [chains], training_arguments(tmp_path, settings, 1, 0), settings)
    with pytest.raises(CotreeError, match=message):
        trainer.training_step(trainer.model, chains)
    with pytest.raises(RuntimeError, match="another"), explain_out_of_memory("here"):
        raise RuntimeError("another")
    outside = pytest.raises(CotreeError, match=r"out of memory in a probe: lower probe\.max_tokens")
    with outside, explain_out_of_memory("in a probe: lower probe.max_tokens"):
        torch.zeros(2**45)


def test_a_reporter_gets_every_step(student: Path, sft_rows: Path, tmp_path: Path) -> None:
    logs: list[StepLog] = []
    settings = CHAINS.model_copy(update={"report_to": ("tensorboard",), "probe": Probe(every=2, max_tokens=4)})
    train("sft", sft_rows, student, tmp_path / "run", settings=settings, seed=0, on_step=logs.append)
    (file,) = (tmp_path / "run" / "trainer" / "runs").glob("*/events.out.tfevents.*")
    found: dict[str, list[tuple[int, float]]] = {}
    content = file.read_bytes()
    while content:  # a record: its length, a checksum of that, an event, a checksum of that
        (length,) = struct.unpack("<Q", content[:8])
        event = Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
    assert [step for step, _ in found["train/loss"]] == [log.step for log in logs]
    assert [loss for _, loss in found["train/loss"]] == pytest.approx([log.loss for log in logs])
    for name in ("grad_norm", "tokens", "probe_tokens"):
        expected = {log.step: log.metrics[name] for log in logs if name in log.metrics}
        assert dict(found[f"train/{name}"]) == pytest.approx(expected)


def test_a_reporter_that_is_not_there_is_refused(student: Path, sft_rows: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="report_to: swanlab is not installed"):
        train(
            "sft", sft_rows, student, tmp_path, settings=CHAINS.model_copy(update={"report_to": ("swanlab",)}), seed=0
        )
    assert list(tmp_path.iterdir()) == []

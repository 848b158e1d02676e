"""The student at the start: a whole folder or none, from GGUF, from a folder, never silently something else."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.support.tiny_student import TEMPLATE, distance, tiny_model, tiny_tokenizer, write_tiny_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from cotree.base.atomic import atomic_draft
from cotree.base.errors import CotreeError, UsageError
from cotree.models.gguf_export import export_gguf
from cotree.models.tokenizer import load_tokenizer
from cotree.train.model import load_model
from cotree.train.run import train
from cotree.train.settings import SFT
from cotree.train.student import convert_gguf


def test_a_gguf_loads_as_transformers_own_reader_loads_it(tmp_path: Path) -> None:
    """Llama only: that reader takes no head size from Qwen files; `test_gguf` has the other families exactly."""
    file = write_tiny_gguf(tiny_model(), tiny_tokenizer(), tmp_path / "tiny.gguf")
    folder = convert_gguf(file, tmp_path / "made" / "student")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(folder)
    assert ours.dtype == torch.float32
    for (name, mine), (other, values) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(mine, values), name
    ids = torch.arange(40)[None]
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)
    for key in ("rope_parameters", "rms_norm_eps", "head_dim", "eos_token_id", "pad_token_id", "tie_word_embeddings"):
        assert getattr(ours.config, key) == getattr(theirs.config, key), key


def test_a_student_from_gguf_is_trained_and_saved_whichever_reader_it_came_through(
    sft_rows: Path, tmp_path: Path
) -> None:
    """What transformers reads from GGUF refuses to be saved until it forgets how it was quantised; ours never knew."""
    file = write_tiny_gguf(tiny_model(), tiny_tokenizer(), tmp_path / "tiny.gguf")
    ours = convert_gguf(file, tmp_path / "ours")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(tmp_path / "theirs")
    load_tokenizer(file).save_pretrained(tmp_path / "theirs")
    weights = []
    for folder in (ours, tmp_path / "theirs"):
        settings = SFT(batch_size=11, warmup_ratio=0, learning_rate=1e-2)
        assert train("sft", sft_rows, folder, tmp_path / f"{folder.name}-run", settings=settings, seed=0).steps == 1
        trained = AutoModelForCausalLM.from_pretrained(tmp_path / f"{folder.name}-run" / "model")
        assert not hasattr(trained.config, "quantization_config")
        weights.append({name: values.detach() for name, values in trained.named_parameters()})
    assert distance(*weights) < 1e-6
    assert distance(weights[0], tiny_model().state_dict()) > 1e-3
    exported = export_gguf(tmp_path / "ours-run" / "model", tmp_path / "trained.gguf", "F32")
    again = load_file(convert_gguf(exported, tmp_path / "again") / "model.safetensors")
    assert all(torch.equal(values, weights[0][name]) for name, values in again.items())


def test_the_tokenizer_in_the_folder_is_that_of_the_file(tmp_path: Path) -> None:
    file = write_tiny_gguf(tiny_model(), tiny_tokenizer(), tmp_path / "tiny.gguf")
    folder = convert_gguf(file, tmp_path / "student")
    text = "<|im_start|>user\n  12 apples.\n\n3 boxes<|im_end|>"
    stored = AutoTokenizer.from_pretrained(folder)
    assert stored(text)["input_ids"] == load_tokenizer(file)(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]
    assert stored.chat_template == TEMPLATE.replace("NEWLINE", "'\n'")
    assert (stored.eos_token, stored.pad_token) == ("<|im_end|>", "<|im_end|>")


def test_a_folder_in_half_precision_is_trained_in_fp32(student: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(student, dtype=torch.bfloat16).save_pretrained(tmp_path)
    weights = dict(load_model(tmp_path).named_parameters())
    assert {values.dtype for values in weights.values()} == {torch.float32}
    for name, values in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(weights[name], values.float())


def test_a_source_that_is_none_is_refused_and_leaves_nothing(sft_rows: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read nowhere.gguf as GGUF"):
        convert_gguf(Path("nowhere.gguf"), tmp_path / "student")
    with pytest.raises(UsageError, match=r"cannot load the tokenizer of no/such/folder"):
        train("sft", sft_rows, Path("no/such/folder"), tmp_path / "run", settings=SFT(), seed=0)
    assert list(tmp_path.iterdir()) == []


def test_students_that_cannot_be_trained_are_refused_before_the_weights_are_read(
    sft_rows: Path, tmp_path: Path
) -> None:
    plain = tiny_tokenizer()
    plain.chat_template = None
    plain.save_pretrained(tmp_path / "base")
    tiny_model().save_pretrained(tmp_path / "base")
    with pytest.raises(UsageError, match="has no chat template: cotree trains chat models"):
        train("sft", sft_rows, tmp_path / "base", tmp_path / "run", settings=SFT(), seed=0)

    file = write_tiny_gguf(tiny_model(), tiny_tokenizer(), tmp_path / "tiny.gguf")
    for old, new, fault in [
        (b"general.architecture", b"general.archi", "has no general.architecture"),
        (b"llama", b"mamba", "is a 'mamba' model: supported are llama, mistral, qwen2, qwen3"),
        (b"blk.1.attn_v.weight", b"blk.1.attn_x.weight", "has a tensor blk.1.attn_x.weight that cotree cannot read"),
    ]:
        changed = file.read_bytes().replace(old, new) if len(old) == len(new) else b""
        (tmp_path / "changed.gguf").write_bytes(changed)
        with pytest.raises(UsageError, match=fault if changed else "cannot read"):
            convert_gguf(tmp_path / "changed.gguf", tmp_path / "student")
    assert not (tmp_path / "student").exists()
    assert not list(tmp_path.glob("*.draft"))


def test_a_draft_that_a_kill_left_is_cleared_and_a_full_disk_is_one_line(tmp_path: Path) -> None:
    file = write_tiny_gguf(tiny_model(), tiny_tokenizer(), tmp_path / "tiny.gguf")
    folder = tmp_path / "student"
    ended = subprocess.Popen(["true"])
    ended.wait()
    here = socket.gethostname().replace(".", "-")
    left = tmp_path / f".student.{here}.{ended.pid}.0.draft"
    left.mkdir()
    (left / "half").write_text("")
    kept = {f".student.{here}.{os.getpid()}.0.draft", f".student.elsewhere.{ended.pid}.0.draft",
            f".student.{here}.{10**30}.0.draft"}  # fmt: skip
    for name in kept:
        (tmp_path / name).write_text("of a process that may run")
    convert_gguf(file, folder)
    assert {path.name for path in tmp_path.iterdir()} == {"student", "tiny.gguf", *kept}
    shutil.rmtree(folder)
    with (
        pytest.raises(CotreeError, match=r"cannot write .*student: .*No space left on device; free some space"),
        atomic_draft(folder) as draft,
    ):
        os.write(os.open("/dev/full", os.O_WRONLY), str(draft).encode())
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.gguf", *kept}

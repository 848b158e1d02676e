"""What cannot be trained on is refused in one line, before anything is written: torn models, rows, other tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.tiny_student import dpo_row, sft_row, tiny_config

from cotree.base.errors import UsageError
from cotree.base.rows import write_jsonl
from cotree.data.kinds import check_file
from cotree.models.encode import EncodedPair
from cotree.models.tokenizer import load_tokenizer
from cotree.train.model import load_model
from cotree.train.rows import sft_weights
from cotree.train.run import train
from cotree.train.settings import DPO, SFT, LoRA
from cotree.train.student import family_of, student_config, student_sha256

CHAINS = SFT(batch_size=4, learning_rate=1e-3, save_steps=1)


def without_weights(file: Path) -> None:
    weights = load_file(file)
    save_file({name: weights[name] for name in weights if "down_proj" not in name}, file, {"format": "pt"})


def of_another_shape(file: Path) -> None:
    weights = load_file(file)
    save_file(weights | {"model.norm.weight": torch.ones(3)}, file, {"format": "pt"})


def torn(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (without_weights, r"2 of its weights are missing or of another shape \(model\.layers\.0\.mlp\.down_proj"),
        (of_another_shape, r"1 of its weights are missing or of another shape \(model\.norm\.weight"),
        (torn, "cannot load the student .*: "),
    ],
)
def test_a_model_that_is_not_whole_is_refused(
    change: Callable[[Path], None], fault: str, student: Path, sft_rows: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(student, tmp_path / "copy"))
    change(copy / "model.safetensors")
    with pytest.raises(UsageError, match=fault):
        train("sft", sft_rows, copy, tmp_path / "run", settings=CHAINS, seed=0)
    assert not (tmp_path / "run" / "model").exists()


def test_weights_that_are_a_pickle_are_refused(student: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(student, tmp_path / "copy"))
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").rename(copy / "other.safetensors")
    with pytest.raises(UsageError, match=r"cannot load the student .*copy: .*model\.safetensors"):
        load_model(copy)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_in_a_models_folder_is_never_run(
    file: str, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers itself asks on a terminal whether it should be, and runs it after a yes."""
    copy = Path(shutil.copytree(student, tmp_path / "copy"))
    (copy / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    names = {"auto_map": {"AutoConfig": "code.Own", "AutoTokenizer": ["code.Own", None]}, "model_type": "own"}
    names |= {"tokenizer_class": "Own"}
    (copy / file).write_text(json.dumps(json.loads((copy / file).read_text()) | names))
    monkeypatch.setattr("builtins.input", lambda _: "y")
    with suppress(UsageError):
        load_tokenizer(copy)
    if file == "config.json":
        with pytest.raises(UsageError, match="custom code"):
            student_config(copy)
    assert not (tmp_path / "ran").exists()


def test_an_adapter_that_is_not_whole_is_refused(student: Path, sft_rows: Path, tmp_path: Path) -> None:
    train(
        "sft",
        sft_rows,
        student,
        tmp_path / "run",
        settings=CHAINS.model_copy(update={"lora": LoRA(rank=2, alpha=4)}),
        seed=0,
    )
    adapter = tmp_path / "run" / "model" / "adapter"
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({name: weights[name] for name in weights if "down_proj" not in name}, file)
    with pytest.raises(UsageError, match="Found missing adapter keys"):
        load_model(adapter)


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "proportional"])
def test_positions_that_depend_on_the_longest_sequence_are_refused(kind: str) -> None:
    config = tiny_config("llama")
    config.rope_parameters = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(
        UsageError, match=f"cannot train with rotary positions of type '{kind}': supported are default,"
    ):
        family_of(config)
    config.rope_parameters["rope_type"] = "yarn"
    assert family_of(config).gguf == "llama"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"prompt": []}, "row 1, column prompt: "),
        ({"prompt": [{"role": "user", "content": None}]}, "row 1, column prompt.0.content: "),
        ({"completion": None}, "row 1, column completion: "),
        ({"completion": [{"role": "user", "content": "Yes."}]}, "row 1, column completion: must be exactly one assist"),
    ],
)
def test_a_row_that_is_none_is_named(change: dict[str, Any], fault: str, student: Path, tmp_path: Path) -> None:
    rows = [sft_row(0), sft_row(1) | change]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UsageError, match=rf"rows\.jsonl: {fault}.*`cotree check-data .*` finds all faults"):
        train("sft", path, student, tmp_path / "run", settings=CHAINS, seed=0)
    assert not (tmp_path / "run").exists()


def test_a_conversation_that_the_template_refuses_is_one_line(student: Path, sft_rows: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(student, tmp_path / "copy"))
    (copy / "chat_template.jinja").write_text("{{ raise_exception('no such role') }}")
    with pytest.raises(UsageError, match="chat template cannot render a conversation of user: no such role"):
        train("sft", sft_rows, copy, tmp_path / "run", settings=CHAINS, seed=0)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"max_position_embeddings": 16}, r"11 rows are over the student's 16 positions: set max_tokens=16"),
        ({"vocab_size": 40}, r"the rows have token \d+, the student's vocabulary 40: is the tokenizer its own\?"),
    ],
)
def test_tokens_and_positions_that_the_student_has_not_are_refused(
    change: dict[str, int], fault: str, student: Path, sft_rows: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(student, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text()) | change
    (copy / "config.json").write_text(json.dumps(config))
    if "vocab_size" in change:
        weights = load_file(copy / "model.safetensors")
        name = "model.embed_tokens.weight"
        save_file(weights | {name: weights[name][:40].clone()}, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=fault):
        train("sft", sft_rows, copy, tmp_path / "run", settings=CHAINS, seed=0)
    assert not (tmp_path / "run" / "model").exists()


def test_a_student_is_known_by_all_that_its_weights_come_from(student: Path, sft_rows: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(student, tmp_path / "base"))
    train(
        "sft",
        sft_rows,
        base,
        tmp_path / "run",
        settings=CHAINS.model_copy(update={"lora": LoRA(rank=2, alpha=4)}),
        seed=0,
    )
    adapter = tmp_path / "run" / "model" / "adapter"
    before = student_sha256(adapter)
    weights = load_file(base / "model.safetensors")
    save_file(weights | {"model.norm.weight": torch.ones(64)}, base / "model.safetensors", {"format": "pt"})
    assert student_sha256(adapter) != before
    (base / "model.safetensors").unlink()
    torch.save(weights, base / "pytorch_model.bin")
    before = student_sha256(base)
    torch.save(weights | {"model.norm.weight": torch.ones(64)}, base / "pytorch_model.bin")
    assert student_sha256(base) != before


@pytest.mark.parametrize("side", ["prompt", "chosen", "rejected"])
def test_a_leaked_turn_is_refused_in_every_side_of_a_pair(side: str, student: Path, tmp_path: Path) -> None:
    row = dpo_row(1)
    row[side] = [row[side][0] | {"content": "So 7.<|im_end|>\n<|im_start|>user\nAnd?"}]
    write_jsonl(tmp_path / "rows.jsonl", [dpo_row(0), row])
    fault = rf"row 1, column {side}.0: the text names the special token <\|im_end\|>"
    with pytest.raises(UsageError, match=fault):
        check_file(tmp_path / "rows.jsonl")
    with pytest.raises(UsageError, match=f"{fault}; take it out; 1 of 2 rows are faulty"):
        train("dpo", tmp_path / "rows.jsonl", student, tmp_path / "run", settings=DPO(), seed=0)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("norm", ["token", "pair"])
def test_a_chosen_chain_with_which_rejected_begins_has_no_sft_term_of_its_own(norm: str) -> None:
    """Only words that name a special token make such a pair."""
    (weights,) = sft_weights([EncodedPair([1], [2, 3], [2, 3, 4], prefix=2)], "suffix", norm)
    assert weights.tolist() == [0, 0]

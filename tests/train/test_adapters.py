"""A PEFT adapter as a student: one that cannot be used is one line with what to do, and no request to a hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cotree.base.errors import UsageError
from cotree.train.model import load_model
from cotree.train.run import train
from cotree.train.settings import SFT, LoRA
from cotree.train.student import student_config, student_folder, student_sha256
from cotree.train.verb import train_rows

Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def adapter(student: Path, sft_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of a student that was trained with LoRA, as another tool would save it: with no sums."""
    out = tmp_path_factory.mktemp("lora") / "run"
    settings = SFT(batch_size=11, lora=LoRA(rank=2, alpha=4))
    train("sft", sft_rows, student, out, settings=settings, seed=0)
    folder = out / "model" / "adapter"
    for file in student.glob("*"):
        if file.name.startswith(("token", "chat_template", "special")):
            shutil.copy(file, folder)
    (folder / "sha256.json").unlink()
    return folder


def naming(base: object) -> Change:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))

    return change


def containing(content: bytes) -> Change:
    return lambda folder: (folder / "adapter_config.json").write_bytes(content)


def without_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def with_pickled_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("token*"):
        file.unlink()


def with_an_empty_base(folder: Path) -> None:
    (folder / "empty").mkdir()
    naming(str(folder / "empty"))(folder)


FIX = "set base_model_name_or_path in its adapter_config.json to the model's folder or hub id"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (naming(None), rf"copy names no base model \(null\); {FIX}"),
        (naming(""), rf'copy names no base model \(""\); {FIX}'),
        (naming(["a"]), r"copy names no base model \(\[\"a\"\]\)"),
        (
            naming("/moved/away"),
            rf"the base of the adapter .*copy is not at /moved/away \(no config.json there\); {FIX}",
        ),
        (
            naming("../moved/away"),
            rf"the base of the adapter .*copy is not at ../moved/away \(no config.json there\); {FIX}",
        ),
        (naming("moved/away"), rf"cannot load the student .*copy \(its base is moved/away: {FIX}\): "),
        (lambda folder: naming(str(folder))(folder), "copy is not at .*copy .no config.json there.; "),
        (with_an_empty_base, rf"the base of the adapter .*copy is not at .*empty \(no config.json there\); {FIX}"),
        (without_weights, "copy has no adapter_model.safetensors; copy the adapter again"),
        (with_pickled_weights, "copy has no adapter_model.safetensors; copy the adapter again, or save it with PEFT"),
        (containing(b"{"), r"adapter_config.json is no adapter's config \(.*\); copy the adapter again"),
        (containing(b"[]"), r"adapter_config.json is no adapter's config \(.*\); copy the adapter again"),
        (containing(b"{}"), r"adapter_config.json is no adapter's config \(.*\); copy the adapter again"),
        (containing(b"\xff\xfe{"), r"adapter_config.json is no adapter's config \(.*\); copy the adapter again"),
    ],
)
def test_an_adapter_that_cannot_be_used_is_one_line(
    change: Change, fault: str, adapter: Path, sft_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    copy = Path(shutil.copytree(adapter, tmp_path / "copy"))
    change(copy)
    with pytest.raises(UsageError, match=fault) as raised:
        train_rows("sft", copy, sft_rows, tmp_path / "run")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match=fault):
        load_model(copy)


@pytest.mark.parametrize("content", [b"", b"half"])
def test_adapter_weights_that_are_torn_and_kinds_that_peft_does_not_know_are_one_line(
    content: bytes, adapter: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(adapter, tmp_path / "copy"))
    (copy / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(UsageError, match=r"cannot load the student .*copy: "):
        load_model(copy)
    file = copy / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"peft_type": "NONSENSE"}))
    with pytest.raises(UsageError, match=r"cannot load the student .*copy: .*NONSENSE"):
        load_model(copy)


def test_an_adapter_is_known_and_checked_with_its_base(
    adapter: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert student_folder(str(adapter)) == adapter
    assert student_config(adapter).model_type == "llama"
    assert student_sha256(adapter) != student_sha256(student)
    copy = Path(shutil.copytree(student, tmp_path / "base"))
    (copy / "sha256.json").write_text(json.dumps({"model.safetensors": [1, "0"]}))
    naming(str(copy))(Path(shutil.copytree(adapter, tmp_path / "other")))
    with pytest.raises(UsageError, match=r"base is damaged \(model.safetensors has \d+ bytes, not 1\)"):
        student_folder(str(tmp_path / "other"))


def test_an_adapter_without_a_tokenizer_says_where_to_take_one_from(
    adapter: Path, sft_rows: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(adapter, tmp_path / "copy"))
    without_tokenizer(copy)
    fault = "copy has no tokenizer; copy tokenizer.json and tokenizer_config.json of its base model into it"
    with pytest.raises(UsageError, match=fault):
        train_rows("sft", copy, sft_rows, tmp_path / "run")
    assert not (tmp_path / "run").exists()

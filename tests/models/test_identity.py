"""What a model is: its content, never its address, its place or its name."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import pytest
from tests.support.full_disk import full_disk
from tests.support.tiny_student import tiny_model, tiny_tokenizer, write_tiny_gguf

from cotree.base.errors import UsageError
from cotree.models.checksums import cache_folder, file_sha256
from cotree.models.resolve import identity, identity_text
from cotree.models.settings import Model


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_old(path: Path, content: bytes, seconds: float = 60.0) -> Path:
    """A file that was written some time ago."""
    path.write_bytes(content)
    modified = time.time_ns() - int(seconds * 1e9)
    os.utime(path, ns=(modified, modified))
    return path


def remembered() -> dict[str, list[object]]:
    path = cache_folder() / "sha256.json"
    found: dict[str, list[object]] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def test_a_hash_is_remembered_until_size_or_mtime_changes(tmp_path: Path) -> None:
    path = write_old(tmp_path / "weights", b"one")
    assert file_sha256(path) == hashlib.sha256(b"one").hexdigest()
    # The file is not read again: what is remembered is what is returned.
    (cache_folder() / "sha256.json").write_text(json.dumps({str(path): [*remembered()[str(path)][:2], "remembered"]}))
    assert file_sha256(path) == "remembered"
    write_old(path, b"two", seconds=30)  # of the same size
    assert file_sha256(path) == hashlib.sha256(b"two").hexdigest()
    modified = path.stat().st_mtime_ns
    path.write_bytes(b"three")
    os.utime(path, ns=(modified, modified))  # of the same mtime
    assert file_sha256(path) == hashlib.sha256(b"three").hexdigest()


def test_a_file_written_this_moment_is_not_remembered(tmp_path: Path) -> None:
    """Another write within the clock's tick would leave size and mtime as they are."""
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    file_sha256(path)
    assert remembered() == {}


def test_files_that_are_gone_are_forgotten(tmp_path: Path) -> None:
    one, two = (write_old(tmp_path / name, name.encode()) for name in ("one", "two"))
    file_sha256(one)
    one.unlink()
    file_sha256(two)
    assert list(remembered()) == [str(two)]


@pytest.mark.parametrize("damage", ["{", "[]", '{"a": 1}', '{"a": [1, 2]}', ""])
def test_a_damaged_or_unwritable_cache_only_costs_time(damage: str, tmp_path: Path) -> None:
    path = write_old(tmp_path / "weights", b"one")
    cache_folder().mkdir(parents=True)
    (cache_folder() / "sha256.json").write_text(damage)
    with full_disk():
        assert file_sha256(path) == hashlib.sha256(b"one").hexdigest()
    assert file_sha256(path) == hashlib.sha256(b"one").hexdigest()


def test_servers_of_one_model_are_one_model() -> None:
    model = Model(url="http://a:1", model="qwen", tokenizer="Qwen/Qwen2.5-72B-Instruct")
    moved = {"url": ("https://b:2/v1", "http://c:3"), "max_in_flight": 3, "api_key_env": "KEY"}
    assert identity_text(model) == identity_text(model.model_copy(update=moved))
    assert identity(model) == {"model": "qwen", "tokenizer": "Qwen/Qwen2.5-72B-Instruct"}
    others = [
        model.model_copy(update={"model": "llama"}),
        model.model_copy(update={"tokenizer": "Qwen/Qwen2.5-7B-Instruct"}),
        model.model_copy(update={"mode": "chat"}),
        model.model_copy(update={"mode": "pooling"}),
    ]
    assert len({identity_text(each) for each in [model, *others]}) == 5


def test_weights_are_known_by_content_and_type_wherever_they_are(tmp_path: Path) -> None:
    file = write_tiny_gguf(tiny_model(), tiny_tokenizer(), tmp_path / "one.gguf")
    copy = shutil.copy(file, tmp_path / "another name.gguf")
    model = Model(weights=str(file))
    assert identity(model) == identity(Model(weights=str(copy), max_in_flight=3))
    assert identity(model) == {"weights": hashlib.sha256(file.read_bytes()).hexdigest(), "gguf": "Q8_0"}
    assert (
        identity(model, "F16") == {**identity(model), "gguf": "F16"} == identity(Model(weights=str(file), gguf="F16"))
    )
    write_tiny_gguf(tiny_model(seed=1), tiny_tokenizer(), file)
    assert identity(model) != identity(Model(weights=str(copy)))
    with pytest.raises(UsageError, match=r"no weights `.*gone.gguf` are here"):
        identity(Model(weights=str(tmp_path / "gone.gguf")))


def test_a_folder_is_known_by_weights_config_and_tokenizer(tmp_path: Path) -> None:
    folder = tmp_path / "student"
    tiny_model(seed=1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    model = Model(weights=str(folder))
    first = identity(model)
    (folder / "README.md").write_text("Not what the model is.")
    shutil.copytree(folder, tmp_path / "copy")
    assert identity(model) == first == identity(model.model_copy(update={"weights": str(tmp_path / "copy")}))
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content + b" ")
        assert identity(model)["weights"] != first["weights"]
        (folder / name).write_bytes(content)
    assert identity(model) == first


def test_a_tokenizer_on_disk_may_be_moved_but_not_changed(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    one, two = (Model(url="http://a:1", model="m", tokenizer=str(tmp_path / name)) for name in ("one", "two"))
    assert identity(one) == identity(two)
    tiny_tokenizer(newline=False).save_pretrained(tmp_path / "two")
    assert identity(one) != identity(two)

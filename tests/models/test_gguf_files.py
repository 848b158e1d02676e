"""GGUF in, GGUF out: the same tokens, the same numbers, served by the engine itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.support.full_disk import full_disk
from tests.support.tiny_student import Post, check_served, tiny_model, tiny_tokenizer, write_tiny_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from cotree.base.errors import CotreeError, UsageError
from cotree.models.families import FAMILIES, gguf_name, to_halves, to_pairs, transformers_name
from cotree.models.gguf_export import HARD_TEXTS, export_gguf
from cotree.models.gguf_files import GGUF, write_gguf
from cotree.models.resolve import gguf_at_type
from cotree.models.tokenizer import SPLITS
from cotree.train.student import convert_gguf

PROMPT = "<|im_start|>user\nTom has 12 apples.\n\n3  boxes<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("model_type", FAMILIES)
def test_names_are_those_of_the_gguf_package(model_type: str) -> None:
    arch = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[FAMILIES[model_type].gguf]
    names = gguf.get_tensor_name_map(arch, 4)
    for name in tiny_model(model_type, tied=False).state_dict():
        stem, kind = name.rsplit(".", 1)
        assert gguf_name(name) == f"{names.get_name(stem)}.{kind}"
        assert transformers_name(gguf_name(name)) == name


@given(heads=st.integers(1, 4), half=st.integers(1, 4), columns=st.integers(0, 3))
def test_rotary_orders_are_inverse_and_pair_up_halves(heads: int, half: int, columns: int) -> None:
    shape = (heads * 2 * half, *([columns] if columns else []))
    rows = np.arange(np.prod(shape)).reshape(shape)
    assert (to_halves(to_pairs(rows, heads), heads) == rows).all()
    first_head = to_pairs(np.arange(heads * 2 * half), heads)[: 2 * half]
    assert first_head.reshape(half, 2).tolist() == [[i, i + half] for i in range(half)]


@pytest.mark.parametrize(("model_type", "tied"), [(name, name != "qwen2") for name in FAMILIES])
def test_export_is_exact_for_every_family(
    model_type: str, tied: bool, tmp_path: Path, serve: Callable[[Path], Post]
) -> None:
    """GGUF -> folder -> changed weights -> GGUF: the engine's log-probabilities are transformers' own."""
    # ASCII only: the engine reports no log-probability for a token that is half a character.
    vocabulary = tiny_tokenizer(ascii_only=True)
    base = write_tiny_gguf(tiny_model(model_type, tied), vocabulary, tmp_path / "base.gguf")
    folder = convert_gguf(base, tmp_path / "student")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.config.model_type == ("llama" if model_type == "mistral" else model_type)
    for name, values in tiny_model(model_type, tied).state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], values, rtol=0, atol=0, msg=name)

    trained = tiny_model(model_type, tied, seed=1)
    trained.save_pretrained(folder)
    for kind, tolerance in (("F32", 1e-4), ("F16", 2e-2)):
        out = export_gguf(folder, tmp_path / f"{kind}.gguf", kind)  # type: ignore[arg-type]
        check_served(trained, AutoTokenizer.from_pretrained(folder), serve(out), PROMPT, tolerance)


ROTARY = {
    "default": {"rope_type": "default", "rope_theta": 5000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128},
}  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "rope"), [*((name, "default") for name in FAMILIES), *(("llama", r) for r in ROTARY)]
)
def test_a_folder_is_served_as_transformers_computes_it(
    model_type: str, rope: str, tmp_path: Path, serve: Callable[[Path], Post]
) -> None:
    """No GGUF before: the header is made of the folder's own config and tokenizer."""
    model = tiny_model(model_type, tied=model_type != "qwen2", rope_parameters=ROTARY[rope])
    vocabulary = tiny_tokenizer(ascii_only=True)
    model.save_pretrained(tmp_path / "student")
    vocabulary.save_pretrained(tmp_path / "student")
    out = export_gguf(tmp_path / "student", tmp_path / "out.gguf", "F32")
    check_served(model, vocabulary, serve(out), PROMPT * 3, 1e-4)


def test_a_folder_in_parts_beside_another_format_is_the_same_model(tmp_path: Path) -> None:
    model = tiny_model()
    for name, size in {"whole": "1GB", "parts": "100KB"}.items():
        model.save_pretrained(tmp_path / name / "student", max_shard_size=size)
        tiny_tokenizer().save_pretrained(tmp_path / name / "student")
        (tmp_path / name / "student" / "consolidated.safetensors").write_bytes(b"no part of it")
        export_gguf(tmp_path / name / "student", tmp_path / f"{name}.gguf", "F32")
    assert len([*(tmp_path / "parts" / "student").glob("model-*.safetensors")]) > 1
    tensors = [
        {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors}
        for name in ("whole", "parts")
    ]
    assert tensors[0] == tensors[1]


@pytest.mark.parametrize("pre", SPLITS)
def test_a_vocabulary_is_known_by_how_it_splits_text(pre: str, tmp_path: Path, serve: Callable[[Path], Post]) -> None:
    """The engine cuts texts with the written vocabulary as the folder's tokenizer does."""
    base = write_tiny_gguf(tiny_model(), tiny_tokenizer(), tmp_path / "base.gguf", pre)
    folder = convert_gguf(base, tmp_path / "student")
    out = export_gguf(folder, tmp_path / "out.gguf", "F32")
    post, tokenizer = serve(out), AutoTokenizer.from_pretrained(folder)
    for text in [PROMPT, *HARD_TEXTS, "x<|im_end|>y", "12345678 It's 7"]:
        served = post("/tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"]
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == served


def test_q8_0_is_what_the_gguf_package_quantises_and_a_conversion_keeps_the_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = write_tiny_gguf(tiny_model(), tiny_tokenizer(), tmp_path / "base.gguf")
    out = gguf_at_type(base, "Q8_0")
    ours, theirs = gguf.GGUFReader(out), gguf.GGUFReader(base)
    originals = {tensor.name: tensor for tensor in theirs.tensors}
    exported = gguf.GGUFReader(export_gguf(convert_gguf(base, tmp_path / "student"), tmp_path / "q8.gguf", "Q8_0"))
    for found in (ours, exported):
        assert {tensor.name for tensor in found.tensors} == set(originals)
        for tensor in found.tensors:
            values = originals[tensor.name].data
            matrix = values.ndim > 1
            assert tensor.tensor_type.name == ("Q8_0" if matrix else "F32")
            assert (tensor.data == (gguf.quants.quantize(values, tensor.tensor_type) if matrix else values)).all()
    # What the folder says of itself is what the file had said, but for names.
    for key in theirs.fields.keys() - {"general.file_type", "general.name"}:
        if not key.startswith("GGUF.") and key not in ("tokenizer.ggml.unknown_token_id", "tokenizer.ggml.pre"):
            assert exported.fields[key].contents() == theirs.fields[key].contents(), key
    assert ours.fields["general.file_type"].contents() == 7
    before, after = GGUF(base), GGUF(out)
    untouched = before.fields.keys() - {"general.file_type"}
    assert {key: after.fields[key] for key in untouched} == {key: before.fields[key] for key in untouched}
    assert after.fields.keys() - before.fields.keys() <= {"general.quantization_version"}


def test_a_vocabulary_that_is_no_utf_8_is_copied(tmp_path: Path) -> None:
    base = write_tiny_gguf(tiny_model(), tiny_tokenizer(ascii_only=True), tmp_path / "base.gguf")
    content = base.read_bytes()
    assert b"<unused_" in content
    base.write_bytes(content.replace(b"<unused_", b"\xff\xfe\xfdused_"))
    file = GGUF(base)
    write_gguf(tmp_path / "copy.gguf", file.fields, "F32", shapes={"output_norm.weight": (64,)}, read=file.array)
    copied = GGUF(tmp_path / "copy.gguf").fields["tokenizer.ggml.tokens"]
    assert copied == file.fields["tokenizer.ggml.tokens"]
    assert b"\xff\xfe\xfdused_" in copied


def test_what_cannot_be_said_exactly_is_refused_by_name_and_leaves_no_file(tmp_path: Path) -> None:
    folder = tmp_path / "student"
    tiny_model(tied=False).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    config, tokenizer, out = folder / "config.json", folder / "tokenizer.json", tmp_path / "out.gguf"
    kept = {file: file.read_text() for file in (config, tokenizer)}

    def refused(fault: str, file: Path, **changes: Any) -> None:
        content = json.loads(kept[file])
        for path, value in changes.items():
            place = content
            *parts, last = path.split("__")
            for part in parts:
                place = place[part]
            place[last] = value
        file.write_text(json.dumps(content))
        with pytest.raises(UsageError, match=fault):
            export_gguf(folder, out, "F16")
        file.write_text(kept[file])

    refused("cannot export 'gpt2' models: supported are llama", config, model_type="gpt2")
    refused("sliding-window layers", config, model_type="mistral", sliding_window=64)
    refused(r"llama\.cpp computes llama models with silu", config, hidden_act="gelu")
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    refused(r"no rotary positions like its own \(dynamic\)", config, rope_parameters=dynamic)
    bent = ROTARY["yarn"] | {"beta_fast": 16}
    refused(r"no rotary positions like its own \(yarn\)", config, rope_parameters=bent)
    refused("its tokenizer is SentencePiece", tokenizer, model__byte_fallback=True)
    plain = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    refused(r"splits text in none of the ways .*gpt-2, smollm, qwen2, llama-bpe", tokenizer, pre_tokenizer=plain)
    smollm3 = {"model_type": "smollm3", "num_hidden_layers": 2, "no_rope_layers": [1, 0], "layer_types": None}
    refused("rotates no positions in every fourth layer only", config, **smollm3)
    refused(r"missing \(blk.2.attn_k.weight, ...\); copy it again", config, num_hidden_layers=3)
    tiny_tokenizer().save_pretrained(tmp_path / "small")
    tiny_model(vocab_size=200).save_pretrained(tmp_path / "small")
    with pytest.raises(UsageError, match=r"has 200 embeddings, and a token 2\d\d; copy its base model's tokenizer"):
        export_gguf(tmp_path / "small", out, "F16")
    tokenizer.unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UsageError, match=r"copy tokenizer\.json and tokenizer_config\.json of its base model into it"):
        export_gguf(folder, out, "F16")
    assert not out.exists()


def test_export_to_a_full_disk_is_one_line_and_keeps_the_old_file(tmp_path: Path) -> None:
    base = write_tiny_gguf(tiny_model(), tiny_tokenizer(), tmp_path / "base.gguf")
    folder = convert_gguf(base, tmp_path / "student")
    (tmp_path / "full.gguf").write_text("old")
    with full_disk(), pytest.raises(CotreeError, match=r"cannot write .*full.gguf: .*File too large"):
        export_gguf(folder, tmp_path / "full.gguf", "F32")
    assert (tmp_path / "full.gguf").read_text() == "old"


def test_broken_files_are_refused(tmp_path: Path) -> None:
    whole = write_tiny_gguf(tiny_model(), tiny_tokenizer(), tmp_path / "base.gguf").read_bytes()
    for number, content in enumerate([b"", b"GGUF", b"version https://git-lfs.github.com/spec/v1\n" * 2, whole[:3000]]):
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r"cannot read .* as GGUF"):
            GGUF(path)
    with pytest.raises(UsageError, match=r"cannot read .*nowhere.gguf as GGUF"):
        GGUF(tmp_path / "nowhere.gguf")

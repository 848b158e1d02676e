"""GGUF in, GGUF out: the same tokens, the same numbers, served by the engine itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

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
from cotree.models.gguf_files import GGUF, export_gguf, write_gguf
from cotree.train.student import convert_gguf

PROMPT = "<|im_start|>user\nTom has 12 apples.\n\n3  boxes<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("model_type", FAMILIES)
def test_names_are_those_of_the_gguf_package(model_type: str) -> None:
    arch = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[FAMILIES[model_type].gguf]
    names = gguf.get_tensor_name_map(arch, 2)
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
    """base GGUF -> folder -> changed weights -> GGUF: the engine's log-probabilities are transformers' own."""
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
        out = export_gguf(folder, base, tmp_path / f"{kind}.gguf", kind)  # type: ignore[arg-type]
        check_served(trained, AutoTokenizer.from_pretrained(folder), serve(out), PROMPT, tolerance)


def test_q8_0_is_what_the_gguf_package_quantises_and_metadata_is_untouched(tmp_path: Path) -> None:
    base = write_tiny_gguf(tiny_model(), tiny_tokenizer(), tmp_path / "base.gguf")
    out = export_gguf(convert_gguf(base, tmp_path / "student"), base, tmp_path / "q8.gguf", "Q8_0")
    ours, theirs = gguf.GGUFReader(out), gguf.GGUFReader(base)
    originals = {tensor.name: tensor for tensor in theirs.tensors}
    assert {tensor.name for tensor in ours.tensors} == set(originals)
    for tensor in ours.tensors:
        values = originals[tensor.name].data
        matrix = values.ndim > 1
        assert tensor.tensor_type.name == ("Q8_0" if matrix else "F32")
        assert (tensor.data == (gguf.quants.quantize(values, tensor.tensor_type) if matrix else values)).all()
    same = {key for key in theirs.fields if not key.startswith("GGUF.") and key != "general.file_type"}
    assert {key: ours.fields[key].contents() for key in same} == {key: theirs.fields[key].contents() for key in same}
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
    write_gguf(tmp_path / "copy.gguf", file, "F32", shapes={"output_norm.weight": (64,)}, read=file.array)
    copied = GGUF(tmp_path / "copy.gguf").fields["tokenizer.ggml.tokens"]
    assert copied == file.fields["tokenizer.ggml.tokens"]
    assert b"\xff\xfe\xfdused_" in copied


def test_export_refuses_what_is_not_the_base_and_leaves_no_file(tmp_path: Path) -> None:
    base = write_tiny_gguf(tiny_model(), tiny_tokenizer(), tmp_path / "base.gguf")
    folder = convert_gguf(base, tmp_path / "student")
    other = write_tiny_gguf(tiny_model("qwen3"), tiny_tokenizer(), tmp_path / "other.gguf")
    with pytest.raises(UsageError, match="is a 'qwen3' model"):
        export_gguf(folder, other, tmp_path / "out.gguf", "F16")
    wide = tiny_model()
    wide.resize_token_embeddings(320)
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(UsageError, match=r"is not the base of .* token_embd.weight is \(300, 64\)"):
        export_gguf(tmp_path / "wide", base, tmp_path / "out.gguf", "F16")
    (folder / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(UsageError, match="cannot export 'mamba' models: supported are llama"):
        export_gguf(folder, base, tmp_path / "out.gguf", "F16")
    assert sorted(path.name for path in tmp_path.glob("*out*")) == []


def test_export_to_a_full_disk_is_one_line_and_keeps_the_old_file(tmp_path: Path) -> None:
    base = write_tiny_gguf(tiny_model(), tiny_tokenizer(), tmp_path / "base.gguf")
    folder = convert_gguf(base, tmp_path / "student")
    (tmp_path / "full.gguf").write_text("old")
    with full_disk(), pytest.raises(CotreeError, match=r"cannot write .*full.gguf: .*File too large"):
        export_gguf(folder, base, tmp_path / "full.gguf", "F32")
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

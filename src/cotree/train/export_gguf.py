"""The trained student as GGUF, so that the engine that served the teacher serves the student.

Invariant: metadata and tokenizer are those of the base GGUF, byte for byte (but for the file type), and the tensors
are exactly those of the transformers folder: every one the base has, of the same shape, in the wanted type.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cotree.errors import CotreeError, UsageError
from cotree.llm import gguf_file
from cotree.llm.gguf_file import GGUF
from cotree.train.durable import whole
from cotree.train.families import FAMILIES, gguf_name, reordered, to_pairs

# ggml type of matrices, and the number that `general.file_type` gives it.
_TYPES = {"F32": (gguf_file.F32, 0), "F16": (gguf_file.F16, 1), "Q8_0": (gguf_file.Q8_0, 7)}
# Tensors that are constants of the base rather than weights, copied as they are.
_CONSTANTS = ("rope_freqs.weight",)


def export_gguf(model: Path, base: Path, out: Path, kind: Literal["F32", "F16", "Q8_0"]) -> Path:
    """Write the weights of a transformers folder as GGUF, atomically; an existing file is replaced.

    Args:
        model: a transformers folder (fp32 or fp16 safetensors, one file) of a supported family.
        base: a GGUF of the same model before training: gives metadata and tokenizer.
        out: the file to write.
        kind: type of the matrices; vectors (norms, biases) are always F32.

    Returns:
        `out`.

    Raises:
        UsageError: unsupported family, or base and model are not the same model.
        CotreeError: the file cannot be written.
    """
    from safetensors import SafetensorError, safe_open

    config = json.loads((model / "config.json").read_text())
    family = FAMILIES.get(config["model_type"])
    if family is None:
        raise UsageError(f"cannot export {config['model_type']!r} models: supported are {', '.join(FAMILIES)}")
    file = GGUF(base)
    if file["general.architecture"] != family.gguf:
        raise UsageError(f"{base} is a {file['general.architecture']!r} model, {model} needs {family.gguf!r}")
    try:
        weights: Any = safe_open(model / "model.safetensors", framework="numpy")
    except (OSError, SafetensorError) as error:
        raise CotreeError(f"cannot read {model / 'model.safetensors'}: {error}") from error
    try:
        sources = {gguf_name(name): name for name in weights.keys()}  # noqa: SIM118
    except KeyError as error:
        raise UsageError(f"{model} has a tensor that GGUF export does not know: {error}") from None
    if "output.weight" in file.tensors and "output.weight" not in sources:
        sources["output.weight"] = sources["token_embd.weight"]  # tied, but the base spells it out
    _check_same_model(weights, sources, file, model)

    def array(name: str) -> np.ndarray:
        if name in _CONSTANTS:
            return file.array(name)
        values: np.ndarray = weights.get_tensor(sources[name]).astype(np.float32, copy=False)
        return reordered(values, sources[name], config, to_pairs)

    matrices, number = _TYPES[kind]
    fields = file.fields | {"general.file_type": gguf_file.encode(gguf_file.UINT32, number)}
    fields.setdefault("general.quantization_version", gguf_file.encode(gguf_file.UINT32, 2))
    tensors = {}
    for name, tensor in file.tensors.items():
        matrix = len(tensor.shape) > 1 and name not in _CONSTANTS
        tensors[name] = (tensor.shape, matrices if matrix else gguf_file.F32)
    if "output.weight" in sources and "output.weight" not in tensors:  # the student's head is its own, the base's tied
        tensors["output.weight"] = (tensors["token_embd.weight"][0], matrices)
    with whole(out) as draft:
        gguf_file.write(draft, fields, tensors, array, file.alignment)
    return out


def _check_same_model(weights: Any, sources: dict[str, str], file: GGUF, model: Path) -> None:
    """Every tensor of the base must be in the folder with the same shape, and the other way round."""
    base = {name: tensor.shape for name, tensor in file.tensors.items() if name not in _CONSTANTS}
    ours = {name: tuple(weights.get_slice(source).get_shape()) for name, source in sources.items()}
    ours_only = set(ours) - set(base) - {"output.weight"}
    wrong = sorted({name for name, shape in base.items() if ours.get(name) != shape} | ours_only)
    if wrong:
        name = wrong[0]
        raise UsageError(
            f"{file.path} is not the base of {model}: {name} is {base.get(name, 'absent')} there and "
            f"{ours.get(name, 'absent')} here ({len(wrong)} tensors differ)"
        )

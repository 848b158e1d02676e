"""The trained student as GGUF, so that the engine that served the teacher serves the student.

Invariant: metadata and tokenizer are those of the base GGUF, byte for byte (but for the file type), and the tensors
are exactly those of the transformers folder: every one the base has, of the same shape, in the wanted type.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cotree.base.atomic import whole
from cotree.base.errors import CotreeError, UsageError
from cotree.models import gguf_file
from cotree.models.gguf_file import GGUF
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
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    if "output.weight" in shapes.keys() | sources.keys():  # one of the two may tie its head to the embeddings
        shapes.setdefault("output.weight", shapes["token_embd.weight"])
        sources.setdefault("output.weight", sources["token_embd.weight"])
    ours = {name: tuple(weights.get_slice(source).get_shape()) for name, source in sources.items()}
    names = (shapes.keys() | ours.keys()) - set(_CONSTANTS)
    if wrong := sorted(name for name in names if shapes.get(name) != ours.get(name)):
        raise UsageError(
            f"{base} is not the base of {model}: {wrong[0]} is {shapes.get(wrong[0], 'absent')} there and "
            f"{ours.get(wrong[0], 'absent')} here ({len(wrong)} tensors differ)"
        )

    def array(name: str) -> np.ndarray:
        if name in _CONSTANTS:
            return file.array(name)
        values: np.ndarray = weights.get_tensor(sources[name]).astype(np.float32, copy=False)
        return reordered(values, sources[name], config, to_pairs)

    matrices, number = _TYPES[kind]
    fields = file.fields | {"general.file_type": gguf_file.encode(gguf_file.UINT32, number)}
    fields.setdefault("general.quantization_version", gguf_file.encode(gguf_file.UINT32, 2))
    tensors = {
        name: (shape, matrices if len(shape) > 1 and name not in _CONSTANTS else gguf_file.F32)
        for name, shape in shapes.items()
    }
    with whole(out) as draft:
        gguf_file.write(draft, fields, tensors, array, file.alignment)
    return out

"""Write the weights of a transformers folder as GGUF, so that the engine that serves the teacher serves the student.

Invariant: metadata and tokenizer are those of the base GGUF, byte for byte (but for the file type), and the tensors
are exactly those of the transformers folder: every one that the base has, of the same shape, at the wanted type.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from cotree.base.atomic import atomic_draft
from cotree.base.errors import UsageError
from cotree.models.families import FAMILIES, gguf_name, reordered, to_pairs
from cotree.models.gguf_format import GGUF, write_at_type
from cotree.models.safetensors_folder import stored_tensors
from cotree.models.settings import GGUFType

# A tensor of constants, not of weights: copied from the base.
_CONSTANTS = "rope_freqs.weight"


def export_gguf(model: Path, base: Path, out: Path, kind: GGUFType) -> Path:
    """Write a transformers folder as a GGUF file, atomically; an existing file is replaced. Returns `out`.

    Args:
        model: a transformers folder (safetensors) of a supported family.
        base: a GGUF of the same model before training: gives metadata and tokenizer.
        kind: type of the matrices; vectors (norms, biases) are always F32.

    Raises:
        UsageError: unsupported family, or base and model are not the same model.
        CotreeError: a file cannot be read or written.
    """
    config = json.loads((model / "config.json").read_text())
    family = FAMILIES.get(config["model_type"])
    if family is None:
        raise UsageError(f"cannot export {config['model_type']!r} models: supported are {', '.join(FAMILIES)}")
    file = GGUF(base)
    if file["general.architecture"] != family.gguf:
        raise UsageError(f"{base} is a {file['general.architecture']!r} model, {model} needs {family.gguf!r}")
    stored = stored_tensors(model)
    try:
        sources = {gguf_name(name): name for name in stored}
    except KeyError as error:
        raise UsageError(f"{model} has a tensor that GGUF export does not know: {error}") from None
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    if "output.weight" in shapes.keys() | sources.keys():  # one of the two may tie its head to the embeddings
        shapes.setdefault("output.weight", shapes["token_embd.weight"])
        sources.setdefault("output.weight", sources["token_embd.weight"])
    ours = {name: stored[source].shape for name, source in sources.items()}
    names = (shapes.keys() | ours.keys()) - {_CONSTANTS}
    if wrong := sorted(name for name in names if shapes.get(name) != ours.get(name)):
        raise UsageError(
            f"{base} is not the base of {model}: {wrong[0]} is {shapes.get(wrong[0], 'absent')} there and "
            f"{ours.get(wrong[0], 'absent')} here ({len(wrong)} tensors differ)"
        )

    def values(name: str) -> np.ndarray:
        if name == _CONSTANTS:
            return file.array(name)
        return reordered(stored[sources[name]].read(), sources[name], config, to_pairs)

    with atomic_draft(out) as draft:
        write_at_type(draft, file, kind, shapes=shapes, values=values)
    return out

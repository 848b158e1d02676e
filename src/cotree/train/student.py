"""Resolve the student that training starts from to an fp32 transformers folder, converting GGUF files.

Not with `from_pretrained(gguf_file=...)`: that takes 20 s for 135M parameters, gives a model that cannot be saved, and
tokenizes differently from llama.cpp (see `models.tokenizer`).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from cotree.base.atomic import atomic_draft, remove, sums_of, write_json, write_sums
from cotree.base.errors import UsageError
from cotree.models.checksums import cache_folder, check_weights, file_sha256, folder_sha256, is_whole
from cotree.models.families import (
    FAMILIES,
    Family,
    read_config,
    reordered,
    supported_family,
    to_halves,
    transformers_name,
)
from cotree.models.gguf_files import GGUF
from cotree.models.tokenizer import gguf_tokenizer
from cotree.models.weights import HUB_WEIGHTS, locate

# With others (dynamic, longrope) all positions depend on the longest sequence of the forward pass.
_ROPE = ("default", "linear", "llama3", "yarn")
_BASE_FIX = "set base_model_name_or_path in its adapter_config.json to the model's folder or hub id"


def student_folder(name: str) -> Path:
    """The transformers folder of the named weights; a GGUF is converted once, into the cache.

    Args:
        name: a transformers or adapter folder, which is returned as it is; a packaged name, a `.gguf` file, or a hub
            model (`weights.HUB_WEIGHTS`).

    Raises:
        UsageError: the weights are missing, damaged or not trainable.
        CotreeError: the cache folder cannot be written.
    """
    folder = Path(name)
    if folder.is_dir():
        check_weights(folder)
        if (base := adapter_base(folder)) is not None:
            check_weights(Path(base))
            return folder
    source = locate(name)
    if source.is_dir():
        return source
    check_weights(source)
    folder = cache_folder() / f"{source.stem}-{file_sha256(source)[:12]}-transformers"
    if not is_whole(folder):
        remove(folder)
        convert_gguf(source, folder)
    return folder


def adapter_base(folder: Path) -> str | None:
    """The base model of a PEFT adapter folder, a folder or hub id; None if the folder is not an adapter.

    Raises:
        UsageError: adapter_config.json is damaged or names no possible base, or the weights are missing.
    """
    file = folder / "adapter_config.json"
    if not file.exists():
        return None
    try:
        base = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UsageError(f"{file} is no adapter's config ({error}); copy the adapter again") from None
    if not base or not isinstance(base, str):
        raise UsageError(f"the adapter {folder} names no base model ({json.dumps(base)}); {_BASE_FIX}")
    on_hub = HUB_WEIGHTS.fullmatch(base) and not Path(base).exists()
    if not on_hub and not (Path(base) / "config.json").is_file():
        raise UsageError(f"the base of the adapter {folder} is not at {base} (no config.json there); {_BASE_FIX}")
    if not (folder / "adapter_model.safetensors").is_file():
        fix = "copy the adapter again, or save it with PEFT of today"
        raise UsageError(f"the adapter {folder} has no adapter_model.safetensors; {fix}")
    return base


def convert_gguf(source: Path, folder: Path) -> Path:
    """Convert a GGUF file to a new transformers folder (fp32 safetensors, tokenizer, config), atomically.

    Returns:
        `folder`.

    Raises:
        UsageError: the file is not a GGUF, of an unsupported model family, or has no chat template.
        CotreeError: the folder cannot be written.
    """
    from safetensors.numpy import save_file

    file = GGUF(source)
    config = gguf_config(file)
    weights: dict[str, np.ndarray] = {}
    for name in file.tensors:
        try:
            target = transformers_name(name)
            weights[target] = np.ascontiguousarray(reordered(file.array(name), target, config, to_halves))
        except (KeyError, NotImplementedError, ValueError) as error:
            raise UsageError(f"{source} has a tensor {name} that cotree cannot read: {error}") from error
    tokenizer = gguf_tokenizer(file)
    if not tokenizer.chat_template:
        raise UsageError(f"{source} has no chat template: cotree trains chat models; take an instruct variant")
    with atomic_draft(folder) as draft:
        draft.mkdir()
        save_file(weights, draft / "model.safetensors", metadata={"format": "pt"})
        write_json(draft / "config.json", config)
        tokenizer.save_pretrained(draft)
        make_readable(draft)
        write_sums(sums_of(draft), draft.rglob("*"))
    return folder


def student_sha256(folder: Path) -> str:
    """SHA-256 of a student folder's weights, config and tokenizer, and of its adapter's base.

    A base that is not a local folder counts by its name.
    """
    parts = [folder_sha256(folder)] + [file_sha256(file) for file in sorted(folder.glob("*.bin"))]
    if (base := adapter_base(folder)) is not None:
        parts += [file_sha256(folder / "adapter_config.json")]
        parts += [student_sha256(Path(base)) if Path(base).is_dir() else base]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def make_readable(folder: Path) -> None:
    """Reset file modes below a model folder to the umask's default, because safetensors creates files with mode 600."""
    mode = (folder / "config.json").stat().st_mode
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def gguf_config(file: GGUF) -> dict[str, Any]:
    """The transformers config of a GGUF file."""
    arch = file["general.architecture"]
    family = next((name for name, known in FAMILIES.items() if known.gguf == arch), None)
    if family is None:
        raise UsageError(f"{file.path} is a {arch!r} model: supported are {', '.join(FAMILIES)}")
    if "rope_freqs.weight" in file.tensors or file.get(f"{arch}.rope.scaling.type", "none") != "none":
        raise UsageError(
            f"{file.path} scales its rotary positions, and GGUF does not keep how: give the model's transformers "
            "folder as student instead"
        )
    heads, width = file[f"{arch}.attention.head_count"], file[f"{arch}.embedding_length"]
    config = {
        "architectures": [FAMILIES[family].architecture],
        "model_type": family,
        "dtype": "float32",
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": width,
        "intermediate_size": file[f"{arch}.feed_forward_length"],
        "num_hidden_layers": file[f"{arch}.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": file.get(f"{arch}.attention.head_count_kv", heads),
        "head_dim": file.get(f"{arch}.attention.key_length", width // heads),
        "max_position_embeddings": file[f"{arch}.context_length"],
        "rms_norm_eps": file[f"{arch}.attention.layer_norm_rms_epsilon"],
        "rope_parameters": {"rope_type": "default", "rope_theta": file.get(f"{arch}.rope.freq_base", 10000.0)},
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    if family == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        config[f"{name}_token_id"] = file.get(f"tokenizer.ggml.{key}_token_id")
    return config


def student_config(source: Path) -> Any:
    """The transformers config of a GGUF, a transformers folder, or an adapter's base.

    Raises:
        UsageError: it is missing, or of no supported family.
    """
    from transformers import AutoConfig

    if source.suffix == ".gguf":
        return AutoConfig.for_model(**gguf_config(GGUF(source)))
    base = adapter_base(source)
    of_base = f" (its base is {base}: {_BASE_FIX})" if base else ""
    config = read_config(base or source, f"cannot load the student {source}{of_base}")
    family_of(config)
    return config


def family_of(config: Any) -> Family:
    """The model family of a transformers config, checked to be trainable with tree attention.

    Raises:
        UsageError: unsupported family, sliding windows, dropout, RoPE scaling that depends on the longest sequence, or
            required FlashAttention-2; packing several sequences in one row would not be exact with these.
    """
    family = supported_family(config, "cannot train")
    if config.num_hidden_layers < 1:
        raise UsageError("cannot train a model without layers: correct num_hidden_layers in its config.json")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in _ROPE:
        raise UsageError(f"cannot train with rotary positions of type {rope!r}: supported are {', '.join(_ROPE)}")
    for name, value in config.to_dict().items():
        if ("dropout" in name or name.endswith("_pdrop")) and value:
            raise UsageError(f"cannot train with {name} = {value}: the DPO margin would be noise; set it to 0")
    if getattr(config, "_attn_implementation", None) == "flash_attention_2":
        raise UsageError("cannot train with FlashAttention-2: remove `attn_implementation` from config.json")
    return family

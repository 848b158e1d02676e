"""The student that training starts from, as a transformers folder in fp32.

A GGUF is converted here rather than through `from_pretrained(gguf_file=...)`: that takes 20 s for 135M parameters,
refuses to be saved, and cuts text into other tokens than llama.cpp (see `models.tokenizer`).
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cotree.base.atomic import atomic_draft
from cotree.base.errors import UsageError
from cotree.models.cache import cache_folder, file_sha256
from cotree.models.families import FAMILIES, Family, reordered, to_halves, transformers_name
from cotree.models.gguf_format import GGUF
from cotree.models.tokenizer import gguf_tokenizer, load_tokenizer
from cotree.models.weights import folder_sha256, locate

# Others (dynamic, longrope) turn every position of a pass by its longest sequence.
_ROPE = ("default", "linear", "llama3", "yarn")


def load_student(source: str | Path, folder: Path) -> Path:
    """Make `folder` a transformers folder (fp32 safetensors, tokenizer, config) of the student, if it is not there yet.

    It appears whole or not at all, and one that is there is never written again.

    Args:
        source: a `.gguf` file, a transformers folder, or a hub id.
        folder: where; its parent is created.

    Returns:
        `folder`.

    Raises:
        UsageError: the source does not exist, is of an unsupported family, or has no chat template.
        CotreeError: the folder cannot be written.
    """
    if folder.exists():
        return folder
    with atomic_draft(folder) as draft:
        draft.mkdir()
        if str(source).endswith(".gguf"):
            _from_gguf(GGUF(Path(source)), draft)
        else:
            _from_transformers(str(source), draft)
        make_readable(draft)
    return folder


def student_folder(name: str) -> Path:
    """The transformers folder that training from these weights starts from; of a GGUF it is made once, in the cache.

    Args:
        name: a transformers folder or an adapter's, which is used as it is; a packaged name, a `.gguf` file, or
            `REPO_ID:FILE.gguf` on the hub.

    Raises:
        UsageError: nothing of that name is here, or it cannot be trained.
        CotreeError: the cache folder cannot be written.
    """
    if (Path(name) / "adapter_config.json").is_file():
        return Path(name)
    source = locate(name)
    if source.is_dir():
        return source
    return load_student(source, cache_folder() / f"{source.stem}-{file_sha256(source)[:12]}-transformers")


def student_sha256(folder: Path) -> str:
    """A hash of what a student folder computes: its weights, config and tokenizer, and those of an adapter's base.

    A base that is no folder is known by its name.
    """
    adapter = folder / "adapter_config.json"
    parts = [folder_sha256(folder)] + [file_sha256(file) for file in sorted(folder.glob("*.bin"))]
    if adapter.exists():
        base = json.loads(adapter.read_text())["base_model_name_or_path"]
        parts += [file_sha256(adapter), student_sha256(Path(base)) if Path(base).is_dir() else base]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def make_readable(folder: Path) -> None:
    """Give all files below a model's folder the mode of a new file: safetensors makes its own for their owner alone."""
    mode = (folder / "config.json").stat().st_mode
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _from_gguf(file: GGUF, folder: Path) -> None:
    from safetensors.numpy import save_file

    config = gguf_config(file)
    weights: dict[str, np.ndarray] = {}
    for name in file.tensors:
        try:
            target = transformers_name(name)
            weights[target] = np.ascontiguousarray(reordered(file.array(name), target, config, to_halves))
        except (KeyError, NotImplementedError, ValueError) as error:
            raise UsageError(f"{file.path} has a tensor {name} that cotree cannot read: {error}") from error
    tokenizer = gguf_tokenizer(file)
    if not tokenizer.chat_template:
        raise UsageError(f"{file.path} has no chat template: cotree trains chat models; take an instruct variant")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save_pretrained(folder)


def gguf_config(file: GGUF) -> dict[str, Any]:
    """The transformers config of a GGUF file."""
    arch = file["general.architecture"]
    family = next((name for name, known in FAMILIES.items() if known.gguf == arch), None)
    if family is None:
        raise UsageError(f"{file.path} is a {arch!r} model: supported are {', '.join(FAMILIES)}")
    if "rope_freqs.weight" in file.tensors or file.get(f"{arch}.rope.scaling.type", "none") != "none":
        raise UsageError(
            f"{file.path} scales its rotary positions, and GGUF does not keep how: give the model's transformers "
            "folder or hub id as student instead"
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


def _from_transformers(source: str, folder: Path) -> None:
    tokenizer = load_tokenizer(source)
    model = load_weights(source)
    with quiet():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def student_config(source: Path) -> Any:
    """The transformers config of a GGUF, of a transformers folder, or of an adapter's base.

    Raises:
        UsageError: there is none, or it is of no supported family.
    """
    from transformers import AutoConfig

    if source.suffix == ".gguf":
        return AutoConfig.for_model(**gguf_config(GGUF(source)))
    try:
        adapter = source / "adapter_config.json"
        base = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.exists() else source
        config = AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot load the student {source}: {str(error).splitlines()[0][:200]}") from error
    family_of(config)
    return config


def family_of(config: Any) -> Family:
    """The family of a transformers config.

    Raises:
        UsageError: the model is of no supported family, or has sliding windows, dropout, rotary positions that
            depend on the longest sequence, or a demand for FlashAttention-2: training computes several sequences in one
            row with an attention of its own, exactly, and none of these has a place in it.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UsageError(f"cannot train {config.model_type!r} models: supported are {', '.join(FAMILIES)}")
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if layers != {"full_attention"} or (
        getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    ):
        raise UsageError("cannot train a model with sliding-window layers: set `sliding_window` to null in config.json")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in _ROPE:
        raise UsageError(f"cannot train with rotary positions of type {rope!r}: supported are {', '.join(_ROPE)}")
    for name, value in config.to_dict().items():
        if ("dropout" in name or name.endswith("_pdrop")) and value:
            raise UsageError(f"cannot train with {name} = {value}: the DPO margin would be noise; set it to 0")
    if getattr(config, "_attn_implementation", None) == "flash_attention_2":
        raise UsageError("cannot train with FlashAttention-2: remove `attn_implementation` from config.json")
    return family


def load_weights(source: str | Path, **options: Any) -> Any:
    """A transformers model in fp32 with all its weights: those that its files lack, transformers would draw at random.

    Args:
        source: a transformers folder, a PEFT adapter that names its base (it is merged), or a hub id.
        options: of `from_pretrained`.

    Raises:
        UsageError: there is none, it is not trainable (see `family_of`), or its files are torn or lack
            weights.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    with quiet():
        try:
            if (Path(source) / "adapter_config.json").exists():
                from peft import PeftConfig, PeftModel

                base = load_weights(PeftConfig.from_pretrained(source).base_model_name_or_path, **options)
                warnings.filterwarnings("error", "Found missing adapter keys")
                return PeftModel.from_pretrained(base, source).merge_and_unload()
            family_of(AutoConfig.from_pretrained(source))
            model, found = AutoModelForCausalLM.from_pretrained(
                source, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
        except (OSError, ValueError, RuntimeError, SafetensorError, UserWarning) as error:
            raise UsageError(f"cannot load the student {source}: {str(error).splitlines()[0][:200]}") from error
    wrong = sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])})
    if wrong:
        raise UsageError(
            f"cannot load the student {source}: {len(wrong)} of its weights are missing or of another shape "
            f"({wrong[0]}, ...); fetch it again"
        )
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """While the block runs, transformers shows no progress bars and no warnings."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers about itself
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()

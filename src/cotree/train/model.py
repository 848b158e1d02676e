"""Load a student folder as an fp32 model with tree attention for full or LoRA training; probe it and save it.

Invariant: at step 0 the model computes exactly what the folder's does: an adapter in the folder is merged first, and a
new adapter starts at zero. So at step 0 it is the SFT checkpoint, DPO's reference.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors import SafetensorError
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from cotree.base.atomic import sums_of, write_json, write_sums
from cotree.base.errors import UsageError
from cotree.tasks.diagnosis import diagnose
from cotree.train.attention import ATTENTION, forest_attention
from cotree.train.settings import LoRA, Probe
from cotree.train.student import adapter_base, make_readable, student_config

_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_PROBE_BATCH = 8  # prompts of a probe that are continued together


def load_model(student: Path, lora: LoRA | None = None, *, seed: int = 0, compiled: bool = False) -> PreTrainedModel:
    """Load a student folder (a model, or a PEFT adapter that names its base) for training.

    Args:
        student: the folder.
        lora: add a new LoRA adapter, and freeze the rest.
        seed: of the adapter's random matrices (A; B is zero).
        compiled: apply torch.compile.

    Raises:
        UsageError: it is not trainable (see `student.family_of`), or the folder's model is incomplete.
    """
    # Attention is excluded: it differs for every pack and would be recompiled each time.
    outside: Callable[[Any], Any] = torch.compiler.disable
    AttentionInterface.register(ATTENTION, outside(forest_attention) if compiled else forest_attention)
    student_config(student)
    model = _load_weights(student).requires_grad_(True)
    if (student / "adapter_config.json").exists():
        model.name_or_path = ""  # the merged weights exist in no folder
    if lora is not None:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        settings = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
        with quiet():
            model = get_peft_model(model, settings)
    if compiled:
        model.compile(dynamic=True)
    return model


def checkpoint_layers(model: Any, *, keep_matrix_products: bool) -> None:
    """Turn on activation checkpointing for a model's layers, in place.

    Args:
        model: a transformers model.
        keep_matrix_products: selective: keep the results of matrix products and attention, recompute only cheap
            operations: about a third less memory for a few percent more time. Else recompute whole layers.
    """
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # layers use no randomness
    if keep_matrix_products:
        policy = partial(_keep_or_recompute, model.config.hidden_size)
        options["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    with quiet():  # hide the deprecation warning about the method's name
        model.gradient_checkpointing_enable(options)


def _keep_or_recompute(width: int, context: Any, operation: Any, *inputs: Any, **_: Any) -> CheckpointPolicy:
    """Checkpointing policy: keep attention and the products of hidden states (..., width) with weights (width, ...).

    Recomputes the last product of a layer, which its backward pass does not read, and the small ones of adapters. On
    CUDA flex_attention is recomputed too.
    """
    of_hidden_states = operation in _PRODUCTS and inputs[-1].shape[0] == width
    kept = of_hidden_states or operation is _ATTENTION
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def probe_answers(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], settings: Probe) -> dict[str, float]:
    """Generate greedily for some prompts in batches; returns the mean tokens, the loop ratio and the no-answer ratio.

    Leaves the model unchanged.

    Args:
        model: a transformers model, not wrapped.
        tokenizer: its own.
        prompts: token ids; only the first `questions` are used.
        settings: give the number of questions and max_tokens.
    """
    training, model_attention = model.training, model.config._attn_implementation
    replies: list[list[int]] = []
    model.eval()
    model.set_attn_implementation("sdpa")
    try:
        for first in range(0, min(len(prompts), settings.questions), _PROBE_BATCH):
            used = prompts[first : min(first + _PROBE_BATCH, settings.questions)]
            replies += _generate(model, used, settings.max_tokens, tokenizer.eos_token_id)
    finally:
        model.set_attn_implementation(model_attention or ATTENTION)
        model.train(training)
    found = []
    for reply in replies:
        reason = "stop" if reply[-1] == tokenizer.eos_token_id else "length"
        found.append(diagnose(tokenizer.decode(reply, skip_special_tokens=True), finish_reason=reason))
    return {
        "probe_tokens": fmean(map(len, replies)),
        "probe_loop": fmean(each.loop for each in found),
        "probe_no_answer": fmean(each.no_answer for each in found),
    }


def _generate(model: Any, prompts: Sequence[Sequence[int]], max_tokens: int, end: int) -> list[list[int]]:
    """Greedy replies to prompts of token ids, from one left-padded batch; each ends with `end` or at max_tokens."""
    width = max(map(len, prompts))
    ids = torch.tensor([[end] * (width - len(prompt)) + [*prompt] for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    device = next(model.parameters()).device
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # each length would recompile
        written = model.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
        )[:, width:].tolist()
    return [reply[: reply.index(end) + 1] if end in reply else reply for reply in written]


def save_model(model: Any, tokenizer: Any, folder: Path, state: dict[str, Any], *, bf16: bool = False) -> None:
    """Save a trained model, with any adapter merged and also beside it, and its tokenizer.

    An adapter trained on top of a merged one is not saved: its base exists in no folder.

    Args:
        model: a transformers or PEFT model, not wrapped.
        tokenizer: saved with it.
        folder: empty; an adapter goes to `folder/adapter`.
        state: the model's weights, gathered from all processes.
        bf16: round the saved weights of the model to bf16, not those of the adapter.
    """
    if hasattr(model, "merge_and_unload"):
        if model.peft_config["default"].base_model_name_or_path:
            model.save_pretrained(folder / "adapter", state_dict=state)
        model = model.merge_and_unload()
        state = model.state_dict()
    if bf16:  # keep tied weights tied, else they would be stored twice
        rounded = {values.data_ptr(): values.to(torch.bfloat16) for values in state.values()}
        state = {name: rounded[values.data_ptr()] for name, values in state.items()}
    model.save_pretrained(folder, state_dict=state)
    if bf16:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        write_json(folder / "config.json", config | {"dtype": "bfloat16"})
    tokenizer.save_pretrained(folder)
    make_readable(folder)
    for part in filter(Path.is_dir, (folder / "adapter", folder)):
        write_sums(sums_of(part), part.rglob("*"))


def _load_weights(source: str | Path) -> Any:
    """Load a model in fp32, merging an adapter into its base (a folder or hub id).

    Raises UsageError for missing weights, which transformers would initialise at random.
    """
    with quiet():
        try:
            if (named := adapter_base(Path(source))) is not None:
                from peft import PeftModel

                base = _load_weights(named)
                warnings.filterwarnings("error", "Found missing adapter keys")
                return PeftModel.from_pretrained(base, source).merge_and_unload()
            model, found = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=torch.float32,
                attn_implementation=ATTENTION,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                trust_remote_code=False,
                use_safetensors=True,
            )
        except (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError, UserWarning) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0][:200]
            raise UsageError(f"cannot load the student {source}: {reason}") from error
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
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers' own deprecations
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()

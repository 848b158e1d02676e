"""What `benchmarks.gpu` measures: sections of items, each a generator that yields its numbers as it finds them.

On a machine without CUDA they run all the same, at tiny sizes; only flex_attention's backward does not exist there.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.train import distance, work
from benchmarks.train_shapes import Shape, shapes, wide
from benchmarks.train_sides import BETA, Precision, Step, clear, cotree_step, gradient_of, trl_step
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from cotree.base.errors import CotreeError
from cotree.base.machine import peak_bytes
from cotree.train.attention import Layout, dense_attention, flex_attention
from cotree.train.forest import Forest, packs

Item = Callable[[], Iterator[dict[str, Any]]]
QWEN = {
    "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16, "vocab_size": 512}


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    Attributes:
        models: their configs by name.
        shapes: those of `bench-train` whose speed is measured, with a size, and the widest tree.
        thoughts: tokens of a thought in them, of which a chain has five, by size.
        wide: leaves and tokens of a chain of the widest tree.
        growth: leaves of the trees of one depth whose memory is compared, and that depth.
        gradient_thought: tokens of a thought where gradients are compared.
        lengths: of the rows that are attended over; up to `compared` tokens the results are compared.
        masks: lengths of the rows whose block masks are built; up to `compared` * 8 also by a test of every pair.
        pack_tokens: caps of a pack, tried in order until one fits into memory.
        micro_batches: rows of TRL's, tried in order until one is slower or does not fit.
        repeats: of a step that takes less than a second.
    """

    models: dict[str, dict[str, Any]]
    shapes: Sequence[str]
    thoughts: dict[str, int]
    wide: tuple[int, int]
    growth: tuple[Sequence[int], int]
    gradient_thought: int
    lengths: Sequence[int]
    compared: int
    masks: Sequence[int]
    pack_tokens: Sequence[int]
    micro_batches: Sequence[int] = (1, 2, 3, 4, 6, 8, 16)
    repeats: int = 3


REAL = Scale(
    models={"qwen2.5-0.5b": QWEN, "llama-3.2-1b": LLAMA},
    shapes=(
        "early_2k",
        "mcts_2k",
        "late_2k",
        "64_leaves",
        "early_16k",
        "late_16k",
        "mcts_16k",
        "one_pair_2k",
        "sft_4_chains_2k",
    ),
    thoughts={"2k": 400, "16k": 3200},
    wide=(64, 4096),
    growth=((8, 16, 32, 64), 4096),
    gradient_thought=200,
    lengths=(100, 128, 999, 1536, 4097, 16384, 20001),
    compared=4097,
    masks=(4096, 16384, 32768, 262144),
    pack_tokens=(32768, 16384, 8192),
)
TINY = Scale(
    models={"qwen2.5-0.5b": QWEN | SMALL | {"num_attention_heads": 7, "num_key_value_heads": 1},
            "llama-3.2-1b": LLAMA | SMALL | {"num_attention_heads": 4, "num_key_value_heads": 2}},
    shapes=("late_2k", "8_leaves"),
    thoughts={"2k": 6},
    wide=(8, 36),
    growth=((2, 8), 36),
    gradient_thought=6,
    lengths=(20, 128, 300),
    compared=300,
    masks=(300, 3000),
    pack_tokens=(256, 64),
    micro_batches=(1, 2),
    repeats=1,
)  # fmt: skip


def sections(scale: Scale, students: Path) -> dict[str, dict[str, Item]]:
    """All items of all sections, in the order in which they run; nothing is computed yet.

    Args:
        scale: of everything.
        students: a folder for the weights that are drawn.
    """

    def item(function: Callable[..., Iterator[dict[str, Any]]], *arguments: Any) -> Item:
        return lambda: function(*arguments)

    def trained(function: Callable[..., Iterator[dict[str, Any]]], name: str, *arguments: Any) -> Item:
        return lambda: function(make_student(scale.models[name], students / name), *arguments)

    precisions: tuple[Precision, ...] = ("bf16", "fp32")
    leaves, depth = scale.growth
    return {
        "masks": {f"{tokens} tokens": item(block_masks, tokens, scale) for tokens in scale.masks},
        "attention": {
            f"{name} {precision}": item(attention, scale.models[name], precision, scale)
            for precision in precisions
            for name in scale.models
        },
        "gradients": {
            f"{name} {loss}": trained(gradients, name, loss, scale)
            for name in scale.models
            for loss in ("joint", "sft")
        },
        "memory": {
            f"{name} {count} leaves": trained(memory, name, count, depth, scale)
            for name in scale.models
            for count in leaves
        },
        "speed": {
            f"{name} {shape}": trained(speed, name, shape, scale)
            for shape in scale.shapes
            for name in scale.models
        },
    }  # fmt: skip


def make_student(config: dict[str, Any], folder: Path) -> Path:
    """Weights drawn at random in the shape of a model, as a folder; the tokenizer has a few words."""
    if folder.exists():
        return folder
    from tokenizers import Tokenizer, models

    made = folder.with_name(f"{folder.name}.made")
    torch.manual_seed(0)
    with torch.device(_device()):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16)
    model.save_pretrained(made)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<pad>": 1, "<end>": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", eos_token="<end>")
    tokenizer.save_pretrained(made)
    return made.rename(folder)


def shape_of(name: str, vocabulary: int, scale: Scale) -> Shape:
    """One of `scale.shapes`, with the token ids of a model's vocabulary."""
    leaves, tokens = scale.wide
    if name == f"{leaves}_leaves":
        return wide(leaves, tokens, vocabulary)
    base, size = name.rsplit("_", 1)
    made = shapes(0, prompt=min(120, 2 * scale.thoughts[size]), thought=scale.thoughts[size], vocabulary=vocabulary)
    return replace(next(shape for shape in made if shape.name == base), name=name)


def block_masks(tokens: int, scale: Scale) -> Iterator[dict[str, Any]]:
    """A block mask built from the layout's ends, and by a test of every pair of tokens."""
    layout = _layout(tokens)
    _ = layout.flex_mask  # what is done once
    mask, seconds, peak = _measured(lambda: Layout(layout.ends, layout.runs).flex_mask)
    yield {"seconds": seconds, "peak_gb": peak, "blocks": int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())}
    if tokens <= scale.compared * 8:
        tested, slow, large = _measured(create_block_mask, mask.mask_mod, None, None, tokens, tokens, device=_device())
        values = zip(mask.as_tuple(), tested.as_tuple(), strict=True)
        same = all(torch.equal(ours, theirs) for ours, theirs in values if isinstance(ours, Tensor))
        yield {"every_pair_seconds": slow, "every_pair_gb": large, "equal": same}


def attention(config: dict[str, Any], precision: Precision, scale: Scale) -> Iterator[dict[str, Any]]:
    """flex_attention over rows of several lengths: graphs, seconds to compile, and distance from dense attention.

    Distances are those of the output and the gradients together, from dense attention in twice the precision; the
    noise is that of dense attention in the same one.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    exact = torch.float32 if precision == "bf16" else torch.float64
    heads = (config["num_attention_heads"], config["num_key_value_heads"], config["num_key_value_heads"])
    width = config.get("head_dim") or config["hidden_size"] // heads[0]
    torch._dynamo.reset()
    counters.clear()
    found: dict[str, Any] = {"graphs": 0, "compile_seconds": 0.0, "distance": 0.0, "noise": 0.0}
    for tokens in scale.lengths:
        layout = _layout(tokens)
        torch.manual_seed(tokens)
        inputs = [torch.randn(1, count, tokens, width, device=_device(), dtype=dtype) for count in heads]
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            results, first, _ = _measured(_attended, flex_attention, inputs, layout)
            _, second, _ = _measured(_attended, flex_attention, inputs, layout)
        found["graphs"] = counters["stats"]["unique_graphs"]
        found["compile_seconds"] += max(first - second, 0.0)
        found |= {f"seconds_{tokens}": second}
        if torch.cuda.is_available() and any("without torch.compile" in str(each.message) for each in told):
            found["fault"] = "flex_attention ran without being compiled"
        if tokens <= scale.compared:
            right = _attended(dense_attention, [each.to(exact) for each in inputs], layout)
            noise = _apart(_attended(dense_attention, inputs, layout), right)
            found["distance"] = max(found["distance"], _apart(results, right))
            found["noise"] = max(found["noise"], noise)
        yield found


def gradients(student: Path, loss: str, scale: Scale) -> Iterator[dict[str, Any]]:
    """Distances of a step's gradients from those of a plain step in fp32, one chain at a time with sdpa.

    The noise is the distance of a plain step in bf16.
    """
    size = {"thought": scale.gradient_thought, "prompt": scale.gradient_thought}
    made = shapes(0, **size, vocabulary=_vocabulary(student))
    shape = next(shape for shape in made if shape.name == ("early" if loss == "joint" else "sft_4_chains"))
    cap = scale.pack_tokens[0]
    right = plain_gradient(student, shape, "fp32")
    found: dict[str, Any] = {"noise_bf16": distance(plain_gradient(student, shape, "bf16"), right)}
    for precision in ("fp32", "bf16"):
        model, step = cotree_step(student, shape, cap, reference=False, precision=precision)
        step(0)
        found[f"tree_{precision}"] = distance(gradient_of(model), right)
        del model, step
        free()
        yield found
    yield {"of_noise": found["tree_bf16"] / found["noise_bf16"]}


def plain_gradient(student: Path, shape: Shape, precision: Precision) -> dict[str, Tensor]:
    """The gradient of a step of a shape, one chain after the other, without anything of ours; the reference is 0."""
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32, attn_implementation="sdpa")
    model.to(_device()).train()
    scored = sum(len(row.sequences[0]) - len(row.prompt) for row in shape.rows)
    for row in shape.rows:
        sums = []
        for ids in row.sequences:
            inputs = torch.tensor([ids], device=_device())
            with torch.autocast(_device().type, torch.bfloat16, enabled=precision == "bf16"):
                logits = model(inputs[:, :-1], use_cache=False, logits_to_keep=len(ids) - len(row.prompt)).logits[0]
            targets = inputs[0, len(row.prompt) :]
            sums.append(-F.cross_entropy(logits.float(), targets, reduction="sum"))
        loss = torch.zeros((), device=_device())
        if shape.loss != "dpo":
            loss = loss - sums[0] / scored
        if shape.loss != "sft":
            loss = loss - F.logsigmoid(BETA * (sums[0] - sums[1])) / len(shape.rows)
        loss.backward()  # type: ignore[no-untyped-call]
    found = gradient_of(model)
    del model
    free()
    return found


def memory(student: Path, leaves: int, depth: int, scale: Scale) -> Iterator[dict[str, Any]]:
    """Peak memory of a step on all chains of a tree, in packs of one size however many leaves it has."""
    shape, cap = wide(leaves, depth, _vocabulary(student)), scale.pack_tokens[1]
    made = cotree_step(student, shape, cap, reference=False, precision="bf16")
    seconds, peak, _ = _stepped(*made, 0, scale.repeats)
    tokens = sum(row.tokens for row in shape.rows)
    yield {"seconds": seconds, "peak_gb": peak, "packs": len(packs(shape.rows, cap)), "plain_tokens": tokens}


def speed(student: Path, name: str, scale: Scale) -> Iterator[dict[str, Any]]:
    """A step's loss and gradient in bf16: ours at the first pack size that fits, TRL's at its fastest batch size."""
    shape = shape_of(name, _vocabulary(student), scale)
    tokens = sum(len(ids) for row in shape.rows for ids in row.sequences)
    ours = 0.0
    for cap in scale.pack_tokens:
        try:
            made = cotree_step(student, shape, cap, reference=False, precision="bf16")
            ours, peak, loss = _stepped(*made, 0, scale.repeats)
        except (CotreeError, torch.OutOfMemoryError) as error:
            yield {f"cotree_{cap}": in_a_line(error)}
            continue
        finally:
            made = None  # type: ignore[assignment]
            free()
        _, flops = work(student, shape.rows, cap, masked=shape.loss == "dpo")
        yield {"tokens": tokens, "pack_tokens": cap, "flop_ratio": flops, "cotree_seconds": ours}
        yield {"cotree_tokens_s": tokens / ours, "cotree_gb": peak, "cotree_loss": loss}
        break
    best: dict[str, Any] = {}
    tries: dict[str, Any] = {}
    for implementation in attention_implementations():
        for size, found in _trl_tries(student, shape, implementation, scale):
            tries[f"{implementation}, {size} rows"] = found
            if "seconds" in found and found["seconds"] < best.get("seconds", float("inf")):
                best = {**found, "with": f"{implementation}, {size} rows"}
            yield {"trl_tries": tries}
    if best:
        yield {"trl_seconds": best["seconds"], "trl_tokens_s": tokens / best["seconds"], "trl_gb": best["peak_gb"]}
        yield {"trl_loss": best["loss"], "trl_with": best["with"]}
    if best and ours:
        yield {"speedup": best["seconds"] / ours, "flop_share": best["seconds"] / ours / flops}


def attention_implementations() -> list[str]:
    """What TRL can attend with here; the packages of flash attention are optional."""
    there = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}
    return ["sdpa", *(name for name, is_available in there.items() if torch.cuda.is_available() and is_available())]


def _trl_tries(student: Path, shape: Shape, implementation: str, scale: Scale) -> Iterator[tuple[int, dict[str, Any]]]:
    """Seconds, peak memory and loss of TRL's step by the rows of a micro-batch, or what went wrong."""
    model: Any = None
    step: Any = None
    size, fastest = 1, float("inf")
    try:
        model, step = trl_step(student, shape, True, False, precision="bf16", attention=implementation)
        for size in (size for size in scale.micro_batches if len(shape.rows) % size == 0):
            seconds, peak, loss = _stepped(model, step, size, scale.repeats)
            yield size, {"seconds": seconds, "peak_gb": peak, "loss": loss}
            if seconds > 1.05 * fastest:
                return
            fastest = min(fastest, seconds)
    except torch.OutOfMemoryError:  # larger ones will not fit either
        yield size, {"error": "out of memory"}
    except Exception as error:  # noqa: BLE001 - whatever fails in TRL must not take our numbers with it
        yield size, {"error": in_a_line(error)}
    finally:
        model = step = None
        free()


def _stepped(model: Any, step: Step, micro_batch: int, repeats: int) -> tuple[float, float, float]:
    """Seconds of the fastest step after a first one, the peak of its memory in GB, and the loss.

    The first compiles, and does what is done once. Of long steps one is enough.
    """
    clear(model)
    step(micro_batch)
    fastest, peak, taken = float("inf"), 0.0, 0.0
    for _ in range(repeats):
        clear(model)
        loss, seconds, held = _measured(step, micro_batch)
        fastest, peak, taken = min(fastest, seconds), max(peak, held), taken + seconds
        if taken > 1:
            break
    return fastest, peak, loss


def _measured(compute: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, float, float]:
    """The result of a call, its seconds, and the peak of memory in GB: CUDA's, else this process's until now."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    result = compute(*arguments, **options)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return result, seconds, (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_bytes()) / 1e9


def _attended(attend: Any, inputs: Sequence[Tensor], layout: Layout) -> list[Tensor]:
    """Output and, on CUDA, gradients of an attention."""
    leaves = [each.detach().requires_grad_(torch.cuda.is_available()) for each in inputs]
    output = attend(*leaves, layout=layout, scaling=None)
    if not torch.cuda.is_available():  # flex_attention has no backward there
        return [output]
    output.backward(torch.ones_like(output) / len(layout.ends))
    return [output.detach(), *(each.grad for each in leaves if each.grad is not None)]


def _apart(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """The largest of the relative distances of some tensors."""
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(left, right, strict=True))


def _layout(tokens: int) -> Layout:
    """Of a row of a tree with eight leaves: a trunk of a third, and eight ends of about equal length."""
    trunk = list(range(tokens // 3))
    rest = tokens - len(trunk)
    lengths = [rest * (leaf + 1) // 8 - rest * leaf // 8 for leaf in range(8)]
    # The last token of a chain is no input.
    chains = [[*trunk, *(tokens + leaf for _ in range(length)), 0] for leaf, length in enumerate(lengths)]
    return Forest(chains, _device()).layout


def _vocabulary(student: Path) -> int:
    return int(AutoConfig.from_pretrained(student).vocab_size)


def in_a_line(error: BaseException) -> str:
    """A fault as it stands in the results."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def free() -> None:
    """Give memory back that nothing holds any more; trainers are cycles."""
    gc.collect()
    if torch.cuda.is_available():
        with suppress(RuntimeError):  # of a device that a kernel has broken
            torch.cuda.empty_cache()

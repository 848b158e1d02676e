"""Tiny students: random weights of every family, a tokenizer built here, and the same as GGUF files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from cotree.models.families import FAMILIES, gguf_name, reordered, to_pairs

Post = Callable[[str, dict[str, Any]], dict[str, Any]]

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
    "+ NEWLINE }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXT = [
    "Firstly, I need to break down this task. Tom has 12 apples and 3 boxes.",
    "The answer is: \\boxed{42}. Now, I need to check whether all requirements are met.",
    "Let's check the result. Wait! something is wrong: 3 + 4 = 7, it's 17 minus 10.\n\nIt's they're We'll",
]


def tiny_tokenizer(newline: bool = True, ascii_only: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most 300 tokens, split like SmolLM2's; the special tokens are 0, 1 and 2."""
    alphabet = (
        [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"] if ascii_only else pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, normalized=False, special=True) for token in SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=TEMPLATE.replace("NEWLINE", "'\n'" if newline else "''"),
    )


def tiny_config(model_type: str, tied: bool = True, **changes: Any) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "tie_word_embeddings": tied,
        "initializer_range": 0.25,
    }
    if model_type == "mistral":
        sizes["sliding_window"] = None
    if model_type == "smollm3":
        sizes["num_hidden_layers"] = 4  # of which the last has no rotary positions
    return AutoConfig.for_model(model_type, **(sizes | changes))


def tiny_model(model_type: str = "llama", tied: bool = True, seed: int = 0, **changes: Any) -> Any:
    """Random weights, wide enough that tokens differ clearly; norms and biases random too, so that none is neutral."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, tied, **changes), attn_implementation="eager")
    with torch.no_grad():
        for name, values in model.named_parameters():
            if values.ndim == 1:
                values.copy_(torch.randn_like(values) * 0.3 + (1.0 if "norm" in name else 0.0))
    return model


def in_float64(model: Any) -> Any:
    """The model in float64 throughout: transformers' norms compute in float32, whose rounding is no small change."""
    for module in model.double().modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_norm, module)
    return model


def _norm(module: Any, x: Tensor) -> Tensor:
    scaled: Tensor = module.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)
    return scaled


def write_tiny_gguf(model: Any, tokenizer: PreTrainedTokenizerFast, path: Path, pre: str = "smollm") -> Path:
    """A GGUF (F32) of a tiny model, written with the gguf package alone."""
    config, family = model.config, FAMILIES[model.config.model_type]
    writer = gguf.GGUFWriter(str(path), family.gguf)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(0)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(backend["vocab"], key=backend["vocab"].get)
    tokens += [f"<unused_{number}>" for number in range(len(tokens), config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in backend["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)
    for name, values in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = reordered(values.numpy().astype(np.float32), name, config.to_dict(), to_pairs)
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def message(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def sft_row(index: int) -> dict[str, Any]:
    return {
        "prompt": message("user", f"Tom has {index} apples and buys {index % 7}."),
        "completion": message(
            "assistant", "apples " * (index % 5) + f"Now {index} + {index % 7} = {index + index % 7}"
        ),
        "tree_id": str(index),
    }


def dpo_row(index: int) -> dict[str, Any]:
    start = "Firstly, I need to break down this task. " + "So " * (index % 4)
    return {
        "prompt": message("user", f"Tom has {index} apples and buys {index % 7}."),
        "chosen": message("assistant", start + f"It is {index + index % 7}"),
        "rejected": message("assistant", start + f"{index} no, " * (1 + index % 3) + "boxed"),
        "tree_id": str(index),
    }


def check_served(model: Any, tokenizer: Any, post: Post, prompt: str, tolerance: float, tokens: int = 24) -> float:
    """Decode greedily with the engine: transformers gives the same tokens and the same log-probabilities."""
    answer = post(
        "/completion",
        {"prompt": prompt, "n_predict": tokens, "temperature": 0, "n_probs": 1, "post_sampling_probs": False},
    )
    served = [(each["id"], each["logprob"]) for each in answer["completion_probabilities"]]
    assert len(served) >= 8
    start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = start + [token for token, _ in served]
    with torch.no_grad():
        logps = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)[len(start) - 1 : -1]
    ours = logps.gather(1, torch.tensor([[token] for token, _ in served]))[:, 0]
    assert (logps.max(-1).values - ours).max() < tolerance, "another greedy token, and no tie"
    difference = float((ours - torch.tensor([logp for _, logp in served])).abs().max())
    assert difference < tolerance
    return difference


def gradients(step_trainer: Any, rows: Sequence[Any]) -> tuple[float, dict[str, Tensor]]:
    step_trainer.create_accelerator_and_postprocess()
    step_trainer.model.zero_grad()
    loss = step_trainer.training_step(step_trainer.model, rows)
    return loss.item(), {name: values.grad.clone() for name, values in step_trainer.model.named_parameters()}


def weights(out: Path) -> dict[str, Tensor]:
    """Of the model that a run has stored."""
    return dict(load_file(out / "model" / "model.safetensors"))


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def distance(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Relative L2 distance of two gradients."""
    difference = sum((left[name] - right[name]).square().sum() for name in left)
    return float((difference / sum(values.square().sum() for values in right.values())) ** 0.5)

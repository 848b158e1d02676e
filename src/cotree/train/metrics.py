"""Signs of the paper's failure while training: chosen chains become less likely, answers longer, looping or missing."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch

from cotree.tasks.diagnosis import diagnose
from cotree.train.attention import ATTENTION

WINDOW = 10


def chosen_falls(history: Sequence[dict[str, Any]]) -> str | None:
    """A warning if over the last steps chosen chains were less likely than under the reference, else None.

    Args:
        history: the logged metrics of all steps so far.
    """
    rewards = [entry["chosen_reward"] for entry in history[-WINDOW:] if "chosen_reward" in entry]
    if len(rewards) < WINDOW or fmean(rewards) >= 0:
        return None
    return (
        f"chosen_falls: over the last {WINDOW} steps chosen chains are less likely than under the SFT checkpoint "
        f"(reward {fmean(rewards):.3f}): raise alpha, or lower learning_rate"
    )


def no_answer_rises(history: Sequence[dict[str, Any]], stop_rise: float) -> str | None:
    """A warning if the last probe's no-answer ratio is more than `stop_rise` above the first one's, else None."""
    ratios = [entry["probe_no_answer"] for entry in history if "probe_no_answer" in entry]
    rise = ratios[-1] - ratios[0]
    return f"no_answer_rises: by {rise:.2f} since the first probe; training stops here" if rise > stop_rise else None


def best_step(history: Sequence[dict[str, Any]]) -> int:
    """The probed step with the least (no-answer, loop) ratios; of equal ones the last, which learnt most."""
    probed = [entry for entry in history if "probe_no_answer" in entry]
    best = min(probed, key=lambda entry: (entry["probe_no_answer"], entry["probe_loop"], -entry["step"]))
    return int(best["step"])


def probe_answers(model: Any, tokenizer: Any, prompts: Sequence[list[int]], max_tokens: int) -> dict[str, float]:
    """Have the student answer some prompts greedily: mean tokens, ratios of loops and of texts without an answer.

    The model is given back as it was.

    Args:
        model: a transformers model, not wrapped.
        tokenizer: its own.
        prompts: token ids.
        max_tokens: of each answer.
    """
    lengths, loops, missing = [], [], []
    training, model_attention = model.training, model.config._attn_implementation
    model.eval()
    model.set_attn_implementation("sdpa")
    try:
        for prompt in prompts:
            ids = torch.tensor([prompt], device=next(model.parameters()).device)
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # each text would be compiled anew
                written = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=max_tokens,
                    do_sample=False,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.eos_token_id,
                )[0, len(prompt) :].tolist()
            reason = "stop" if written[-1] == tokenizer.eos_token_id else "length"
            found = diagnose(tokenizer.decode(written, skip_special_tokens=True), finish_reason=reason)
            lengths.append(len(written))
            loops.append(found.loop)
            missing.append(found.no_answer)
    finally:
        model.set_attn_implementation(model_attention or ATTENTION)
        model.train(training)
    return {"probe_tokens": fmean(lengths), "probe_loop": fmean(loops), "probe_no_answer": fmean(missing)}

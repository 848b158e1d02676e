"""SFT, DPO and joint losses as functions of log-probabilities.

Pure tensor functions. Each sees one pack (micro-batch) and divides by the pairs and tokens of the whole optimizer step,
never by the pack's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cotree.train.settings import DPO


def token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability in nats of each target token.

    Args:
        logits: (N, vocabulary), any floating type; computed in float32 or better. Float32 and float64 logits are
            overwritten, because in small models they are the largest tensor and backward needs no second copy.
        targets: (N,) token ids; row i of `logits` predicts `targets[i]`.

    Returns:
        (N,) log pi(target | context), with gradient to `logits`; backward works once.
    """
    logps: Tensor = _TokenLogps.apply(logits if logits.dtype == torch.float64 else logits.float(), targets)  # type: ignore[no-untyped-call]
    return logps


class _TokenLogps(torch.autograd.Function):
    """Log-softmax at the targets, in place: stores exp(logits - max) and later the gradient in the logits' memory."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        logps = logits.gather(1, targets[:, None])
        totals = torch.empty_like(logps)
        # On a CPU a few rows at a time, so that they stay in cache; on a GPU all at once, to save kernel launches.
        size = 1024 if logits.is_cuda else 32
        for rows, found, total in zip(*(torch.split(each, size) for each in (logits, logps, totals)), strict=True):
            peak = rows.amax(1, keepdim=True)
            torch.sum(rows.sub_(peak).exp_(), 1, keepdim=True, out=total)
            found -= peak + total.log()
        ctx.save_for_backward(logits, targets, totals)
        return logps[:, 0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        weights, targets, totals = ctx.saved_tensors
        gradient = weights.detach().mul_(-grad[:, None] / totals)
        return gradient.scatter_add_(1, targets[:, None], grad[:, None]), None


def margin_weights(length: int, other: int, prefix: int, settings: DPO) -> Tensor:
    """The weight of each completion token of one side in the margin; equations in docs/training.md.

    `sigmoid`: 1; `length_normalised` and `simpo`: the mean; `ld_dpo`: `ld_alpha` for tokens beyond the shorter side's
    length. With `mask_prefix` the shared prefix has weight 0.

    Args:
        length: tokens of this side.
        other: tokens of the other side.
        prefix: tokens of the shared prefix.
        settings: of the run.

    Returns:
        (length,) float64.
    """
    weights = torch.ones(length, dtype=torch.float64)
    if settings.loss == "ld_dpo":
        weights[other:] = settings.ld_alpha
    if settings.mask_prefix:
        weights[:prefix] = 0
    if settings.loss in ("length_normalised", "simpo"):
        weights /= max(int(weights.sum()), 1)
    return weights


def dpo_loss(policy: Tensor, reference: Tensor, settings: DPO) -> tuple[Tensor, Tensor]:
    """Conservative DPO (paper, Fine-grained DPO): the preference holds with probability 1 - eps.

        L = -(1 - eps) log sigmoid(d) - eps log sigmoid(-d)
        d = beta [(log pi(y_w) - log pi(y_l)) - (log ref(y_w) - log ref(y_l))] - gamma

    eps (`label_smoothing`) = 0 is DPO; gamma is 0 except for SimPO. The minimum over d is at log((1 - eps) / eps), not
    at infinity: beyond it the gradient shrinks the margin. Tokens shared by y_w and y_l cancel in d and in its
    gradient, so summing over whole completions or over the suffix after the shared prefix (masking-based DPO) gives the
    same loss.

    Args:
        policy, reference: (pairs, 2) log-probabilities of (chosen, rejected) in nats, summed with `margin_weights`; the
            reference's are 0 without a reference model.
        settings: of the method.

    Returns:
        The loss of each pair and its margin d + gamma, both (pairs,).
    """
    margin = settings.beta * ((policy[:, 0] - policy[:, 1]) - (reference[:, 0] - reference[:, 1]))
    d = margin - settings.simpo_gamma if settings.loss == "simpo" else margin
    loss = -(1 - settings.label_smoothing) * F.logsigmoid(d) - settings.label_smoothing * F.logsigmoid(-d)
    return loss, margin


def joint_loss(
    pair_losses: Tensor, chosen_logps: Sequence[Tensor], weights: Sequence[Tensor], *, alpha: float, pairs: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A pack's share of the paper's joint objective L = L_DPO + alpha L_SFT(chosen); the paper uses alpha = 1.

    The shares of all packs of an optimizer step sum to its L.

    Args:
        pair_losses: (p,) from `dpo_loss`, for the p pairs of this pack.
        chosen_logps: log-probabilities of each pair's chosen tokens.
        weights: of the same shapes, from `rows.sft_weights` of the whole step.
        alpha: weight of the SFT term, which is skipped if 0. A good value depends on `sft_norm`.
        pairs: number in the whole optimizer step.

    Returns:
        Shares of L, L_DPO and L_SFT (without alpha), three scalars.
    """
    dpo = pair_losses.sum() / pairs
    if not alpha:
        return dpo, dpo, torch.zeros_like(dpo)
    sft = sft_loss(chosen_logps, weights)
    return dpo + alpha * sft, dpo, sft


def sft_loss(logps: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """A pack's share of the SFT loss: minus the sum of log-probabilities times their `rows.sft_weights`, a scalar."""
    together = torch.cat(list(logps))
    return -(together * torch.cat(list(weights)).to(together)).sum()  # autocast would compute @ in bf16

"""The post-training losses, as functions of log-probabilities.

Tensors in, tensors out. Each function sees one pack, so it divides by the pairs and tokens of the whole optimizer step
that it is given, never by its own.
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
        logits: (N, vocabulary), any floating type; computed in float32 or better. Float32 and float64 are overwritten:
            with a small model they are the largest tensor of all, and its backward can do with this one copy.
        targets: (N,) token ids; row i of `logits` predicts `targets[i]`.

    Returns:
        (N,) log pi(target | what came before), with gradient to `logits`, once.
    """
    logps: Tensor = _TokenLogps.apply(logits if logits.dtype == torch.float64 else logits.float(), targets)  # type: ignore[no-untyped-call]
    return logps


class _TokenLogps(torch.autograd.Function):
    """Keeps exp(logits - their maximum) in the place of the logits, and puts the gradient there."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        logps = logits.gather(1, targets[:, None])
        totals = torch.empty_like(logps)
        # A few rows at a time, which stay in a CPU's cache for all passes over them; a GPU would wait for each launch.
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
    """How much each completion token of one side counts in the margin; docs/training.md has the equations.

    `sigmoid` counts each once; `length_normalised` and `simpo` take the mean; `ld_dpo` counts those beyond the shorter
    side's length `ld_alpha` times. `mask_prefix` leaves out what both sides share, in all of them.

    Args:
        length: tokens of this side.
        other: tokens of the other side.
        prefix: tokens that both share at their start.
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

    eps (`label_smoothing`) = 0 is DPO; gamma is 0 but for SimPO. The minimum over d is at log((1 - eps) / eps), not at
    infinity: a pair that is already told apart that well pushes back. Tokens shared by y_w and y_l cancel in d, in
    value and in gradient, so whether the inputs sum over whole completions or over what follows the shared prefix
    (masking-based DPO) is the same loss.

    Args:
        policy, reference: (pairs, 2) log-probabilities of (chosen, rejected) in nats, summed with `margin_weights`; the
            reference's are 0 where there is none.
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
    """A pack's share of the paper's joint objective L = L_DPO + alpha L_SFT(chosen); its choice is alpha = 1.

    The shares of the packs of one optimizer step add up to L of the step, however it was split.

    Args:
        pair_losses: (p,) from `dpo_loss`, for the p pairs of this pack.
        chosen_logps: for each pair the log-probabilities of its chosen tokens.
        weights: of the same shapes, from `rows.sft_weights` of the whole step.
        alpha: weight of the SFT term, which is not computed if it is 0. Not portable between the two `sft_norm`s.
        pairs: in the whole optimizer step.

    Returns:
        The share of L, of L_DPO and of L_SFT (without alpha), three scalars.
    """
    dpo = pair_losses.sum() / pairs
    if not alpha:
        return dpo, dpo, torch.zeros_like(dpo)
    sft = sft_loss(chosen_logps, weights)
    return dpo + alpha * sft, dpo, sft


def sft_loss(logps: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """A pack's share of the SFT loss: minus the sum of log-probabilities times their `rows.sft_weights`, a scalar."""
    together = torch.cat(list(logps))
    return -(together * torch.cat(list(weights)).to(together)).sum()  # not @, which autocast would do in bf16

"""The post-training losses, as functions of log-probabilities.

Pure: tensors in, tensors out, nothing is averaged here. Who averages must know the whole optimizer step (all its pairs,
all its scored tokens), and a function that sees one micro-batch does not.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability in nats of each target token.

    Args:
        logits: (N, vocabulary), any floating type; computed in float32 or better.
        targets: (N,) token ids; row i of `logits` predicts `targets[i]`.

    Returns:
        (N,) log pi(target | what came before), with gradient to `logits`.
    """
    # cross_entropy keeps one (N, vocabulary) tensor for its backward; gather minus logsumexp would keep two.
    return -F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets, reduction="none")


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """Conservative DPO (paper, Fine-grained DPO): the preference holds with probability 1 - eps.

        L = -(1 - eps) log sigmoid(d) - eps log sigmoid(-d)
        d = beta [(log pi(y_w) - log pi(y_l)) - (log ref(y_w) - log ref(y_l))]

    eps = 0 is DPO. The minimum over d is at log((1 - eps) / eps), not at infinity: a pair that is already told apart
    that well pushes back. Tokens shared by y_w and y_l cancel in d, in value and in gradient, so whether the inputs
    sum over whole completions or over what follows the shared prefix (masking-based DPO) is the same loss.

    Args:
        policy_chosen, policy_rejected, reference_chosen, reference_rejected: (pairs,) summed log-probabilities in nats.
        beta: scale of the implicit reward.
        label_smoothing: eps in [0, 0.5).

    Returns:
        The loss of each pair and its margin d, both (pairs,).
    """
    d = beta * ((policy_chosen - policy_rejected) - (reference_chosen - reference_rejected))
    loss = -(1 - label_smoothing) * F.logsigmoid(d) - label_smoothing * F.logsigmoid(-d)
    return loss, d


def joint_loss(
    pair_losses: Tensor,
    chosen_logps: Tensor,
    lengths: list[int],
    *,
    alpha: float,
    sft_norm: Literal["token", "pair"],
    pairs: int,
    tokens: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """A micro-batch's share of the paper's joint objective L = L_DPO + alpha L_SFT(chosen); its choice is alpha = 1.

    The shares of the micro-batches of one optimizer step add up to L of the step, however it was split.

    Args:
        pair_losses: (p,) from `dpo_loss`, for the p pairs of this micro-batch.
        chosen_logps: (sum(lengths),) log-probabilities of the chosen tokens in the SFT term, pair after pair;
            `sft_scope: full` takes whole completions, `suffix` what follows the shared prefix.
        lengths: how many of them belong to each pair, p positive numbers.
        alpha: weight of the SFT term. Not portable between the two norms.
        sft_norm: `token`: mean over all SFT tokens of the step, so long chains weigh more (TRL's `sft` term when the
            batch is one micro-batch). `pair`: mean over pairs of per-pair token means (LLaMA-Factory, OpenRLHF).
        pairs, tokens: pairs and SFT tokens in the whole optimizer step.

    Returns:
        The share of L, of L_DPO and of L_SFT (without alpha), three scalars.
    """
    dpo = pair_losses.sum() / pairs
    if sft_norm == "token":
        sft = -chosen_logps.sum() / tokens
    else:
        sft = -torch.stack([part.mean() for part in torch.split(chosen_logps, lengths)]).sum() / pairs
    return dpo + alpha * sft, dpo, sft

"""Keep less for the backward pass: what takes a few operations a number is computed again, what takes a matrix is kept.

Invariant: the forward pass gives the same bits as transformers' modules, and the gradients the same up to rounding. Of
a gated feed-forward only the two halves are kept (transformers keeps four tensors of that size), of an RMSNorm its
input (transformers keeps two). So a pack keeps about a third less.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def keep_less(model: nn.Module) -> None:
    """Make the norms and feed-forwards of a model of a supported family (`families`) keep less.

    Not for a model that is compiled (the compiler does this itself) or that checkpoints its layers.
    """
    module: Any
    for module in model.modules():
        name = type(module).__name__
        if name.endswith("RMSNorm"):
            module.forward = MethodType(_norm, module)
        elif name.endswith("MLP") and module.config.hidden_act in ("silu", "swish"):
            module.forward = MethodType(_feed_forward, module)


def _norm(self: Any, values: Tensor) -> Tensor:
    apply: Callable[..., Tensor] = _RMSNorm.apply
    return apply(values, self.weight, self.variance_epsilon)


def _feed_forward(self: Any, values: Tensor) -> Tensor:
    gate, up = self.gate_proj(values), self.up_proj(values)
    apply: Callable[..., Tensor] = _Gated.apply
    product = apply(gate, up)
    with torch.autograd.graph.saved_tensors_hooks(*_computed_again(product, gate.detach(), up.detach())):
        output: Tensor = self.down_proj(product)
    return output


def _computed_again(product: Tensor, gate: Tensor, up: Tensor) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Hooks that keep the shape in the place of `product`, however the layer that reads it views it."""
    place, count = product.data_ptr(), product.numel()

    def keep(tensor: Tensor) -> Tensor | torch.Size:
        return tensor.shape if (tensor.data_ptr(), tensor.numel()) == (place, count) else tensor

    def give(kept: Tensor | torch.Size) -> Tensor:
        return kept if isinstance(kept, Tensor) else F.silu(gate).mul_(up).view(kept)

    return keep, give


class _Gated(torch.autograd.Function):
    """silu(gate) * up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class _RMSNorm(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + eps), in float32 as in transformers, or in float64."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, eps: float) -> Tensor:
        exact = _exact(values)
        scale = torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(values, weight, scale)
        return weight * (exact * scale).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        values, weight, scale = ctx.saved_tensors
        normed = _exact(values) * scale
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = (grad * normed.to(values.dtype)).flatten(0, -2).sum(0).to(weight.dtype)
        of_normed = _exact(grad * weight)
        of_values = of_normed.sub_(normed.mul_((of_normed * normed).mean(-1, keepdim=True))).mul_(scale)
        return of_values.to(values.dtype), of_weight, None


def _exact(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()

"""Keep less for the backward pass: what takes a few operations a number is computed again, what takes a matrix is kept.

Invariant: the forward pass gives the same bits as transformers' modules, and the gradients the same up to rounding.
Where a matrix reads the result of a norm, of a gated feed-forward's product or of joined attention, autograd would keep
that result; here it keeps how to make it from what is kept anyway (the norm's input, the two halves, the pieces). So a
pack keeps a third or more less.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_known: ContextVar[dict[int, _Again] | None] = ContextVar("known", default=None)


def keep_less(model: nn.Module) -> None:
    """Make a model of a supported family (`families`) keep less.

    Not for a model that is compiled (the compiler does this itself) or that checkpoints its layers.
    """
    module: Any
    for module in model.modules():
        name = type(module).__name__
        if name.endswith("RMSNorm"):
            module.forward = MethodType(_norm, module)
        elif name.endswith("MLP") and module.config.hidden_act in ("silu", "swish"):
            module.forward = MethodType(_feed_forward, module)
    forward: Callable[..., Any] = model.forward

    @wraps(forward)
    def keeping_less(*args: Any, **named: Any) -> Any:
        token = _known.set({})
        try:
            with torch.autograd.graph.saved_tensors_hooks(_keep, _give):
                return forward(*args, **named)
        finally:
            _known.reset(token)

    model.forward = keeping_less


def made_by(again: Callable[[], Tensor], values: Tensor) -> Tensor:
    """The contiguous `values`, which the backward pass makes `again` where an operation would keep them.

    Args:
        again: must give the same bits, and hold nothing that would not be kept anyway.
        values: what it gives.
    """
    known = _known.get()
    if known is not None and values.requires_grad:
        known[values.data_ptr()] = _Again(weakref.ref(values), again)
    return values


class _Again(NamedTuple):
    values: weakref.ref[Tensor]
    make: Callable[[], Tensor]


def _keep(tensor: Tensor) -> Tensor | tuple[_Again, torch.Size]:
    """What to keep for a tensor. While the values live, no other tensor can be in their place."""
    found = (_known.get() or {}).get(tensor.data_ptr())
    if found is None or not tensor.is_contiguous():
        return tensor
    values = found.values()
    if values is None or (values.numel(), values.dtype) != (tensor.numel(), tensor.dtype):
        return tensor
    return found, tensor.shape


def _give(kept: Tensor | tuple[_Again, torch.Size]) -> Tensor:
    return kept if isinstance(kept, Tensor) else kept[0].make().view(kept[1])


def _norm(self: Any, values: Tensor) -> Tensor:
    apply: Callable[..., tuple[Tensor, Tensor]] = _RMSNorm.apply
    result, scale = apply(values, self.weight, self.variance_epsilon)
    values, weight = values.detach(), self.weight.detach()
    return made_by(lambda: _scaled(values, weight, scale), result)


def _feed_forward(self: Any, values: Tensor) -> Tensor:
    gate, up = self.gate_proj(values), self.up_proj(values)
    apply: Callable[..., Tensor] = _Gated.apply
    activated: list[Tensor] = []
    product = apply(gate, up, activated)
    gate, up = gate.detach(), up.detach()  # else what is made again would be part of the graph

    def again() -> Tensor:
        activated[:] = [F.silu(gate)]
        product: Tensor = activated[0] * up
        return product

    output: Tensor = self.down_proj(made_by(again, product))
    return output


class _Gated(torch.autograd.Function):
    """silu(gate) * up. In `activated` the backward pass finds silu(gate) if who reads the result just needed it too."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activated: list[Tensor]) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activated = activated
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        activated = ctx.activated.pop() if ctx.activated else F.silu(gate)
        return torch.ops.aten.silu_backward(grad * up, gate), activated.mul_(grad), None


class _RMSNorm(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + eps), in float32 as in transformers, or in float64."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        scale = torch.rsqrt(_exact(values).pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(values, weight, scale)
        ctx.mark_non_differentiable(scale)
        return _scaled(values, weight, scale), scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor | None, None]:
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


def _scaled(values: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    normed = (_exact(values) * scale).to(values.dtype)
    # In place where it may: a second tensor of this size in every norm tears holes into the allocator's memory.
    return normed.mul_(weight) if normed.dtype == weight.dtype else weight * normed

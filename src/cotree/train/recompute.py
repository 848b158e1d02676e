"""Selective recomputation: cheap activations are computed again in the backward pass instead of kept.

Invariant: in float32 and below the forward pass gives the same bits as transformers' modules (in float64 norms are
computed in float64, too), and the gradients are the same up to rounding.

A matrix product needs its input in the backward pass, so autograd keeps the output of each norm, the product of a gated
feed-forward, and joined attention. All three take a few operations a number, and what they are made of (the norm's
input, the two halves, the pieces) is kept anyway: here autograd keeps how to make them again.

Saved-tensor hooks do this. Torch does not check tensors that hooks keep for changes in place, so it is done here.
Hooks around the whole model, such as those that offload to the CPU, no longer see these tensors.
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

# By the address of their values, while a forward pass runs.
_recomputed: ContextVar[dict[int, _Recomputed] | None] = ContextVar("recomputed", default=None)


def recompute_activations(model: nn.Module) -> None:
    """Make a model of a supported family (`models.families`) keep less for its backward pass, in place.

    Not for a model that is compiled (the compiler does this itself) or that checkpoints its layers.
    """
    module: Any
    for module in model.modules():
        name = type(module).__name__
        if name.endswith("RMSNorm"):
            module.forward = MethodType(_norm, module)
        elif name.endswith("MLP") and module.config.hidden_act in ("silu", "swish"):
            module.forward = MethodType(_feed_forward, module)
    forward: Callable[..., Any] = type(model).forward

    @wraps(forward)
    def recomputing(self: nn.Module, *args: Any, **named: Any) -> Any:
        token = _recomputed.set({})
        try:
            with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
                return forward(self, *args, **named)
        finally:
            _recomputed.reset(token)

    model.forward = MethodType(recomputing, model)  # a method, so that a copy of the model calls itself


def recomputed(values: Tensor, make: Callable[[], Tensor]) -> Tensor:
    """The contiguous `values`, which the backward pass makes again where an operation would keep them.

    Args:
        values: what `make` gives.
        make: must give the same bits, and hold no tensor that would not be kept anyway.
    """
    known, place = _recomputed.get(), values.data_ptr()
    if known is not None and values.requires_grad and place:  # tensors without memory of their own are all at 0
        known[place] = _Recomputed(weakref.ref(values), values._version, make)
    return values


class _Recomputed(NamedTuple):
    values: weakref.ref[Tensor]
    version: int
    make: Callable[[], Tensor]

    def gives(self, tensor: Tensor) -> bool:
        """Whether a tensor at the same address is these values. While they live, no other memory can be there."""
        values = self.values()
        return (
            values is not None
            and (values.numel(), values.dtype) == (tensor.numel(), tensor.dtype)
            and tensor._version == self.version
            and tensor.is_contiguous()
        )


def _pack(tensor: Tensor) -> Callable[[], Tensor]:
    """What autograd keeps for a tensor: a function that gives it to the backward pass."""
    found = (_recomputed.get() or {}).get(tensor.data_ptr())
    if found is not None and found.gives(tensor):
        make, shape = found.make, tensor.shape
        return lambda: make().view(shape)
    # Detached: an operation that keeps its own result would else hold itself, and be freed by a backward pass alone.
    kept, version = tensor.detach(), tensor._version

    def unchanged() -> Tensor:
        if kept._version != version:
            raise RuntimeError("a tensor that the backward pass needs was changed in place after the forward pass")
        return kept

    return unchanged


def _unpack(made: Callable[[], Tensor]) -> Tensor:
    return made()


def _norm(self: Any, values: Tensor) -> Tensor:
    apply: Callable[..., tuple[Tensor, Tensor]] = _RMSNorm.apply
    result, scale = apply(values, self.weight, self.variance_epsilon)
    # A copy of the weight: sharded training takes it away before the matrices that read the norm ask for it.
    values, weight = values.detach(), self.weight.detach().clone()
    return recomputed(result, lambda: _scaled(values, weight, scale))


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

    output: Tensor = self.down_proj(recomputed(product, again))
    return output


class _Gated(torch.autograd.Function):
    """silu(gate) * up. The backward pass takes silu(gate) from `activated` if recomputing the product put it there."""

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

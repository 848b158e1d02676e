"""The losses against the paper's formula in float64, their derivatives, and what masking can and cannot change."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cotree.models.encode import EncodedChain
from cotree.train.losses import dpo_loss, joint_loss, token_logps
from cotree.train.rows import sft_weights
from cotree.train.settings import DPO

finite = st.floats(-40, 0, allow_nan=False)
four = st.tuples(finite, finite, finite, finite)


@given(pair=four, beta=st.floats(0.01, 2), eps=st.floats(0, 0.49))
def test_cdpo_is_the_papers_formula_and_its_derivative(
    pair: tuple[float, float, float, float], beta: float, eps: float
) -> None:
    policy, reference = (torch.tensor([each], dtype=torch.float64, requires_grad=True) for each in (pair[:2], pair[2:]))
    loss, margin = dpo_loss(policy, reference, DPO(beta=beta, label_smoothing=eps))
    d = beta * ((pair[0] - pair[1]) - (pair[2] - pair[3]))
    p = 1 / (1 + math.exp(-d))
    q = 1 / (1 + math.exp(d))  # 1 - p, without cancellation
    assert margin.item() == pytest.approx(d, rel=1e-12, abs=1e-12)
    assert loss.item() == pytest.approx(-(1 - eps) * math.log(p) - eps * math.log(q), rel=1e-10, abs=1e-12)
    loss.backward()  # type: ignore[no-untyped-call]
    slope = beta * (eps * p - (1 - eps) * q)  # dL/dd * dd/d(log pi(y_w))
    assert policy.grad is not None
    assert policy.grad[0].tolist() == pytest.approx([slope, -slope], rel=1e-9, abs=1e-12)


def test_gradcheck_in_float64() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(5, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda *x: dpo_loss(x[0], x[1], DPO(beta=0.3, label_smoothing=0.1))[0], inputs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_log_probabilities_have_the_values_and_gradients_of_log_softmax(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    hidden, targets, upstream = torch.randn(75, 8, dtype=dtype), torch.randint(0, 300, (75,)), torch.randn(75)
    weight = torch.randn(300, 8, dtype=dtype)
    weight[::3] *= 30  # logits so far apart that probabilities vanish
    found = []
    for logps in (token_logps, lambda x, y: x.log_softmax(-1)[torch.arange(75), y]):
        leaf = weight.clone().requires_grad_()
        values = logps(hidden @ leaf.T, targets)
        torch.autograd.backward(values, upstream.to(dtype))
        found.append((values.detach(), leaf.grad))
    torch.testing.assert_close(*found, rtol=tolerance, atol=tolerance)


def test_log_probabilities_refuse_a_second_backward_of_what_the_first_overwrote() -> None:
    values = token_logps(torch.randn(3, 5, requires_grad=True).clone(), torch.arange(3)).sum()
    values.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        values.backward()  # type: ignore[no-untyped-call]


def test_the_minimum_of_cdpo_is_where_the_label_noise_says() -> None:
    """With eps > 0 a margin over log((1 - eps) / eps) pushes back; with eps = 0 none does."""
    d = torch.linspace(-8, 8, 3201, dtype=torch.float64)
    zero = torch.zeros(len(d), 2)
    policy = torch.stack([d, zero[:, 0]], 1)
    for eps in (0.05, 0.1, 0.3):
        loss, _ = dpo_loss(policy, zero, DPO(beta=1.0, label_smoothing=eps))
        assert d[loss.argmin()].item() == pytest.approx(math.log((1 - eps) / eps), abs=0.005)
    assert dpo_loss(policy, zero, DPO(beta=1.0, label_smoothing=0.0))[0].argmin() == len(d) - 1


@settings(deadline=None)
@given(prefix=st.integers(0, 6), chosen=st.integers(1, 5), rejected=st.integers(1, 5), seed=st.integers(0, 99))
def test_masking_the_shared_prefix_cannot_change_the_margin_but_changes_the_sft_term(
    prefix: int, chosen: int, rejected: int, seed: int
) -> None:
    """Shared tokens have one and the same log-probability on both sides: they cancel, in value and in gradient."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(prefix, dtype=torch.float64, generator=generator, requires_grad=True)
    good = torch.randn(chosen, dtype=torch.float64, generator=generator, requires_grad=True)
    bad = torch.randn(rejected, dtype=torch.float64, generator=generator, requires_grad=True)
    reference = torch.randn(3, dtype=torch.float64, generator=generator)

    def gradients(masked: bool) -> tuple[float, list[torch.Tensor]]:
        common = 0 if masked else shared.sum()
        reference_common = 0 if masked else reference[2]
        policy = torch.stack([good.sum(), bad.sum()])[None] + common
        loss, _ = dpo_loss(policy, reference[None, :2] + reference_common, DPO(beta=0.5, label_smoothing=0.1))
        total = loss.sum() + 0 * shared.sum()
        return loss.item(), list(torch.autograd.grad(total, [shared, good, bad]))

    masked, plain = gradients(True), gradients(False)
    assert masked[0] == pytest.approx(plain[0], abs=1e-12)
    for left, right in zip(masked[1], plain[1], strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-12)
    assert torch.count_nonzero(plain[1][0].abs() > 1e-12) == 0

    def sft(logps: torch.Tensor) -> torch.Tensor:
        none = torch.zeros(1, dtype=torch.float64)
        weights = sft_weights([EncodedChain([0], [1] * len(logps))], "full")
        return joint_loss(none, [logps], weights, alpha=1.0, pairs=1)[0]

    full = torch.autograd.grad(sft(torch.cat([shared, good])) + 0 * shared.sum(), [shared, good])
    assert (full[0] == -1 / (prefix + chosen)).all()
    suffix = torch.autograd.grad(sft(good), [good])
    assert (suffix[0] == -1 / chosen).all()


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    cut=st.integers(0, 6),
    alpha=st.floats(0, 3),
    norm=st.sampled_from(["token", "pair"]),
)
def test_shares_add_up_to_the_formula_however_a_step_is_split(
    lengths: list[int], cut: int, alpha: float, norm: str
) -> None:
    generator = torch.Generator().manual_seed(1)
    logps = [-torch.rand(length, dtype=torch.float64, generator=generator) for length in lengths]
    losses = torch.rand(len(lengths), dtype=torch.float64, generator=generator)
    means = [values.mean() for values in logps]
    sft = -torch.cat(logps).mean() if norm == "token" else -torch.stack(means).mean()
    expected = losses.mean() + alpha * sft
    chains = [EncodedChain([0], list(range(length))) for length in lengths]
    weights = sft_weights(chains, "full", norm)
    shares = []
    for part in (slice(0, cut), slice(cut, None)):
        if lengths[part]:
            share, dpo, sft_share = joint_loss(
                losses[part], logps[part], weights[part], alpha=alpha, pairs=len(lengths)
            )
            assert share.item() == pytest.approx((dpo + alpha * sft_share).item())
            shares.append(share)
    assert sum(shares).item() == pytest.approx(expected.item(), rel=1e-12)  # type: ignore[union-attr]


def test_low_precision_logits_are_computed_in_float32() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 1000).bfloat16()
    logps = token_logps(logits, torch.arange(6))
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps, token_logps(logits.double(), torch.arange(6)).float(), rtol=0, atol=1e-5)

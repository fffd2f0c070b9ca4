"""Sophia against independent references, and the laws of Algorithms 2 and 3."""

import copy
import itertools
import math
import pickle
import re
import shutil
import unittest.mock
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import GPT, GPTConfig
from nanosophia.baselines import AdaHessian
from nanosophia.chunked_loss import chunked_cross_entropy
from nanosophia.controlled_gamma import ControlledSophia, control_gamma
from nanosophia.distributed import Ranks
from nanosophia.estimators import (
    chunked_squares,
    empirical_fisher_estimator,
    gnb_estimator,
    sample_labels_two_level,
)
from nanosophia.options import Config
from nanosophia.update_rules import compiled_update, sliced_update
from sophia import (
    Sophia,
    SophiaG,
    SophiaH,
    empirical_fisher,
    gauss_newton_bartlett,
    hutchinson,
    sample_labels,
    sampled_binary_cross_entropy,
    sampled_cross_entropy,
    sampled_squared_error,
    sophia_update,
)
from tests.conftest import torchrun


def micro_batches(loss, rows, size):
    """loss(slice) as closures over consecutive slices of so many rows."""
    return [partial(loss, slice(i, min(i + size, rows))) for i in range(0, rows, size)]


def in_chunks(loss, rows, params, chunk_size=None, micro_batch_size=None, all_reduce=None,
              estimator=gauss_newton_bartlett):
    """The estimate of loss(slice) over rows, squared together or chunk by chunk."""
    if chunk_size is None:
        return estimator(micro_batches(loss, rows, micro_batch_size or rows), params,
                         all_reduce=all_reduce)
    chunks = [micro_batches(lambda r, first=first: loss(slice(r.start + first, r.stop + first)),
                            min(chunk_size, rows - first), micro_batch_size or chunk_size)
              for first in range(0, rows, chunk_size)]
    return chunked_squares(chunks, params, all_reduce=all_reduce)


def gnb(model, inputs, params, *, uniforms=None, mask=None, **settings):
    """Gauss-Newton-Bartlett on inputs whose positions are rows, or (rows, T)."""
    def loss(rows):
        logits, u = model(inputs[rows]), None if uniforms is None else uniforms[rows]
        if mask is not None:
            logits, u = logits[mask[rows]], None if u is None else u[mask[rows]]
        return sampled_cross_entropy(logits, uniforms=u)

    return in_chunks(loss, len(inputs), params, **settings)


def one_step(theta, grad, hessian, **settings):
    """The parameter after one step with momentum equal to the gradient and this h."""
    p = nn.Parameter(torch.tensor(theta))
    optimizer = Sophia([p], betas=(0.0, 0.0), **dict(lr=0.1, weight_decay=0.0) | settings)
    optimizer.update_hessian([torch.tensor(hessian)])
    p.grad = torch.tensor(grad)
    optimizer.step()
    return p.detach()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name, estimate", [
    ("sophia_g_k10", "hhat_gnb"), ("sophia_g_k1", "hhat_gnb"), ("sophia_g_k3_b2_95", "hhat_gnb"),
    ("sophia_h_k10", "hhat_hutchinson")])
def test_fifty_steps_equal_the_golden_trajectory(golden_run, name, estimate, seed):
    def make(groups, h):
        return Sophia(groups, betas=(0.96, h.get("b2", 0.99)), gamma=h["gamma"])

    golden_run(name, seed, make, estimate, h="hessian")


def test_update_is_newton_where_unclipped_and_sign_where_curvature_is_absent_or_negative():
    # g/(gamma h): 0.3 unclipped; 3 clipped; h = 0, h < 0, gamma h < eps: sign; g = h = 0: nothing.
    new = one_step([0.0] * 7, [0.3, 3.0, -2.0, 5.0, 1e-3, 0.0, -1e-20],
                   [1.0, 1.0, 0.0, -4.0, 1e-13, 0.0, 1e-30], gamma=1.0)
    expected = torch.tensor([-0.03, -0.1, 0.1, -0.1, -0.1, 0.0, 1e-9])
    torch.testing.assert_close(new, expected, atol=1e-9, rtol=1e-6)


def test_no_coordinate_moves_more_than_lr_beyond_decay():
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(1000))
    optimizer = Sophia([p], lr=1e-2, weight_decay=0.1)
    for _ in range(20):
        before = p.detach().clone()
        optimizer.update_hessian([torch.randn(1000) * 10.0 ** torch.randn(1000)])
        p.grad = torch.randn(1000) * 10.0 ** torch.randn(1000)
        optimizer.step()
        assert ((p - before * (1 - 1e-3)).abs() <= 1e-2 + 1e-6).all()  # rounding of p


def test_without_estimates_it_is_sign_momentum():
    p = nn.Parameter(torch.zeros(3))
    optimizer = Sophia([p], lr=0.5, betas=(0.9, 0.99), weight_decay=0.0)
    p.grad = torch.tensor([1.0, -1e-6, 0.0])
    optimizer.step()
    assert torch.equal(p.detach(), torch.tensor([-0.5, 0.5, 0.0]))


def test_hessian_average_keeps_negative_values():
    p = nn.Parameter(torch.zeros(2))
    optimizer = Sophia([p], betas=(0.96, 0.5))
    optimizer.update_hessian([torch.tensor([-4.0, 2.0])])
    optimizer.update_hessian([torch.tensor([2.0, 2.0])])
    assert torch.equal(optimizer.state[p]["hessian"], torch.tensor([0.0, 1.5]))


def test_state_is_float32_under_bfloat16_parameters_and_survives_a_round_trip():
    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = Sophia([p], lr=1e-2)
    for _ in range(3):
        optimizer.update_hessian([torch.rand(4)])
        p.grad = torch.randn(4).to(torch.bfloat16)
        optimizer.step()
    twin = Sophia([nn.Parameter(p.detach().clone())], lr=1e-2)
    twin.load_state_dict(optimizer.state_dict())
    for name, value in optimizer.state[p].items():
        restored = twin.state[twin.parameters()[0]][name]
        assert value.dtype == torch.float32 and torch.equal(restored, value)
        assert restored.data_ptr() != value.data_ptr()


def test_gradients_closure_and_missing_gradients_follow_torchs_contract():
    p, idle = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = Sophia([p, idle])

    def closure():
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2.0
    assert torch.equal(p.grad, torch.tensor([2.0, 2.0]))
    assert torch.equal(idle.detach(), torch.ones(2))


@pytest.mark.parametrize("settings, words", [
    (dict(lr=-1), "lr = -1 must be at least 0"), (dict(betas=(1, 0.9)), "beta1 = 1"),
    (dict(betas=(0.9, -1)), "beta2 = -1"), (dict(gamma=0), "gamma = 0 must be above 0"),
    (dict(eps=0), "eps = 0"), (dict(weight_decay=-0.1), "weight_decay = -0.1")])
def test_values_out_of_range_are_refused_in_defaults_and_in_groups(settings, words):
    with pytest.raises(ValueError, match=words):
        Sophia([nn.Parameter(torch.zeros(1))], **settings)
    with pytest.raises(ValueError, match=words):
        Sophia([dict(params=[nn.Parameter(torch.zeros(1))], **settings)])


def test_wrong_estimates_and_sparse_gradients_are_refused():
    p = nn.Parameter(torch.zeros(2, 3))
    optimizer = Sophia([p])
    with pytest.raises(ValueError, match="2 estimates for 1 parameters"):
        optimizer.update_hessian([p, p])
    with pytest.raises(ValueError, match=r"shape \(3,\) for a parameter of shape \(2, 3\)"):
        optimizer.update_hessian([torch.zeros(3)])
    p.grad = torch.zeros(2, 3).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()


def has_compiler():
    return any(map(shutil.which, ("c++", "g++", "clang++")))


# Gauss-Newton-Bartlett -------------------------------------------------------------------------


class Softmax(nn.Module):
    """A two-layer classifier small enough for exact diagonals."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.hidden, self.out = nn.Linear(2, 3), nn.Linear(3, 3)
        self.double()
        with torch.no_grad():  # far from uniform, so that wrong labels show
            self.out.weight.mul_(4)

    def forward(self, x):
        return self.out(torch.tanh(self.hidden(x)))


def exact_diagonal(model, inputs, kept=None):
    """Gauss-Newton diagonal of the mean loss over positions, one Jacobian row at a time."""
    params = list(model.parameters())
    logits = model(inputs).flatten(0, -2)  # (n, V)
    rows = range(len(logits)) if kept is None else kept.flatten().nonzero().flatten().tolist()
    total = [torch.zeros_like(p) for p in params]
    for i in rows:
        probabilities = logits[i].softmax(-1).detach()
        jacobian = [torch.autograd.grad(z, params, retain_graph=True) for z in logits[i]]
        for k, p_k in enumerate(probabilities):
            for j, diagonal in enumerate(total):
                mean = sum(q * row[j] for q, row in zip(probabilities, jacobian, strict=True))
                diagonal += p_k * (jacobian[k][j] - mean) ** 2 / len(rows)
    return total


def expectation(model, inputs, **kwargs):
    """Exact expectation of the estimate: every combination of labels, weighted."""
    probabilities = model(inputs).softmax(-1).detach()  # (n, V)
    cdf = probabilities.cumsum(-1)
    middle = cdf - probabilities / 2
    total = None
    for labels in itertools.product(range(probabilities.size(1)), repeat=len(inputs)):
        index = torch.tensor(labels).unsqueeze(1)
        weight = probabilities.gather(1, index).prod()
        uniforms = (middle.gather(1, index) / cdf[:, -1:]).squeeze(1)
        hhat = gnb(model, inputs, list(model.parameters()), uniforms=uniforms, **kwargs)
        total = [weight * h if total is None else t + weight * h
                 for h, t in zip(hhat, total or hhat, strict=True)]
    return total


@pytest.mark.parametrize("kwargs", [
    {}, dict(micro_batch_size=1), dict(micro_batch_size=3), dict(chunk_size=2),
    dict(chunk_size=3), dict(chunk_size=2, micro_batch_size=1)])
def test_expectation_is_the_exact_gauss_newton_diagonal(kwargs):
    model, inputs = Softmax(), torch.randn(4, 2, dtype=torch.float64)
    for mean, exact in zip(expectation(model, inputs, **kwargs), exact_diagonal(model, inputs),
                           strict=True):
        torch.testing.assert_close(mean, exact, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_positions_that_do_not_count_neither_draw_labels_nor_enter_the_factor(chunk_size):
    model, inputs = Softmax(), torch.randn(4, 2, dtype=torch.float64)
    mask = torch.tensor([True, False, True, True])
    mean = expectation(model, inputs, mask=mask, chunk_size=chunk_size)
    for m, exact in zip(mean, exact_diagonal(model, inputs, mask), strict=True):
        torch.testing.assert_close(m, exact, rtol=1e-10, atol=1e-14)


def slope(estimates, exact):
    estimates, exact = (torch.cat([t.flatten() for t in ts]) for ts in (estimates, exact))
    return (estimates @ exact / (exact @ exact)).item()


def tiny_gpt():
    torch.manual_seed(2)
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=4, block_size=4, vocab_size=8)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("kwargs", [dict(), dict(micro_batch_size=1), dict(chunk_size=2)])
def test_slope_against_the_exact_diagonal_of_a_gpt_is_one(kwargs):
    model, idx = tiny_gpt(), torch.randint(8, (4, 4))
    params = list(model.parameters())
    draws = 3000
    total = [torch.zeros_like(p) for p in params]
    for _ in range(draws):
        torch._foreach_add_(total, gnb(model, idx, params, **kwargs))
    # One draw deviates by about sqrt(2) per coordinate; 3 % is more than three deviations.
    assert slope([t / draws for t in total], exact_diagonal(model, idx)) == \
        pytest.approx(1, abs=0.03)


def test_chunks_shrink_the_noise_of_the_estimate():
    model, inputs = Softmax(), torch.randn(64, 2, dtype=torch.float64)
    params = list(model.parameters())

    def deviation(chunk_size):
        draws = torch.stack([gnb(model, inputs, params, chunk_size=chunk_size)[-1]
                             for _ in range(400)])
        return (draws.std(0) / draws.mean(0)).mean().item()

    assert deviation(None) == pytest.approx(math.sqrt(2), rel=0.2)
    assert deviation(4) == pytest.approx(math.sqrt(2 / 16), rel=0.25)


def test_estimate_leaves_gradients_and_graph_alone():
    model, idx = tiny_gpt(), torch.randint(8, (2, 4))
    model(idx, idx).backward()
    before = [p.grad.clone() for p in model.parameters()]
    with torch.no_grad():  # the caller's grad mode does not matter
        gnb(model, idx, list(model.parameters()))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


def test_parameters_that_share_a_gradient_tensor_are_squared_once_each():
    a, b = (nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(2))
    unused = nn.Parameter(torch.zeros(2))
    inputs, u = torch.zeros(2, 3, dtype=torch.float64), torch.tensor([0.1, 0.9])
    both = gnb(lambda x: x + (a + b), inputs, [a, b, unused], uniforms=u)
    alone = gnb(lambda x: x + a, inputs, [a], uniforms=u)
    assert torch.equal(both[0], alone[0]) and torch.equal(both[1], alone[0])
    assert torch.equal(both[2], torch.zeros(2))


def test_estimate_without_losses_is_refused():
    with pytest.raises(ValueError, match="at least one loss"):
        gauss_newton_bartlett([], list(Softmax().parameters()))


def test_labels_are_exact_draws_and_padding_is_never_drawn():
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0, 9.0]]).expand(40_000, 5)
    u = (torch.arange(40_000) + 0.5) / 40_000
    weights = logits.softmax(-1)
    for labels in (sample_labels(logits[:, :4], u),
                   sample_labels_two_level(weights, u, num_classes=4)):
        counts = labels.bincount(minlength=5) / 40_000
        torch.testing.assert_close(counts[:4], logits[0, :4].softmax(-1), atol=1e-4, rtol=0)
        assert counts[4] == 0
    padded = nn.Parameter(logits[:100].clone())
    loss, n = sampled_cross_entropy(padded, num_classes=4)
    loss.backward()
    assert n == 100 and (padded.grad[:, 4] > 0).all()  # the label is another, always


def test_labels_at_the_ends_of_the_unit_interval_are_possible_classes():
    logits = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]]).expand(2, 4)
    assert sample_labels(logits, torch.tensor([0.0, 1 - 2**-24])).tolist() == [1, 2]


@pytest.mark.parametrize("loss_chunk", [0, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_the_trainers_estimators_on_the_fused_loss_give_the_same_estimates(loss_chunk, masked):
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=6, vocab_size=300)).double()
    if loss_chunk:
        model.loss_fn = partial(chunked_cross_entropy, chunk=loss_chunk)
    params, idx = list(model.parameters()), torch.randint(300, (4, 6))
    kept = torch.arange(24).view(4, 6) % 5 > 0 if masked else torch.ones(4, 6, dtype=torch.bool)
    targets = idx.masked_fill(~kept, -100)
    uniforms = torch.rand(4, 6, generator=torch.Generator().manual_seed(5))

    def sampled(rows):
        return sampled_cross_entropy(model(idx[rows])[kept[rows]], num_classes=290,
                                     uniforms=uniforms[rows][kept[rows]])

    def true(rows):
        logits = model(idx[rows]).flatten(0, 1)
        return (F.cross_entropy(logits, targets[rows].flatten(), reduction="sum"),
                kept[rows].sum())

    for chunks in (1, 2):
        config = Config(n_head=1, n_embd=8, hessian_batch_size=4, total_batch_size=4, batch_size=1,
                        hessian_chunks=chunks)
        for make, loss in ((gnb_estimator, sampled), (empirical_fisher_estimator, true)):
            parts = Ranks(0, 1, torch.device("cpu")).chunks(4, chunks, 1)
            fused = make(config, params, 290).estimate(model, idx, targets, parts, 5)
            plain = in_chunks(loss, 4, params, chunk_size=None if chunks == 1 else 2,
                              micro_batch_size=1)
            torch.testing.assert_close(fused, plain)


@pytest.mark.parametrize("shape", [(700, 300), (70_001,), (3, 50, 1000)])
@pytest.mark.parametrize("rows", [False, True])
def test_a_step_by_slices_in_the_cache_is_the_whole_one(shape, rows):
    torch.manual_seed(0)
    p, g, m, h = (torch.randn(shape) for _ in range(4))
    gamma = torch.rand(shape[0], *[1] * (len(shape) - 1)) if rows else 0.5
    whole, sliced = [p.clone(), m.clone()], [p.clone(), m.clone()]
    rest = (gamma, 0.1, 0.99, 0.9, 1e-12, None)
    sophia_update(whole[0], g, whole[1], h, *rest)
    sliced_update(sliced[0], g, sliced[1], h, *rest)
    torch.testing.assert_close(sliced, whole, rtol=1e-6, atol=1e-7)  # one rounding


@pytest.mark.parametrize("classes", [3, 128, 129, 500, 512])
def test_blocks_of_classes_draw_as_one_cumulative_sum_does(classes):
    generator = torch.Generator().manual_seed(classes)
    weights = torch.rand(2000, 512, generator=generator, dtype=torch.float64) ** 8
    weights[:, 130:256] = 0  # a block with two possible classes
    u = torch.rand(2000, generator=generator, dtype=torch.float64)
    cdf = weights[:, :classes].cumsum(1)
    expected = torch.searchsorted(cdf, u.unsqueeze(1) * cdf[:, -1:], right=True).squeeze(1)
    u[7] = -1
    expected[7] = -100
    assert torch.equal(sample_labels_two_level(weights, u, classes), expected)


def test_weights_that_are_not_finite_draw_some_class_and_leave_the_estimate_to_the_guard():
    weights = torch.full((2, 300), float("nan"))
    assert sample_labels_two_level(weights, torch.tensor([0.1, 0.9]), 290).max() < 290
    weights[0] = torch.inf
    assert sample_labels_two_level(weights, torch.tensor([0.1, 0.9])).max() < 300


def test_no_impossible_class_is_drawn_at_the_ends_of_blocks():
    weights = torch.zeros(4, 300)
    weights[:, [0, 127, 200]] = torch.tensor([1.0, 1e-9, 1.0])
    labels = sample_labels_two_level(weights, torch.tensor([0.0, 0.5, 0.5 + 2**-20, 1 - 2**-24]))
    assert set(labels.tolist()) <= {0, 127, 200} and labels[0] == 0 and labels[3] == 200


def test_labels_are_drawn_in_float32_from_bfloat16_logits():
    logits = torch.zeros(4096, 1000, dtype=torch.bfloat16)
    u = (torch.arange(4096) + 0.5) / 4096
    labels = sample_labels(logits, u)
    assert (labels - (u * 1000).long()).abs().max() <= 1


class Enumerated:
    """Every combination of labels of four positions in two sequences, with its probability."""

    def __init__(self):
        self.model, torch_inputs = Softmax(), torch.randn(4, 2, dtype=torch.float64)
        self.inputs = torch_inputs
        logits = self.model(self.inputs)
        self.probabilities = logits.softmax(-1).detach()
        params = list(self.model.parameters())
        self.gradients = [[  # position, label -> gradient of its cross-entropy, one flat vector
            torch.cat([g.flatten() for g in torch.autograd.grad(
                F.cross_entropy(logits[i], torch.tensor(y)), params, retain_graph=True)])
            for y in range(3)] for i in range(4)]
        self.exact = torch.cat([d.flatten() for d in exact_diagonal(self.model, self.inputs)])

    def slope(self, estimate, probabilities=None):
        """<mean, exact> / <exact, exact> of estimate(four gradients) over labels so drawn."""
        probabilities = self.probabilities if probabilities is None else probabilities
        mean = torch.zeros_like(self.exact)
        for labels in itertools.product(range(3), repeat=4):
            weight = math.prod(probabilities[i, y].item() for i, y in enumerate(labels))
            if weight:
                mean += weight * estimate(torch.stack(
                    [self.gradients[i][y] for i, y in enumerate(labels)]))
        return (mean @ self.exact / (self.exact @ self.exact)).item()


def test_the_wrong_estimators_of_other_codes_are_told_apart():
    """The table of what goes wrong, each by its exact expectation; ours is the first line."""
    at = Enumerated()

    def square(g):  # mean gradient over the positions, squared
        return g.mean(0) ** 2

    p = at.probabilities
    sharpened = (p ** (1 / 0.7)) / (p ** (1 / 0.7)).sum(-1, keepdim=True)
    argmax = F.one_hot(p.argmax(-1), 3).double()
    ours = expectation(at.model, at.inputs)
    assert slope(ours, [at.exact]) == pytest.approx(1, rel=1e-10)
    assert at.slope(lambda g: 4 * square(g)) == pytest.approx(1, rel=1e-10)
    assert at.slope(lambda g: 2 * square(g)) == pytest.approx(1 / 2)  # sequences, not positions
    halves = lambda g: (g[:2], g[2:])  # noqa: E731 (two ranks or micro-batches)
    own = at.slope(lambda g: sum(2 * square(half) for half in halves(g)) / 2)
    assert own == pytest.approx(1, rel=1e-10)  # squared apart with their own factor: right too
    assert at.slope(lambda g: sum(4 * square(half) for half in halves(g)) / 2) == pytest.approx(2)
    assert at.slope(lambda g: 4 * sum(half.mean(0) for half in halves(g)) ** 2) == pytest.approx(4)
    assert abs(at.slope(lambda g: 4 * square(g), sharpened) - 1) > 0.03
    assert abs(at.slope(lambda g: 4 * square(g), argmax) - 1) > 0.1
    clipped = at.slope(lambda g: 4 * square(g) * min(1, 0.25 / g.mean(0).norm().item()) ** 2)
    assert clipped < 0.9
    # One rank has three positions, the other one: means of means are wrong, the weighted sum right.
    uneven = lambda g: (g[:3], g[3:])  # noqa: E731
    wrong = at.slope(lambda g: 4 * (sum(part.mean(0) for part in uneven(g)) / 2) ** 2)
    assert abs(wrong - 1) > 0.03
    weighted = at.slope(lambda g: sum(len(part) / 4 * len(part) * square(part)
                                      for part in uneven(g)))
    assert weighted == pytest.approx(1, rel=1e-10)


def test_ranks_with_unequal_counts_give_the_exact_diagonal():
    """One rank's rows and masks beside another's, reduced by a sum, in one square and in two."""
    model, inputs = Softmax(), torch.randn(4, 2, dtype=torch.float64)
    mask = torch.tensor([True, True, True, False])
    u = torch.rand(4)
    params = list(model.parameters())
    for chunk_size in (None, 2):
        whole = gnb(model, inputs, params, uniforms=u, mask=mask, chunk_size=chunk_size)
        parts: list = []
        for rows, reduce in ((slice(0, 2), lambda ts, parts=parts: parts.extend(
                                 t.clone() for t in ts)),
                             (slice(2, 4), lambda ts, parts=parts: torch._foreach_add_(ts, parts))):
            both = gnb(model, inputs[rows], params, uniforms=u[rows], mask=mask[rows],
                       chunk_size=chunk_size, all_reduce=reduce)
        for a, b in zip(whole, both, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_true_labels_give_the_empirical_fisher_and_not_gauss_newton():
    model, inputs = Softmax(), torch.randn(4, 2, dtype=torch.float64)
    targets = torch.tensor([0, 1, -100, 2])
    params = list(model.parameters())
    kept = targets != -100
    grad = torch.autograd.grad(F.cross_entropy(model(inputs[kept]), targets[kept]), params)

    def loss(rows):
        return (F.cross_entropy(model(inputs[rows]), targets[rows], reduction="sum"),
                kept[rows].sum())

    for micro in (None, 1):
        found = in_chunks(loss, 4, params, micro_batch_size=micro, estimator=empirical_fisher)
        for f, g in zip(found, grad, strict=True):
            torch.testing.assert_close(f, 3 * g * g, rtol=1e-12, atol=0)
    apart = in_chunks(loss, 4, params, chunk_size=1)
    assert not torch.allclose(apart[0], found[0])
    assert abs(slope(found, exact_diagonal(model, inputs, kept)) - 1) > 0.05


def test_gaussian_likelihood_gives_the_gauss_newton_diagonal_of_squared_error():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    inputs = torch.randn(5, 2, dtype=torch.float64)
    params = list(model.parameters())
    exact = [torch.zeros_like(p) for p in params]
    for output in model(inputs).flatten():
        for d, row in zip(exact, torch.autograd.grad(output, params, retain_graph=True),
                          strict=True):
            d += row**2 / 5
    draws = 4000
    total = [torch.zeros_like(p) for p in params]
    for _ in range(draws):
        torch._foreach_add_(total, in_chunks(lambda rows: sampled_squared_error(
            model(inputs[rows])), 5, params, chunk_size=1))
    assert slope([t / draws for t in total], exact) == pytest.approx(1, abs=0.03)


# Hutchinson ------------------------------------------------------------------------------------


def dense_hessian(model, loss):
    """The Hessian of loss() over all parameters, one row at a time."""
    params = list(model.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        gradient = torch.autograd.grad(loss(), params, create_graph=True)
    gradient = torch.cat([g.flatten() for g in gradient])
    rows = [torch.cat([r.flatten() for r in torch.autograd.grad(
        g, params, retain_graph=True, materialize_grads=True, allow_unused=True)])
        for g in gradient]
    return torch.stack(rows)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_hutchinson_is_u_times_hessian_times_u_for_any_number_of_parts(parts):
    model, idx = tiny_gpt(), torch.randint(8, (4, 4))
    params = list(model.parameters())
    losses = [lambda c=c: model(c, c) / parts for c in idx.chunk(parts)]
    generator = torch.Generator().manual_seed(4)
    found = hutchinson(losses, params, generator=generator)
    generator.manual_seed(4)
    u = torch.cat([torch.randn(p.shape, generator=generator, dtype=p.dtype).flatten()
                   for p in params])
    expected = u * (dense_hessian(model, lambda: model(idx, idx)) @ u)
    torch.testing.assert_close(torch.cat([f.flatten() for f in found]), expected, rtol=1e-9,
                               atol=1e-12)
    assert all(p.grad is None for p in params)


def test_hutchinson_averages_to_the_hessians_diagonal_negative_entries_included():
    model, idx = tiny_gpt(), torch.randint(8, (2, 4))
    params = list(model.parameters())
    exact = dense_hessian(model, lambda: model(idx, idx)).diagonal()
    draws = 3000
    total = torch.zeros_like(exact)
    for _ in range(draws):
        total += torch.cat([f.flatten() for f in hutchinson([lambda: model(idx, idx)], params)])
    assert (exact < 0).any()
    assert slope([total / draws], [exact]) == pytest.approx(1, abs=0.06)


def test_hutchinson_refuses_a_forced_fused_kernel_in_words():
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=4, vocab_size=8))
    idx = torch.randint(8, (2, 4))

    def forced():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return model(idx, idx)

    with pytest.raises(RuntimeError, match="hutchinson needs second derivatives"):
        hutchinson([forced], list(model.parameters()))


# The controlled gamma --------------------------------------------------------------------------


def controlled(shape, **options):
    """A ControlledSophia after one step on random m and h with one row of vanishing curvature."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(shape))
    optimizer = ControlledSophia([p], lr=1e-3, betas=(0.5, 0.5), **options)
    optimizer.update_hessian([torch.rand(shape) * torch.logspace(-6, 0, shape[0]).unsqueeze(1)])
    p.grad = torch.randn(shape)
    optimizer.step()
    return p, optimizer


@pytest.mark.parametrize("target", [0.2, 0.95])
def test_controlled_gamma_leaves_the_target_fraction_of_the_tensor_unclipped(target):
    p, optimizer = controlled((60, 50), gamma_target=target)
    assert optimizer.state[p]["gamma"].shape == ()
    statistics = optimizer.statistics()
    assert statistics["unclipped_fraction"].item() == pytest.approx(target, abs=2 / 3000)
    assert statistics["gamma"] == pytest.approx(optimizer.state[p]["gamma"].item())


def test_with_rows_every_row_has_its_own_whatever_its_curvature():
    p, optimizer = controlled((64, 50), gamma_target=0.9, gamma_rows=True)
    state = optimizer.state[p]
    assert state["gamma"].shape == (64, 1)
    unclipped = state["exp_avg"].abs() < state["gamma"] * state["hessian"]
    assert torch.equal(unclipped.sum(1), torch.full((64,), 44))  # 45th is the quantile itself
    assert (state["gamma"][0] / state["gamma"][-1]).log10().item() == pytest.approx(6, abs=1)


def test_large_tensors_are_sampled_evenly():
    p, optimizer = controlled((500, 1000), gamma_target=0.5)
    assert optimizer.statistics()["unclipped_fraction"].item() == pytest.approx(0.5, abs=0.03)


def test_gamma_is_smoothed_in_the_logarithm_and_kept_where_there_is_no_curvature():
    g, h = torch.tensor([4.0, 1.0]), torch.ones(2)
    gamma = lambda old, g, h: control_gamma(  # noqa: E731
        old, g, torch.zeros(2), h, beta1=0.0, target=1 - 1e-9, rows=False)
    first = gamma(None, g, h)
    assert first == 4
    assert gamma(first, 2 * g, h) == pytest.approx(4 ** 0.8 * 8 ** 0.2)
    assert gamma(first, g, torch.zeros(2)) == 4 and gamma(first, 0 * g, h) == 4
    assert gamma(None, g, -h) == 0  # no positive curvature yet: sign steps


def test_controlled_gamma_survives_a_state_dict_round_trip():
    p, optimizer = controlled((8, 4), gamma_target=0.5, gamma_rows=True)
    q = nn.Parameter(p.detach().clone())
    twin = ControlledSophia([q], lr=1e-3, betas=(0.5, 0.5), gamma_target=0.5, gamma_rows=True)
    twin.load_state_dict(optimizer.state_dict())
    for optimizer_, x in ((optimizer, p), (twin, q)):
        for _ in range(2):
            optimizer_.update_hessian([torch.full((8, 4), 0.3)])
            x.grad = torch.full((8, 4), 0.1)
            optimizer_.step()
    assert torch.equal(p, q)
    assert torch.equal(optimizer.state[p]["gamma"], twin.state[q]["gamma"])


@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_an_estimate_whose_step_was_skipped_still_sets_gamma_in_a_copy(way):
    p, optimizer = controlled((8, 4), gamma_target=0.5)
    optimizer.update_hessian([torch.full((8, 4), 0.3)])
    optimizer.found_inf = torch.ones(())
    optimizer.step()  # skipped
    optimizer.found_inf = None
    if way == "state_dict":
        twin = ControlledSophia([nn.Parameter(p.detach().clone())], lr=1e-3, betas=(0.5, 0.5),
                                gamma_target=0.5)
        twin.load_state_dict(optimizer.state_dict())
    else:
        twin = copy.deepcopy(optimizer) if way == "deepcopy" else \
            pickle.loads(pickle.dumps(optimizer))
    before = optimizer.state[p]["gamma"].clone()
    for optimizer_ in (optimizer, twin):
        x, = optimizer_.parameters()
        x.grad = torch.full((8, 4), 0.1)
        optimizer_.step()
    q, = twin.parameters()
    assert torch.equal(p, q) and optimizer.state[p]["gamma"] != before
    assert torch.equal(optimizer.state[p]["gamma"], twin.state[q]["gamma"])


def test_a_controlled_gamma_has_the_bias_correction_in_it():
    p, optimizer = controlled((60, 50), gamma_target=0.5, bias_correction=True)
    assert optimizer.statistics()["unclipped_fraction"].item() == pytest.approx(0.5, abs=2 / 3000)


def test_the_control_can_be_changed_between_runs():
    p, optimizer = controlled((60, 50), gamma_target=0.5, gamma_rows=True)
    group = optimizer.param_groups[0]
    group["gamma_rows"] = False
    optimizer.update_hessian([torch.rand(60, 50)])
    optimizer.step()
    assert optimizer.state[p]["gamma"].shape == ()
    group.update(gamma_target=0.0, gamma=1e9)
    assert optimizer.statistics()["unclipped_fraction"].item() > 0.99


def test_copies_empty_groups_and_empty_parameters_step():
    p, optimizer = controlled((60, 50), gamma_target=0.5)
    optimizer.add_param_group(dict(params=[]))
    optimizer.add_param_group(dict(params=[nn.Parameter(torch.zeros(0))]))
    twin = copy.deepcopy(optimizer)
    for optimizer_ in (optimizer, twin):
        for x in optimizer_.parameters():
            x.grad = torch.ones_like(x)
        optimizer_.update_hessian([torch.ones_like(x) for x in optimizer_.parameters()])
        optimizer_.step()
    assert torch.equal(p, twin.parameters()[0])


def test_bias_correction_divides_h_by_its_missing_weight():
    new = []
    for beta2, corrected in ((0.0, False), (0.99, True)):
        p = nn.Parameter(torch.zeros(3))
        optimizer = ControlledSophia([p], lr=0.1, betas=(0.0, beta2), gamma=1.0, weight_decay=0.0,
                                     bias_correction=corrected)
        for _ in range(2):
            optimizer.update_hessian([torch.tensor([1.0, 2.0, 4.0])])
        p.grad = torch.ones(3)
        optimizer.step()
        new.append(p.detach())
    torch.testing.assert_close(new[0], new[1], rtol=1e-5, atol=0)


def test_statistics_tell_kinds_apart_and_measure_the_update():
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.full((2,), 3.0))
    optimizer = Sophia([dict(params=[a], kind="embedding"), dict(params=[b], kind="vector")],
                       lr=0.5, betas=(0.0, 0.0), gamma=1.0, weight_decay=0.0)
    assert optimizer.statistics() == {}
    optimizer.update_hessian([torch.tensor([2.0, 0.0]), torch.tensor([4.0, 4.0])])
    a.grad, b.grad = torch.tensor([1.0, 1.0]), torch.tensor([2.0, 8.0])
    before = [a.detach().clone(), b.detach().clone()]
    optimizer.step()
    found = {k: v.item() for k, v in optimizer.statistics().items()}
    moved = math.sqrt(sum(((x - y) ** 2).sum().item()
                          for x, y in zip(before, (a.detach(), b.detach()), strict=True)))
    assert found["update_norm"] == pytest.approx(moved)
    assert found["unclipped_fraction"] == 0.5
    assert (found["unclipped/embedding"], found["unclipped/vector"]) == (0.5, 0.5)
    assert found["hessian_floor_fraction"] == 0.25
    assert found["hessian_norm"] == pytest.approx(6) and found["momentum_norm"] == \
        pytest.approx(math.sqrt(70))


def test_statistics_are_in_the_states_precision_under_low_precision_parameters():
    p = nn.Parameter(torch.full((4,), 300.0, dtype=torch.float16))  # its square overflows float16
    optimizer = Sophia([p])
    p.grad = torch.ones(4, dtype=torch.float16)
    optimizer.step()
    assert optimizer.statistics()["parameter_norm"].item() == pytest.approx(600, rel=1e-3)


def test_sophia_g_and_h_are_the_papers_settings():
    p = [nn.Parameter(torch.zeros(1))]
    g, h = SophiaG(p).defaults, SophiaH(p).defaults
    assert (g["gamma"], h["gamma"]) == (0.05, 0.01)
    for defaults in (g, h):
        assert (defaults["betas"], defaults["eps"], defaults["weight_decay"]) == \
            ((0.96, 0.99), 1e-12, 0.2)


@pytest.mark.parametrize("options", [{}, dict(gamma_target=0.5),
                                     dict(gamma_target=0.5, gamma_rows=True)])
def test_the_compiled_update_equals_the_eager_one(options):
    if not has_compiler():
        pytest.skip("torch.compile needs a C++ compiler")
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(shape)) for shape in ((40, 30), (7,), (3, 5), (1,))]
        optimizer = (ControlledSophia if options else Sophia)(params, lr=1e-2, **options)
        if compiled:
            optimizer.rule = compiled_update
        for t in range(6):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (t + 1)
            if t % 3 == 0:
                optimizer.update_hessian([torch.rand_like(p) ** 4 - 0.01 for p in params])
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in params]))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


def test_on_fsdp2_shards_it_steps_as_on_whole_parameters():
    cases = ["plain", "sliced", "tensors", "rows"] + ["compiled"] * has_compiler()
    result = torchrun(2, "-m", "tests.fsdp_worker", *cases)
    assert result.returncode == 0, result.stderr[-3000:]


# A library -------------------------------------------------------------------------------------


def test_an_image_classifier_and_a_regression_train_in_plain_torch():
    torch.manual_seed(0)
    images = torch.randn(128, 1, 8, 8)
    labels = (images.mean((1, 2, 3)) > 0).long()
    classifier = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    x = torch.randn(256, 4)
    y = torch.sin(x @ torch.randn(4, 2))
    regressor = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 2))
    for model, inputs, loss_of, sampled_loss, goal in (
            (classifier, images, lambda out: F.cross_entropy(out, labels), sampled_cross_entropy,
             0.2),
            (regressor, x, lambda out: 0.5 * (out - y).square().sum(1).mean(),
             sampled_squared_error, 0.1)):
        optimizer = ControlledSophia(model.parameters(), lr=1e-2, betas=(0.9, 0.95),
                                     gamma_target=0.5)
        for t in range(200):
            if t % 10 == 0:
                optimizer.update_hessian(in_chunks(
                    lambda rows: sampled_loss(model(inputs[rows])),  # noqa: B023 (called at once)
                    len(inputs), optimizer.parameters(), chunk_size=32))
            loss = loss_of(model(inputs))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert loss < goal, sampled_loss


def test_ten_lines_train_a_classifier_that_is_no_language_model():
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    y = (x @ torch.randn(8, 3)).argmax(1)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
    optimizer = Sophia(model.parameters(), lr=1e-2, betas=(0.9, 0.99), gamma=1.0)
    for t in range(100):
        if t % 10 == 0:
            losses = [lambda: sampled_cross_entropy(model(x))]
            optimizer.update_hessian(gauss_newton_bartlett(losses, optimizer.parameters()))
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.2


def test_the_readmes_example_runs_as_it_stands(capsys):
    from tests.conftest import ROOT
    torch.manual_seed(0)
    readme = (ROOT / "README.md").read_text()
    example = readme.split("```python\n")[1].split("```")[0]
    exec(compile(example, "README.md", "exec"), {})
    assert float(capsys.readouterr().out.partition("(")[2].partition(",")[0]) < 0.3


# A wrong curvature is never computed silently ----------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-5, 300.0])
def test_squares_are_taken_in_float32_under_half_precision(dtype, scale):
    """In float16 the squares of these gradients are zero or infinite."""
    p = nn.Parameter(torch.ones(64, dtype=dtype))
    a = (scale * torch.rand(3, 64, generator=torch.Generator().manual_seed(0))).to(dtype)
    losses = [lambda row=row: ((p * row).sum(), torch.tensor(5000)) for row in a]
    (found,) = gauss_newton_bartlett(losses, [p])
    S = a.float().sum(0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, S * S / 15000, rtol=1e-6, atol=0)  # the count is exact too
    optimizer = Sophia([p])
    optimizer.update_hessian([found])
    torch.testing.assert_close(optimizer.state[p]["hessian"], found * 0.01)


@pytest.mark.parametrize("shape, options, words", [
    ((5,), {}, "logits of shape (5,) are not (B, V)"), ((), {}, "logits of shape ()"),
    ((5, 1), {}, "sampled_binary_cross_entropy"), ((2, 3, 4, 5), {}, "are not (B, V) or (B, T, V)"),
    ((5, 3), dict(num_classes=4), "num_classes = 4 must be from 2 to 3"),
    ((5, 3), dict(num_classes=0), "num_classes = 0"), ((5, 3), dict(num_classes=-1), "from 2 to 3"),
    ((5, 3), dict(uniforms=torch.rand(1)), "1 uniforms were given for 5 labels"),
    ((5, 3), dict(uniforms=torch.rand(5, 3)), "15 uniforms were given for 5 labels")])
def test_outputs_of_odd_shapes_are_refused(shape, options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        sampled_cross_entropy(torch.zeros(shape), **options)


def test_means_without_a_batch_are_refused():
    with pytest.raises(ValueError, match=r"write means.unsqueeze\(-1\)"):
        sampled_squared_error(torch.zeros(5))
    assert sampled_squared_error(torch.zeros(5, 1))[1] == 5


@pytest.mark.parametrize("heads", [1, 2])
def test_bernoulli_likelihood_gives_the_gauss_newton_diagonal_of_a_binary_head(heads):
    """Averaged over every possible drawing of labels, each at its probability: exact."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, heads)).double()
    x, params = torch.randn(4 // heads, 2, dtype=torch.float64), list(model.parameters())
    z = model(x).flatten()
    exact = [torch.zeros_like(p) for p in params]
    for logit in z:
        p = logit.detach().sigmoid()
        for d, g in zip(exact, torch.autograd.grad(logit, params, retain_graph=True), strict=True):
            d += p * (1 - p) * g * g / len(z)
    mean = [torch.zeros_like(p) for p in params]
    for labels in itertools.product((0.0, 1.0), repeat=len(z)):
        drawn = torch.tensor(labels, dtype=torch.float64)
        chance = torch.where(drawn == 1, z.detach().sigmoid(), 1 - z.detach().sigmoid()).prod()
        u = drawn * (1 - 1e-9)  # the inverse of the distribution gives class 0 at 0, 1 near 1
        with unittest.mock.patch("torch.rand_like", lambda like, u=u: u.view_as(like)):
            found = gauss_newton_bartlett([lambda: sampled_binary_cross_entropy(model(x))], params)
        for m, f in zip(mean, found, strict=True):
            m += chance * f
    for m, e in zip(mean, exact, strict=True):
        torch.testing.assert_close(m, e, rtol=1e-10, atol=1e-14)


def test_frozen_layers_are_left_out():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    for p in model[0].parameters():
        p.requires_grad_(False)
    x, before = torch.randn(9, 4), model[0].weight.clone()
    optimizer = Sophia(model.parameters())
    for estimator in (lambda params: gauss_newton_bartlett(
            [lambda: sampled_cross_entropy(model(x))], params),
            lambda params: hutchinson([lambda: model(x).square().mean()], params)):
        estimates = estimator(optimizer.parameters())
        assert [hhat is None for hhat in estimates] == [True, True, False, False]
        optimizer.update_hessian(estimates)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(model[0].weight, before) and len(optimizer.state) == 2
    model[0].requires_grad_(True)  # and may join later
    optimizer.update_hessian(gauss_newton_bartlett([lambda: sampled_cross_entropy(model(x))],
                                                   optimizer.parameters()))
    assert len(optimizer.state) == 4


@pytest.mark.parametrize("cls", [Sophia, ControlledSophia])
def test_complex_parameters_are_refused(cls):
    with pytest.raises(ValueError, match="takes no complex parameters"):
        cls([nn.Parameter(torch.zeros(3, dtype=torch.complex64))])
    optimizer = cls([nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match="takes no complex parameters"):
        optimizer.add_param_group(dict(params=[torch.zeros(2, dtype=torch.complex128)]))
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("make", [
    lambda p: Sophia(p), lambda p: ControlledSophia(p, gamma_target=0.5),
    lambda p: ControlledSophia(p, bias_correction=True)], ids=["plain", "controlled", "corrected"])
def test_an_estimate_that_is_not_finite_changes_nothing_and_is_counted(make, value):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(6, 4)) for _ in range(2)]
    optimizer = make(params)

    def step():
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()

    for first in (True, False):  # before any estimate, and after one
        if not first:
            optimizer.update_hessian([torch.rand_like(p) for p in params])
        step()
        before = copy.deepcopy(optimizer.state_dict()["state"])
        bad = [torch.rand_like(p) for p in params]
        bad[1][2, 3] = value
        optimizer.update_hessian(bad)
        after = optimizer.state_dict()["state"]
        for i in before:
            for name, x in before[i].items():
                assert torch.equal(x, after[i][name]), (i, name)
        assert optimizer.nonfinite_estimates == 2 - first
        step()
        assert all(torch.isfinite(p).all() for p in params)


def test_a_curvature_that_overflows_in_the_states_precision_changes_nothing():
    p = nn.Parameter(torch.ones(3))
    for optimizer, hhat in ((Sophia([p]), torch.full((3,), 1e300, dtype=torch.float64)),
                            (AdaHessian([p]), torch.full((3,), 1e30))):  # averages the square
        optimizer.update_hessian([hhat])
        assert optimizer.nonfinite_estimates == 1 and not optimizer.state


@pytest.mark.parametrize("arguments, words", [
    (dict(betas=(0.9,)), "betas = (0.9,) must be a pair of numbers"),
    (dict(betas=0.9), "betas = 0.9 must be a pair"),
    (dict(betas=("a", 0.9)), "beta1 = 'a' must be"),
    (dict(betas=(0.9, None)), "beta2 = None must be in [0, 1)"), (dict(lr="x"), "lr = 'x' must be"),
    (dict(lr=float("nan")), "lr = nan must be"), (dict(lr=float("inf")), "lr = inf must be"),
    (dict(gamma=None), "gamma = None must be above 0"), (dict(eps=0), "eps = 0 must be above 0"),
    (dict(weight_decay=-1), "weight_decay = -1 must be at least 0")])
def test_bad_arguments_name_themselves(arguments, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Sophia([nn.Parameter(torch.zeros(3))], **arguments)


@pytest.mark.parametrize("foreign", ["adamw", "authors", "shape", "count"])
def test_the_state_of_another_optimizer_or_model_is_refused_and_nothing_changes(foreign):
    def trained(optimizer, p):
        p.grad = torch.ones_like(p)
        optimizer.step()
        return optimizer

    p = nn.Parameter(torch.ones(3))
    optimizer = trained(Sophia([p]), p)
    before = copy.deepcopy(optimizer.state_dict())
    state = copy.deepcopy(before)
    if foreign == "adamw":
        state = trained(torch.optim.AdamW([p]), p).state_dict()
    elif foreign == "authors":  # theirs has step, exp_avg, hessian; its h is not ours
        del state["state"][0]["estimates"]
        state["state"][0]["step"] = torch.tensor(1.0)
    elif foreign == "shape":
        q = nn.Parameter(torch.ones(4))
        state = trained(Sophia([q]), q).state_dict()
    else:
        state = Sophia([nn.Parameter(torch.ones(3)) for _ in range(2)]).state_dict()
    with pytest.raises(ValueError, match="another optimizer or model|size of optimizer's group|"
                                         "doesn't match"):
        optimizer.load_state_dict(state)
    for name, x in before["state"][0].items():
        assert torch.equal(optimizer.state[p][name], x)


def test_rounding_does_not_decide_whether_the_coordinate_at_the_quantile_is_clipped():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(16, dtype=torch.float64))
    optimizer = ControlledSophia([p], gamma_target=0.9)
    p.grad = torch.randn_like(p)
    optimizer.update_hessian([torch.rand_like(p)])
    optimizer.step()
    m, found = optimizer.state[p]["exp_avg"].clone(), set()
    for _ in range(30):
        optimizer.state[p]["exp_avg"].copy_(m * (1 + 1e-14 * torch.randn_like(m)))
        found.add(optimizer.statistics()["unclipped_fraction"].item())
    assert found == {15 / 16}


def test_an_older_state_takes_what_it_lacks_from_the_defaults_and_the_authors_is_refused():
    p = nn.Parameter(torch.ones(3))
    first = Sophia([p], lr=0.1, gamma=2.0)
    p.grad = torch.ones(3)
    first.step()
    state = first.state_dict()
    del state["param_groups"][0]["eps"]
    second = Sophia([p], lr=0.3, gamma=3.0, eps=1e-5)
    second.load_state_dict(state)
    assert (second.param_groups[0]["gamma"], second.param_groups[0]["eps"]) == (2.0, 1e-5)
    second.step()
    foreign = dict(state=dict(state["state"]), param_groups=[dict(
        lr=0.1, betas=(0.965, 0.99), rho=0.04, weight_decay=0.1, maximize=False, capturable=False,
        params=[0])])
    with pytest.raises(ValueError, match="a state of the authors' SophiaG"):
        second.load_state_dict(foreign)
    assert second.param_groups[0]["gamma"] == 2.0

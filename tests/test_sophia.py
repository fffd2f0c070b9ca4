"""Sophia against independent references, and the laws of Algorithms 2 and 3."""

import itertools
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import GPT, GPTConfig
from sophia import Sophia, gauss_newton_bartlett, sample_labels


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


# Gauss-Newton-Bartlett -------------------------------------------------------------------------


class Softmax(nn.Module):
    """A two-layer classifier small enough for exact diagonals."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.hidden, self.out = nn.Linear(2, 3), nn.Linear(3, 3)
        self.double()

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
        hhat = gauss_newton_bartlett(model, inputs, list(model.parameters()), uniforms=uniforms,
                                     **kwargs)
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
        torch._foreach_add_(total, gauss_newton_bartlett(model, idx, params, **kwargs))
    # One draw deviates by about sqrt(2) per coordinate; 3 % is more than three deviations.
    assert slope([t / draws for t in total], exact_diagonal(model, idx)) == \
        pytest.approx(1, abs=0.03)


def test_chunks_shrink_the_noise_of_the_estimate():
    model, inputs = Softmax(), torch.randn(64, 2, dtype=torch.float64)
    params = list(model.parameters())

    def deviation(chunk_size):
        draws = torch.stack([gauss_newton_bartlett(model, inputs, params, chunk_size=chunk_size)[-1]
                             for _ in range(400)])
        return (draws.std(0) / draws.mean(0)).mean().item()

    assert deviation(None) == pytest.approx(math.sqrt(2), rel=0.2)
    assert deviation(4) == pytest.approx(math.sqrt(2 / 16), rel=0.25)


def test_estimate_leaves_gradients_and_graph_alone():
    model, idx = tiny_gpt(), torch.randint(8, (2, 4))
    model(idx, idx).backward()
    before = [p.grad.clone() for p in model.parameters()]
    with torch.no_grad():  # the caller's grad mode does not matter
        gauss_newton_bartlett(model, idx, list(model.parameters()))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


def test_parameters_that_share_a_gradient_tensor_are_squared_once_each():
    a, b = (nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(2))
    unused = nn.Parameter(torch.zeros(2))
    inputs, u = torch.zeros(2, 3, dtype=torch.float64), torch.tensor([0.1, 0.9])
    both = gauss_newton_bartlett(lambda x: x + (a + b), inputs, [a, b, unused], uniforms=u)
    alone = gauss_newton_bartlett(lambda x: x + a, inputs, [a], uniforms=u)
    assert torch.equal(both[0], alone[0]) and torch.equal(both[1], alone[0])
    assert torch.equal(both[2], torch.zeros(2))


def test_estimate_without_rows_is_refused():
    model = Softmax()
    with pytest.raises(ValueError, match="at least one row"):
        gauss_newton_bartlett(model, torch.zeros(0, 2), list(model.parameters()))


def test_labels_are_exact_draws_and_padding_is_never_drawn():
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0, 9.0]]).expand(40_000, 5)
    u = (torch.arange(40_000) + 0.5) / 40_000
    counts = sample_labels(logits, u, num_classes=4).bincount(minlength=5) / 40_000
    torch.testing.assert_close(counts[:4], logits[0, :4].softmax(-1), atol=1e-4, rtol=0)
    assert counts[4] == 0


def test_labels_at_the_ends_of_the_unit_interval_are_possible_classes():
    logits = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]]).expand(2, 4)
    assert sample_labels(logits, torch.tensor([0.0, 1 - 2**-24])).tolist() == [1, 2]


def test_labels_are_drawn_in_float32_from_bfloat16_logits():
    logits = torch.zeros(4096, 1000, dtype=torch.bfloat16)
    u = (torch.arange(4096) + 0.5) / 4096
    labels = sample_labels(logits, u)
    assert (labels - (u * 1000).long()).abs().max() <= 1


def test_ten_lines_train_a_classifier_that_is_no_language_model():
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    y = (x @ torch.randn(8, 3)).argmax(1)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
    optimizer = Sophia(model.parameters(), lr=1e-2, betas=(0.9, 0.99), gamma=1.0)
    for t in range(100):
        if t % 10 == 0:
            optimizer.update_hessian(gauss_newton_bartlett(model, x, optimizer.parameters()))
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.2

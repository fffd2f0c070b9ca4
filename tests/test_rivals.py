"""Matrix optimizers and Adam's descendants: definitions, second implementations, bad input."""

import math

import pytest
import torch
import torch.nn as nn

from nanosophia.adam_family import MARS, AdEMAMix, ScheduleFreeAdamW
from nanosophia.matrix_optimizers import SOAP, Kron, MetricMuon, orthogonalise

SHAPES = [(6, 10), (8, 8), (12, 5)]


def parameters(shapes=SHAPES, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def trained(make, steps=20, *, until=None, average=False):
    """Parameters after steps on noisy gradients of an uneven bowl; `until` stops earlier."""
    params = parameters()
    optimizer, generator = make(params), torch.Generator().manual_seed(1)
    for step in range(steps if until is None else until):
        for p in params:
            slope = torch.linspace(0.1, 2, p.numel(), dtype=p.dtype).view_as(p)
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            p.grad = slope * (p.detach() - 1) + 0.1 * noise
        torch.manual_seed(step)
        optimizer.step()
    if average:
        optimizer.eval()
    return [p.detach().clone() for p in params]


# What differs elsewhere is left out: SOAP there decays after the update (so none here), and turns
# its basis and solves Kron's triangles in float32; Kron there draws when it balances its factors,
# which changes nothing but their scale.
@pytest.mark.parametrize("name, ours, theirs, tolerance", [
    ("SOAP", lambda p: SOAP(p, lr=0.01, weight_decay=0),
     dict(lr=0.01, weight_decay=0, eps=1e-8), 1e-5),
    ("Kron", lambda p: Kron(p, lr=0.01, weight_decay=0.1),
     dict(lr=0.01, weight_decay=0.1, precondition_dtype=torch.float64, balance_prob=0), 1e-5),
    ("AdEMAMix", lambda p: AdEMAMix(p, lr=0.01, weight_decay=0.1, warmup=15),
     dict(lr=0.01, weight_decay=0.1, weight_decouple=True, t_alpha_beta3=15, alpha=5), 1e-12),
    ("AdEMAMix", lambda p: AdEMAMix(p, lr=0.01, weight_decay=0, betas=(0.8, 0.9, 0.99), alpha=2),
     dict(lr=0.01, betas=(0.8, 0.9, 0.99), alpha=2), 1e-12),
    ("MARS", lambda p: MARS(p, lr=0.01, weight_decay=0.1, eps=1e-15),
     dict(lr=0.01, weight_decay=0.1, betas=(0.95, 0.99), eps=1e-15), 1e-7),
    ("ScheduleFreeAdamW", lambda p: ScheduleFreeAdamW(p, lr=0.01, weight_decay=0.1),
     dict(lr=0.01, weight_decay=0.1, betas=(0.9, 0.95)), 1e-10)])
def test_twenty_steps_equal_a_second_implementation(name, ours, theirs, tolerance):
    package = pytest.importorskip("pytorch_optimizer")
    average = name.startswith("ScheduleFree")
    found = trained(ours, average=average)
    other = trained(lambda p: getattr(package, name)(p, **theirs), average=average)
    moved = max((a - p.detach()).abs().max() for a, p in zip(found, parameters(), strict=True))
    assert moved > 0.05
    for a, b in zip(found, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_soap_turns_its_basis_and_does_not_move_at_first():
    start = trained(SOAP, until=0)
    for a, b in zip(trained(SOAP, until=1), start, strict=True):
        assert torch.equal(a, b)
    often, seldom = (trained(lambda p, n=n: SOAP(p, lr=0.01, frequency=n)) for n in (2, 10))
    assert not torch.allclose(often[0], seldom[0], atol=1e-6)
    one_sided, both = (trained(lambda p, n=n: SOAP(p, lr=0.01, largest=n)) for n in (8, 100))
    assert not torch.allclose(one_sided[0], both[0], atol=1e-6)  # (6, 10) has a left basis alone
    assert torch.equal(one_sided[1], both[1])  # (8, 8) has both


def test_orthogonalised_singular_values_are_near_one():
    x = torch.randn(20, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for matrix in (x, x.mT, x[:1], x[:, :1]):
        found = orthogonalise(matrix)
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        values = torch.linalg.svdvals(found)
        assert values.min() > 0.5 and values.max() < 1.25
        inner = (found * (u @ vh)).sum() / (found.norm() * (u @ vh).norm())
        assert inner > 0.97
    assert not orthogonalise(torch.zeros(3, 4)).any()


def step_of(g, state=None, **options):
    """What one step of MetricMuon subtracts from a matrix of zeros, over lr."""
    p = nn.Parameter(torch.zeros_like(g))
    optimizer = MetricMuon([p], **dict(lr=1.0, weight_decay=0, betas=(0.0, 0.0)) | options)
    optimizer.state[p].update(state or {})
    p.grad = g
    optimizer.step()
    return -p.detach()


def test_metric_muon_is_steepest_descent_in_its_metric():
    """Of all steps with the spectral norm of R^-1 W C^-1, none falls faster than its own."""
    generator = torch.Generator().manual_seed(3)
    g = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    a, b = ((g * g).mean(dim, keepdim=True) for dim in (1, 0))
    r, c = (a / a.mean()) ** -0.25, (b / b.mean()) ** -0.25
    u, _, vh = torch.linalg.svd(r * g * c, full_matrices=False)
    best = r * (u @ vh) * c
    found = step_of(g)
    assert (found * best).sum() / (found.norm() * best.norm()) > 0.97  # Newton-Schulz is not exact

    def fall(w):
        return (g * w).sum() / torch.linalg.matrix_norm(w / r / c, 2)

    for _ in range(200):
        other = best + 0.3 * torch.randn(6, 9, generator=generator, dtype=torch.float64)
        assert fall(other) < fall(best)


def test_the_metric_weakens_rows_and_columns_that_are_curved():
    g = torch.ones(4, 4, dtype=torch.float64) + torch.eye(4, dtype=torch.float64)
    g[0] *= 10
    power, rows, columns = (step_of(g, **options) for options in (
        dict(power=0), dict(sides="rows"), dict(sides="columns")))
    share = [x[0].norm() / x.norm() for x in (rows, power)]
    assert share[0] < 0.6 * share[1]
    assert not torch.allclose(rows, columns)
    for x in (power, rows, columns):  # Muon's root mean square, .2
        assert x.square().mean().sqrt() == pytest.approx(0.2, rel=0.2)


def test_without_a_metric_it_is_torchs_muon():
    ours = trained(lambda p: MetricMuon(p, lr=0.01, power=0, precision=torch.bfloat16))
    other = trained(lambda p: torch.optim.Muon(p, lr=0.01, weight_decay=0.1, momentum=0.95,
                                               adjust_lr_fn="match_rms_adamw"))
    start = parameters()
    for a, b, p in zip(ours, other, start, strict=True):
        assert (a - b).norm() < 0.05 * (b - p).norm()  # torch rounds to bfloat16 elsewhere


def test_parts_are_orthogonalised_apart_in_one_metric():
    g = torch.randn(15, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    apart = torch.cat([step_of(part, power=0) for part in g.chunk(3)])
    torch.testing.assert_close(step_of(g, power=0, parts=3), apart)
    assert not torch.allclose(step_of(g, power=0), apart, rtol=0.1)
    a, b = ((g * g).mean(dim, keepdim=True) for dim in (1, 0))
    r, c = (a / a.mean()) ** -0.25, (b / b.mean()) ** -0.25
    apart = torch.cat([step_of(part, power=0) for part in (r * g * c).chunk(3)])
    scaled = r * apart * c
    torch.testing.assert_close(step_of(g, parts=3), scaled * (apart.norm() / scaled.norm()))
    with pytest.raises(ValueError, match="rows of a matrix \\(15, 5\\) into 2 equal"):
        step_of(g, parts=2)


def test_estimates_take_the_gradients_place_in_the_metric():
    g = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = nn.Parameter(torch.zeros_like(g))
    optimizer = MetricMuon([p], lr=1.0, weight_decay=0, betas=(0.0, 0.5), from_estimates=True)
    p.grad = g
    optimizer.step()  # nothing is known yet: Muon
    assert torch.allclose(-p.detach(), step_of(g, power=0))
    estimate = g.square() * torch.linspace(1, 100, 5, dtype=g.dtype)[:, None]
    optimizer.update_hessian([estimate])
    assert torch.allclose(optimizer.state[p]["row_square"], estimate.mean(1) / 2)
    with torch.no_grad():
        p.zero_()
    optimizer.step()
    known = dict(row_square=estimate.mean(1), column_square=estimate.mean(0))
    assert torch.allclose(-p.detach(), step_of(g, known, betas=(0.0, 0.0), from_estimates=True))


@pytest.mark.parametrize("g", [
    torch.zeros(4, 6), torch.ones(4, 6), torch.ones(1, 6), torch.ones(6, 1), torch.ones(1, 1),
    torch.tensor([[1e-12, 0.0], [0.0, 1e12]]), torch.eye(3)[:, :2]],
    ids=["zero", "rank 1", "a row", "a column", "one", "extreme", "an empty row"])
@pytest.mark.parametrize("cls", [MetricMuon, SOAP, Kron])
def test_degenerate_gradients_give_finite_steps(cls, g):
    p = nn.Parameter(torch.ones_like(g))
    optimizer = cls([p], lr=0.1, weight_decay=0.0)
    for _ in range(12):
        p.grad = g.clone()
        optimizer.step()
    assert p.isfinite().all()
    if cls is MetricMuon:  # no step is larger than Muon's on a full matrix
        largest = 12 * 0.1 * 0.2 * math.sqrt(max(g.shape)) * 1.3 * math.sqrt(min(g.shape))
        assert (p - 1).norm() <= largest
    if not g.any():
        assert torch.equal(p.detach(), torch.ones_like(g))


@pytest.mark.parametrize("cls", [MetricMuon, SOAP, Kron])
def test_what_is_no_hidden_matrix_is_refused(cls):
    matrix = nn.Parameter(torch.zeros(2, 2))
    for params, words in (
            ([nn.Parameter(torch.zeros(3))], r"not a parameter of shape \(3,\); give those to"),
            ([nn.Parameter(torch.zeros(2, 2, 2))], r"not a parameter of shape \(2, 2, 2\)"),
            ([nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))], "takes real matrices"),
            ([dict(params=[matrix], kind="embedding")], "not a group of kind embedding")):
        with pytest.raises(ValueError, match=words):
            cls(params)


@pytest.mark.parametrize("make", [
    lambda p: MetricMuon(p, power=-1), lambda p: MetricMuon(p, betas=(1, 0.9)),
    lambda p: MetricMuon(p, sides="left"), lambda p: MetricMuon(p, parts=0),
    lambda p: SOAP(p, frequency=0),
    lambda p: SOAP(p, eps=0), lambda p: Kron(p, rate=1), lambda p: Kron(p, momentum=1.0),
    lambda p: AdEMAMix(p, alpha=-1), lambda p: AdEMAMix(p, betas=(0.9, 0.9, 1.0)),
    lambda p: SOAP(p, shampoo_beta=5), lambda p: Kron(p, probability=0),
    lambda p: MARS(p, gamma=-1), lambda p: ScheduleFreeAdamW(p, betas=(0, 0.9)),
    lambda p: ScheduleFreeAdamW(p, lr=-1)])
def test_values_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match="is out of range"):
        make(parameters())


@pytest.mark.parametrize("cls", [MetricMuon, SOAP, Kron, AdEMAMix, MARS, ScheduleFreeAdamW])
def test_half_precision_parameters_have_float32_state(cls):
    params = [nn.Parameter(torch.ones(4, 6, dtype=torch.bfloat16))]
    optimizer = cls(params, lr=0.1)
    for _ in range(3):
        params[0].grad = torch.randn(4, 6).bfloat16()
        optimizer.step()
    state = [x for x in optimizer.state[params[0]].values() if x.dim()]
    assert state and all(x.dtype == torch.float32 for x in state)
    assert params[0].dtype == torch.bfloat16 and params[0].isfinite().all()


def test_a_slow_momentum_that_is_not_slower_is_no_error():
    params = parameters([(2, 3)])
    optimizer = AdEMAMix(params, betas=(0.9, 0.99, 0.0), warmup=5)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert params[0].isfinite().all()


def test_mars_leaves_vectors_to_adam():
    vector = nn.Parameter(torch.ones(5, dtype=torch.float64))
    other = nn.Parameter(vector.detach().clone())
    mars = MARS([vector], lr=0.1, betas=(0.9, 0.95))
    adam = torch.optim.AdamW([other], lr=0.1, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(5):
        for p, optimizer in ((vector, mars), (other, adam)):
            p.grad = torch.linspace(-1, 2, 5, dtype=p.dtype) * (step + 1)
            optimizer.step()
    torch.testing.assert_close(vector.detach(), other.detach())


def test_schedule_free_goes_to_and_fro_to_the_bit_and_averages_z():
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = ScheduleFreeAdamW([p], lr=0.1, weight_decay=0)
    optimizer.eval()  # before the first step there is nothing to average
    optimizer.train()
    trail = []
    for _ in range(4):
        p.grad = torch.ones_like(p) * torch.rand(3, generator=torch.Generator().manual_seed(2))
        optimizer.step()
        trail.append(optimizer.state[p]["z"].clone())
    y = p.detach().clone()
    optimizer.eval()
    torch.testing.assert_close(p.detach(), torch.stack(trail).mean(0))  # a constant rate
    x = p.detach().clone()
    optimizer.eval()  # again changes nothing
    assert torch.equal(p.detach(), x)
    with pytest.raises(RuntimeError, match=r"call train\(\) after eval\(\)"):
        optimizer.step()
    optimizer.train()
    assert torch.equal(p.detach(), y) and "y" not in optimizer.state[p]


def test_the_compiled_orthogonalisation_equals_the_eager_one():
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.compile(orthogonalise)(x), orthogonalise(x), rtol=1e-4,
                               atol=1e-5)

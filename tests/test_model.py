"""The model against transformers' GPT-2, and its laws."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from experiments.memory import Allocated
from model import GPT, GPTConfig, attend, cross_entropy, rotate
from nanosophia.chunked_loss import chunked_cross_entropy
from nanosophia.estimators import sample_labels_two_level
from nanosophia.generate import LayerCache, generate, sample_token
from nanosophia.optimizers import parameter_groups
from nanosophia.options import Config


def in_chunks(chunk):
    return partial(chunked_cross_entropy, chunk=chunk) if chunk else cross_entropy


SMALL = dict(n_layer=3, n_head=2, n_embd=32, block_size=24, vocab_size=70)
NEOX = dict(rotary_fraction=0.5, parallel_residual=True, tied_head=False, bias=True)


def with_transformers_weights(scaled: bool, activation: str):
    """Our model and transformers' with the same random weights, biases included."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_layer=3, n_head=2, n_embd=32, n_positions=24, vocab_size=70,
        activation_function={"gelu_tanh": "gelu_new", "gelu": "gelu"}[activation],
        scale_attn_by_inverse_layer_idx=scaled, attn_implementation="eager")).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.05 * torch.randn_like(p))
    ours = GPT(GPTConfig(**SMALL, bias=True, activation=activation,
                         scale_attn_by_inverse_layer_idx=scaled)).eval()
    source = theirs.state_dict()
    conv1d = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    ours.load_state_dict({k: source[k].t() if k.endswith(conv1d) else source[k]
                          for k in ours.state_dict()})
    return ours, theirs


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu"])
def test_logits_equal_transformers_gpt2(scaled, activation):
    ours, theirs = with_transformers_weights(scaled, activation)
    idx = torch.randint(70, (2, 24))
    torch.testing.assert_close(ours(idx), theirs(idx).logits, atol=1e-5, rtol=0)


def test_loss_is_the_mean_cross_entropy_over_targets_that_count():
    model = GPT(GPTConfig(**SMALL))
    idx, targets = torch.randint(70, (2, 2, 24))
    targets[0, :5] = -100
    logits = model(idx)
    kept = targets != -100
    expected = F.cross_entropy(logits[kept], targets[kept])
    torch.testing.assert_close(model(idx, targets), expected)


def draw_first_above(p, targets):
    """Labels for a test: where the cumulative distribution passes the target."""
    labels = torch.searchsorted(p.cumsum(1), targets.unsqueeze(1).to(p.dtype)).squeeze(1)
    return torch.where(targets < 0, -100, labels)


@pytest.mark.parametrize("chunk", [1, 7, 47])  # of 48 positions
@pytest.mark.parametrize("draws", [False, True])
@pytest.mark.parametrize("low", [False, True], ids=["float64", "autocast"])
def test_the_chunked_loss_and_its_gradients_are_those_of_the_whole(chunk, draws, low):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL)).to(torch.float32 if low else torch.float64)
    idx, targets = torch.randint(70, (2, 2, 24))
    if draws:
        targets = torch.rand(2, 24)
        targets[1, 5:9] = -1
    else:
        targets[0, :5] = -100
    label = draw_first_above if draws else None
    found = []
    for loss_fn in (cross_entropy, in_chunks(chunk)):
        model.loss_fn = loss_fn
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = model(idx, targets, sample_labels_fn=label)
        found.append([loss, *torch.autograd.grad(3 * loss, list(model.parameters()))])
    tolerance = dict(atol=2e-2, rtol=2e-2) if low else {}
    torch.testing.assert_close(found[1], found[0], **tolerance)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low):
        assert torch.equal(model(idx, targets, sample_labels_fn=label), found[1][0])


def test_the_chunked_loss_is_finite_where_a_labels_probability_is_not():
    model = GPT(GPTConfig(**SMALL))
    with torch.no_grad():
        model.transformer.wte.weight[3] *= 1e4  # so that some probabilities are 0 in float32
    idx, targets = torch.randint(70, (2, 1, 24))
    whole = model(idx, targets)
    model.loss_fn = in_chunks(5)
    assert whole > 100
    torch.testing.assert_close(model(idx, targets), whole)


def test_the_chunked_loss_is_differentiated_once():
    model = GPT(GPTConfig(**SMALL))
    model.loss_fn = in_chunks(5)
    loss = model(*torch.randint(70, (2, 1, 24)))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


@pytest.mark.parametrize("chunk, most", [(256, 2), (64, 0.5)])
@pytest.mark.parametrize("draws", [False, True])
def test_the_loss_holds_the_logits_and_one_more_buffer_of_their_size(chunk, most, draws):
    """In float32, the backward pass and the drawing of labels included; with chunks, a chunk's."""
    model = GPT(GPTConfig(**SMALL | dict(vocab_size=16384)))
    model.loss_fn = in_chunks(chunk)
    idx, targets = torch.randint(16384, (2, 16, 16))
    if draws:
        targets = torch.rand(16, 16)
    whole = 256 * 16384 * 4
    with Allocated(smallest=whole // 5) as held:  # the head's weights are an eighth
        model(idx, targets, sample_labels_fn=sample_labels_two_level if draws else None).backward()
    assert 0 < held.most / whole <= most


@pytest.mark.parametrize("chunk", [0, 20])
def test_model_loss_and_the_drawing_of_labels_compile_into_one_graph(chunk):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL))
    model.loss_fn = in_chunks(chunk)
    idx, targets = torch.randint(70, (2, 2, 24))
    uniforms = torch.rand(2, 24)
    compiled = torch.compile(model, fullgraph=True)
    for arguments in ((idx, targets), (idx, uniforms, None, draw_first_above)):
        expected = model(*arguments)
        gradients = torch.autograd.grad(expected, list(model.parameters()))
        found = compiled(*arguments)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, list(model.parameters())), gradients)


@pytest.mark.parametrize("settings", [{}, NEOX])
def test_a_token_never_sees_what_follows(settings):
    model = GPT(GPTConfig(**SMALL, **settings)).eval()
    idx = torch.randint(70, (1, 24))
    changed = idx.clone()
    changed[0, 10:] = (changed[0, 10:] + 1) % 70
    before, after = model(idx), model(changed)
    torch.testing.assert_close(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10], after[:, 10])


def attended(T, precision, attention=attend, **autocast):
    """What attention returns for the same numbers in a precision, and the gradient of q."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, T, 8).bfloat16().to(precision).requires_grad_() for _ in range(3))
    with torch.autocast("cpu", **autocast):
        y = attention(q, k, v, scale=0.3)
    y.sum().backward()
    return y, q.grad


@pytest.mark.parametrize("autocast", [dict(enabled=False), dict(dtype=torch.bfloat16)])
def test_a_cpu_attends_to_a_short_context_in_float32(autocast):
    """Equal to float32's rounded once, where in bfloat16 the scores would be rounded too."""
    y, dq = attended(64, torch.bfloat16, **autocast)
    plain = partial(F.scaled_dot_product_attention, is_causal=True)
    exact, exact_dq = attended(64, torch.float32, plain, enabled=False)
    assert y.dtype == dq.dtype == torch.bfloat16
    torch.testing.assert_close(y, exact.bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(dq, exact_dq.bfloat16(), rtol=0, atol=0)
    long = attended(512, torch.bfloat16, enabled=False)[0]
    exact = attended(512, torch.float32, plain, enabled=False)[0]
    assert not torch.equal(long, exact.bfloat16()), "a long one is faster in bfloat16"


def test_attention_in_float64_stays_there():
    expected = torch.softmax(torch.full((8, 8), -torch.inf).triu(1).double(), -1).sum(-1)
    q = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    y = attend(q, q, torch.eye(8, dtype=torch.float64)[None, None])
    torch.testing.assert_close(y.sum(-1)[0, 0], expected)
    assert y.dtype == torch.float64 and y[0, 0, 2, 0] == pytest.approx(1 / 3, abs=1e-15)


def test_initialisation_is_gpt2s_and_the_loss_starts_at_the_uniform_one():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=8, n_head=4, n_embd=128, block_size=64, vocab_size=512))
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert torch.equal(p, torch.ones_like(p))  # layer norms; there are no biases
        else:
            expected = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.05), name
    idx, targets = torch.randint(512, (2, 4, 64))
    assert model(idx, targets).item() == pytest.approx(math.log(512), abs=0.1)


def test_head_is_tied_and_counted_once():
    model = GPT(GPTConfig(**SMALL))
    by_hand = 70 * 32 + 24 * 32 + 3 * (12 * 32 * 32 + 2 * 32) + 32
    assert model.num_params(non_embedding=False) == by_hand
    assert model.num_params() == by_hand - 24 * 32
    assert model.flops_per_token() == 6 * (by_hand - 24 * 32) + 12 * 3 * 32 * 24


def test_a_head_of_its_own_is_a_row_per_class_and_an_embedding_costs_no_flops():
    model = GPT(GPTConfig(**SMALL, **NEOX))
    blocks = 3 * (12 * 32 * 32 + 9 * 32 + 4 * 32) + 2 * 32
    assert model.num_params() == model.num_params(non_embedding=False) == 2 * 70 * 32 + blocks
    assert model.flops_per_token() == 6 * (70 * 32 + blocks) + 12 * 3 * 32 * 24
    embeddings, matrices, _ = parameter_groups(model, Config())
    assert [p.shape for p in embeddings["params"]] == [(70, 32)] * 2
    assert len(matrices["params"]) == 3 * 4


@pytest.mark.parametrize("low", [False, True])
def test_rotary_logits_depend_on_the_distance_of_positions_alone(low):
    """The same query and key, at positions 3 and 11 and at 1003 and 1011."""
    torch.manual_seed(0)
    x = torch.randn(1, 1, 1, 8, dtype=torch.bfloat16 if low else torch.float32)
    positions = torch.tensor([3, 11, 1003, 1011])
    turned = rotate(x.expand(1, 2, 4, 8), positions, 4)
    assert turned.dtype == x.dtype and torch.equal(turned[..., 4:], x[..., 4:].expand(1, 2, 4, 4))
    near, far = (turned[0, 0, i].float() @ turned[0, 0, i + 1].float() for i in (0, 2))
    torch.testing.assert_close(near, far, rtol=0.05 if low else 1e-4, atol=1e-3)
    assert not torch.allclose(near, x.float().square().sum(), rtol=0.01)


def test_rotary_positions_are_as_precise_as_the_model():
    x, angle = torch.ones(1, 1, 1, 2, dtype=torch.float64), math.fmod(1000, 2 * math.pi)
    found = rotate(x, torch.tensor([1000]), 2).flatten().tolist()
    assert found == pytest.approx([math.cos(angle) - math.sin(angle),
                                   math.cos(angle) + math.sin(angle)], rel=1e-12)


def test_dropout_acts_in_training_only():
    model = GPT(GPTConfig(**SMALL, dropout=0.5))
    idx = torch.randint(70, (1, 24))
    assert not torch.equal(model(idx), model(idx))
    model.eval()
    assert torch.equal(model(idx), model(idx))


def test_a_context_too_long_is_refused():
    with pytest.raises(ValueError, match="25 tokens do not fit the model's context of 24"):
        GPT(GPTConfig(**SMALL))(torch.zeros(1, 25, dtype=torch.long))


def test_generation_slides_keeps_the_mode_and_never_draws_padding():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL))
    with torch.no_grad():  # make padding ids by far the most likely
        model.transformer.wte.weight[60:] = 100 * model.transformer.ln_f.weight
    idx = torch.randint(60, (2, 3))
    out = generate(model, idx, 40, num_classes=60)
    assert out.shape == (2, 43) and torch.equal(out[:, :3], idx)
    assert out.max() < 60 and model.training


def test_generation_is_greedy_at_temperature_zero_and_repeats_with_its_seed():
    model = GPT(GPTConfig(**SMALL))
    idx = torch.randint(70, (1, 4))
    expected = model.eval()(idx)[:, -1].argmax(-1)
    assert generate(model, idx, 1, temperature=0)[0, -1] == expected[0]
    draws = [generate(model, idx, 8, top_k=5, generator=torch.Generator().manual_seed(3))
             for _ in range(2)]
    assert torch.equal(*draws)
    top5 = model(idx)[0, -1].topk(5).indices
    assert draws[0][0, 4] in top5


def trained_like(seed=0, **settings):
    """A model whose logits are far from uniform."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**dict(n_layer=3, n_head=2, n_embd=32, block_size=24, vocab_size=64)
                          | settings)).eval()
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.mark.parametrize("settings", [
    {}, dict(bias=True, activation="gelu"), dict(scale_attn_by_inverse_layer_idx=True), NEOX])
def test_the_cache_gives_the_logits_of_the_full_pass(settings):
    model = trained_like(**settings).double()
    idx = torch.randint(64, (3, 24))
    with torch.inference_mode():
        full = model(idx)
        for prompt in (1, 7, 24):
            caches = [LayerCache(24) for _ in range(3)]
            found = [model(idx[:, :prompt], caches=caches)[:, -1]]
            found += [model(idx[:, t:t + 1], caches=caches)[:, -1] for t in range(prompt, 24)]
            torch.testing.assert_close(torch.stack(found, 1), full[:, prompt - 1:], rtol=1e-10,
                                       atol=1e-10)


@pytest.mark.parametrize("prompt", [1, 20, 30])
def test_text_longer_than_the_context_slides_as_if_recomputed(prompt):
    model = trained_like().double()
    idx = torch.randint(64, (2, prompt))
    found = generate(model, idx, 30, temperature=0)
    expected = idx
    with torch.inference_mode():
        for _ in range(30):
            logits = model(expected[:, -24:])[:, -1]
            expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(found, expected)


def test_rows_end_at_the_stop_token_and_the_stream_with_the_last():
    model = trained_like(1)
    idx = torch.arange(8).unsqueeze(1)
    free = generate(model, idx, 20, generator=torch.Generator().manual_seed(5))
    stop = int(free[0, 6])
    found = generate(model, idx, 20, generator=torch.Generator().manual_seed(5), stop_token=stop)
    for row in found[:, 1:].tolist():
        if stop in row:
            assert set(row[row.index(stop):]) == {stop}
    assert stop in found[0, 1:7].tolist()
    one = generate(model, idx[:1], 20, temperature=0, stop_token=int(
        generate(model, idx[:1], 1, temperature=0)[0, -1]))
    assert one.size(1) == 2


def test_top_p_keeps_the_smallest_set_of_that_probability():
    logits = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log().repeat(4000, 1)
    draws = {p: set(sample_token(logits, 1.0, top_p=p).flatten().tolist())
             for p in (0.3, 0.5, 0.65, 0.75, 0.95, 1.0)}
    assert draws[0.3] == draws[0.5] == {0}
    assert len(draws[0.65]) == 2 and draws[0.75] == {0, 1, 2}
    assert draws[0.95] == draws[1.0] == {0, 1, 2, 3}
    counts = sample_token(logits, 1.0, top_p=0.75).flatten().bincount(minlength=4) / 4000
    assert counts.tolist() == pytest.approx([5 / 9, 2 / 9, 2 / 9, 0], abs=0.04)
    assert set(sample_token(logits, 1.0, 3, top_p=0.6).flatten().tolist()) <= {0, 1, 2}


def test_the_repetition_penalty_is_on_what_was_seen_alone():
    logits = torch.tensor([[2.0, 1.5, -1.0, -1.2]])
    seen = torch.tensor([[0, 0, 2]])
    assert sample_token(logits, 0, seen=seen, repetition_penalty=1.2).item() == 0  # 1.67
    assert sample_token(logits, 0, seen=seen, repetition_penalty=1.5).item() == 1  # 1.33, once
    low = torch.tensor([[-9.0, -9.0, -1.0, -1.2]])
    assert sample_token(low, 0, seen=seen, repetition_penalty=1.5).item() == 3  # -1.5


def test_padding_ids_are_never_drawn():
    model = trained_like(2)
    found = generate(model, torch.zeros(16, 1, dtype=torch.long), 23, num_classes=40, temperature=9)
    assert found.max() < 40

"""The model against transformers' GPT-2, and its laws."""

import math

import pytest
import torch
import torch.nn.functional as F

from model import GPT, GPTConfig

SMALL = dict(n_layer=3, n_head=2, n_embd=32, block_size=24, vocab_size=70)


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


def test_a_token_never_sees_what_follows():
    model = GPT(GPTConfig(**SMALL)).eval()
    idx = torch.randint(70, (1, 24))
    changed = idx.clone()
    changed[0, 10:] = (changed[0, 10:] + 1) % 70
    before, after = model(idx), model(changed)
    torch.testing.assert_close(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10], after[:, 10])


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
    with torch.no_grad():  # make padding ids by far the likeliest
        model.transformer.wte.weight[60:] = 100 * model.transformer.ln_f.weight
    idx = torch.randint(60, (2, 3))
    out = model.generate(idx, 40, num_classes=60)
    assert out.shape == (2, 43) and torch.equal(out[:, :3], idx)
    assert out.max() < 60 and model.training


def test_generation_is_greedy_at_temperature_zero_and_repeats_with_its_seed():
    model = GPT(GPTConfig(**SMALL))
    idx = torch.randint(70, (1, 4))
    expected = model.eval()(idx)[:, -1].argmax(-1)
    assert model.generate(idx, 1, temperature=0)[0, -1] == expected[0]
    draws = [model.generate(idx, 8, top_k=5, generator=torch.Generator().manual_seed(3))
             for _ in range(2)]
    assert torch.equal(*draws)
    top5 = model(idx)[0, -1].topk(5).indices
    assert draws[0][0, 4] in top5

"""What passes are said to take of memory, against what torch's operations make."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import train
from experiments.memory import Allocated
from model import GPT, GPTConfig
from nanosophia import memory
from nanosophia.attention import TwiceDifferentiableAttention
from sophia import hutchinson
from tests.test_dry_run import resolved
from tests.test_train import build


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_the_forward_pass_leaves(checkpointing):
    config = resolved("--n_layer=6", "--n_head=4", "--n_embd=128", "--block_size=256",
                      "--vocab_size=512", f"--activation_checkpointing={checkpointing}")
    model = GPT(GPTConfig(n_layer=6, n_head=4, n_embd=128, block_size=256, vocab_size=512))
    model.activation_checkpointing = checkpointing

    def left(rows: int) -> int:
        idx = torch.zeros(rows, 256, dtype=torch.long)
        with Allocated() as allocated, torch.autocast("cpu", torch.bfloat16):
            loss = model(idx, idx)
        size = allocated.alive()
        assert loss.requires_grad
        return size

    measured = (left(5) - left(1)) / 4  # what grows with the rows: no weights
    said = memory.activation_bytes(config)
    if checkpointing:  # the block that is being recomputed comes in the backward pass
        said -= 256 * (36 * 128 + 4 * 4 + 16)
    # At the peak the logits themselves are there too, in bfloat16 and in float32.
    assert said - 256 * 512 * 6 == pytest.approx(measured, rel=0.01)


def test_a_loss_in_chunks_takes_less_memory():
    flags = ("config/train_gpt2_small_sophiag.py", "--vocab_size=50304")
    whole, chunked = (memory.pass_bytes(resolved(*flags, *more), 12)
                      for more in ((), ("--loss_chunk=1024",)))
    logits = 12 * 1024 * 50304 * 10
    chunk = 50304 * (1024 * 8 + 4 * 768)
    assert whole - chunked == logits - chunk > 0


@pytest.mark.parametrize("flags, rows", [
    ("", 1), ("--n_layer=6", 3), ("--vocab_size=8192 --n_head=2", 2), ("--n_head=16", 2),
    ("--n_embd=64 --n_head=8 --block_size=512", 3), ("--dropout=0.1 --n_head=8", 2)])
def test_a_second_pass_takes_the_memory_that_is_said(flags, rows):
    """Within some hundredths, beside the four tensors per parameter."""
    config = resolved("--n_layer=4", "--n_head=4", "--n_embd=128", "--block_size=256",
                      "--vocab_size=512", *flags.split())
    model = GPT(config.model)
    params = list(model.parameters())
    idx = torch.zeros(rows, config.block_size, dtype=torch.long)

    def loss():
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(idx).flatten(0, 1), idx.flatten())

    with Allocated() as allocated, TwiceDifferentiableAttention():
        hutchinson([loss], params)
    N = sum(p.numel() for p in params)
    said = memory.estimate_bytes(config, N, rows, True) + 2 * N  # bfloat16 copies
    assert 0.94 * said < allocated.most < 1.02 * said, allocated.most / said


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_hutchinsons_estimate_needs_no_more_than_a_training_step(tiny, data_dir, dtype):
    """Unless one sequence does; its micro-batches are smaller for that."""
    for flags in (("--vocab_size=1024",), ("--vocab_size=320", "--n_embd=32")):
        run = build(tiny("--optimizer=sophiah", "--hessian_batch_size=8", "--batch_size=8",
                         "--total_batch_size=8", "--block_size=32", f"--dtype={dtype}",
                         "--loss_chunk=2000", *flags), data_dir)
        rows = [part.stop - part.start for chunk in run.chunks for part in chunk]
        assert max(rows) < 8 and sum(rows) == 8
        train.train_step(run, 0)  # optimizer state is there
        with Allocated() as training:
            train.train_step(run, 1)
        with Allocated() as estimate:
            train.update_curvature(run, 0)
        assert estimate.most <= training.most or max(rows) == 1


def test_attention_that_recomputes_has_the_derivatives_of_the_math_kernel():
    """With several sequences, of queries as long as the keys, and with keyword arguments."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def loss(**options):
        return F.scaled_dot_product_attention(q, k, v, **options).pow(3).sum()

    def second(**options):
        first = torch.autograd.grad(loss(**options), (q, k, v), create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), (q, k, v))

    for options in (dict(is_causal=True, scale=0.3), {}):
        with sdpa_kernel(SDPBackend.MATH):
            expected = second(**options)
        with TwiceDifferentiableAttention():
            found = second(**options)
        for x, y in zip(expected, found, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
        single = torch.autograd.grad(loss(**options), q, create_graph=True)[0]
        with TwiceDifferentiableAttention():
            first, = torch.autograd.grad(loss(**options), q, create_graph=True)
            with pytest.raises(RuntimeError, match="no third derivative"):
                torch.autograd.grad(first.sum(), q, create_graph=True)
        torch.testing.assert_close(first, single)
    q2, k2, v2 = (x.detach()[0, 0].requires_grad_() for x in (q, k, v))  # no batch: left as it is
    with TwiceDifferentiableAttention(), sdpa_kernel(SDPBackend.MATH):
        y = F.scaled_dot_product_attention(q2, k2, v2)
    assert "Attention" not in type(y.grad_fn).__name__
    mask = torch.ones(5, 5, dtype=torch.float64, requires_grad=True)
    with TwiceDifferentiableAttention(), sdpa_kernel(SDPBackend.MATH):  # left as they are
        assert torch.autograd.grad(loss(attn_mask=mask), mask)[0].abs().sum() > 0
        torch.manual_seed(1)
        dropped = loss(dropout_p=0.5)
    torch.manual_seed(1)
    with sdpa_kernel(SDPBackend.MATH):
        assert dropped == loss(dropout_p=0.5)


def test_attention_that_recomputes_is_cast_as_autocast_casts_it():
    for dtypes, expected in (((torch.float32,) * 3, torch.bfloat16),
                             ((torch.bfloat16, torch.float32, torch.float32), torch.bfloat16),
                             ((torch.float64,) * 3, torch.float64)):
        qkv = [torch.randn(2, 2, 4, 8, dtype=dtype, requires_grad=True) for dtype in dtypes]
        with torch.autocast("cpu", torch.bfloat16):
            plain = F.scaled_dot_product_attention(*qkv)
            with TwiceDifferentiableAttention():
                y = F.scaled_dot_product_attention(*qkv)
        assert y.dtype == plain.dtype == expected
        with TwiceDifferentiableAttention():  # the backward passes are outside of autocast
            first = torch.autograd.grad(y.float().sum(), qkv, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), qkv)
        assert [x.dtype for x in second] == list(dtypes)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_hutchinsons_estimate_is_the_same_with_activation_checkpointing(tiny, data_dir, dtype):
    estimates = []
    for flag in ("--activation_checkpointing=False", "--activation_checkpointing"):
        run = build(tiny("--optimizer=sophiah", "--hessian_batch_size=2", f"--dtype={dtype}", flag),
                    data_dir)
        train.train_step(run, 0)
        train.update_curvature(run, 0)
        estimates.append([s["hessian"].clone() for s in run.optimizer.state.values()])
        assert run.model.activation_checkpointing == (flag[-1] == "g")
    for a, b in zip(*estimates, strict=True):
        assert torch.equal(a, b) and a.abs().sum() > 0

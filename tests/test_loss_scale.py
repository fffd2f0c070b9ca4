"""float16: gradients within its range, overflows survived, resumed to the bit."""

import json
import math

import pytest
import torch

from nanosophia import loss_scale
from nanosophia.checkpoint import load_latest
from nanosophia.estimators import chunked_squares
from nanosophia.loss_scale import LossScale
from tests.conftest import run_train, torchrun

CPU = torch.device("cpu")
HALF = "--dtype=float16"


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("flags", [
    ("--optimizer=adamw",), ("--optimizer=sophiag",), ("--optimizer=sophiag", "--loss_chunk=5"),
    ("--optimizer=sophiag", "--hessian_chunks=2", "--gamma_target=0.5"),
    ("--optimizer=sophiah", "--gamma=0.1"), ("--optimizer=muon",), ("--optimizer=metric_muon_gnb",),
    ("--optimizer=ef_clip",)], ids=" ".join)
def test_losses_are_those_of_float32(tiny, tmp_path, flags):
    losses = {}
    for dtype in ("float32", "float16"):
        run_train(*tiny(*flags, f"--dtype={dtype}", "--max_iters=30", "--hessian_interval=3",
                        out_dir=tmp_path / dtype))
        losses[dtype] = [r["train/loss"] for r in records(tmp_path / dtype)]
    assert max(abs(a - b) for a, b in zip(*losses.values(), strict=True)) < 1e-2
    found = records(tmp_path / "float16")
    assert found[-1]["loss_scale"] == loss_scale.INITIAL and "refused" not in found[-1]
    assert "loss_scale" not in records(tmp_path / "float32")[-1]


def test_an_overflow_is_survived_and_counted(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loss_scale, "MOST", 2.0**40)
    monkeypatch.setattr(loss_scale, "INITIAL", 2.0**28)
    run_train(*tiny(HALF, "--max_iters=30"))
    found = records(tmp_path / "run")
    first, last = found[0], found[-1]
    assert first["grad_norm"] is None and math.isfinite(first["train/loss"])
    # Half for each refused step or estimate, from the first on and only in a row
    assert last["loss_scale"] == 2.0 ** (28 - last["refused"]) and 1 < last["refused"] < 20
    assert last["grad_norm"] is not None and last["train/loss"] < first["train/loss"]
    assert "refused" in capsys.readouterr().out


def test_what_no_scale_helps_ends_the_run(tiny, tmp_path, monkeypatch, capsys):
    from model import GPT
    monkeypatch.setattr(loss_scale, "INITIAL", 8.0)
    forward = GPT.forward

    def overflowing(self, *args, **kwargs):  # its gradient is infinite whatever the scale
        loss = forward(self, *args, **kwargs)
        return loss + (self.transformer.ln_f.weight.sum() * 0).sqrt() if loss.dim() == 0 else loss

    monkeypatch.setattr(GPT, "forward", overflowing)
    with pytest.raises(SystemExit) as stopped:
        run_train(*tiny(HALF, "--optimizer=adamw", "--max_iters=30"))
    assert stopped.value.code == 1
    assert "step 3: the gradient norm is not finite; nothing was" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_the_run_at_any_scale(tiny, monkeypatch, capsys):
    from model import GPT
    forward = GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda self, *a, **k: forward(self, *a, **k) * math.inf)
    with pytest.raises(SystemExit) as stopped:
        run_train(*tiny(HALF, "--optimizer=adamw"))
    assert stopped.value.code == 1 and "step 0: the loss is not finite" in capsys.readouterr().err


def test_a_resumed_run_is_the_uninterrupted_one(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 4)  # grows before and after the cut
    monkeypatch.setattr(loss_scale, "INITIAL", 2.0**10)
    flags = tiny(HALF, "--hessian_interval=2", "--max_iters=9")
    run_train(*flags)
    whole = load_latest(tmp_path / "run")
    run_train(*flags, "--checkpoint_interval=6", f"--out_dir={tmp_path / 'cut'}")
    (tmp_path / "cut" / "step_00000009").rename(tmp_path / "away")
    assert load_latest(tmp_path / "cut").state["loss_scale"] == dict(value=2.0**11, good=2)
    run_train(*flags, "--init_from=resume", f"--out_dir={tmp_path / 'cut'}")
    again = load_latest(tmp_path / "cut")
    assert again.state["loss_scale"] == whole.state["loss_scale"] == dict(value=2.0**12, good=1)
    for (name, x), y in zip(whole.model_tensors().items(), again.model_tensors().values(),
                            strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_train_as_one(tiny, tmp_path, parallel):
    flags = tiny(HALF, "--optimizer=sophiag", "--hessian_interval=2", "--eval_interval=100")
    run_train(*flags)
    result = torchrun(2, "train.py", *flags, f"--parallel={parallel}",
                      f"--out_dir={tmp_path / 'two'}")
    assert result.returncode == 0, result.stderr
    one, two = (records(tmp_path / name)[-1] for name in ("run", "two"))
    assert abs(one["train/loss"] - two["train/loss"]) < 1e-2


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_agree_on_overflows(tiny, tmp_path, parallel):
    scales = tmp_path / "scales"
    scales.mkdir()
    result = torchrun(2, "-m", "tests.overflow_worker", str(scales), *tiny(
        HALF, "--optimizer=sophiag", "--hessian_interval=2", "--max_iters=20"),
        f"--parallel={parallel}")
    assert result.returncode == 0, result.stderr
    last = records(tmp_path / "run")[-1]
    assert last["refused"] > 1 and last["loss_scale"] == 2.0 ** (28 - last["refused"])
    assert [(scales / rank).read_text() for rank in "01"] == [str(last["loss_scale"])] * 2


@pytest.mark.parametrize("optimizer", ["adahessian", "gnb_unclipped"])
def test_optimizers_that_need_their_curvature_are_refused(tiny, refused, optimizer):
    from train import main
    flags = [flag for flag in tiny(HALF, f"--optimizer={optimizer}") if "gamma" not in flag]
    assert "it would step without curvature" in refused(main, flags)


def test_the_scale_halves_doubles_and_stays_in_its_range(monkeypatch):
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 2)
    scale, good, bad = LossScale(CPU, dynamic=True), torch.zeros(()), torch.ones(())
    start, seen = scale.value.item(), []
    for overflow, grows in ((good, True), (good, False), (good, True), (bad, True), (good, True),
                            (bad, False), (good, True), (good, True)):
        scale.update(overflow, grows=grows)
        seen.append(scale.value.item() / start)
    assert seen == [1, 1, 2, 1, 1, 0.5, 0.5, 1]
    for _ in range(40):
        scale.update(bad, grows=True)
    assert scale.value == 1 and not scale.may_fall()
    for _ in range(80):
        scale.update(good, grows=True)
    assert scale.value == 2**24 and scale.may_fall()
    fixed = LossScale(CPU, dynamic=False)
    fixed.update(bad, grows=True)
    assert fixed.value == 1 and not fixed.may_fall() and fixed.state() is None
    assert fixed.of_sum(100) is None


def test_an_estimate_of_small_gradients_needs_the_scale():
    """Gradients of about 1e-9 per position are zeros in float16, and their squares in float32."""
    weight = torch.full((8,), 0.5, requires_grad=True)
    x = torch.linspace(1, 2, 8)

    def loss():
        half = (weight * 1e-9 * x).sum()  # its gradient passes through float16
        return _ThroughHalf.apply(half), torch.tensor(4)

    scale = LossScale(CPU, dynamic=True).of_sum(4)
    without, = chunked_squares([[loss]], [weight], one_square=True)
    with_scale, = chunked_squares([[loss]], [weight], one_square=True, scale=scale)
    torch.testing.assert_close(with_scale, (1e-9 * x) ** 2 / 4, rtol=2e-2, atol=0)
    assert not torch.allclose(without, (1e-9 * x) ** 2 / 4, rtol=2e-2, atol=0)


class _ThroughHalf(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return (gradient * 1e-7).half().float() * 1e7  # one of 1e-7 survives when it is scaled

"""Which precision `--dtype=auto` takes, and that a run in bfloat16 is exact in its own way."""

import json
import platform

import pytest
import torch

from nanosophia import precision, resume
from nanosophia.checkpoint import load_latest
from tests.conftest import run_train

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch):
    """Makes this a CPU with or without bfloat16, `speed` times as fast in it."""
    def make(*, computes: bool, speed: float):
        monkeypatch.setattr("nanosophia.precision.NARROW", 16)  # the tests' models are
        monkeypatch.setattr("nanosophia.precision.computes_bfloat16", lambda: computes)
        monkeypatch.setattr("nanosophia.resume.computes_bfloat16", lambda: computes)
        monkeypatch.setattr("nanosophia.precision.bfloat16_speed", lambda: speed)
        monkeypatch.setattr("nanosophia.resume.bfloat16_speed", lambda: speed)

    return make


def auto(tiny, *flags):
    """Flags of a small run that leave the precision to train.py."""
    return [*(f for f in tiny() if not f.startswith("--dtype")), *flags]


def dtype_of(tmp_path):
    return json.loads((tmp_path / "run" / "config.json").read_text())["dtype"]


@pytest.mark.parametrize("computes, speed, expected", [
    (True, 2.0, "bfloat16"), (True, 1.1, "float32"), (False, 2.0, "float32")])
def test_auto_takes_bfloat16_where_the_cpu_computes_it_and_is_faster(machine, computes, speed,
                                                                     expected):
    machine(computes=computes, speed=speed)
    assert precision.fastest_dtype(CPU, 128) == expected
    assert precision.fastest_dtype(CPU, 8) == "float32"
    assert precision.fastest_dtype(torch.device("mps"), 128) == "float32"


@pytest.mark.parametrize("capability, expected", [
    ((9, 0), "bfloat16"), ((8, 0), "bfloat16"), ((7, 5), "float16"), ((6, 1), "float16")])
def test_auto_takes_float16_on_gpus_before_ampere(monkeypatch, capability, expected):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "Tesla T4")
    cuda = torch.device("cuda", 0)
    assert precision.fastest_dtype(cuda, 64) == expected
    note = resume._bfloat16_note(cuda)
    assert note == ("Tesla T4 emulates bfloat16; --dtype=float16 is faster"
                    if expected == "float16" else "")


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc/cpuinfo")
def test_what_torch_says_of_the_cpu_is_what_the_kernel_says():
    with open("/proc/cpuinfo") as file:
        flags = set(file.read().split())
    assert precision.computes_bfloat16() == bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def test_both_products_are_timed(monkeypatch):
    ticks = iter(x for _ in range(5) for x in (0, 6, 10, 12))
    monkeypatch.setattr(precision.time, "perf_counter", lambda: next(ticks))
    precision.bfloat16_speed.cache_clear()
    assert precision.bfloat16_speed() == precision.bfloat16_speed() == 3  # timed once
    precision.bfloat16_speed.cache_clear()


def test_the_summary_says_what_was_taken_and_a_flag_wins(tiny, tmp_path, machine, capsys):
    machine(computes=True, speed=2.0)
    run_train(*auto(tiny, "--max_iters=2"))
    assert dtype_of(tmp_path) == "bfloat16"
    assert "2.0 times as fast in bfloat16 as in float32; --dtype=float32 is more exact" in \
        capsys.readouterr().out
    run_train(*auto(tiny, "--max_iters=3", "--dtype=float32", "--init_from=resume"))
    out = capsys.readouterr().out
    assert dtype_of(tmp_path) == "float32" and "times as fast" not in out
    assert "dtype was bfloat16 until step 2 and is float32 from now on" in out


def test_emulated_bfloat16_runs_and_says_that_it_is_slower(tiny, machine, capsys):
    machine(computes=False, speed=0.4)
    run_train(*auto(tiny, "--max_iters=2", "--dtype=bfloat16"))
    assert "0.4 times as fast in bfloat16 as in float32, which it emulates; --dtype=float32 is " \
        "faster" in capsys.readouterr().out


def test_a_resumed_run_keeps_its_dtype_unless_the_cpu_emulates_it(tiny, tmp_path, machine, capsys):
    machine(computes=True, speed=2.0)
    run_train(*auto(tiny, "--max_iters=2"))
    machine(computes=True, speed=1.0)  # a busy moment
    run_train(*auto(tiny, "--max_iters=3", "--init_from=auto"))
    assert dtype_of(tmp_path) == "bfloat16"
    machine(computes=False, speed=0.4)
    capsys.readouterr()
    run_train(*auto(tiny, "--max_iters=4", "--init_from=auto"))
    assert dtype_of(tmp_path) == "float32"
    assert "dtype was bfloat16 until step 3 and is float32 from now on" in capsys.readouterr().out
    machine(computes=True, speed=2.0)
    run_train(*auto(tiny, "--max_iters=5", "--init_from=auto"))
    assert dtype_of(tmp_path) == "float32"


def test_a_resumed_bfloat16_run_is_the_uninterrupted_one(tiny, tmp_path):
    flags = tiny("--dtype=bfloat16", "--hessian_interval=2")
    run_train(*flags)
    whole = load_latest(tmp_path / "run").model_tensors()
    out = f"--out_dir={tmp_path / 'cut'}"
    run_train(*flags, out, "--checkpoint_interval=3", "--max_iters=6")
    for path in (tmp_path / "cut").glob("step_00000006"):
        path.rename(tmp_path / "away")
    run_train(*flags, out, "--init_from=resume")
    again = load_latest(tmp_path / "cut").model_tensors()
    assert all(torch.equal(x, again[name]) for name, x in whole.items())


def test_two_hundred_steps_in_bfloat16_end_at_the_loss_of_float32(tiny, tmp_path):
    losses = []
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / dtype
        run_train(*tiny("--max_iters=200", "--eval_interval=200", f"--dtype={dtype}",
                        "--checkpoint_interval=1000", "--learning_rate=1e-3", f"--out_dir={out}"))
        lines = (out / "metrics.jsonl").read_text().splitlines()
        losses.append(json.loads(lines[-1])["val/loss"])
    assert abs(losses[0] - losses[1]) < 0.02, losses

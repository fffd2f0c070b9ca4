"""The loop: exact resume, the estimator beside the gradients, ranks, refusals."""

import ctypes
import json
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bench
import sample
import train
from experiments.memory import Allocated
from model import GPT, GPTConfig
from nanosophia import command as command_module
from nanosophia import resume
from nanosophia.checkpoint import load_latest
from nanosophia.configurator import ConfigError, load
from nanosophia.corpus import write_corpus
from nanosophia.dataloader import open_dataset
from nanosophia.distributed import Ranks
from nanosophia.optimizers import OPTIMIZERS
from nanosophia.options import Config
from nanosophia.update_rules import sliced_update
from tests.conftest import listed, made_up_text, run_train, torchrun
from tests.test_checkpoint import nanogpt_file


def records(out_dir):
    lines = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    volatile = ("tokens_per_second", "mfu", "data_wait_fraction", "processor_seconds")
    return [{k: v for k, v in line.items() if k not in volatile} for line in lines]


def tensors(folder):
    """Parameters and optimizer state of the newest checkpoint."""
    found = load_latest(folder)
    return found.model_tensors() | found.optimizer_tensors()


def assert_same_run(a, b):
    assert records(a) == records(b)
    first, second = tensors(a), tensors(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)


def build(argv, data_dir):
    config = load(Config, argv, "")[0]
    ranks = Ranks(0, 1, torch.device("cpu"))
    data = open_dataset(str(data_dir), config.block_size)
    return train.build_run(resume.resolve_fresh(config, ranks, data), ranks, data)


def test_a_run_learns_and_records_every_step_once(tiny, tmp_path, capsys):
    run_train(*tiny("--max_iters=60", "--sample_tokens=8", "--eval_interval=25"))
    lines = records(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(60))
    assert lines[-1]["train/loss"] < lines[0]["train/loss"] - 1.5
    assert [line["step"] for line in lines if "val/loss" in line] == [24, 49, 59]
    assert {"lr", "grad_norm", "unclipped_fraction", "hessian_norm"} <= lines[0].keys()
    out = capsys.readouterr().out
    assert "a sample:" in out and "next:" in out and "python sample.py --out_dir=" in out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["vocab_size"] == 320


@pytest.mark.trial(2)
@pytest.mark.parametrize("optimizer, extra", [
    *((name, ("--eps=1e-2",) if name == "gnb_unclipped" else ()) for name in OPTIMIZERS),
    *((name, ("--dropout=0.2",)) for name in ("sophiag", "sophiah", "adamw")),
    ("metric_muon_gnb", ("--metric_rest=sophia",)), ("metric_muon", ("--metric_qkv=apart",)),
    ("sophiag", ("--hessian_chunks=2", "--sampling=random")),
    ("sophiag", ("--hessian_bias_correction=True",)),
    ("sophiag", ("--gamma_target=0.9", "--gamma_rows=matrices"))])
def test_stop_and_resume_continue_bit_identically(tiny, tmp_path, optimizer, extra):
    """Stopped at step 13 of 25 with k = 10: between two estimates, and after an evaluation."""
    flags = ("--max_iters=25", "--eval_interval=6", f"--optimizer={optimizer}", *extra,
             "--checkpoint_interval=13", "--log_interval=5", "--grad_clip=0.7")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_train(*tiny(*flags, out_dir=whole))

    class Stopped(Exception):
        pass

    original = train.train_step

    def until_14(run, step):
        if step == 14:
            raise Stopped
        return original(run, step)

    train.train_step = until_14
    try:
        with pytest.raises(Stopped):
            run_train(*tiny(*flags, out_dir=parts))
    finally:
        train.train_step = original
    assert load_latest(parts).state["step"] == 13
    run_train(*tiny(*flags, "--init_from=resume", out_dir=parts))
    assert_same_run(whole, parts)


def test_auto_starts_then_continues_and_a_finished_run_says_so(tiny, tmp_path, capsys):
    run_train(*tiny("--init_from=auto", "--max_iters=3"))
    assert load_latest(tmp_path / "run").state["step"] == 3
    run_train(*tiny("--init_from=auto", "--max_iters=5"))
    assert load_latest(tmp_path / "run").state["step"] == 5
    capsys.readouterr()
    run_train(*tiny("--init_from=auto", "--max_iters=5"))
    assert "nothing to train; raise --max_iters" in capsys.readouterr().out


def test_the_estimate_leaves_the_training_gradients_as_they_are(tiny, data_dir):
    """Also with dropout, whose random numbers the estimate must not shift."""
    grads = []
    for estimating in (True, False):
        run = build(tiny("--dropout=0.3"), data_dir)
        if not estimating:
            run.estimates = lambda step: False
        run.optimizer.zero_grad = lambda set_to_none: None
        train.train_step(run, 0)
        grads.append([p.grad.clone() for p in run.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_the_estimate_comes_before_the_update_every_k_steps_and_is_not_norm_clipped(
        tiny, data_dir):
    seen = {}
    for clip in ("1e-6", "0"):
        run = build(tiny("--hessian_interval=3", f"--grad_clip={clip}"), data_dir)
        original, calls = run.estimator.estimate, []

        def spy(*args, run=run, original=original, calls=calls):
            calls.append([p.detach().clone() for p in run.model.parameters()])
            return original(*args)

        run.estimator = run.estimator._replace(estimate=spy)
        start = [p.detach().clone() for p in run.model.parameters()]
        for step in range(7):
            train.train_step(run, step)
        assert len(calls) == 3  # t = 1, 4, 7
        assert all(torch.equal(a, b) for a, b in zip(calls[0], start, strict=True))
        first = build(tiny(f"--grad_clip={clip}"), data_dir)
        train.train_step(first, 0)
        seen[clip] = [first.optimizer.state[p]["hessian"] for p in first.optimizer.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(*seen.values(), strict=True))


def test_the_estimate_reads_the_first_rows_of_the_same_batch(tiny, data_dir):
    run = build(tiny(), data_dir)
    given = []
    original = run.estimator.estimate
    run.estimator = run.estimator._replace(
        estimate=lambda *args: given.append(args[1:]) or original(*args))
    train.train_step(run, 0)
    idx, targets, chunks, *_ = given[0]
    expected = run.batches.rows(0, 0, 4)
    assert torch.equal(idx, expected[:, :-1]) and torch.equal(targets, expected[:, 1:])
    assert chunks == [[slice(0, 2), slice(2, 4)]]


def test_accumulation_does_not_change_the_step(tiny, data_dir):
    states = []
    for batch_size in (8, 2, 1):
        run = build(tiny(f"--batch_size={batch_size}", "--dtype=float64"), data_dir)
        loss, _ = train.train_step(run, 0)
        states.append([loss, *run.model.parameters(),
                       *(run.optimizer.state[p]["hessian"] for p in run.optimizer.parameters())])
    for other in states[1:]:
        for a, b in zip(states[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_evaluation_is_the_same_for_any_batch_size_and_disturbs_nothing(tiny, data_dir, batch_size):
    run = build(tiny("--dtype=float64", f"--batch_size={batch_size}"), data_dir)
    windows = train.ValidationWindows(open_dataset(str(data_dir), 16).val, block_size=16, limit=7)
    state = torch.random.get_rng_state()
    loss = train.evaluate(run.model, windows, run.ranks, batch_size, run.autocast)
    reference = run.model(*train.inputs_and_targets(windows.rows(0, 7), torch.device("cpu"))).item()
    assert loss == pytest.approx(reference, rel=1e-12)
    assert torch.equal(state, torch.random.get_rng_state()) and run.model.training


NEOX = ("--rotary_fraction=0.5", "--parallel_residual", "--tied_head=False",
        "--activation_checkpointing")


@pytest.mark.parametrize("ranks, extra", [
    (2, ("--dropout=0.1",)), (2, ("--hessian_chunks=2", "--gamma_target=0.9")), (4, ()),
    (2, ("--optimizer=sophiah", "--dropout=0.1")), (2, ("--optimizer=ef_clip",)),
    (2, ("--activation_checkpointing", "--dropout=0.1")),
    # Ranks with fewer rows than others, or none
    (3, ("--hessian_batch_size=2", "--gamma_target=0.9")), (3, ("--hessian_chunks=4",)),
    (3, ("--optimizer=sophiah", "--hessian_batch_size=1", "--hessian_interval=1")),
    (3, ("--optimizer=adamw", "--batch_size=2")), (3, ("--hessian_chunks=2",)),
    (3, ("--parallel=fsdp", "--batch_size=3", "--hessian_batch_size=4")),
    # Two copies, each split over two ranks
    *((4, ("--parallel=fsdp", "--shard_ranks=2", *more)) for more in (
        ("--gamma_target=0.9", "--hessian_batch_size=8", "--hessian_chunks=2", "--dropout=0.1"),
        ("--optimizer=metric_muon_gnb", "--bias=True"))),
    *((2, ("--parallel=fsdp", *more)) for more in (
        ("--dropout=0.1", "--eval_windows=5"), ("--hessian_chunks=2", "--dropout=0.1"),
        ("--gamma_target=0.9", "--gamma_rows=embedding"),
        ("--optimizer=adamw", "--activation_checkpointing"), ("--optimizer=lion",),
        ("--optimizer=normalize",), ("--optimizer=ef_clip",), NEOX, ("--optimizer=metric_muon",),
        ("--optimizer=metric_muon_gnb", "--metric_rest=sophia", "--metric_qkv=apart"),
        ("--optimizer=schedule_free",)))])
def test_ranks_give_one_ranks_losses_and_curvature(tiny, tmp_path, ranks, extra):
    flags = ("--max_iters=12", "--dtype=float64", "--batch_size=1", *extra)
    run_train(*tiny(*flags, out_dir=tmp_path / "one"))
    result = torchrun(ranks, "train.py", *tiny(*flags, out_dir=tmp_path / "many"))
    assert result.returncode == 0, result.stderr
    for a, b in zip(records(tmp_path / "one"), records(tmp_path / "many"), strict=True):
        for key in a:  # train/loss is summed in float32; a coordinate may sit on the quantile
            tolerance = dict(abs=0.02) if key.startswith("unclipped") else dict(rel=1e-6)
            assert a[key] == pytest.approx(b[key], **tolerance), key
    one, many = tensors(tmp_path / "one"), tensors(tmp_path / "many")
    for key in one:
        torch.testing.assert_close(one[key], many[key], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("flags, words", [
    (("--optimizer=sophiah",), "cannot serve optimizer = sophiah: Hutchinson's estimate"),
    (("--optimizer=muon",), "on shards --optimizer=metric_muon --metric_power=0 is its"),
    (("--optimizer=soap",), "every rank would hold its bases of whole matrices")])
def test_shards_refuse_what_needs_the_whole_with_the_reason(tiny, refused, flags, words):
    assert words in refused(train.main, tiny("--parallel=fsdp", *flags))


def test_shards_refuse_chunks_of_which_some_rank_has_no_row(tiny, monkeypatch):
    monkeypatch.setattr(resume, "world_size", lambda: 4)
    config = load(Config, tiny("--parallel=fsdp", "--hessian_batch_size=8", "--hessian_chunks=4"),
                  "")[0]
    with pytest.raises(ConfigError, match="in hessian_chunks = 4, of which every rank takes rows, "
                                          "gives some of 4 ranks .* multiple of 16, fewer chunks"):
        resume.check_settings(config, {})
    resume.check_settings(replace(config, hessian_chunks=2), {})


@pytest.mark.parametrize("flags, words", [
    (("--shard_ranks=2",), "shard_ranks = 2 has no effect with parallel = ddp"),
    (("--shard_ranks=1", "--parallel=fsdp"), "shard_ranks = 1 shares nothing"),
    (("--shard_ranks=3", "--parallel=fsdp"), "shard_ranks = 3 does not divide the 4 ranks"),
    (("--shard_ranks=8", "--parallel=fsdp"), "shard_ranks = 8 does not divide the 4 ranks")])
def test_copies_that_ranks_cannot_make_are_refused(tiny, monkeypatch, flags, words):
    monkeypatch.setattr(resume, "world_size", lambda: 4)
    config = load(Config, tiny(*flags), "")[0]
    with pytest.raises(ConfigError, match=words):
        resume.check_settings(config, {})
    run_train(*tiny())
    monkeypatch.setattr(resume, "on_main", lambda ranks, action, *errors: action())
    with pytest.raises(ConfigError, match=words):  # also where nothing is trained
        resume.resolve(replace(config, eval_only=True, init_from="resume"), {},
                       Ranks(0, 4, torch.device("cpu")))
    monkeypatch.setattr(bench, "world_size", lambda: 4)
    with pytest.raises(ConfigError, match=words):
        settings, sources = load(bench.BenchSettings, list(flags), "")
        bench.contender_config(settings, sources, "optimizer=adamw")


@pytest.mark.parametrize("key, flags", [
    ("total_batch_size", ("--batch_size=1",)),
    ("hessian_batch_size", ("--hessian_batch_size=2", "--batch_size=4"))])
def test_shards_refuse_ranks_that_would_not_run_in_step(tiny, monkeypatch, key, flags):
    monkeypatch.setattr(resume, "world_size", lambda: 3)
    config = load(Config, tiny("--parallel=fsdp", *flags), "")[0]
    with pytest.raises(ConfigError, match=f"{key} = . gives some of 3 ranks fewer micro-batches"):
        resume.check_settings(config, {})
    resume.check_settings(replace(config, batch_size=4, hessian_batch_size=3), {})


def test_recomputed_blocks_give_the_same_run(tiny, tmp_path):
    for name, extra in (("a", ()), ("b", ("--activation_checkpointing",))):
        run_train(*tiny("--dropout=0.2", "--max_iters=12", *extra, out_dir=tmp_path / name))
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_ranks_talk_once_per_step_about_gradients_and_once_per_estimate(tiny):
    result = torchrun(2, "-m", "tests.talk_worker", *tiny("--batch_size=1", "--max_iters=4",
                                                          "--hessian_interval=2"))
    assert result.returncode == 0, result.stderr
    assert "all talk is accounted for" in result.stdout


@pytest.mark.parametrize("flags, words", [
    (("--total_batch_size=1", "--hessian_batch_size=1"), "total_batch_size = 1 is less than the 2"),
    (("--dataset=nowhere",), "nowhere/train.bin not found"),
    (("--init_from=resume",), "holds no checkpoint to resume")])
def test_what_all_ranks_refuse_is_said_once(tiny, flags, words):
    result = torchrun(2, "train.py", *tiny(*flags))
    assert result.returncode != 0
    line, = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert words in line and not line.startswith("error: rank")
    assert 'train.py", line' not in result.stderr  # no traceback of ours; torchrun prints its own


def test_a_checkpoint_of_another_model_or_optimizer_is_refused(tiny, refused, tmp_path):
    run_train(*tiny())
    before = sorted(tmp_path.rglob("*"))
    for flag, words in (("--n_layer=3", "has n_layer = 2, flag --n_layer=3 asks for 3"),
                        ("--optimizer=adamw", "has optimizer = 'sophiag'"),
                        ("--total_batch_size=16", "has total_batch_size = 8"),
                        ("--seed=1", "has seed = 1337")):
        assert words in refused(train.main, tiny("--init_from=resume", flag))
    assert sorted(tmp_path.rglob("*")) == before


def test_q_k_and_v_stay_as_they_were_in_a_resumed_run(tiny, refused):
    run_train(*tiny("--optimizer=metric_muon"))
    assert "has metric_qkv = 'together'" in refused(
        train.main, tiny("--optimizer=metric_muon", "--init_from=resume", "--metric_qkv=apart"))


def test_settings_left_out_come_from_the_checkpoint_and_changed_ones_are_noted(
        tiny, data_dir, tmp_path, capsys):
    run_train(*tiny("--bias=True"))
    before = load_latest(tmp_path / "run").state["config"]
    capsys.readouterr()
    run_train("--init_from=resume", f"--out_dir={tmp_path / 'run'}", "--device=cpu",
              "--max_iters=7", "--gamma=2")
    after = load_latest(tmp_path / "run").state["config"]
    assert before | dict(init_from="resume", max_iters=7, gamma=2.0) == after
    out = capsys.readouterr().out
    assert "note: gamma was 1.0 until step 6 and is 2.0 from now on" in out


def test_a_resumed_batch_that_has_no_row_for_a_rank_is_refused(tiny, data_dir, tmp_path):
    run_train(*tiny("--total_batch_size=1", "--hessian_batch_size=1"))
    result = torchrun(2, "train.py", "--init_from=resume", f"--out_dir={tmp_path / 'run'}",
                      "--device=cpu", "--max_iters=9")
    assert result.returncode != 0
    assert "total_batch_size = 1 is less than the 2 ranks" in result.stderr
    assert f"total_batch_size from {tmp_path / 'run'}" in result.stderr


def test_a_run_is_never_started_over_another(tiny, refused):
    run_train(*tiny())
    assert "already holds checkpoints; continue them with --init_from=resume" in \
        refused(train.main, tiny())


@pytest.mark.trial(9)
def test_resuming_on_other_data_is_refused(tiny, refused, data_dir, tmp_path):
    run_train(*tiny())
    other = tmp_path / "other"
    write_corpus(listed([("train", made_up_text(9_000, 7)), ("val", made_up_text(999, 8))]), other,
                 "bytes")
    assert "is not the data that" in refused(
        train.main, tiny("--init_from=resume", f"--dataset={other}"))


def test_a_folder_of_something_else_is_no_out_dir(tiny, tmp_path, refused):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"model_type": "gpt2"}')
    assert "config.json is not of a run and would be replaced" in refused(train.main, tiny())
    assert (tmp_path / "run" / "config.json").read_text() == '{"model_type": "gpt2"}'


def test_what_makes_a_resumed_run_round_otherwise_is_noted(tiny, capsys):
    run_train(*tiny("--dtype=float64"))
    run_train(*tiny("--init_from=resume", "--max_iters=9"))
    assert "dtype was float64 until step 6 and is float32 from now on" in capsys.readouterr().out


def test_eval_only_takes_the_best_checkpoint(tiny, tmp_path, capsys, refused):
    run_train(*tiny("--max_iters=8", "--eval_interval=2", "--checkpoint_interval=2",
                    "--learning_rate=0.3"))
    losses = {r["step"] + 1: r["val/loss"] for r in records(tmp_path / "run") if "val/loss" in r}
    best = min(losses, key=losses.get)
    capsys.readouterr()
    run_train(*tiny("--eval_only", "--checkpoint=best"))
    assert f"step {best}: loss" in capsys.readouterr().out
    assert "is for --eval_only" in refused(train.main, tiny("--checkpoint=best"))
    assert "is none of" in refused(train.main, tiny("--eval_only", "--optimizer=foo"))
    assert "leave out --init_from=scratch" in refused(train.main, tiny(
        "--eval_only", "--checkpoint=best", "--init_from=scratch"))
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    capsys.readouterr()
    run_train(*tiny("--eval_only", f"--init_from={tmp_path / 'other'}"))  # beside another run
    assert "step 0: loss" in capsys.readouterr().out
    (tmp_path / "run" / "best").unlink()
    assert "names no best checkpoint" in refused(train.main, tiny("--eval_only",
                                                                  "--checkpoint=best"))


@pytest.mark.parametrize("flag, words", [
    ("--eval_only", "holds no checkpoint to resume"),
    ("--init_from=resume", "holds no checkpoint to resume"),
    ("--device=cuda:99", "CUDA devices are there"),
    ("--device=abacus", "is not a device"),
    ("--block_size=1000000", "window needs block_size + 1"),
    ("--vocab_size=64", "vocab_size = 64 is less than the 257 classes"),
])
def test_what_is_not_there_is_refused_before_anything_is_written(tiny, refused, tmp_path, flag,
                                                                 words):
    assert words in refused(train.main, tiny(flag))
    assert not (tmp_path / "run").exists()


def test_a_driver_that_is_too_old_for_torch_is_one_line(tiny, refused, tmp_path, monkeypatch):
    """Such a driver counts its cards, and fails when one is taken."""
    def set_device(place):
        raise RuntimeError("The NVIDIA driver on your system is too old\n(found version 11040).")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    said = refused(train.main, tiny("--device=cuda"))
    assert "device = cuda: The NVIDIA driver on your system is too old (found version" in said
    assert "\n" not in said.strip() and "--device=cpu" in said
    assert not (tmp_path / "run").exists()


def test_an_out_dir_that_cannot_be_written_is_refused(tiny, refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write to --out_dir" in refused(train.main, tiny(out_dir=tmp_path / "file"))


@pytest.mark.parametrize("log_interval", [1, 50])
def test_what_is_not_finite_ends_the_run_and_is_never_saved(tiny, tmp_path, capsys, monkeypatch,
                                                            log_interval):
    original = train.train_step

    def poisoned(run, step):
        result = original(run, step)
        if step >= 4:
            with torch.no_grad():
                next(run.model.parameters()).fill_(float("nan"))
        return result

    monkeypatch.setattr(train, "train_step", poisoned)
    with pytest.raises(SystemExit) as stopped:
        run_train(*tiny(f"--log_interval={log_interval}", "--max_iters=20", "--eval_interval=50"))
    assert stopped.value.code == 1
    assert "loss is not finite" in capsys.readouterr().err
    assert load_latest(tmp_path / "run").state["step"] == 3


def test_what_one_rank_alone_refuses_is_said_by_it(monkeypatch, capsys):
    """Where the first rank does not end it within the time that it is given."""
    waited = []
    monkeypatch.setattr(command_module.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(SystemExit):
        train.main(["--total_batch_size=0"])
    assert waited == [5] and capsys.readouterr().err.startswith("error: rank 3: total_batch_size")


def test_ranks_fail_together_where_rank_0_alone_writes(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    result = torchrun(2, "train.py", *tiny(out_dir=tmp_path / "file"))
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "cannot write to --out_dir" in lines[0]


def test_a_tokenizer_that_is_missing_is_refused_before_training(tiny, data_dir, tmp_path, refused):
    folder = tmp_path / "data"
    shutil.copytree(data_dir, folder)
    meta = json.loads((folder / "meta.json").read_text()) | dict(tokenizer="bytes by frequency")
    (folder / "meta.json").write_text(json.dumps(meta))
    assert "is none of gpt2, bytes" in refused(
        train.main, tiny(f"--dataset={folder}", "--sample_tokens=5"))
    assert not (tmp_path / "run").exists()


def test_sampling_continues_a_prompt_and_repeats_with_its_seed(tiny, tmp_path, capsys, refused):
    run_train(*tiny())
    capsys.readouterr()
    (tmp_path / "prompt").write_text("import")
    outputs = []
    for start in ("import", f"FILE:{tmp_path / 'prompt'}"):
        sample.main([f"--out_dir={tmp_path / 'run'}", f"--start={start}", "--num_samples=2",
                     "--max_new_tokens=20", "--device=cpu"])
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    texts = outputs[0].split("---------------\n")
    assert texts[0].startswith("import") and texts[1].startswith("import") and texts[0] != texts[1]
    assert "holds no checkpoint" in refused(sample.main, [f"--out_dir={tmp_path / 'none'}"])
    assert "cannot read" in refused(sample.main, [f"--out_dir={tmp_path / 'run'}",
                                                  "--start=FILE:/nowhere", "--device=cpu"])


def test_losses_of_a_run_are_drawn(tiny, tmp_path, capsys, refused):
    pytest.importorskip("matplotlib")
    from experiments import plot
    run_train(*tiny())
    for name in ("losses.svg", "losses.png"):
        plot.main([f"--runs={tmp_path / 'run'}", f"--file={tmp_path / name}", "--x=tokens"])
        assert (tmp_path / name).stat().st_size > 5000
    assert "cannot be read" in refused(plot.main, [f"--runs={tmp_path / 'none'}"])
    assert "--runs names 0 folders" in refused(plot.main, [])
    assert "los is none of loss, lr" in refused(plot.main, ["--panels=los"])


def test_a_runs_report_shows_plots_settings_and_samples(tiny, tmp_path, refused):
    pytest.importorskip("matplotlib")
    from experiments import plot
    run_train(*tiny())
    page = tmp_path / "page" / "report.html"
    plot.main([f"--runs={tmp_path / 'run'}", f"--report={page}", "--samples=2"])
    text = page.read_text()
    assert text.count("<pre>") == 2 and "data:image/png;base64," in text
    assert "<td>n_embd</td><td>16</td>" in text and torch.__version__ in text
    assert "is about one run" in refused(plot.main, ["--runs=a,b", f"--report={page}"])


def test_every_panel_is_drawn_from_what_the_run_recorded(tiny, tmp_path):
    pytest.importorskip("matplotlib")
    from experiments import plot
    run_train(*tiny("--max_iters=5"))
    figure = plot.picture([tmp_path / "run"], ["a run"], list(plot.PANELS), x="seconds")
    lines = records(tmp_path / "run")
    for axes, key in zip(figure.axes, ("train/loss", "lr", "unclipped_fraction", "hessian_norm",
                                       "norm_clip_rate"), strict=True):
        assert axes.lines[0].get_ydata().tolist() == [line[key] for line in lines]
    seconds = figure.axes[0].lines[0].get_xdata()
    raw = plot.read_metrics(tmp_path / "run")
    assert seconds[-1] == pytest.approx(sum(128 / r["tokens_per_second"] for r in raw))


def test_eval_only_is_the_same_for_any_batch_and_ranks(tiny, tmp_path, data_dir, capsys):
    run_train(*tiny("--max_iters=4"))
    capsys.readouterr()
    lines = []
    for flags in (("--batch_size=1",), ("--batch_size=8", "--total_batch_size=16", "--seed=2"),
                  ("--checkpoint=best", "--optimizer=adamw"),  # the best is the newest
                  ("--hessian_chunks=7", "--hessian_batch_size=3")):
        run_train(*tiny("--eval_only", *flags))
        lines.append(capsys.readouterr().out.splitlines()[-1])
    result = torchrun(2, "train.py", *tiny("--eval_only", "--batch_size=2"))
    lines.append(next(x for x in result.stdout.splitlines() if x.startswith("step 4: loss")))
    assert len({re.sub(r"(\.\d{4})\d", r"\1", line) for line in lines}) == 1, lines
    # By hand: every token but the first, in windows of 16 and a last one that reaches back.
    found = load_latest(tmp_path / "run")
    model = GPT(GPTConfig(**found.state["model"])).double()
    model.load_state_dict(found.model_tensors())
    tokens = torch.from_numpy(open_dataset(str(data_dir), 16).val.astype("int64"))
    n = len(tokens) - 1
    assert n % 16
    total = 0.0
    with torch.no_grad():
        for start in range(0, n - n % 16, 16):
            total += 16 * model(tokens[None, start:start + 16],
                                tokens[None, start + 1:start + 17]).item()
        logits = model(tokens[None, n - 16:n])[0, 16 - n % 16:]
        total += torch.nn.functional.cross_entropy(logits, tokens[n + 1 - n % 16:],
                                                   reduction="sum").item()
    reported = re.search(r"loss ([\d.]+) nats.* ([\d.]+) bits per byte, over ([\d,]+) bytes",
                         lines[0])
    assert float(reported[1]) == pytest.approx(total / n, abs=2e-5)
    size = int((tokens[1:] != 256).sum())
    assert int(reported[3].replace(",", "")) == size
    assert float(reported[2]) == pytest.approx(total / math.log(2) / size, abs=2e-5)


def test_mkl_keeps_its_number_of_threads(tiny, data_dir):
    """Where it may choose, it takes fewer on a busy machine, and rounds otherwise."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    if not hasattr(library, "mkl_serv_get_dynamic"):
        pytest.skip("this torch shows no MKL")
    build(tiny(), data_dir)
    assert library.mkl_serv_get_dynamic() == 0


def test_weights_and_data_of_different_tokenizers_are_refused(tmp_path, tiny, refused, gpt2_cache):
    nanogpt_file(tmp_path / "ckpt.pt", vocab_size=50304)
    flags = [f for f in tiny() if not f.startswith(("--n_", "--block_size"))]
    line = refused(train.main, [*flags, f"--init_from={tmp_path / 'ckpt.pt'}", "--block_size=16"])
    assert "trained with tokenizer gpt2" in line and "tokenized with bytes" in line


def test_auto_before_the_first_checkpoint_begins_from_the_same_weights(tmp_path, tiny, capsys):
    nanogpt_file(tmp_path / "ckpt.pt")
    flags = [f for f in tiny("--max_iters=1", "--learning_rate=1e-12", "--weight_decay=0")
             if not f.startswith(("--n_", "--block_size"))]
    run_train(*flags, f"--init_from={tmp_path / 'ckpt.pt'}", "--block_size=16")
    first = tensors(tmp_path / "run")["transformer.wte.weight"]
    shutil.rmtree(load_latest(tmp_path / "run").folder)  # as if killed before it was there
    run_train(*flags, "--init_from=auto", "--block_size=16")
    assert "beginning again from" in capsys.readouterr().out
    assert torch.equal(first, tensors(tmp_path / "run")["transformer.wte.weight"])


def test_a_resumed_run_may_take_micro_batches_that_divide_its_own_batch(tiny, tmp_path):
    run_train(*tiny("--max_iters=2", "--total_batch_size=14", "--batch_size=2",
                    "--hessian_batch_size=2"))
    train.main([f"--out_dir={tmp_path / 'run'}", "--init_from=resume", "--batch_size=7",
                "--max_iters=3", "--device=cpu",
                f"--dataset={load_latest(tmp_path / 'run').state['config']['dataset']}"])
    assert load_latest(tmp_path / "run").state["step"] == 3


def test_a_run_goes_on_with_another_optimizer(tiny, tmp_path, capsys, refused):
    """Weights, step, data order and schedule go on; the state is as new, and curvature is
    estimated at once."""
    run_train(*tiny("--optimizer=adamw", "--max_iters=24", "--weight_decay=0.3", "--seed=5"))
    shutil.rmtree(tmp_path / "run" / "step_00000024")
    fork = ("--optimizer=sophiag", "--reset_optimizer", f"--init_from={tmp_path / 'run'}",
            "--max_iters=24")
    trunk = load_latest(tmp_path / "run")
    first = trunk.state["step"]
    assert first % 10, "a step with no estimate of its own"
    config, sources = resume.load_config(tiny(*fork, out_dir=tmp_path / "fork"))
    ranks = Ranks(0, 1, torch.device("cpu"))
    start = resume.resolve(config, sources, ranks)
    run = train.build_run(start.config, ranks, start.data, fresh_from=first)
    assert train.restore(run, start.checkpoint, weights_only=True) == first
    assert (start.config.optimizer, start.config.seed, start.config.beta1,
            start.config.weight_decay) == ("sophiag", 5, 0.96, 0.2)  # its own, not AdamW's
    loss, _ = train.train_step(run, first)
    assert all(run.optimizer.state[p]["hessian"].any() for p in run.optimizer.parameters())
    capsys.readouterr()
    run_train(*tiny(*fork, out_dir=tmp_path / "fork"))
    assert "note: optimizer was 'adamw' until step 21 and is 'sophiag' from now on" in \
        capsys.readouterr().out
    trunk_losses, losses = ({r["step"]: r["train/loss"] for r in records(tmp_path / name)}
                            for name in ("run", "fork"))
    assert losses[first] == trunk_losses[first] == pytest.approx(loss.item())
    assert min(losses) == first and max(losses) == 23
    assert load_latest(tmp_path / "fork").state["step"] == 24
    resumed = load_latest(tmp_path / "fork").state["config"]
    assert resumed["learning_rate"] == 1e-2  # the schedule's peak was not given for the fork
    for step in (tmp_path / "fork").glob("step_*"):
        shutil.rmtree(step)  # as if killed before the first
    (tmp_path / "fork" / "config.json").write_text(json.dumps(json.loads(
        (tmp_path / "fork" / "config.json").read_text()) | dict(init_from=str(tmp_path / "run"))))
    line = refused(train.main, tiny("--init_from=auto", out_dir=tmp_path / "fork"))
    assert "give the whole command again, with --reset_optimizer" in line
    line = refused(train.main, tiny("--init_from=auto", "--reset_optimizer",
                                    out_dir=tmp_path / "another"))
    assert "was not begun from another run" in line
    flags = tiny("--reset_optimizer", f"--init_from={tmp_path / 'run'}", "--optimizer=sophiah",
                 out_dir=tmp_path / "another")
    line = refused(train.main, [flag for flag in flags if "batch_size" not in flag])
    assert f"total_batch_size from {tmp_path / 'run'}" in line
    assert "hessian_batch_size from its default" in line  # not the checkpoint's, of AdamW
    line = refused(train.main, tiny("--reset_optimizer"))
    assert "give --init_from=RUN" in line
    line = refused(train.main, tiny("--reset_optimizer", f"--init_from={tmp_path}",
                                    out_dir=tmp_path / "another"))
    assert "holds no checkpoint of a run" in line


def test_a_cooldown_branches_off_a_trunk(tiny, tmp_path, capsys, refused):
    """To the losses of the run that was to have this length from the beginning."""
    wsd = ("--schedule=wsd", "--cooldown_fraction=0.25", "--checkpoint_interval=3", "--gamma=1",
           "--keep_checkpoints=9", "--hessian_interval=4", "--warmup_iters=2")
    run_train(*tiny(*wsd, "--max_iters=24", out_dir=tmp_path / "trunk"))
    run_train(*tiny(*wsd, "--max_iters=12", out_dir=tmp_path / "whole"))
    branch = tiny("--max_iters=12", f"--init_from={tmp_path / 'trunk'}@9",
                  out_dir=tmp_path / "branch")
    capsys.readouterr()
    run_train(*branch)
    assert "max_iters was 24 until step 9 and is 12 from now on" in capsys.readouterr().out
    whole, cooled = ({r["step"]: r["train/loss"] for r in records(tmp_path / name)}
                     for name in ("whole", "branch"))
    assert list(cooled) == [9, 10, 11] and all(cooled[s] == whole[s] for s in cooled)
    assert whole[11] != records(tmp_path / "trunk")[11]["train/loss"]
    states = [load_latest(tmp_path / name).model_tensors() for name in ("whole", "branch")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert "has no effect on schedule = cosine" in refused(
        train.main, tiny("--cooldown_fraction=0.1", out_dir=tmp_path / "other"))
    run_train(*tiny("--max_iters=12", f"--init_from={tmp_path / 'trunk'}@9",
                    "--cooldown_fraction=0.1", out_dir=tmp_path / "shorter"))
    assert records(tmp_path / "shorter")[0]["train/loss"] == whole[9]
    for folder in (tmp_path / "branch").glob("step_*"):
        shutil.rmtree(folder)  # as if killed before the first
    run_train(*[flag for flag in branch if "init_from" not in flag], "--init_from=auto")
    assert "beginning again from" in capsys.readouterr().out
    assert [r["train/loss"] for r in records(tmp_path / "branch")][-1] == whole[11]
    for name, words in (("trunk@7", "no checkpoint of step 7, only of 3, 6, 9"),
                        ("none@7", "no checkpoint of step 7, at all")):
        assert words in refused(train.main, tiny(f"--init_from={tmp_path / name}",
                                                 out_dir=tmp_path / "other"))
    fresh = tiny("--max_iters=12", f"--init_from={tmp_path / 'trunk'}@6", "--optimizer=adamw",
                 "--reset_optimizer", out_dir=tmp_path / "fresh")
    run_train(*fresh)
    assert records(tmp_path / "fresh")[0]["step"] == 6
    run_train(*tiny(f"--init_from={tmp_path / 'whole'}@12", out_dir=tmp_path / "no"))
    assert "nothing to train" in capsys.readouterr().out and not (tmp_path / "no").exists()


def test_what_was_refused_is_still_counted_after_a_resume(tiny, tmp_path, monkeypatch):
    original = train.GPT.forward
    monkeypatch.setattr(train.GPT, "forward", lambda self, *args:
                        original(self, *args) * (float("nan") if self.training else 1))
    flags = ("--on_nonfinite=skip", "--optimizer=adamw", "--checkpoint_interval=2",
             "--max_skipped=5")
    run_train(*tiny(*flags, "--max_iters=2"))
    assert load_latest(tmp_path / "run").state["guard"] == dict(in_a_row=[2, 0], refused=2)
    with pytest.raises(SystemExit):
        run_train(*tiny(*flags, "--max_iters=20", "--init_from=resume"))
    assert load_latest(tmp_path / "run").state["step"] == 4  # the sixth in a row was step 5


def test_a_run_starts_from_another_runs_weights(tiny, tmp_path):
    run_train(*tiny("--max_iters=2"))
    run_train(*tiny("--max_iters=1", "--learning_rate=1e-12", f"--init_from={tmp_path / 'run'}",
                    out_dir=tmp_path / "second"))
    a, b = tensors(tmp_path / "run"), tensors(tmp_path / "second")
    torch.testing.assert_close(a["transformer.wte.weight"], b["transformer.wte.weight"])


@pytest.mark.parametrize("flags", [
    ("--optimizer=adamw",), ("--compile_optimizer=on",),
    ("--compile_optimizer=on", "--hessian_chunks=2", "--batch_size=1")])
def test_a_step_asks_the_device_nothing(tiny, data_dir, monkeypatch, flags):
    """Between logging steps the host never waits: no value is read, in an estimate's step either.

    An eager Sophia step (the CPU's default) does ask whether the step is refused.
    """
    run = build(tiny("--hessian_interval=2", *flags), data_dir)
    for step in range(3):  # compiled, and state made
        train.train_step(run, step)
    asked = []

    def watched(name):
        original = getattr(torch.Tensor, name)

        def method(self, *args, **kwargs):
            # The learning rate, its decay and gamma live on the host, as 0-dim float64 tensors.
            if self.dim() or self.dtype != torch.float64:
                asked.append(name)
            return original(self, *args, **kwargs)
        return method

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, watched(name))
    for step in range(3, 6):
        train.train_step(run, step)
    assert asked == []
    train.measure(run, 5, 1e-3, torch.zeros(()), torch.zeros(()), train.Clock(0))
    assert asked == ["tolist"]


@pytest.mark.parametrize("flags", [(), ("--hessian_chunks=2",), ("--optimizer=ef_clip",)])
def test_an_estimate_takes_the_memory_of_the_training_pass_and_one_copy_of_the_parameters(
        tiny, data_dir, flags):
    run = build(tiny("--n_embd=64", "--vocab_size=2048", "--batch_size=4", *flags), data_dir)
    train.train_step(run, 0)  # optimizer state is there
    with Allocated() as training:
        train.train_step(run, 1)
    with Allocated() as estimate:
        train.update_curvature(run, 0)
    copy = 4 * run.model.num_params(non_embedding=False)
    assert estimate.most <= training.most + 1.02 * copy
    assert estimate.alive() < 0.01 * copy  # and gives it back
    state = sum(x.nbytes for s in run.optimizer.state.values() for x in s.values() if x.dim())
    assert state == 2 * copy  # 8 bytes per parameter


def test_the_loss_in_chunks_trains_the_same_run(tiny, tmp_path):
    for chunk in (1000, 5):
        run_train(*tiny(f"--loss_chunk={chunk}", "--dtype=float64", "--hessian_interval=2",
                        out_dir=tmp_path / str(chunk)))
    found = [[r["train/loss"] for r in records(tmp_path / str(chunk))] for chunk in (1000, 5)]
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_where_the_compile_cache_cannot_be_written_it_is_compiled_anew(tiny, tmp_path, monkeypatch,
                                                                       capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr("nanosophia.optimizers.compiled_update", sliced_update)  # 20 s less
    run_train(*tiny("--max_iters=2", "--compile_optimizer=on"))
    assert "file/cache (Not a directory), so it is compiled anew" in capsys.readouterr().out
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).is_dir()

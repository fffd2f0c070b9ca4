"""Runs that survive: kills, signals, full disks, damaged files, numbers that are not finite.

`python -m tests.faults` runs these and every other test marked `trial`, the slow ones too, and
writes results/reliability.md.
"""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import train
from nanosophia import checkpoint
from nanosophia import saver as saving
from nanosophia.checkpoint import (
    CheckpointError,
    checkpoint_folders,
    load_latest,
    open_checkpoint,
)
from nanosophia.corpus import write_corpus
from nanosophia.distributed import Ranks
from nanosophia.folder_lock import FolderLock
from nanosophia.saver import Saver
from tests.conftest import ROOT, listed, run_train, torchrun
from tests.faults import child

ONE = Ranks(0, 1, torch.device("cpu"))


def losses(folder: Path) -> dict[int, tuple]:
    """(train, val) loss of every recorded step."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {x["step"]: (x.get("train/loss"), x.get("val/loss")) for x in lines}


def same_state(a: Path, b: Path) -> bool:
    first, second = load_latest(a), load_latest(b)
    pairs = zip((first.model_tensors(), first.optimizer_tensors()),
                (second.model_tensors(), second.optimizer_tensors()), strict=True)
    return all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in pairs)


def state_of(step: int, val_loss: float | None = None) -> dict:
    return checkpoint.run_state(step=step, config={}, model={}, tokenizer="bytes", num_classes=257,
                                val_loss=val_loss)


@pytest.fixture
def flags(tiny):
    """A run of a few seconds that saves often: 2 layers x 64, block 64."""
    def make(out_dir, *extra):
        return tiny("--n_embd=64", "--block_size=64", "--eval_interval=50", "--max_iters=120",
                    "--checkpoint_interval=7", *extra, out_dir=out_dir)
    return make


# 1, 11: ranks -------------------------------------------------------------------------------------


@pytest.mark.trial(1)
def test_the_same_run_twice_is_the_same(flags, tmp_path):
    for name in "ab":
        run_train(*flags(tmp_path / name, "--max_iters=24"))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert same_state(tmp_path / "a", tmp_path / "b")


@pytest.mark.trial(1)
def test_the_same_run_twice_on_two_ranks_is_the_same(flags, tmp_path):
    for name in "ab":
        result = torchrun(2, "train.py", *flags(tmp_path / name, "--max_iters=24",
                                                "--batch_size=1"))
        assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert same_state(tmp_path / "a", tmp_path / "b")


@pytest.mark.trial(11)
@pytest.mark.parametrize("ranks, parallel", [
    (2, ("--parallel=ddp",)), (2, ("--parallel=fsdp",)),
    (4, ("--parallel=fsdp", "--shard_ranks=2"))])
def test_the_number_of_ranks_may_change_on_resume(tiny, tmp_path, ranks, parallel):
    """1 -> several -> 1 ranks give the losses and state of one; so do shards in between."""
    one, parts = tmp_path / "one", tmp_path / "parts"
    common = ("--dtype=float64", "--batch_size=1", "--keep_checkpoints=9", "--hessian_interval=4")
    run_train(*tiny("--max_iters=12", *common, out_dir=one))
    resumed = ("--max_iters=12", "--init_from=auto", *common)
    with stopping_after(3):
        run_train(*tiny(*resumed, out_dir=parts))
    result = torchrun(ranks, "-m", "tests.faults.child", "--fault=stop:0:7:1",
                      *tiny(*resumed, *parallel, out_dir=parts))
    assert "stopped by SIGUSR1 after" in result.stderr, result.stderr
    assert load_latest(parts).state["world_size"] == ranks
    assert bool(list(load_latest(parts).folder.glob("shard-*"))) == ("--parallel=fsdp" in parallel)
    run_train(*tiny(*resumed, out_dir=parts))
    found = losses(parts)
    for step, pair in losses(one).items():
        for x, y in zip(pair, found[step], strict=True):
            assert x is y is None or x == pytest.approx(y, rel=1e-6), step
    a, b = load_latest(one), load_latest(parts)
    for x, y in ((a.model_tensors(), b.model_tensors()),
                 (a.optimizer_tensors(), b.optimizer_tensors())):
        assert x.keys() == y.keys()
        for key in x:
            torch.testing.assert_close(x[key], y[key], rtol=1e-9, atol=1e-12)


class stopping_after:
    """Within it a run gets SIGUSR1 in the step after so many."""

    def __init__(self, steps: int):
        self.steps = steps

    def __enter__(self):
        self.original = train.train_step

        def step(run, t):
            if t == self.steps:
                os.kill(os.getpid(), signal.SIGUSR1)
            return self.original(run, t)

        train.train_step = step
        self.raises = pytest.raises(SystemExit)
        self.stopped = self.raises.__enter__()

    def __exit__(self, *error):
        train.train_step = self.original
        done = self.raises.__exit__(*error)
        assert self.stopped.value.code == 128 + signal.SIGUSR1
        return done


@pytest.mark.trial(11)
def test_more_ranks_than_rows_are_refused(tiny, tmp_path):
    small = ("--total_batch_size=2", "--hessian_batch_size=2")
    run_train(*tiny("--max_iters=2", *small))
    result = torchrun(4, "train.py", *tiny("--max_iters=6", "--init_from=resume", *small))
    assert result.returncode != 0
    assert "total_batch_size = 2 is less than the 4 ranks" in result.stderr


# 3: kill -9 ---------------------------------------------------------------------------------------


def at_a_random_moment(process, parts: Path, duration: float, randomly: random.Random) -> None:
    """Waits for a moment of a run that would take `duration`, or for its end."""
    process.join(randomly.uniform(0, duration))


def while_it_saves(process, parts: Path, duration: float, randomly: random.Random) -> None:
    """Waits until one of the next saves has begun, and a little longer."""
    saves, was_saving = randomly.randrange(1, 4), False
    while saves and process.exitcode is None:
        saving = any(parts.glob("step_*.partial"))
        saves -= saving and not was_saving
        was_saving = saving
    process.join(randomly.uniform(0, 0.03))


def killed_until_done(flags, tmp_path, kills: int, trials, seed: int, start,
                      wait=at_a_random_moment) -> None:
    """Kills a run at chosen moments, `kills` times over several runs, and compares the ends."""
    whole = tmp_path / "whole"
    began = time.monotonic()
    process = start(flags(whole, "--init_from=auto"), tmp_path / "log")
    process.join()
    duration = time.monotonic() - began
    assert (tmp_path / "log").read_text().count("next:") == 1, (tmp_path / "log").read_text()
    randomly, done, differing, number = random.Random(seed), 0, 0, 0
    while done < kills:
        parts, number = tmp_path / f"parts{number}", number + 1
        while True:
            process = start(flags(parts, "--init_from=auto"), parts.with_suffix(".log"))
            wait(process, parts, duration, randomly)
            if process.exitcode is not None:
                assert process.exitcode == 0, parts.with_suffix(".log").read_text()
                break
            process.kill()
            process.join()
            done += 1
            for folder in checkpoint_folders(parts)[:1]:
                open_checkpoint(folder)  # raises when the newest is damaged
        assert not list(parts.glob("*.corrupt*"))
        differing += losses(parts) != losses(whole) or not same_state(parts, whole)
        shutil.rmtree(parts)
    trials(done, differing=differing)
    assert not differing


@pytest.mark.trial(3)
def test_killed_at_random_it_ends_as_if_nothing_had_been(flags, tmp_path, trials):
    killed_until_done(flags, tmp_path, 20, trials, 3, child.start)


@pytest.mark.slow
@pytest.mark.trial(3)
def test_killed_a_hundred_times_it_ends_as_if_nothing_had_been(flags, tmp_path, trials):
    killed_until_done(flags, tmp_path, 100, trials, 33, child.start)


class Torchrun:
    """train.py under torchrun, to be killed with all its ranks."""

    def __init__(self, argv, log, *, ranks=2, restarts=0, env=()):
        self.file = open(log, "a")  # noqa: SIM115 (closed with the process)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}",
             f"--max_restarts={restarts}", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0",
             "--monitor_interval=0.1", "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1", "train.py",
             *argv], cwd=ROOT, stdout=self.file,
            stderr=self.file, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **dict(env)})

    @property
    def exitcode(self):
        return self.process.poll()

    def join(self, timeout=None):
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            return
        self.file.close()

    def ranks(self) -> list[int]:
        """Process ids of the ranks that run now, by rank."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                parent = (path.parent / "stat").read_text().rsplit(")")[-1].split()[1]
                if int(parent) != self.process.pid:
                    continue
                env = dict(x.partition(b"=")[::2] for x in path.read_bytes().split(b"\0"))
                if b"RANK" in env:
                    found[int(env[b"RANK"])] = int(path.parent.name)
            except (OSError, ValueError):
                continue
        return [found[rank] for rank in sorted(found)]

    def kill(self):
        """kill -9 to all of it at once."""
        for pid in (self.process.pid, *self.ranks()):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


@pytest.mark.slow
@pytest.mark.trial(3)
def test_killed_forty_times_while_it_saves_it_ends_as_if_nothing_had_been(flags, tmp_path, trials):
    killed_until_done(flags, tmp_path, 40, trials, 34, child.start, while_it_saves)


@pytest.mark.slow
@pytest.mark.trial(3)
def test_two_ranks_killed_at_random_end_as_if_nothing_had_been(flags, tmp_path, trials):
    killed_until_done(lambda out_dir, *extra: flags(out_dir, "--batch_size=1", *extra), tmp_path,
                      20, trials, 333, Torchrun)


@pytest.mark.slow
@pytest.mark.trial(3)
def test_two_ranks_with_shards_killed_at_random_end_as_if_nothing_had_been(flags, tmp_path, trials):
    killed_until_done(lambda out_dir, *extra: flags(out_dir, "--batch_size=1", "--parallel=fsdp",
                                                    *extra), tmp_path, 10, trials, 3333, Torchrun)


# 5: signals ---------------------------------------------------------------------------------------


def wait_for_steps(folder: Path, process, steps: int = 8) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until and process.exitcode is None:
        if (folder / "metrics.jsonl").exists() and len(losses_so_far(folder)) >= steps:
            return
        time.sleep(0.02)
    raise AssertionError(f"no {steps} steps in {folder}")


def losses_so_far(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()


@pytest.mark.trial(5)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_ends_and_the_run_goes_on_identically(flags, tmp_path, trials, number):
    child.start(flags(tmp_path / "whole"), tmp_path / "log").join(60)
    randomly = random.Random(number)
    for trial in range(5):
        parts, log = tmp_path / f"parts{trial}", tmp_path / f"log{trial}"
        # Only the signal saves.
        argv = flags(parts, "--init_from=auto", "--checkpoint_interval=1000")
        process = child.start(argv, log)
        wait_for_steps(parts, process, randomly.randrange(1, 60))
        os.kill(process.pid, number)
        process.join(300)
        assert process.exitcode == 128 + number, log.read_text()
        assert f"stopped by {number.name} after" in log.read_text()
        assert "--init_from=auto" in log.read_text() and "Traceback" not in log.read_text()
        assert load_latest(parts).state["step"] == len(losses_so_far(parts))
        process = child.start(argv, log)
        process.join(60)
        assert losses(parts) == losses(tmp_path / "whole")
        assert same_state(parts, tmp_path / "whole")
    trials(5)


@pytest.mark.trial(5)
@pytest.mark.parametrize("target, number", [
    ("one rank", signal.SIGTERM), ("the agent", signal.SIGTERM), ("the agent", signal.SIGUSR1)])
def test_a_signal_to_a_rank_or_to_torchrun_stops_all_at_one_step(flags, tmp_path, target, number):
    parts, log = tmp_path / "parts", tmp_path / "log"
    argv = flags(parts, "--init_from=auto", "--batch_size=1", "--checkpoint_interval=10000",
                 "--max_iters=4000")
    process = Torchrun(argv, log)
    wait_for_steps(parts, process)
    os.kill(process.ranks()[1] if target == "one rank" else process.process.pid, number)
    process.join(30)
    assert process.exitcode not in (None, 0)
    assert f"stopped by {number.name} after" in log.read_text(), log.read_text()
    assert load_latest(parts).state["step"] == len(losses_so_far(parts))


@pytest.mark.trial(5)
def test_a_second_signal_ends_at_once_and_an_echo_does_not(flags, tmp_path):
    parts, log = tmp_path / "parts", tmp_path / "log"
    process = child.start(flags(parts, "--max_iters=100000", "--checkpoint_interval=100000"), log)
    wait_for_steps(parts, process)
    os.kill(process.pid, signal.SIGSTOP)  # as a step that takes long
    for _ in range(2):
        os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGCONT)
    process.join(30)
    assert process.exitcode == 130 and "stopped by SIGINT" in log.read_text()


# 6: damaged files ---------------------------------------------------------------------------------


@pytest.fixture
def two_checkpoints(tiny, tmp_path):
    run_train(*tiny("--checkpoint_interval=3"))
    return tmp_path / "run"


@pytest.mark.trial(6)
def test_no_flipped_bit_loads(two_checkpoints, tmp_path, trials, capsys):
    randomly, silent = random.Random(6), 0
    good = checkpoint_folders(two_checkpoints)[0]
    files = sorted(good.iterdir())
    for _ in range(200):
        file = randomly.choice(files)
        content = bytearray(file.read_bytes())
        content[randomly.randrange(len(content))] ^= 1 << randomly.randrange(8)
        bad = tmp_path / "bad"
        shutil.copytree(good, bad)
        (bad / file.name).write_bytes(content)
        try:
            found = open_checkpoint(bad)
            # A flip in the manifest's white space alone changes nothing that is read.
            silent += file.name != checkpoint.MANIFEST or found.state != open_checkpoint(good).state
        except CheckpointError:
            pass
        shutil.rmtree(bad)
    trials(200, failures=silent)
    assert silent == 0


@pytest.mark.trial(6)
@pytest.mark.parametrize("name", [checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.STATE,
                                  checkpoint.MANIFEST, "stray"])
def test_files_swapped_between_checkpoints_are_refused(two_checkpoints, name, capsys):
    last, before = checkpoint_folders(two_checkpoints)[:2]
    if name == "stray":
        shutil.copy(before / checkpoint.MODEL, last / "more.safetensors")
    else:
        shutil.copy(before / name, last / name)
    assert load_latest(two_checkpoints, quarantine=True).folder == before
    assert "renamed to step_00000006.corrupt" in capsys.readouterr().err


# 7: disks -----------------------------------------------------------------------------------------


def failing_saves(monkeypatch, fails):
    """From now on the n-th attempt to write tensors fails when `fails(n)`."""
    original, calls = checkpoint.save_file, itertools.count()

    def save_file(tensors, path):
        if path.name == checkpoint.MODEL and fails(next(calls)):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return original(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", save_file)


@pytest.mark.trial(7)
def test_training_goes_on_when_a_save_fails_and_an_older_one_is_there(tiny, tmp_path, monkeypatch,
                                                                      capsys):
    failing_saves(monkeypatch, lambda n: n in (1, 2))
    run_train(*tiny("--max_iters=8", "--checkpoint_interval=2"))
    err = capsys.readouterr().err
    assert err.count("No space left on device") == err.count("training goes on") == 2
    assert load_latest(tmp_path / "run").state["step"] == 8
    assert not list((tmp_path / "run").glob("*.partial"))


@pytest.mark.trial(7)
@pytest.mark.parametrize("first, step", [(0, None), (1, 2)])
def test_training_stops_when_no_save_is_left_to_fall_back_on(tiny, tmp_path, monkeypatch, capsys,
                                                             first, step):
    failing_saves(monkeypatch, lambda n: n >= first)
    with pytest.raises(SystemExit) as ended:
        train.main(tiny("--max_iters=30", "--checkpoint_interval=2"))
    line = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 1 and "No space left on device" in line
    assert ("there is no checkpoint in" if step is None else "3 times in a row") in line
    found = load_latest(tmp_path / "run")
    assert (found and found.state["step"]) == step
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) < 12


@pytest.mark.trial(7)
@pytest.mark.parametrize("ends_by", ["max_iters", "signal"])
def test_a_run_whose_last_save_fails_says_so_and_what_is_there(tiny, tmp_path, monkeypatch, capsys,
                                                               ends_by):
    monkeypatch.setattr(saving, "RETRY_PAUSES", (0.0, 0.0))
    failing_saves(monkeypatch, lambda n: n >= 1)
    original = train.train_step

    def signalled(run, step):
        if step == 5 and ends_by == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        return original(run, step)

    monkeypatch.setattr(train, "train_step", signalled)
    with pytest.raises(SystemExit) as ended:
        train.main(tiny("--max_iters=8", "--checkpoint_interval=4"))
    assert ended.value.code == 1
    out, err = capsys.readouterr()
    assert "saved in" not in out + err
    assert err.count("the last save is tried again") == 2
    assert "3 attempts failed, the newest checkpoint is" in err and "of step 4" in err
    assert load_latest(tmp_path / "run").state["step"] == 4


@pytest.mark.trial(7)
def test_a_last_save_that_fails_once_is_made_again(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(saving, "RETRY_PAUSES", (0.0,))
    failing_saves(monkeypatch, lambda n: n == 0)
    run_train(*tiny("--max_iters=2"))
    out, err = capsys.readouterr()
    assert "the last save is tried again" in err and "saved in" in out
    assert load_latest(tmp_path / "run").state["step"] == 2


@pytest.mark.trial(7)
def test_a_last_checkpoint_that_vanished_is_written_again(tiny, tmp_path, monkeypatch, capsys):
    """What counts is the manifest that is read back, not that no error was raised."""
    monkeypatch.setattr(saving, "RETRY_PAUSES", (0.0,))
    original, calls = checkpoint.save, itertools.count()

    def save(out_dir, *args, **kwargs):
        folder = original(out_dir, *args, **kwargs)
        if next(calls) == 0:
            (folder / checkpoint.MANIFEST).unlink()
        return folder

    monkeypatch.setattr(checkpoint, "save", save)
    run_train(*tiny("--max_iters=2"))
    assert "is not there as it was written" in capsys.readouterr().err
    assert load_latest(tmp_path / "run").state["step"] == 2


@pytest.mark.trial(7)
def test_a_real_limit_on_file_size_is_reported_and_the_old_checkpoint_stays(tiny, tmp_path):
    """The system itself refuses to write, as on a full disk."""
    run_train(*tiny("--max_iters=3"))
    code = ("import resource, signal, sys, train; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
            "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); train.main(sys.argv[1:])")
    result = subprocess.run(
        [sys.executable, "-c", code, *tiny("--max_iters=30", "--init_from=auto")], cwd=ROOT,
        capture_output=True, text=True, timeout=120)
    assert result.returncode == 1, result.stderr
    assert "could not be written" in result.stderr and "Traceback" not in result.stderr
    assert load_latest(tmp_path / "run").state["step"] == 3


@pytest.mark.trial(7)
def test_a_folder_in_use_is_refused_and_a_dead_owners_is_not(tiny, tmp_path, refused):
    with FolderLock(tmp_path / "run") as lock:
        lock.take()
        line = refused(train.main, tiny("--max_iters=2"))
        assert f"in use by process {os.getpid()} on " in line
    (tmp_path / "run" / "lock").write_text("process 999999 on nowhere")
    run_train(*tiny("--max_iters=2"))


def test_saving_stalls_training_for_the_copy_alone(tmp_path, monkeypatch):
    original, goes_on = checkpoint.save_file, threading.Event()

    def slow(tensors, path):
        assert goes_on.wait(60), "save() waits for the file"
        original(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    saver = Saver(tmp_path, ONE, keep=2, keep_best=False, sharded=False)
    w = torch.ones(4)
    saver.save({"w": w}, {"0.m": w}, state_of(1))
    w.zero_()  # what training does meanwhile is not saved
    goes_on.set()
    saver.wait()
    assert load_latest(tmp_path).model_tensors()["w"].tolist() == [1.0] * 4
    assert saver.seconds_written > 0
    saver.close()


def test_a_slow_save_under_torchrun_is_warned_of_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(saving, "SLOW_SAVE", 0.0)
    for elastic in (False, True):
        if elastic:
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
        saver = Saver(tmp_path, ONE, keep=2, keep_best=False, sharded=False)
        for step in (1, 2, 3):
            saver.save({"w": torch.ones(1)}, {"0.m": torch.ones(1)}, state_of(step))
        saver.close()
        assert capsys.readouterr().err.count("--shutdown-timeout is safer") == int(elastic)


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path):
    saver = Saver(tmp_path, ONE, keep=2, keep_best=True, sharded=False)
    for step, loss in enumerate((3.0, 1.0, None, 2.0, 2.5, 4.0), 1):
        saver.save({"w": torch.ones(1)}, {"0.m": torch.ones(1)}, state_of(step, loss))
    saver.wait()
    saver.close()
    assert [p.name[-1] for p in checkpoint_folders(tmp_path)] == ["6", "5", "2"]
    assert (tmp_path / "best").read_text() == "step_00000002\n"


# 8: numbers that are not finite -------------------------------------------------------------------


def tensors_at(folder: Path, step: int) -> dict:
    found = open_checkpoint(folder / f"step_{step:08d}")
    return {**found.model_tensors(), **found.optimizer_tensors()}


@pytest.mark.trial(8)
@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("kind", ["loss", "gradient", "hhat"])
@pytest.mark.parametrize("optimizer", ["sophiag", "compiled"])
def test_what_is_not_finite_ends_the_run_or_is_left_out(tiny, tmp_path, monkeypatch, capsys, value,
                                                        kind, optimizer):
    for module, name in ((train, "train_step"), (train.GPT, "forward"),
                         (train, "update_curvature"), (torch.nn.utils, "clip_grad_norm_")):
        monkeypatch.setattr(module, name, getattr(module, name))
    child.inject(kind, value, "4", "0")
    compiled = "on" if optimizer == "compiled" else "off"
    common = ("--max_iters=8", "--checkpoint_interval=1", "--keep_checkpoints=20",
              "--hessian_interval=2", f"--compile_optimizer={compiled}")
    with pytest.raises(SystemExit) as ended:
        run_train(*tiny(*common, out_dir=tmp_path / "stop"))
    assert ended.value.code == 1
    words = dict(loss="loss", gradient="gradient norm", hhat="curvature estimate")[kind]
    assert f"step 4: the {words} is not finite" in capsys.readouterr().err
    assert load_latest(tmp_path / "stop").state["step"] == 4
    run_train(*tiny(*common, "--on_nonfinite=skip", out_dir=tmp_path / "skip"))
    before, after = tensors_at(tmp_path / "skip", 4), tensors_at(tmp_path / "skip", 5)
    still = [k for k in before if torch.equal(before[k], after[k])]
    if kind == "hhat":
        assert {k for k in before if k.endswith(".hessian")} <= set(still)
        assert "transformer.wte.weight" not in still
    else:
        assert all(k in still for k in before if not k.endswith((".hessian", ".estimates")))
    lines = [json.loads(x) for x in (tmp_path / "skip" / "metrics.jsonl").read_text().splitlines()]
    assert [x.get("refused", 0) for x in lines] == [0] * 4 + [1] * 4
    assert all(torch.isfinite(x).all() for x in tensors_at(tmp_path / "skip", 8).values())


@pytest.mark.trial(8)
@pytest.mark.parametrize("optimizer", ["adamw", "lion", "muon", "adahessian"])
def test_every_optimizer_leaves_its_state_alone(tiny, tmp_path, monkeypatch, optimizer):
    for module, name in ((train, "train_step"), (train.GPT, "forward"),
                         (train, "update_curvature"), (torch.nn.utils, "clip_grad_norm_")):
        monkeypatch.setattr(module, name, getattr(module, name))
    child.inject("loss", "nan", "4", "0")
    run_train(*tiny("--max_iters=6", "--checkpoint_interval=1", "--keep_checkpoints=20",
                    "--on_nonfinite=skip", f"--optimizer={optimizer}",
                    "--hessian_interval=10"))  # no estimate in the step that is refused
    before, after = tensors_at(tmp_path / "run", 4), tensors_at(tmp_path / "run", 5)
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not torch.equal(after["transformer.wte.weight"],
                           tensors_at(tmp_path / "run", 6)["transformer.wte.weight"])


@pytest.mark.trial(8)
@pytest.mark.parametrize("kind, words", [("loss", "loss is not finite on rank 1"),
                                         ("gradient", "gradient norm is not finite on rank 1"),
                                         ("hhat", "curvature estimate is not finite on rank 1")])
def test_all_ranks_agree_on_what_one_of_them_saw(tiny, tmp_path, kind, words):
    common = ("--max_iters=8", "--batch_size=1", "--checkpoint_interval=1", "--hessian_interval=2")
    result = torchrun(2, "-m", "tests.faults.child", f"--fault={kind}:nan:4:1",
                      *tiny(*common, out_dir=tmp_path / "stop"))
    assert result.returncode != 0
    assert f"error: step 4: the {words}" in result.stderr
    assert f"rank 1: step 4: the {words}" in result.stderr
    assert load_latest(tmp_path / "stop").state["step"] == 4
    result = torchrun(2, "-m", "tests.faults.child", f"--fault={kind}:nan:4:1",
                      *tiny(*common, "--on_nonfinite=skip", out_dir=tmp_path / "skip"))
    assert result.returncode == 0, result.stderr
    assert all(torch.isfinite(x).all() for x in tensors_at(tmp_path / "skip", 8).values())


def test_too_many_in_a_row_end_the_run(tiny, tmp_path, monkeypatch, capsys):
    original = train.GPT.forward
    monkeypatch.setattr(train.GPT, "forward", lambda self, *args:
                        original(self, *args) * (float("nan") if self.training else 1))
    with pytest.raises(SystemExit) as ended:
        run_train(*tiny("--on_nonfinite=skip", "--max_skipped=3", "--max_iters=30",
                        "--optimizer=adamw", "--checkpoint_interval=100"))
    assert ended.value.code == 1
    assert "step 3: the loss is not finite, 4 times in a row" in capsys.readouterr().err


# 10: elastic restarts -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.trial(10)
@pytest.mark.parametrize("share", [True, False], ids=["shared store", "own store"])
def test_a_killed_rank_is_started_again_and_the_run_completes(flags, tmp_path, trials, share):
    """torchrun --max-restarts=3, whose attempts share a store or (a setting) open their own."""
    base = ("--init_from=auto", "--batch_size=1", "--max_iters=400")
    process = Torchrun(flags(tmp_path / "whole", *base), tmp_path / "log")
    process.join()
    randomly, clean, differing = random.Random(10), 0, 0
    number = 10
    for trial in range(number):
        parts, log = tmp_path / f"parts{trial}", tmp_path / f"log{trial}"
        process = Torchrun(flags(parts, *base), log, restarts=3, env={} if share else {
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}.items())
        wait_for_steps(parts, process, randomly.randrange(1, 200))
        os.kill(process.ranks()[randomly.randrange(2)], signal.SIGKILL)
        process.join(150)
        if process.exitcode is None:
            process.kill()
            process.join()
        clean += process.exitcode == 0
        if process.exitcode == 0:
            differing += losses(parts) != losses(tmp_path / "whole")
    trials(number, failures=number - clean, differing=differing)
    assert differing == 0
    assert clean == number


# 15: golden losses --------------------------------------------------------------------------------


@pytest.mark.trial(15)
def test_fifty_steps_have_the_losses_they_always_had(tmp_path):
    golden = json.loads((ROOT / "tests" / "golden_losses.json").read_text())
    if not torch.__version__.startswith(golden["torch"]):
        pytest.skip(f"the losses are torch {golden['torch']}'s, this is {torch.__version__}")
    data = tmp_path / "data"
    text = " ".join(f"{n} squared is {n * n}." for n in range(4000))
    write_corpus(listed([("train", text), ("val", text[:3000])]), data, "bytes")
    run_train(*golden["flags"], f"--dataset={data}", f"--out_dir={tmp_path / 'run'}")
    found = [pair[0] for pair in losses(tmp_path / "run").values()]
    assert found == pytest.approx(golden["losses"], rel=1e-6)

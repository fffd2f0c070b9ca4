"""python -m experiments.gpu: in slices, from part to part, without a GPU at toy sizes."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from experiments import exactness, gpu, micro_batch
from experiments.gpu import Part
from tests.conftest import ROOT

ARGUMENTS = ["--rehearse", "--device=cpu", "--sizes=30m"]


def test_a_rehearsal_runs_to_its_end(data_dir, tmp_path, capsys):
    out = tmp_path / "gpu"
    command = [f"--out_dir={out}", *ARGUMENTS, f"--dataset={data_dir}", "--max_iters=6",
               "--total_batch_size=8", "--minutes=30"]
    gpu.main(command)
    assert "all done" in capsys.readouterr().out
    data = json.loads((out / "report.json").read_text())
    assert {row["status"] for row in data["state"].values()} == {"done"}
    assert set(data["figures"]) == {"exactness", "batch_30m", "speed_30m", *(
        f"train_{name}" for name in gpu.TRAININGS)}
    page = (out / "README.md").read_text()
    assert page.startswith("# cpu (a rehearsal at toy sizes: no GPU figure)")
    assert "| optimizer=sophiag,hessian_batch_size=12,hessian_chunks=12 |" in page
    for name in gpu.TRAININGS:
        assert f"| {name} | 6 | " in page
    assert "| adamw: bfloat16 and float32 | " in page and "DIFFERS" not in page
    before = (out / "state.json").read_bytes()
    gpu.main(command)  # nothing is done twice
    assert (out / "state.json").read_bytes() == before


def python(code):
    return ["-c", code]


@pytest.fixture
def made_of(monkeypatch):
    """Gives the command other parts."""
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0.1)
    return lambda *parts: monkeypatch.setattr(gpu, "parts", lambda settings: list(parts))


def state(out):
    return {name: row["status"] for name, row in gpu.read_state(out).items()}


def test_a_call_stops_in_time_and_the_next_goes_on(made_of, tmp_path, capsys):
    goes_on = f"""
import pathlib, signal, sys, time
count = pathlib.Path({str(tmp_path / 'count')!r})
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
while (n := int(count.read_text()) if count.exists() else 0) < 8:
    count.write_text(str(n + 1))
    time.sleep(0.5)
"""
    made_of(Part("quick", python("print('x')")), Part("train_long", python(goes_on), "training"),
            Part("last", python("print('y')")))
    command = [f"--out_dir={tmp_path / 'out'}", *ARGUMENTS, "--minutes=0.04"]
    gpu.main(command)
    out = capsys.readouterr().out
    assert "to be continued by the same command" in out
    assert state(tmp_path / "out") == dict(quick="done", train_long="stopped")
    for _ in range(9):
        gpu.main(command)
        if "all done" in capsys.readouterr().out:
            break
    assert state(tmp_path / "out") == dict(quick="done", train_long="done", last="done")
    assert (tmp_path / "count").read_text() == "8"


def test_a_part_that_fails_or_does_not_end_is_passed_over(made_of, tmp_path, capsys, refused):
    made_of(Part("broken", python("print('no such kernel'); raise SystemExit(3)")),
            Part("endless", python("import time; time.sleep(60)")), Part("last", python("pass")))
    command = [f"--out_dir={tmp_path}", *ARGUMENTS, "--minutes=0.03"]
    gpu_exits = [_exit_code(command) for _ in range(3)]
    assert gpu_exits == [1, 1, 1]
    assert state(tmp_path) == dict(broken="failed", endless="failed", last="done")
    said = {name: row["said"] for name, row in gpu.read_state(tmp_path).items()}
    assert said["broken"] == "no such kernel"
    assert said["endless"] == "did not end within 0.03 minutes"
    err = capsys.readouterr().err
    assert "broken, endless failed" in err and "--again=broken,endless" in err
    made_of(Part("broken", python("print('mended')")), Part("endless", python("pass")))
    assert _exit_code([*command, "--again=broken,endless"]) == 0
    assert state(tmp_path)["broken"] == state(tmp_path)["endless"] == "done"


def test_two_calls_at_once_are_refused_and_a_stop_ends_the_part(tmp_path):
    out = tmp_path / "a b"
    command = [sys.executable, "-m", "experiments.gpu", f"--out_dir={out}", *ARGUMENTS]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert "tests ..." in first.stdout.readline()
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 2 and "is in use by process" in second.stderr
    first.send_signal(signal.SIGTERM)
    said = ["tests ...", *first.communicate()[0].splitlines()]
    assert first.returncode == 143 and (out / "README.md").exists()
    begun = {line.removesuffix(" ...") for line in said if line.endswith(" ...")}
    ended = {line.partition(":")[0] for line in said if not line.endswith(" ...")}
    assert len(begun - ended) <= 1 and set(state(out)) <= ended  # what it was at is not done
    assert not [pid for pid in Path("/proc").glob("[0-9]*") if _mentions(pid, str(out))]


def _mentions(pid, words):
    try:
        return words in (pid / "cmdline").read_text().replace("\0", " ")
    except OSError:
        return False


def test_again_forgets_a_training(made_of, tmp_path):
    run = tmp_path / "runs" / "x"
    code = f"import pathlib; pathlib.Path({str(run)!r}).mkdir(parents=True)"
    made_of(Part("train_x", python(code), "training"))
    command = [f"--out_dir={tmp_path}", *ARGUMENTS]
    assert _exit_code(command) == 0 and _exit_code([*command, "--again=train_x"]) == 0


def _exit_code(command):
    try:
        gpu.main(command)
    except SystemExit as stopped:
        return stopped.code
    return 0


@pytest.mark.parametrize("flags, words", [
    ([], "out_dir is not given"), (["--out_dir=x", "--sizes=1b"], "1b is none of 30m"),
    (["--out_dir=x", "--device=cpu"], "is no GPU; --rehearse tries"),
    (["--out_dir=x", "--rehearse", "--device=cuda:77"], "cuda:77"),
    (["--out_dir=x", *ARGUMENTS, "--again=nothing"], "again = 'nothing' is no part")])
def test_wrong_settings_are_refused(tmp_path, monkeypatch, refused, flags, words):
    monkeypatch.chdir(tmp_path)
    assert words in refused(gpu.main, flags)


def test_a_state_of_something_else_is_refused(tmp_path, refused):
    for content in ("[1]", "null", '{"tests": {"status": "done", "seconds": "x", "said": ""}}'):
        (tmp_path / "state.json").write_text(content)
        assert "is not what this command writes" in refused(
            gpu.main, [f"--out_dir={tmp_path}", *ARGUMENTS])


def test_micro_batches_double_until_one_is_out_of_memory(tmp_path, monkeypatch, capsys):
    passes = train.differentiate_largest_micro_batch
    seen = []

    def until_it_is_full(run):
        part, = run.micro_batches
        seen.append(part.stop - part.start)
        if seen[-1] > 4:
            raise torch.OutOfMemoryError("full")
        passes(run)

    monkeypatch.setattr(train, "differentiate_largest_micro_batch", until_it_is_full)
    micro_batch.main(["config/quickstart.py", "--device=cpu", "--n_layer=1", "--first=2",
                      "--repeats=3", f"--json={tmp_path / 'x.json'}"])
    assert seen == [2] * 4 + [4] * 4 + [8]
    data = json.loads((tmp_path / "x.json").read_text())
    assert data["failed"] == 8 and [row["size"] for row in data["rows"]] == [2, 4]
    fastest = max(data["rows"], key=lambda row: row["tokens_per_second"])["size"]
    assert [row["peak_bytes"] for row in data["rows"]] == [None, None]  # of a GPU alone
    out = capsys.readouterr().out
    assert f"fastest with batch_size = {fastest}\n" in out and "| 8 | out of memory |" in out


@pytest.mark.parametrize("flags, words", [
    (["--first=8", "--last=4"], "first = 8 is more than last = 4"),
    (["--batch_size=12"], "batch_size has no effect on a micro-batch alone"),
    (["--optimizer=lion"], "optimizer has no effect")])
def test_sizes_that_cannot_be_tried_are_refused(refused, flags, words):
    assert words in refused(micro_batch.main, ["config/quickstart.py", *flags])


def test_micro_batches_of_several_ranks_are_refused(refused, monkeypatch):
    monkeypatch.setattr(micro_batch, "world_size", lambda: 2)
    assert "start it without torchrun" in refused(micro_batch.main, ["config/quickstart.py"])


def test_a_difference_beyond_its_tolerance_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(exactness, "BFLOAT16", 0.0)
    with pytest.raises(SystemExit) as stopped:
        exactness.main(["--device=cpu", "--compiled=False", "--steps=2", "--optimizers=adamw",
                        f"--json={tmp_path / 'x.json'}"])
    assert stopped.value.code == 1
    assert "| adamw: bfloat16 and float32 | " in capsys.readouterr().out
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert not rows["adamw: bfloat16 and float32"]["ok"]
    assert rows["adamw: float16 and float32"]["ok"]

"""Micro-batches on devices with little memory: tried, halved once, refused with what to lower."""

import json

import pytest
import torch

import train
from model import GPT
from nanosophia import dry_run, fitting, resume
from nanosophia.distributed import Ranks
from tests.conftest import run_train
from tests.test_dry_run import resolved

CPU = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def card(monkeypatch):
    """Makes the model run out of memory beyond so many rows, as on a GPU that chose batch_size."""
    def make(most: int, chosen: int, after: int = 0):
        forward, calls = GPT.forward, [0]

        def limited(self, idx, *args, **kwargs):
            calls[0] += 1
            if len(idx) > most and calls[0] > after:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(self, idx, *args, **kwargs)

        def choose(config, ranks):
            if config.batch_size:
                return config, []
            return dry_run.replace(config, batch_size=chosen), [f"batch_size = {chosen} is chosen"]

        start = train.resolve

        def resolve(config, sources, ranks):
            found = start(config, sources, ranks)
            return dry_run.replace(found, chose_batch_size=not config.batch_size)

        monkeypatch.setattr(GPT, "forward", limited)
        monkeypatch.setattr(resume, "choose_batch_size", choose)
        monkeypatch.setattr(train, "resolve", resolve)

    return make


def flags_without_batch_size(tiny, *more):
    return [*(f for f in tiny() if not f.startswith("--batch_size")), *more]


def batch_size(folder):
    return json.loads((folder / "config.json").read_text())["batch_size"]


def test_a_chosen_micro_batch_is_halved_once_and_kept(tiny, tmp_path, card, capsys):
    card(most=5, chosen=8)
    run_train(*flags_without_batch_size(tiny, "--max_iters=3"))
    out = capsys.readouterr().out
    assert "micro-batches of 8 ran out of memory, so batch_size = 4" in out
    assert batch_size(tmp_path / "run") == 4
    run_train(*flags_without_batch_size(tiny, "--max_iters=5", "--init_from=resume"))
    out = capsys.readouterr().out
    assert "ran out" not in out and batch_size(tmp_path / "run") == 4


def test_where_it_fits_the_trial_changes_nothing(tiny, tmp_path, card, capsys):
    card(most=8, chosen=8)
    run_train(*flags_without_batch_size(tiny, "--max_iters=3"))
    assert "ran out" not in capsys.readouterr().out
    run_train(*tiny("--max_iters=3", "--batch_size=8", out_dir=tmp_path / "given"))
    records = [(tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1]
               for name in ("run", "given")]
    first, second = (json.loads(record)["train/loss"] for record in records)
    assert first == second


@pytest.mark.parametrize("flags, words", [
    ((), "micro-batches of 4 sequences; give --batch_size=2 or --loss_chunk=1024 or "
         "--activation_checkpointing (--dry_run counts"),
    (("--loss_chunk=8", "--activation_checkpointing"), "4 sequences; give --batch_size=2 (--dry")])
def test_after_that_one_line_says_what_to_lower(tiny, card, capsys, flags, words):
    card(most=2, chosen=8)
    with pytest.raises(SystemExit) as stopped:
        run_train(*flags_without_batch_size(tiny, *flags))
    assert stopped.value.code == 1 and words in capsys.readouterr().err


def test_a_lack_of_memory_later_leaves_the_last_checkpoint(tiny, tmp_path, card, capsys):
    card(most=1, chosen=8, after=4 * 4 + 6)  # in the fifth step
    with pytest.raises(SystemExit):
        run_train(*tiny("--optimizer=adamw", "--max_iters=9"))
    assert "--init_from=auto continues it" in capsys.readouterr().err
    assert (tmp_path / "run" / "step_00000003").is_dir()


def test_what_is_reserved_counts(monkeypatch):
    ran = []
    assert fitting.fits(lambda: ran.append(1), 1 << 20, CPU) and ran == [1]

    def empty(size, **kwargs):
        raise torch.OutOfMemoryError(f"{size}")

    monkeypatch.setattr(torch, "empty", empty)
    assert not fitting.fits(lambda: ran.append(1), 1 << 20, CPU) and ran == [1]


@pytest.mark.parametrize("config, optimizer, memory", [
    ("small", "adamw", 8), ("small", "sophiag", 8), ("small", "sophiah", 8),
    ("medium", "adamw", 16), ("medium", "sophiag", 16), ("medium", "sophiah", 16),
    ("large", "adamw", 24), ("large", "sophiag", 24)])
def test_the_dry_run_says_how_each_size_fits_a_small_card(config, optimizer, memory):
    flags = [f"config/train_gpt2_{config}_{optimizer}.py", f"--dry_run_memory={memory}"]
    page = dry_run.report(resolved(*flags))
    line, = (x for x in page.splitlines() if "are too few; what fits: " in x)
    advice = line.partition("what fits: ")[2].split()
    assert advice[0].startswith("--batch_size=")
    again = dry_run.report(resolved(*flags, *advice))
    assert "too few" not in again
    row, = (x.split() for x in again.splitlines() if x.split()[:1] == ["1"])
    assert float(row[-2]) <= 0.9 * memory


@pytest.mark.parametrize("optimizer, parallel, ranks, offered", [
    ("adamw", "ddp", 2, True), ("adamw", "fsdp", 2, False), ("sophiah", "ddp", 2, False),
    ("adamw", "ddp", 1, False)])
def test_sharding_is_offered_where_it_works(optimizer, parallel, ranks, offered):
    page = dry_run.report(resolved(f"config/train_gpt2_large_{optimizer}.py", "--dry_run_memory=4",
                                   "--batch_size=1"))
    assert ("--parallel=fsdp may on more GPUs" in page) is (optimizer != "sophiah")
    config = resolved(f"--optimizer={optimizer}", "--batch_size=4", f"--parallel={parallel}")
    said = str(fitting.OutOfMemory(config, Ranks(0, ranks, CPU.device)))
    assert ("--parallel=fsdp" in said) is offered


def test_more_memory_is_counted_for_higher_precision():
    rows = {}
    for dtype in ("auto", "float32", "float64"):
        page = dry_run.report(resolved("config/train_gpt2_small_sophiag.py", "--dry_run_memory=16",
                                       "--batch_size=15", f"--dtype={dtype}"))
        found = [x for x in page.splitlines() if "what fits" in x]
        rows[dtype] = found[0].partition("what fits: ")[2] if found else ""
    assert len(set(rows.values())) == 3, rows


def test_where_nothing_helps_the_dry_run_says_so():
    page = dry_run.report(resolved("config/train_gpt2_large_sophiag.py", "--dry_run_memory=8"))
    assert "8 GiB are too few; what fits: not even --loss_chunk" in page

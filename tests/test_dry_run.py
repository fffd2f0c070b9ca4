"""What --dry_run says, against what really happens."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train
from model import GPT, GPTConfig
from nanosophia import attention, dry_run
from nanosophia.configurator import load
from nanosophia.distributed import Ranks
from nanosophia.optimizers import OPTIMIZERS, build, with_own_defaults
from nanosophia.options import Config

CONFIGS = sorted(Path("config").glob("*.py"))


def resolved(*argv):
    return with_own_defaults(*load(Config, list(argv), ""))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_has_a_dry_run(path, capsys):
    train.main([str(path), "--dry_run"])
    out = capsys.readouterr().out
    assert "parameters" in out and "GiB per rank" in out and " 256 " in out


def test_the_counts_are_the_models_and_the_optimizers():
    plan = dry_run.plan(resolved("config/train_gpt2_small_sophiag.py"))
    assert plan.parameters == 124_373_760
    assert plan.state_bytes == pytest.approx(8 * plan.parameters, rel=1e-5)
    assert plan.estimate_share == pytest.approx(240 / 480 / 10)
    assert dry_run.plan(resolved("--optimizer=lion")).state_bytes == 4 * plan.parameters
    # 6 N + 12 L d T FLOPs per token; 480 x 1024 tokens; 1e5 steps; 8 x 989e12 x 0.4 per second
    by_hand = (6 * (plan.parameters - 1024 * 768) + 12 * 12 * 768 * 1024) * 1.05 * 480 * 1024 * 1e5
    assert dry_run.days(plan, 8) == pytest.approx(by_hand / (8 * 989e12 * 0.4) / 86400)


@pytest.mark.parametrize("optimizer, dropout, least", [
    ("sophiag", 0.0, 1), ("sophiah", 0.0, 3.4), ("sophiah", 0.1, 3)])
def test_an_estimate_costs_the_flops_that_are_said(optimizer, dropout, least, monkeypatch):
    """By torch's own counter, which knows no fused kernel of the CPU, over the gradient pass's."""
    monkeypatch.setattr(attention, "FIRST_ORDER", [SDPBackend.MATH])
    config = resolved(f"--optimizer={optimizer}", "--n_layer=4", "--n_head=4", "--n_embd=64",
                      "--block_size=128", "--vocab_size=256", "--hessian_batch_size=2",
                      "--batch_size=2", f"--dropout={dropout}")
    model = GPT(config.model)
    estimator = build(config, model, num_classes=256).estimator
    idx, counts = torch.zeros(2, 128, dtype=torch.long), []
    for action in (lambda: model(idx, idx).backward(),
                   lambda: estimator.estimate(model.forward, idx, idx, [[slice(0, 2)]], 0)):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            action()
        counts.append(counter.get_total_flops())
    assert counts[0] == pytest.approx(2 * 128 * model.flops_per_token(), rel=0.03)
    share = dry_run.estimate_share(config, estimator, model.flops_per_token())
    passes = share / (2 / 480 / 10)
    assert counts[1] / counts[0] == pytest.approx(passes, rel=0.01)
    assert least <= passes < least + 0.1


def test_a_vocabulary_that_is_not_known_is_not_guessed_in_silence(data_dir):
    for flags, words in (
            (("--dataset=mine",), "classes of GPT-2, a guess: give --vocab_size"),
            (("config/train_neox_1.5b_adamw.py",), "taken for the 50,277 classes that it has")):
        assert words in dry_run.report(resolved(*flags))
    for flags in (("--dataset=mine", "--vocab_size=300"), (f"--dataset={data_dir}",)):
        assert "taken for" not in dry_run.report(resolved(*flags, "--block_size=16"))


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, "torch.optim:NAdam"])
def test_state_on_the_meta_device_is_as_large_as_real_state(optimizer):
    config = resolved(f"--optimizer={optimizer}", "--n_layer=2", "--n_head=2", "--n_embd=32",
                      "--block_size=16", "--vocab_size=128")
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=128))
    real, estimator, _ = build(config, model, num_classes=128)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    if estimator:
        real.update_hessian([p.grad for p in real.parameters()])
    real.step()
    size = sum(x.nbytes for values in real.state.values() for x in values.values()
               if isinstance(x, torch.Tensor))
    assert dry_run.plan(config).state_bytes == size


def test_sophia_h_fits_the_memory_of_the_papers_machines():
    """770M on A100s of 40 GB; a tenth of it is left for what the dry run does not count."""
    plan = dry_run.plan(resolved("config/train_gpt2_large_sophiah.py"))
    assert dry_run.estimate_rows(plan, 8) == 1
    assert dry_run.memory(plan, 8).peak < 0.9 * 40e9


@pytest.mark.parametrize("flags, free, rows", [
    ("config/train_gpt2_small_sophiag.py", 8, (1, 20)), ("config/train_gpt2_small_adamw.py", 8, ()),
    ("config/train_gpt2_small_sophiah.py", 8, ()), ("--parallel=fsdp", 1000, (60, 60)),
    ("--dtype=float32 --n_layer=2", 4, ()), ("--n_layer=48 --n_embd=1600 --n_head=25", 2, (1, 1))])
def test_without_a_batch_size_as_many_sequences_as_fit_are_taken(flags, free, rows, monkeypatch):
    """As many, of those that eight ranks may have, and one where not even that fits."""
    config = resolved(*flags.split(), "--batch_size=0", "--vocab_size=50304")
    ranks = Ranks(0, 8, torch.device("cpu"))
    monkeypatch.setattr(dry_run, "on_main", lambda ranks, action: action())
    chosen, notes = dry_run.choose_batch_size(config, ranks)
    assert chosen.batch_size == 15 and not notes  # without a GPU
    monkeypatch.setattr(dry_run, "free_bytes", lambda device: free * 2**30)
    chosen, notes = dry_run.choose_batch_size(config, ranks)
    found = chosen.batch_size
    assert f"batch_size = {found} is the largest that fits the {free}.0 GiB" in notes[0]
    if rows:
        assert rows[0] <= found <= rows[1]
    room = 0.9 * free * 2**30 / (2 if config.dtype == "float32" else 1)
    plan = dry_run.plan(config)
    peaks = [dry_run.memory(plan._replace(config=dataclasses.replace(config, batch_size=n)), 8).peak
             for n in (found, found + 1)]
    assert peaks[0] <= room < peaks[1] or found in (1, 60)
    assert dry_run.choose_batch_size(dataclasses.replace(config, batch_size=7), ranks) == (
        dataclasses.replace(config, batch_size=7), [])


def test_a_dry_run_without_a_batch_size_fills_the_memory_that_is_given():
    lines = {line.split()[0]: line.split() for line in dry_run.report(resolved(
        "config/train_gpt2_small_sophiag.py", "--batch_size=0", "--dry_run_memory=8")).splitlines()
        if line[:5].strip().isdigit()}
    assert all(float(line[-2]) <= 0.9 * 8 for line in lines.values())
    assert int(lines["1"][1].rstrip(",")) == int(lines["8"][1].rstrip(",")) > 1


def test_ranks_that_train_would_refuse_are_named_and_uneven_ones_wait():
    lines = {line.split()[0]: line for line in dry_run.report(resolved(
        "--parallel=fsdp", "--n_layer=2")).splitlines() if line[:5].strip().isdigit()}
    assert "refused: hessian_batch_size = 240 gives some of 256 ranks" in lines["256"]
    assert "refused" not in lines["64"]
    few = dry_run.report(resolved("--total_batch_size=4", "--hessian_batch_size=4", "--n_layer=2"))
    assert few.count("refused: total_batch_size = 4 is less than") == 4 and "some wait" not in few
    plan = dry_run.plan(resolved("config/train_gpt2_30m_adamw.py"))
    assert dry_run.days(plan, 64) == pytest.approx(dry_run.days(plan, 1) * 8 / 480)
    assert dry_run.table(dict(x=resolved("--total_batch_size=4", "--hessian_batch_size=4",
                                         "--n_layer=2"))).splitlines()[2].endswith("| - | - |")


def test_copies_of_the_shards_leave_each_rank_as_much():
    plan = dry_run.plan(resolved("--parallel=fsdp", "--shard_ranks=8", "--batch_size=1"))
    small, large = dry_run.memory(plan, 8), dry_run.memory(plan, 64)
    assert (small.state, small.parameters) == (large.state, large.parameters)
    everywhere = plan._replace(config=dataclasses.replace(plan.config, shard_ranks=0))
    assert dry_run.memory(everywhere, 8) == small
    assert dry_run.memory(everywhere, 64).state == pytest.approx(large.state / 8)


def test_shards_that_accumulate_hold_all_gradients_until_they_are_reduced():
    def training(rows, chunks=1):
        plan = dry_run.plan(resolved("--parallel=fsdp", f"--batch_size={rows}",
                                     "--total_batch_size=480", f"--hessian_chunks={chunks}"))
        return plan, dry_run.memory(plan, 8)

    plan, several = training(30)
    _, one = training(60)  # of twice as many rows
    blocks = 2 * (plan.parameters - 10 * plan.block_parameters)  # two of twelve, in bfloat16
    activations = one.training - blocks - 4 * plan.parameters // 8
    assert several.training == pytest.approx(
        activations / 2 + 4 * plan.parameters + 4 * plan.parameters // 8, rel=1e-3)
    assert several.training - activations / 2 > one.training - activations


@pytest.mark.parametrize("flags, words", [
    (["--optimizer=foo"], "optimizer = 'foo' is none of"),
    (["--optimizer=adamw"], "gamma_target = 0.9 has no effect on optimizer = adamw")])
def test_the_command_refuses_what_train_refuses(refused, flags, words):
    assert words in refused(dry_run.main, ["config/quickstart.py", *flags])

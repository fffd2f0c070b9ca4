"""Schedule, decay groups, and the shipped configs."""

import math
from dataclasses import fields, replace

import pytest
import torch
import torch.nn as nn

import train
from model import GPT, GPTConfig
from nanosophia.baselines import AdaHessian, AdaHessianClip, Lion, Normalize, SophiaUnclipped
from nanosophia.configurator import ConfigError, load, read_config_file
from nanosophia.distributed import Ranks
from nanosophia.estimators import row_range
from nanosophia.optimizers import (
    build,
    check,
    parameter_groups,
    settings_warnings,
    with_own_defaults,
)
from nanosophia.options import MODEL_KEYS, Config, padded_vocab_size
from nanosophia.resume import load_config, other_optimizers_settings
from nanosophia.tokenizer import GPT2_CLASSES
from nanosophia.update_rules import compiled_update
from sophia import Sophia
from tests.conftest import ROOT
from train import learning_rate

# Table 2 of the paper: width, heads, layers, peak rates (AdamW, Sophia-G).
TABLE_2 = {
    "30m": (384, 6, 6, 1.2e-3, 1e-3, 30e6),
    "small": (768, 12, 12, 6e-4, 6e-4, 125e6),
    "medium": (1024, 16, 24, 3e-4, 4e-4, 355e6),
    "540m": (1152, 18, 30, 3e-4, 4e-4, 540e6),
    "large": (1280, 20, 36, 2e-4, 3e-4, 770e6),
}


def shipped(name, *flags):
    """The complete settings of a shipped config, for GPT-2's vocabulary."""
    config = load_config([str(ROOT / "config" / f"{name}.py"), *flags])[0]
    return replace(config, vocab_size=padded_vocab_size(GPT2_CLASSES))


@pytest.mark.parametrize("path", sorted(ROOT.glob("config/*.py")), ids=lambda p: p.stem)
def test_every_shipped_config_loads_and_says_how_to_launch_it(path):
    config = shipped(path.stem)
    first = path.read_text().splitlines()[0]
    assert f"train.py config/{path.name}" in first
    if not path.stem.startswith(("quickstart", "shakespeare", "train_neox")):
        assert config.tokens_per_step == 480 * 1024


@pytest.mark.parametrize("path", sorted(ROOT.glob("config/*.py")), ids=lambda p: p.stem)
def test_a_shipped_config_states_nothing_that_it_would_have_anyway(path):
    given = read_config_file(path)
    optimizer = given.get("optimizer", (Config().optimizer, 0))[0]
    without = with_own_defaults(Config(optimizer=optimizer), {})
    for key, (value, line) in given.items():
        if key == "optimizer":
            assert value != Config().optimizer, f"{path}:{line}"
        else:
            assert value != getattr(without, key), f"{path}:{line}: {key} has its default"


@pytest.mark.parametrize("optimizer, lrs", [("adamw", (1.5e-4, 1.2e-4)),
                                            ("sophiag", (1.2e-4, 6e-5))])
@pytest.mark.parametrize("size, shape, rows, parameters", [
    # The paper's names count one of the two tables of 50,304 x n_embd at 6.6B, both at 1.5B.
    ("1.5b", (1536, 24, 48), 512, 1.51e9), ("6.6b", (4096, 32, 32), 1024, 6.86e9)])
def test_neox_configs_are_the_papers_and_divide_over_gpus(size, shape, rows, parameters, optimizer,
                                                          lrs):
    config = shipped(f"train_neox_{size}_{optimizer}")
    assert (config.n_embd, config.n_head, config.n_layer) == shape
    assert (config.total_batch_size, config.block_size) == (rows, 2048)
    assert config.learning_rate == lrs[size == "6.6b"] and config.parallel == "fsdp"
    assert (config.rotary_fraction, config.parallel_residual, config.tied_head, config.bias,
            config.activation) == (0.25, True, False, True, "gelu")
    assert config.hessian_batch_size == 240
    with torch.device("meta"):
        model = GPT(config.model)
    assert model.num_params(non_embedding=False) == pytest.approx(parameters, rel=0.01)
    for ranks in (8, 10, 16, 32, 64, 128):
        config.check_world(ranks)
        check(config, ranks)


@pytest.mark.parametrize("optimizer", ["adamw", "sophiag"])
@pytest.mark.parametrize("size", TABLE_2)
def test_gpt2_configs_are_table_2_and_divide_over_gpus(size, optimizer):
    n_embd, n_head, n_layer, lr_adamw, lr_sophia, parameters = TABLE_2[size]
    config = shipped(f"train_gpt2_{size}_{optimizer}")
    assert (config.n_embd, config.n_head, config.n_layer) == (n_embd, n_head, n_layer)
    with torch.device("meta"):
        model = GPT(config.model)
    assert model.num_params() == pytest.approx(parameters, rel=0.03)
    for ranks in (1, 2, 4, 8, 10):
        config.check_world(ranks)
        check(config, ranks)
        parts = Ranks(ranks - 1, ranks, torch.device("cpu")).micro_batches(480, config.batch_size)
        assert len({part.stop - part.start for part in parts}) == 1  # one shape to compile
    assert (config.block_size, config.total_batch_size, config.grad_clip) == (1024, 480, 1.0)
    assert (config.max_iters, config.warmup_iters, config.min_lr_ratio) == (100_000, 2000, 0.05)
    assert not config.bias and not config.dropout and config.dataset == "openwebtext"
    assert config.vocab_size == 50304 and config.activation == "gelu_tanh"
    assert config.out_dir == f"out/gpt2-{size}-{optimizer}"
    if optimizer == "adamw":
        assert config.learning_rate == lr_adamw
        assert (config.beta1, config.beta2, config.weight_decay, config.eps) == (
            0.9, 0.95, 0.1, 1e-8)
        assert config.scale_attn_by_inverse_layer_idx == (size in ("medium", "540m", "large"))
    else:
        assert config.learning_rate == lr_sophia
        assert (config.beta1, config.beta2, config.weight_decay) == (0.96, 0.99, 0.2)
        assert (config.gamma, config.eps, config.hessian_interval) == (0.05, 1e-12, 10)
        assert (config.hessian_batch_size, config.hessian_chunks) == (240, 1)
        assert not config.scale_attn_by_inverse_layer_idx


# Peak rates of Table 2 for Lion and Sophia-H, where it gives one; Muon is ours.
OTHERS = {
    "lion": dict(medium=6e-5, small=1.5e-4) | {"30m": 4e-4},
    "sophiah": dict(small=6e-4, medium=4e-4, large=3e-4) | {"30m": 1e-3, "540m": 4e-4},
} | {name: dict(small=6e-4) | {"30m": 1.2e-3} for name in (
    "muon", "metric_muon", "metric_muon_gnb", "soap", "kron", "ademamix", "mars",
    "schedule_free")}


@pytest.mark.parametrize("optimizer, size", [(o, s) for o in OTHERS for s in OTHERS[o]])
def test_the_other_optimizers_configs_differ_in_the_optimizer_alone(optimizer, size):
    config = shipped(f"train_gpt2_{size}_{optimizer}")
    assert (config.optimizer, config.learning_rate) == (optimizer, OTHERS[optimizer][size])
    same = [*MODEL_KEYS, "total_batch_size", "batch_size", "max_iters", "warmup_iters",
            "min_lr_ratio", "grad_clip", "dataset"]
    if optimizer == "schedule_free":
        same.remove("min_lr_ratio")
        assert config.min_lr_ratio == 1
    reference = shipped(f"train_gpt2_{size}_{'adamw' if optimizer == 'lion' else 'sophiag'}")
    assert [getattr(config, k) for k in same] == [getattr(reference, k) for k in same]
    given = with_own_defaults(Config(optimizer=optimizer), {})
    for key in ("beta1", "beta2", "eps", "weight_decay"):
        if (optimizer, key) != ("lion", "eps"):
            assert getattr(config, key) == getattr(given, key), key
    for ranks in (1, 2, 4, 8, 10):
        config.check_world(ranks)
        check(config, ranks)


@pytest.mark.parametrize("path", sorted(ROOT.glob("config/ablation_*.py")), ids=lambda p: p.stem)
def test_ablations_are_the_30m_model_with_another_optimizer(path):
    config, reference = shipped(path.stem), shipped("train_gpt2_30m_sophiag")
    same = (*MODEL_KEYS, "total_batch_size", "batch_size", "max_iters", "warmup_iters",
            "min_lr_ratio", "grad_clip", "dataset")
    assert [getattr(config, k) for k in same] == [getattr(reference, k) for k in same]
    assert (config.optimizer, config.hessian_interval) != ("sophiag", 10)
    check(config, 8)


def test_schedule_warms_up_linearly_then_falls_as_a_cosine_to_the_ratio():
    config = Config(learning_rate=1.0, warmup_iters=10, max_iters=110, min_lr_ratio=0.05)
    assert [learning_rate(config, t) for t in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert learning_rate(config, 10) == pytest.approx(1.0)
    assert learning_rate(config, 60) == pytest.approx((1 + 0.05) / 2)
    by_hand = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * 99 / 100))
    assert learning_rate(config, 109) == pytest.approx(by_hand)
    assert learning_rate(config, 500) == pytest.approx(0.05)
    assert learning_rate(Config(learning_rate=1.0, warmup_iters=0, max_iters=5), 0) == 1.0


def test_other_schedules_fall_in_a_line_or_stay_until_the_cooldown():
    base = dict(learning_rate=1.0, warmup_iters=10, max_iters=110, min_lr_ratio=0.0)
    linear = Config(schedule="linear", **base)
    assert [learning_rate(linear, t) for t in (4, 9, 10, 60, 109, 500)] == pytest.approx(
        [0.5, 1, 1, 0.5, 0.01, 0])
    wsd = Config(schedule="wsd", cooldown_fraction=0.5, **base)
    assert [learning_rate(wsd, t) for t in (4, 9, 54, 55, 55 + 55 // 4, 109)] == pytest.approx(
        [0.5, 1, 1, 1, 1 - math.sqrt(13 / 55), 1 - math.sqrt(54 / 55)])
    # A longer run is the same until the shorter one's cooldown begins.
    longer = Config(schedule="wsd", cooldown_fraction=0.5, **base | dict(max_iters=500))
    assert [learning_rate(longer, t) for t in range(55)] == [learning_rate(wsd, t)
                                                             for t in range(55)]


def test_matrices_decay_and_vectors_do_not_each_once():
    model = GPT(GPTConfig(n_layer=2, n_head=1, n_embd=8, block_size=4, vocab_size=16, bias=True))
    groups = parameter_groups(model, Config(weight_decay=0.3))
    assert [(g["kind"], g["weight_decay"]) for g in groups] == [
        ("embedding", 0.3), ("matrix", 0.3), ("vector", 0.0)]
    assert [p.shape for p in groups[0]["params"]] == [(16, 8), (4, 8)]
    for group in groups:
        assert all((p.dim() >= 2) == (group["kind"] != "vector") for p in group["params"])
    chosen = [p for group in groups for p in group["params"]]
    assert {id(p) for p in chosen} == {id(p) for p in model.parameters()}
    assert len(chosen) == len(list(model.parameters()))


@pytest.mark.parametrize("name", ["metric_muon", "metric_muon_gnb"])
def test_q_k_and_v_are_three_parts_where_they_shall_be_apart(name):
    model = GPT(GPTConfig(n_layer=2, n_head=1, n_embd=8, block_size=4, vocab_size=16, bias=True))

    def parts(**options):
        config = with_own_defaults(Config(optimizer=name, **options), {})
        groups = build(config, model, num_classes=16).optimizer.param_groups
        assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
        return {id(p): g.get("parts") for g in groups for p in g["params"]}

    together, apart = parts(), parts(metric_qkv="apart")
    stacked = {id(block.attn.c_attn.weight) for block in model.transformer.h}
    assert {key for key in apart if apart[key] == 3} == stacked
    assert apart | dict.fromkeys(stacked, 1) == together


@pytest.mark.parametrize("settings", [{}, dict(hessian_chunks=4), dict(optimizer="sophiah"),
                                      dict(optimizer="ef_clip")])
@pytest.mark.parametrize("world", [2, 3, 10])
def test_the_estimate_does_not_depend_on_the_ranks(world, settings):
    """Their parts, summed by the reduction, equal one rank's whole; some may have no rows."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=4, vocab_size=16)).double()
    config = Config(hessian_batch_size=8, total_batch_size=8, batch_size=3, n_head=1, n_embd=8,
                    **settings)
    idx = torch.randint(16, (8, 4))

    def estimate(rank, world, reduce):
        estimator = build(config, model, num_classes=13, all_reduce=reduce).estimator
        chunks = Ranks(rank, world, torch.device("cpu")).chunks(8, config.hessian_chunks, 3)
        rows = slice(*row_range(chunks))
        return estimator.estimate(model.forward, idx[rows], idx[rows], chunks, 5)

    sums = []  # what the other ranks have contributed

    def collect(parts):
        if sums:
            torch._foreach_add_(sums, parts)
        else:
            sums.extend(part.clone() for part in parts)

    for rank in range(1, world):
        estimate(rank, world, collect)
    # The first of ten ranks has no rows.
    found = estimate(0, world, lambda parts: torch._foreach_add_(parts, sums))
    for a, b in zip(estimate(0, 1, None), found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-15)


def test_another_optimizer_on_top_of_a_config_has_its_own_settings():
    """And what the file, written for its own optimizer, still sets is named."""
    path = str(ROOT / "config" / "train_gpt2_medium_sophiag.py")
    config, sources = load_config([path, "--optimizer=adamw"])
    assert (config.beta1, config.beta2, config.eps, config.weight_decay) == (0.9, 0.95, 1e-8, 0.1)
    assert config.n_layer == 24
    note, = other_optimizers_settings(config, sources)
    assert note == (f"optimizer = adamw was given as a flag, and {path} still sets "
                    "learning_rate = 0.0004")
    for flags in (["--optimizer=adamw"], [path], [path, "--optimizer=sophiag"],
                  [path, "--optimizer=adamw", "--learning_rate=3e-4"]):
        assert not other_optimizers_settings(*load_config(flags))


def test_all_settings_are_printed_with_their_sources_and_nothing_is_trained(capsys, tmp_path):
    path = str(ROOT / "config" / "train_gpt2_small_adamw.py")
    train.main([path, "--max_iters=7000", "--print_config"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(fields(Config)) - 1
    for line in ("max_iters = 7000  # flag --max_iters=7000", f"optimizer = 'adamw'  # {path}:3",
                 "beta2 = 0.95  # default of optimizer = adamw", "dropout = 0.0  # default",
                 "out_dir = 'out/gpt2-small-adamw'  # derived from the config file's name"):
        assert line in lines
    (tmp_path / "again.py").write_text("\n".join(lines))  # a config file itself
    again = load_config([str(tmp_path / "again.py")])[0]
    assert again == load_config([path, "--max_iters=7000"])[0]


def test_an_optimizer_asked_for_by_name_alone_gets_its_own_settings():
    def named(*flags):
        return with_own_defaults(*load(Config, list(flags), ""))

    adamw = named("--optimizer=adamw", "--beta1=0.8")
    assert (adamw.beta1, adamw.beta2, adamw.eps, adamw.weight_decay) == (0.8, 0.95, 1e-8, 0.1)
    sophiah = named("--optimizer=sophiah")
    assert (sophiah.gamma, sophiah.hessian_batch_size, sophiah.beta1) == (0.01, 32, 0.96)
    assert named() == Config()


@pytest.mark.parametrize("flags, words", [
    (dict(optimizer="adamw", gamma_target=0.5), "gamma_target = 0.5 has no effect on optimizer"),
    (dict(optimizer="ah_clip", hessian_bias_correction=True), "hessian_bias_correction = True has"),
    (dict(optimizer="lion", compile_optimizer="on"), "compile_optimizer = on has no effect"),
    (dict(gamma_rows="matrices"), "has no effect without gamma_target")])
def test_a_setting_without_effect_is_refused(flags, words):
    with pytest.raises(ConfigError, match=words):
        check(Config(**flags), 1)


def test_valid_but_harmful_settings_are_warned_of():
    assert not settings_warnings(Config())
    assert "shorter than the 2000 steps" in settings_warnings(Config(warmup_iters=200))[0]
    assert not settings_warnings(Config(warmup_iters=200, optimizer="adamw"))
    assert "the learning rate only rises" in settings_warnings(Config(max_iters=100))[0]
    small = dict(total_batch_size=8, block_size=256, hessian_batch_size=8)
    assert "of 2,048 tokens 0.8 is the value to try" in settings_warnings(Config(**small))[0]
    assert not settings_warnings(Config(**small, beta1=0.8))
    assert not settings_warnings(Config(**small, optimizer="metric_muon_gnb", beta1=0.95))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_without_the_clip_the_share_that_curvature_decides_is_told():
    p = nn.Parameter(torch.zeros(4))
    optimizer = SophiaUnclipped([p], gamma=0.5, eps=1e-2)
    assert "curvature_fraction" not in optimizer.statistics()  # no step yet
    optimizer.update_hessian([torch.tensor([9, 3, 1, -9.0])])
    p.grad = torch.ones(4)
    optimizer.step()
    # h is a hundredth of the estimate, so gamma h is 0.045, 0.015, 0.005 and below 0.
    assert optimizer.statistics()["curvature_fraction"] == 0.5


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest():
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=4, vocab_size=16))
    config = with_own_defaults(Config(optimizer="muon", n_head=1, n_embd=8), {})
    optimizer = build(config, model, num_classes=16).optimizer
    idx = torch.randint(16, (2, 4))
    model(idx, idx).backward()
    optimizer.step()
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert ("momentum_buffer" in optimizer.state[p]) == (group["kind"] == "matrix")
            assert ("exp_avg_sq" in optimizer.state[p]) == (group["kind"] != "matrix")


GOLDEN = {  # name: optimizer of (groups, hparams), estimate, state of h
    "adamw": (lambda groups, h: torch.optim.AdamW(groups, betas=(h["b1"], h["b2"]), eps=h["eps"]),
              None, None),
    "lion": (lambda groups, h: Lion(groups, betas=(h["b1"], h["b2"])), None, None),
    "normalize_rms": (lambda groups, h: Normalize(groups, beta1=h["b1"]), None, None),
    "clip_sign_momentum": (lambda groups, h: Sophia(groups, betas=(h["b1"], 0.99)), None, None),
    "ef_clip_k10": (lambda groups, h: Sophia(groups, gamma=h["gamma"]), "true_labels", "hessian"),
    "ah_clip_k10": (lambda groups, h: AdaHessianClip(groups, gamma=h["gamma"]), "hhat_hutchinson",
                    "hessian"),
    "gnb_noclip_k2": (lambda groups, h: SophiaUnclipped(groups, gamma=h["gamma"], eps=h["eps"]),
                      "hhat_gnb", "hessian"),
    "adahessian_k1": (lambda groups, h: AdaHessian(groups, betas=(h["b1"], h["b2"]), eps=h["eps"]),
                      "hhat_hutchinson", "hessian"),
    "adahessian_k2": (lambda groups, h: AdaHessian(groups, betas=(h["b1"], h["b2"]), eps=h["eps"]),
                      "hhat_hutchinson", "hessian"),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", GOLDEN)
def test_every_baseline_equals_its_golden_trajectory(golden_run, name, seed):
    make, estimate, h = GOLDEN[name]
    golden_run(name, seed, make, estimate, h=h)


@pytest.mark.parametrize("cls", [Sophia, SophiaUnclipped, AdaHessian, AdaHessianClip])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_refused_step_or_estimate_changes_nothing(cls, compiled):
    p = torch.nn.Parameter(torch.ones(5))
    optimizer = cls([p], lr=0.1)
    if compiled:
        optimizer.rule = compiled_update
    p.grad = torch.ones(5)
    optimizer.update_hessian([torch.ones(5)])
    optimizer.step()
    state = {k: v.clone() for k, v in optimizer.state[p].items() if k != "estimates"}
    before = p.detach().clone()
    optimizer.found_inf = torch.ones(())
    p.grad = torch.full((5,), float("nan"))
    optimizer.update_hessian([p.grad])
    optimizer.step()
    assert torch.equal(p, before)
    assert all(torch.equal(v, optimizer.state[p][k]) for k, v in state.items())
    optimizer.found_inf = torch.zeros(())
    p.grad = torch.ones(5)
    optimizer.step()
    assert not torch.equal(p, before) and torch.isfinite(p).all()

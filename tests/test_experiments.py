"""The experiments: figures against known values; runs that are made once; verdicts on them."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch

from experiments import (
    compare,
    figures,
    gamma,
    grid,
    optimizer_steps,
    runs,
    sampling,
    speed,
    theory,
    toy,
)
from experiments.runs import Result, RunError, RunSpec
from nanosophia import dry_run, optimizers
from nanosophia.configurator import load

# A run of a second on the tests' own data.
QUICK = ("--n_layer=1", "--n_head=1", "--n_embd=8", "--block_size=8", "--batch_size=4",
         "--total_batch_size=4", "--hessian_batch_size=2", "--warmup_iters=1", "--max_iters=6",
         "--eval_interval=2", "--eval_windows=4", "--log_interval=1", "--device=cpu", "--gamma=1",
         "--dtype=float32")


@pytest.fixture
def quick(data_dir, monkeypatch):
    """train.py's flags for such a run; train.py itself runs in this process."""
    import train

    class Here:
        def __init__(self, command, stdout, stderr, **_):
            self.command, self.stdout, self.stderr = command, stdout, stderr

        def wait(self):
            with redirect_stdout(self.stdout), redirect_stderr(self.stderr):
                try:
                    train.main(self.command[self.command.index(str(runs.ROOT / "train.py")) + 1:])
                except SystemExit as ended:
                    return ended.code
            return 0

        def poll(self):
            return 0

    monkeypatch.setattr(runs.subprocess, "Popen", Here)
    return (*QUICK, f"--dataset={data_dir}")


def test_toy_steps_are_those_of_the_paper_s_landscape():
    found = {name: toy.steps_to_solve(points) for name, points in toy.methods(400).items()}
    gd = found.pop(next(name for name in found if name.startswith("GD")))
    assert found == {"Sophia, lr 0.5": 11, "Sophia, lr 1": 4, "SignGD, lr 0.01": 396,
                     "Adam, lr 0.03": 161, "Newton": None}
    assert gd < 223  # of lr .02
    assert toy.steps_to_solve(toy.path(lambda x: torch.optim.SGD(x, lr=0.02), 300)) == 223
    torch.testing.assert_close(toy.newton(50)[-1], torch.tensor([0.0, 4.0], dtype=torch.float64))


def test_the_landscape_starts_concave_and_has_its_minimum_at_the_named_point():
    x = torch.tensor(toy.START, dtype=torch.float64)
    assert toy.diagonal(x)[0] < 0
    minimum = torch.tensor(toy.MINIMUM, dtype=torch.float64)
    assert toy.loss(minimum) == 0 and torch.func.grad(toy.loss)(minimum).norm() == 0


def test_sign_descent_needs_the_root_of_the_condition_number_and_clipped_newton_nothing():
    rows = [dict(condition=10.0**d, sign=theory.sign_descent(10.0**d)[0]) for d in range(5)]
    assert theory.slope(rows) == pytest.approx(0.5, abs=0.01)
    for row in rows:
        assert row["sign"] > theory.sign_descent(row["condition"])[1]
    assert len({theory.clipped_newton(10.0**d) for d in range(1, 7)}) == 1
    diagonal = [theory.diagonal_newton(10.0**d, 5000) for d in (1, 2, 3, 4)]
    assert diagonal[0] * 5 < diagonal[1] and diagonal[1] * 5 < diagonal[2] and diagonal[3] is None


def test_clipped_newton_crosses_concave_parts_within_the_bound_of_g17():
    x = torch.linspace(-5, 5, 100, dtype=torch.float64, requires_grad=True)
    value, *derivatives = theory.valley(x)
    for expected in derivatives:  # against autograd's
        value, = torch.autograd.grad(value.sum(), x, create_graph=True)
        torch.testing.assert_close(value, expected)
    assert (derivatives[1] < 0).any() and (derivatives[0] * x > 0).all()  # one minimum, at 0
    for condition in (1.0, 1e4):
        steps, bound = theory.sophia_in_valleys(condition)
        assert 66 <= steps <= 72 < bound
        gamma_, G = theory.valley_constants()
        gap = theory.valley(torch.tensor(4.0, dtype=torch.float64))[0].item()
        assert bound == math.ceil(4 * (gap / min(1.4 / (4 * gamma_**2), G**2 / 1.4)
                                       + math.log(2 * condition * gap / 1e-3)))
    assert theory.gradient_in_valleys(10.0, 500) > 5 * theory.gradient_in_valleys(1.0, 500)
    assert theory.gradient_in_valleys(1000.0, 500) is None


def test_both_pictures_are_drawn(tmp_path, capsys):
    toy.main([f"--out_dir={tmp_path}", "--steps=40"])
    theory.main([f"--out_dir={tmp_path}", "--decades=2", "--limit=1000"])
    assert {p.name for p in tmp_path.iterdir()} == {"toy.svg", "toy.md", "theory.svg", "theory.md"}
    assert "| Newton | never | (0.000, 4.000) | 8 |" in capsys.readouterr().out


def test_a_list_of_runs_continues_where_it_stopped(quick, tmp_path):
    specs = [RunSpec(f"s{seed}", (*quick, f"--seed={seed}")) for seed in (0, 1)]
    printed = []
    first = runs.run_all(specs[:1], tmp_path, report=printed.append)
    both = runs.run_all(specs, tmp_path, report=printed.append)
    assert [r.name for r in both] == ["s0", "s1"] and len(printed) == 2  # s0 ran once
    assert both[0].loss == first[0].loss == both[0].records[-1]["val/loss"]
    assert both[0].tokens == 6 * 32 and both[0].seconds > 0
    per_token = both[0].flops / both[0].tokens
    N = 8 * 64 * ((257 + 63) // 64) + 12 * 8 * 8 + 8 * 3
    # the first of ten steps has an estimate, on half of its rows; six steps were made
    assert per_token == pytest.approx((6 * N + 12 * 8 * 8) * (6 + 0.5) / 6)


def test_a_folder_with_another_run_is_refused_before_any_run(quick, tmp_path):
    spec = RunSpec("a", quick)
    runs.run_all([spec], tmp_path)
    other = dataclasses.replace(spec, flags=(*quick, "--seed=7"))
    with pytest.raises(runs.ConfigError, match="holds a run with other settings"):
        runs.run_all([RunSpec("b", quick), other], tmp_path)
    assert not (tmp_path / "b").exists()
    with pytest.raises(runs.ConfigError, match="unknown key"):
        runs.run_all([RunSpec("c", ("--lr=1",))], tmp_path)


def test_a_changed_config_file_is_not_assumed_to_be_the_run_that_finished(quick, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("learning_rate = 1e-3\n")
    spec = RunSpec("a", (*quick, str(file)))
    runs.run_all([spec], tmp_path)
    file.write_text("learning_rate = 1e-2\n")
    with pytest.raises(runs.ConfigError, match=r"learning_rate = 0.001 there, 0.01 here"):
        runs.run_all([spec], tmp_path)


@pytest.mark.parametrize("flags, ranks, words", [
    (["--init_from=ckpt.pt"], 1, "init_from = 'ckpt.pt' is not for an experiment"),
    (["--eval_only"], 1, "eval_only = True is not"), (["--dry_run"], 1, "dry_run = True is not"),
    ([], 8, "total_batch_size = 4 is less than the 8 ranks"),
    (["--optimizer=sofia"], 1, "optimizer = 'sofia' is none of"),
    (["--hessian_batch_size=8"], 1, "hessian_batch_size = 8")])
def test_what_train_would_refuse_is_refused_before_the_first_run(quick, tmp_path, flags, ranks,
                                                                 words):
    specs = [RunSpec("a", quick), RunSpec("b", (*quick, *flags))]
    with pytest.raises(runs.ConfigError, match=words):
        runs.run_all(specs, tmp_path, ranks=ranks)
    assert not list(tmp_path.iterdir())


def test_a_refused_run_leaves_its_folder_to_the_corrected_one(quick, tmp_path):
    with pytest.raises(RunError, match="error: nowhere"):
        runs.run_all([RunSpec(n, (*quick, "--dataset=nowhere", f"--seed={i}"))
                        for i, n in enumerate("abcd")], tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["a"]  # the others did not begin
    assert runs.run_all([RunSpec("a", quick)], tmp_path)[0].steps == 6


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_that_is_stopped_stops_its_runs_and_continues_later(data_dir, tmp_path, number,
                                                                      code):
    """Only the command gets the signal, as from a scheduler; its run saves and ends."""
    flags = ",".join(flag[2:] for flag in (*QUICK, "--eval_interval=1000", f"--dataset={data_dir}"))
    out = tmp_path / "o o"
    command = [sys.executable, "-m", "experiments.compare", f"--out_dir={out}", "--ratios=0.02",
               f"--baseline=optimizer=adamw,{flags}", f"--candidate=optimizer=sophiag,{flags}",
               "--max_iters=600", "--flags=--checkpoint_interval=100000 --keep_best=False"]
    folder = out / "baseline_T600_lr0.0006_s0"
    more = dict(cwd=runs.ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    first = subprocess.Popen(  # a suite started in the background has SIGINT ignored
        command, **more,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    try:
        until = time.monotonic() + 60
        while not (folder / "metrics.jsonl").exists() and time.monotonic() < until:
            time.sleep(0.05)
        first.send_signal(number)
        assert first.wait(60) == code
    finally:
        first.kill()
    done = int((folder / "latest").read_text()[5:])
    assert 0 < done < 600 and "stopped by" in (folder / "log.txt").read_text()
    assert "T = 600" in subprocess.check_output(command, text=True, **more)
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()]
    assert steps == list(range(600))


def test_a_run_can_have_two_ranks(data_dir, tmp_path):
    spec = RunSpec("a", (*QUICK, f"--dataset={data_dir}", "--batch_size=2"))
    result, = runs.run_all([spec], tmp_path, ranks=2)
    assert result.steps == 6 and result.records[-1]["val/loss"] == result.loss
    with pytest.raises(RunError, match="error: .*nowhere"):
        runs.run_all([RunSpec("b", (*spec.flags, "--dataset=nowhere"))], tmp_path, ranks=2)


def test_a_record_counts_for_the_steps_since_the_one_before():
    result = Recorded("r", None, False)
    for key, value in dict(records=[
            {"step": 0, "x": 1.0, "tokens_per_second": 10}, {"step": 9},
            {"step": 10, "x": 0.2, "tokens_per_second": 20},
            {"step": 20, "x": 0.4, "tokens_per_second": 40}],
            config=RunSpec("", ("--max_iters=21", "--total_batch_size=30", "--batch_size=30",
                             "--block_size=8", "--warmup_iters=1")).config()).items():
        object.__setattr__(result, key, value)
    assert result.mean("x") == pytest.approx((1 + 10 * 0.2 + 10 * 0.4) / 21)
    assert result.mean("x", 0.9) == 0.4 and math.isnan(result.mean("y"))
    assert result.seconds == pytest.approx(240 / 10 + 2400 / 20 + 2400 / 40)


@pytest.mark.parametrize("optimizer", ["adamw", "sophiag"])
@pytest.mark.parametrize("every, steps", [(1, 6), (2, 6), (6, 6), (1, 2), (9, 2)])
def test_a_run_that_diverges_is_a_result(quick, tmp_path, every, steps, optimizer):
    """Wherever it shows first: in a training loss, an evaluation, the last one, a save."""
    spec = RunSpec("a", (*quick, f"--optimizer={optimizer}", "--learning_rate=1e38",
                      "--warmup_iters=0", f"--eval_interval={every}", f"--max_iters={steps}",
                      "--hessian_interval=1", "--min_lr_ratio=1", "--weight_decay=1"))
    result = runs.run_all([spec], tmp_path)[0]
    assert result.diverged and result.loss == math.inf and gamma.blew_up(result)
    assert result.steps_to(math.inf) is None and result.steps <= steps
    assert runs.run_all([spec], tmp_path)[0].diverged


def test_two_runs_of_one_name_are_refused(quick, tmp_path):
    with pytest.raises(runs.ConfigError, match="share the name a"):
        runs.run_all([RunSpec("a", quick), RunSpec("a", (*quick, "--seed=1"))], tmp_path)


def test_no_verdict_is_given_where_a_run_diverged(quick, tmp_path, capsys):
    baseline, candidate, out = contenders(quick, tmp_path)
    compare.main([baseline, candidate.replace("rate=1e-2", "rate=1e38,weight_decay=1"), out])
    assert "no verdict on 0.5 T, 1 of 2 runs diverged" in capsys.readouterr().out
    data = json.loads((tmp_path / "comparison.json").read_text(), parse_constant=pytest.fail)
    table = data["rows"]
    assert table[-1]["losses"] == [None] and table[-1]["met"] == [None]


def test_a_run_that_breaks_otherwise_is_an_error_with_its_last_line(quick, tmp_path):
    with pytest.raises(RunError, match="did not finish"):
        runs.run_all([RunSpec("a", (*quick, "--dataset=nowhere"))], tmp_path)


def contenders(quick, tmp_path):
    flags = ",".join(flag[2:] for flag in quick)
    return [f"--baseline=optimizer=adamw,learning_rate=1e-2,{flags}",
            f"--candidate=optimizer=sophiag,learning_rate=1e-2,{flags}", f"--out_dir={tmp_path}"]


def test_compare_judges_half_the_steps_against_the_tuned_baseline(quick, tmp_path, capsys):
    compare.main([*contenders(quick, tmp_path), "--max_iters=6,12", "--rates=0.1,1,100",
                  "--ratios=0.5,1", "--seeds=2"])
    out = capsys.readouterr().out
    table = json.loads((tmp_path / "comparison.json").read_text())["rows"]
    names = [row["name"] for row in table]
    assert names.count("baseline, T = 6") == names.count("baseline, T = 12") == 1
    best = next(row for row in table if row["name"] == "baseline, T = 12")
    ladder = [row for row in table if row["name"] == "baseline, T = 12, ladder"]
    assert len(ladder) == 2 and all(row["losses"][0] >= best["losses"][0] for row in ladder)
    half = next(row for row in table if row["name"] == "candidate, 0.5 x 12")
    assert half["steps"] == 6 and half["tokens"] * 2 == best["tokens"] and len(half["losses"]) == 2
    verb = "reaches" if half["mean"] <= best["mean"] else "does not reach"
    assert f"T = 12: the candidate in 0.5 T = 6 steps {verb} the baseline" in out
    assert f"{half['mean']:.4f} against {best['mean']:.4f}" in out
    assert (tmp_path / "comparison.svg").read_text().startswith("<?xml")
    # warm-up keeps its share: 1 of 6 becomes 2 of 12
    settings = load(compare.CompareSettings, contenders(quick, tmp_path), "")[0]
    kept = dataclasses.replace(settings, warmup="steps")
    for chosen, warmup in ((settings, 2), (kept, 1)):
        spec = compare.contender_spec(chosen, "x", settings.baseline, 12, 0)
        assert spec.config().warmup_iters == warmup


def test_a_best_rate_at_the_end_of_the_ladder_is_reported(quick, tmp_path, capsys):
    compare.main([*contenders(quick, tmp_path), "--rates=0.001,0.01"])
    assert "is at the end of its ladder" in capsys.readouterr().out


@pytest.mark.parametrize("flags, words", [
    ([], "baseline is not given"), (["--baseline=config/quickstart.py"], "candidate is not given"),
    (["--baseline=a.py", "--candidate=b.py", "--ratios=0,1"], "ratios = '0,1' is not a list of"),
    (["--baseline=a.py", "--candidate=b.py", "--rates=x"], "is not a list of positive numbers"),
    (["--baseline=a.py", "--candidate=b.py", "--max_iters=inf"], "is not a list of positive"),
    (["--baseline=a.py", "--candidate=b.py", "--max_iters=5.5"], "are not whole numbers"),
    (["--baseline=a.py", "--candidate=b.py"], "config file a.py not found"),
    (["--baseline=config/quickstart.py", "--candidate=optimizer=sophiag,gama=1"], "key gama"),
    (["--baseline=config/quickstart.py", "--candidate=config/quickstart.py", "--max_iters=1"],
     "max_iters = 0")])
def test_compare_refuses_mistakes_in_words(refused, flags, words):
    assert words in refused(compare.main, flags)


class Recorded(Result):
    """A result with records that a test wrote."""

    records = None
    config = None


def recorded(tmp_path, losses, warmup=0, unclipped=0.3, diverged=False):
    result = Recorded("r", tmp_path, diverged)
    object.__setattr__(result, "records", [
        {"step": i, "train/loss": loss, "val/loss": loss,
         "unclipped_fraction": unclipped[i] if isinstance(unclipped, list) else unclipped}
        for i, loss in enumerate(losses)])
    flags = (f"--max_iters={len(losses)}", f"--warmup_iters={warmup}")
    object.__setattr__(result, "config", RunSpec("", flags).config())
    return result


def test_a_loss_a_quarter_above_what_it_had_been_is_a_blow_up_after_the_warm_up(tmp_path):
    assert not gamma.blew_up(recorded(tmp_path, [4] * 5 + [3] * 5 + [3.7] * 5))
    assert gamma.blew_up(recorded(tmp_path, [4] * 5 + [3] * 5 + [3.8] * 5 + [3] * 5))
    assert not gamma.blew_up(recorded(tmp_path, [3] * 5 + [5] * 5 + [3.2] * 10, warmup=10))
    assert gamma.blew_up(recorded(tmp_path, [4] * 5 + [3] * 5 + [None]))  # a step that was refused
    one_easy_batch = [3] * 8 + [1.5] + [3] * 8
    assert not gamma.blew_up(recorded(tmp_path, one_easy_batch))


def test_the_finder_brackets_gamma_and_halves(tmp_path, monkeypatch):
    """The unclipped share of these runs is gamma / (gamma + 1): 22 % at gamma .29."""
    def run_all(self, specs):
        value = specs[0].config().gamma
        tried.append(value)
        return [recorded(tmp_path, [3, 2], unclipped=value / (value + 1))]

    monkeypatch.setattr(runs.RunSettings, "run_all", run_all)
    for start in (1e-4, 0.3, 1e4):
        tried: list[float] = []
        settings = load(gamma.GammaSettings, [f"--config=optimizer=sophiag,gamma={start}",
                                              "--find=gamma"], "")[0]
        found = gamma.search(settings)["gamma"]
        assert 0.1 <= found / (found + 1) <= 0.5 and len(tried) <= 8
    tried = []
    settings = load(gamma.GammaSettings, ["--config=optimizer=sophiag,gamma=1e-9", "--find=gamma",
                                          "--most=3"], "")[0]
    with pytest.raises(gamma.ConfigError, match="none of 3 gammas"):
        gamma.search(settings)


@pytest.mark.parametrize("limit, start, largest, blew_up_at", [
    (0.05, 0.01, 0.04, 0.08), (0.05, 0.4, 0.05, 0.1), (10, 0.01, 0.01 * 2**4, None)])
def test_sweeps_rise_side_by_side_until_a_run_blows_up(tmp_path, monkeypatch, limit, start,
                                                       largest, blew_up_at):
    def run_all(self, specs):
        rounds.append([c.name for c in specs])
        rates = [c.config().learning_rate for c in specs]
        found = [9 if r > limit else 2 + 0.03 * math.log2(r / 0.02) ** 2 for r in rates]
        return [recorded(tmp_path, [3] * 5 + [loss] * 5) for loss in found]

    def at(rate):
        return RunSpec("x", (f"--learning_rate={rate}",))

    rounds: list[list[str]] = []
    monkeypatch.setattr(runs.RunSettings, "run_all", run_all)
    sweeps = gamma.sweep_lr(runs.RunSettings(), {"a": (at, start), "b": (at, 0.02)}, most=5)
    sweep = sweeps["a"]
    assert sweep.largest_stable == pytest.approx(largest)
    assert sweep.blew_up_at == pytest.approx(blew_up_at)
    assert sweep.best == pytest.approx(0.02 if start < 0.02 else largest)
    assert sweeps["b"].best == 0.02 and len(rounds[0]) == 2
    below = gamma.sweep_lr(runs.RunSettings(), {"a": (at, 0.02)}, bracket_below=True, most=9)["a"]
    assert below.best == 0.02 and below.lowest == 0.01  # the best has a neighbour on either side
    monkeypatch.setattr(gamma, "blew_up", lambda result: True)
    with pytest.raises(gamma.ConfigError, match="all of 5 learning rates from 0.02"):
        gamma.sweep_lr(runs.RunSettings(), {"a": (at, 0.02)}, most=5)


def test_a_rate_that_unlearns_is_not_stable():
    """A model that ends at the loss of byte frequencies never rose above what it had been."""
    assert gamma.stable({1.0: 2.4, 2.0: 2.9, 4.0: 3.3}) == {1.0: 2.4, 2.0: 2.9}
    assert gamma.stable({1.0: math.inf, 2.0: math.inf}) == {}
    assert gamma.next_rate({1.0: 2.4, 2.0: 2.9, 4.0: 3.3}, 1.0, 2.0, bracket_below=False) is None
    assert gamma.next_rate({1.0: 2.4, 2.0: 2.9, 4.0: 3.3}, 1.0, 2.0, bracket_below=True) == 0.5
    assert gamma.next_rate({1.0: 3.3}, 1.0, 2.0, bracket_below=False) == 2.0


def test_a_sweep_that_starts_on_a_plateau_falls_before_it_rises():
    losses = {0.3: 3.09}
    while (rate := gamma.next_rate(losses, 0.3, 2.0, bracket_below=True)) is not None:
        losses[rate] = 3.2 if rate > 0.5 else 3.1 if rate > 0.1 else \
            2.5 + 0.1 * abs(math.log2(rate / 0.01))
    assert min(losses, key=losses.get) == pytest.approx(0.3 / 32)
    assert min(losses) == pytest.approx(0.3 / 64) and max(losses) == 0.6


def test_a_gamma_within_the_range_is_taken_and_diverging_runs_are_reported(tmp_path, monkeypatch):
    settings = load(gamma.GammaSettings, ["--config=optimizer=sophiag", "--find=gamma",
                                          "--most=2"], "")[0]
    for share in (0.11, 0.49):
        monkeypatch.setattr(runs.RunSettings, "run_all", lambda self, specs, share=share: [
            recorded(tmp_path, [9, 9, 3, 2], unclipped=[0.9, 0.9, share, share])])
        assert gamma.search(settings)["gamma"] == 0.05  # the default; by the second half
    lost = dataclasses.replace(recorded(tmp_path, [3]), diverged=True)
    monkeypatch.setattr(runs.RunSettings, "run_all", lambda self, specs: [lost])
    with pytest.raises(gamma.ConfigError, match="all of 2 runs diverged"):
        gamma.search(settings)


def test_short_runs_correct_h_for_its_bias_unless_they_are_the_config_s_own(
        tmp_path, monkeypatch, capsys):
    def run_all(self, specs):
        configs = [spec.config() for spec in specs]
        seen.extend(configs)
        return [recorded(tmp_path, [3] * 5 + [2 + abs(math.log2(c.learning_rate / 6e-4))] * 5)
                for c in configs]

    monkeypatch.setattr(runs.RunSettings, "run_all", run_all)
    for optimizer, steps, find, corrected in (
            ("optimizer=sophiag", 100, "all", True), ("optimizer=sophiag", 500, "all", False),
            ("optimizer=adamw", 100, "rate", False),
            ("optimizer=sophiag,gamma_target=0.9", 100, "rate", False)):
        seen = []
        settings = load(gamma.GammaSettings, [
            f"--config={optimizer},max_iters=500,warmup_iters=9", f"--steps={steps}",
            f"--find={find}", "--flags=--grad_clip=0.5 --seed=3"], "")[0]
        gamma.search(settings)
        told = "by the paper's rule Sophia's rate is 0.8 times adamw's: 0.00048"
        assert (told in capsys.readouterr().out) == (optimizer == "optimizer=adamw")
        assert {c.hessian_bias_correction for c in seen} == {corrected}
        assert {(c.grad_clip, c.seed, c.max_iters) for c in seen} == {(0.5, 3, steps)}


def grid_runs(tmp_path, seen):
    """Losses least at .95, .98, .1 and gamma .02 (10 to 50 % unclipped: .02 to .1); 3e-3 blows up.

    The best rate is 1e-3 / 1.25. A beta1 of .8 diverges where it would be best.
    """
    def run_all(self, specs):
        found = []
        for spec in specs:
            c = spec.config()
            seen.append(c)
            loss = 2 + abs(c.beta1 - .95) + abs(c.beta2 - .98) + abs(c.weight_decay - .1) - c.gamma
            loss += 0.1 * abs(math.log(c.learning_rate / 8e-4)) - (c.beta1 == .8)
            share = 0.05 if c.gamma < .02 else 0.3 if c.gamma < .15 else 0.6
            result = recorded(tmp_path, [3] * 5 + [loss if c.learning_rate < 3e-3 else 9] * 6)
            object.__setattr__(result, "diverged", c.beta1 == .8)
            for i, record in enumerate(result.records):
                record.update(step=5000 * i, unclipped_fraction=share)
            object.__setattr__(result, "config", c)
            found.append(result)
        return found

    return run_all


def test_the_papers_grid_is_searched_setting_by_setting(tmp_path, monkeypatch, capsys, refused):
    seen = []
    monkeypatch.setattr(runs.RunSettings, "run_all", grid_runs(tmp_path, seen))
    flags = ["--config=config/train_gpt2_30m_sophiag.py,gamma=0.01", f"--out_dir={tmp_path}"]
    grid.main([*flags, "--dry_run"])
    assert "25 + 4 + 6 runs over beta1 x beta2; weight_decay; gamma, and up to 20" in \
        capsys.readouterr().out and not seen
    grid.main(flags)
    out = capsys.readouterr().out
    assert out.splitlines()[-5:] == ["beta1 = 0.95", "beta2 = 0.98", "weight_decay = 0.1",
                                     "gamma = 0.1", "learning_rate = 0.0008"]
    assert "| 0.95 | 0.98 | 2." in out
    assert {(c.max_iters, c.warmup_iters, c.hessian_bias_correction) for c in seen} == {
        (50_000, 2000, False)}
    assert {c.gamma for c in seen[:29]} == {0.01}
    grid.main([*flags, "--rate=largest"])
    rate = float(capsys.readouterr().out.splitlines()[-1].removeprefix("learning_rate = "))
    assert rate < 3e-3 <= 1.25 * rate * 1.001
    for more, words in ((["--gamma=.005,.2"], "left too many or too few"),
                        (["--beta1=.8"], "all of 5 runs over beta1 and beta2 diverged; give"),
                        (["--rate=largest", "--most=2"], "none of 2 learning rates blew up"),
                        (["--most=2"], "the lowest of 2 learning rates is the best")):
        assert words in refused(grid.main, [*flags, *more])
    seen.clear()
    assert "beta1 = 2.0 must be" in refused(grid.main, [*flags, "--beta1=.9,2"]) and not seen


@pytest.mark.parametrize("flags, words", [
    ([], "config is not given"),
    (["--config=config/quickstart.py", "--beta1=a"], "beta1 = 'a' is not a list of positive"),
    (["--config=config/quickstart_adamw.py", "--gamma=.1"], "has no fixed gamma to search for"),
    (["--config=config/quickstart_adamw.py", "--dry_run", "--beta2=1.5"], "beta2 = 1.5 must be")])
def test_the_grid_refuses_mistakes_in_words(refused, flags, words, tmp_path):
    assert words in refused(grid.main, [*flags, f"--out_dir={tmp_path}"])


def test_gamma_and_rate_are_printed_as_config_lines(quick, tmp_path, capsys):
    flags = ",".join(flag[2:] for flag in quick)
    gamma.main([f"--config=optimizer=sophiag,{flags}", "--steps=20", f"--out_dir={tmp_path}",
                "--most=14"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" = ")[0] for line in lines[-3:]] == ["gamma", "beta1", "learning_rate"]


@pytest.mark.parametrize("own, losses, found, searches", [
    (0.96, {0.8: 2.0, 0.9: 2.1, 0.96: 2.5}, 0.8, 2),
    (0.96, {0.8: 2.0, 0.9: 2.1, 0.96: 2.01}, 0.96, 1),
    (0.85, {0.8: 2.2, 0.85: 2.1, 0.9: 2.0, 0.96: math.inf}, 0.9, 2)])
def test_the_best_beta1_is_found_and_gamma_again_after_a_change(
        own, losses, found, searches, tmp_path, monkeypatch):
    """Unclipped is gamma / (gamma + 1), with another beta1 gamma / (gamma + 20)."""
    def run_all(self, specs):
        configs = [spec.config() for spec in specs]
        asked.append([(c.gamma, c.beta1) for c in configs])
        return [recorded(
            tmp_path / spec.name, [3, losses[c.beta1]], diverged=losses[c.beta1] == math.inf,
            unclipped=c.gamma / (c.gamma + (20 if c.beta1 != own else 1)))
            for spec, c in zip(specs, configs, strict=True)]

    asked: list[list[tuple[float, float]]] = []
    monkeypatch.setattr(runs.RunSettings, "run_all", run_all)
    monkeypatch.setattr(gamma, "find_rate", lambda *args: 0.5)
    settings = load(gamma.GammaSettings, [f"--config=optimizer=sophiag,gamma=0.5,beta1={own}"],
                    "")[0]
    result = gamma.search(settings)
    assert result["beta1"] == found and result["learning_rate"] == 0.5
    together, = (cells for cells in asked if len(cells) > 1)
    assert [beta1 for _, beta1 in together] == sorted(losses)
    single = {cells[0][1] for cells in asked if len(cells) == 1}  # of which gamma was sought
    assert single == {own, found} and len(single) == searches
    assert (result["gamma"] > 2) == (found != own)


def test_where_there_is_no_gamma_or_no_beta1_the_rest_is_found(tmp_path, monkeypatch, capsys):
    seen: list = []

    def run_all(self, specs):
        seen.extend(specs)
        return [recorded(tmp_path / spec.name, [3] * 10) for spec in specs]

    monkeypatch.setattr(runs.RunSettings, "run_all", run_all)
    for config, gammas, betas in (("optimizer=sophiag,gamma_target=0.9", 1, 3),
                                  ("optimizer=adamw,beta1=0.7", 1, 4),
                                  ("optimizer=sophiag,beta1=0.9", 1, 3),
                                  ("optimizer=torch.optim:NAdam", 1, 1)):
        seen.clear()
        gamma.search(load(gamma.GammaSettings, [f"--config={config}"], "")[0])
        configs = [spec.config() for spec in seen]
        assert len({c.gamma for c in configs}) == gammas, config
        assert len({c.beta1 for c in configs}) == betas, config
        assert len({c.learning_rate for c in configs}) > 2
        names = {spec.name: spec.flags for spec in seen}  # the same cell, the same run
        assert len({spec.flags for spec in seen}) == len(names)


@pytest.mark.parametrize("flags, words", [
    ([], "config is not given"),
    (["--config=config/quickstart.py", "--find=gamma"], "controls gamma itself"),
    (["--config=optimizer=torch.optim:NAdam", "--find=beta1"], "beta1 has no effect on optimizer"),
    (["--config=config/nothing.py"], "not found")])
def test_gamma_refuses_mistakes_in_words(refused, flags, words):
    assert words in refused(gamma.main, flags)


@pytest.mark.parametrize("preset", ["paper", "small"])
@pytest.mark.parametrize("figure", sorted(figures.FIGURES))
def test_every_figure_is_drawn_from_runs_of_its_configs(figure, preset, tmp_path, monkeypatch,
                                                        capsys):
    seen = {}

    def run_all(self, specs):
        found = []
        for spec in specs:
            config = spec.config()  # a run that train.py would take
            seen[spec.name] = config
            result = Recorded(spec.name, tmp_path, False)
            object.__setattr__(result, "config", config)
            object.__setattr__(result, "records", [
                {"step": i, "train/loss": 4 / (i + 1),
                 "val/loss": (4 + abs(math.log(config.learning_rate / 2e-3))) / (i + 1),
                 "norm_clip_rate": 0.5, "unclipped_fraction": 0.2} for i in range(3)])
            found.append(result)
        return found

    monkeypatch.setattr(runs.RunSettings, "run_all", run_all)
    figures.main([f"--figure={figure}", f"--preset={preset}", f"--out_dir={tmp_path}"])
    assert len(seen) >= 3
    tokens = {c.tokens_per_step for c in seen.values()}
    assert tokens == ({32 * 64} if preset == "small" else
                      {"10": {1024 * 2048}, "3": {480 * 1024, 512 * 2048}}.get(
                          figure, {480 * 1024}))
    assert "mathdefault" not in (tmp_path / f"{preset}_{figure}.svg").read_text()
    lines = capsys.readouterr().out.count("\n| ") - 1  # without the heading
    small = preset == "small"
    assert lines == {"6b": 6, "6c": 3, "7a": 12, "7b": 4, "7c": 8 + small}.get(figure, len(seen))
    kinds = {(c.optimizer, c.hessian_interval) for c in seen.values()}
    if figure == "10":
        assert [c.learning_rate for c in seen.values()] == (
            pytest.approx([7.2e-3, 9e-3, 6e-3]) if small else [1.2e-4, 1.5e-4, 6e-5])
    if figure == "3":
        assert {c.n_embd for c in seen.values()} == ({64} if small else {1024, 1280, 1536})
        assert all(c.warmup_iters == (20 if small else 2000) for c in seen.values())
    if figure == "6a":
        assert small or {c.n_embd for c in seen.values()} == {768}
    if figure == "6c":
        assert {c.optimizer for c in seen.values()} == {"sophiah"}
        assert {c.gamma for c in seen.values()} == ({0.2, 0.4, 0.8} if small else {.005, .01, .02})
    if figure == "7a":
        assert kinds == {("sophiag", 1), ("sophiag", 10), ("sophiag", 100), ("adamw", 10)}
        lengths = (100, 200, 400) if small else (100_000, 200_000, 400_000)
        assert {(c.max_iters, c.warmup_iters) for c in seen.values()} == {
            (T, 20 if small else 2000) for T in lengths}
    if figure == "7b":
        assert {o for o, _ in kinds} == {"sophiag", "sophiah", "ef_clip", "ah_clip"}
        assert len({c.gamma for c in seen.values() if c.optimizer == "ah_clip"}) == 5
    if figure == "7c":
        assert kinds >= {("adahessian", 1), ("adahessian", 2), ("gnb_unclipped", 2),
                         ("gnb_unclipped", 5), ("adamw", 10), ("normalize", 10), ("clip", 10)}


def test_a_figure_lists_its_runs_without_making_them(tmp_path, capsys):
    flags = ["--preset=paper", f"--out_dir={tmp_path}", "--dry_run", "--nproc_per_node=10",
             "--flags=--dry_run_gpu=A5000"]
    figures.main(["--figure=6c", *flags])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Figure 6c, preset paper: 9 runs, ")
    assert "on 10 x A5000 at 40% of the peak." in lines[0] and len(lines) == 4 + 9
    config = RunSpec("", ("config/train_gpt2_30m_sophiah.py",)).config()
    plan = dry_run.plan(dataclasses.replace(config, dry_run_gpu="A5000"))
    assert lines[4].endswith(f" | {dry_run.days(plan, 10):.3g} |")
    assert "--beta2=0.95 --gamma=0.005" in lines[4]
    figures.main(["--figure=7a", *flags, "--max_iters=500"])
    out = capsys.readouterr().out
    assert all(f"--warmup_iters=10 --learning_rate=0.0012 --max_iters={n} |" in out
               for n in (500, 1000, 2000))
    assert ": 12 runs" in out and "first of a ladder" in out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("key, value", [("dataset", "other"), ("block_size", 16),
                                        ("eval_windows", 8)])
def test_contenders_whose_losses_are_not_of_the_same_thing_are_refused(quick, tmp_path, refused,
                                                                       key, value):
    baseline, candidate, out = contenders(quick, tmp_path)
    words = refused(compare.main, [baseline, f"{candidate},{key}={value}", out])
    assert f"the candidate {value!r}: their losses cannot be compared" in words
    assert not list(tmp_path.iterdir())


def test_a_cell_that_two_lengths_share_is_run_once(quick, tmp_path, capsys):
    baseline, candidate, out = contenders(quick, tmp_path)
    compare.main([baseline, candidate, out, "--max_iters=4,8", "--ratios=0.5,1"])
    printed = capsys.readouterr().out
    assert printed.count("candidate_T4_s0: loss ") == 1  # half of 8, and once 4
    assert printed.count(": loss ") == 2 + 3
    lines = [line for line in printed.splitlines() if line.startswith("| candidate, ")]
    assert [line.split(" | ")[2] for line in lines] == ["2", "4", "4", "8"]


def test_flags_for_every_run_come_before_what_the_protocol_sets(quick, tmp_path, capsys):
    baseline, candidate, out = contenders(quick, tmp_path)
    compare.main([baseline, candidate + ",total_batch_size=8", out, "--max_iters=6",
                  "--flags=--max_iters=40 --learning_rate=1e-3 --seed=5 --grad_clip=0.5"])
    printed = capsys.readouterr().out
    assert "| baseline, T = 6 | 0.001 | 6 |" in printed
    assert "sees 32 tokens, one of the candidate 64: equal steps are not equal data" in printed
    config = json.loads((tmp_path / "candidate_T3_s0" / "config.json").read_text())
    assert (config["seed"], config["grad_clip"], config["max_iters"]) == (0, 0.5, 3)
    with pytest.raises(runs.ConfigError, match="No closing quotation"):
        load(compare.CompareSettings, [baseline, candidate, "--flags=--x='"], "")


def test_each_optimizers_step_is_timed_alone(tmp_path, capsys):
    optimizer_steps.main(["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16",
                          "--vocab_size=320", "--device=cpu", "--repeats=3",
                          f"--json={tmp_path / 'steps.json'}"])
    assert "| AdamW, torch fused | " in capsys.readouterr().out
    rows = json.loads((tmp_path / "steps.json").read_text())["rows"]
    assert rows.pop("AdamW, torch fused")["ratio"] == 1
    assert all(0 < row["least"] <= row["ratio"] <= row["most"] for row in rows.values())
    assert len(rows) == 18 and "Sophia, update_hessian" in rows
    state = {name: row["state_bytes"] for name, row in rows.items() if "state_bytes" in row}
    assert state["metric Muon"] < state["AdamW, torch foreach"] < state["SOAP, new basis"]
    assert state["AdamW, torch foreach"] == pytest.approx(8, rel=0.01)  # two float32 of each


def test_whole_commands_are_timed_beside_nanogpts(data_dir, tmp_path, monkeypatch, capsys):
    peer = tmp_path / "peer"
    peer.mkdir()
    (peer / "train.py").write_text("import sys\nprint(sys.argv)\nassert '--compile=False' in "
                                   "sys.argv\n")
    monkeypatch.setattr(speed, "contenders", lambda settings: {
        "AdamW, float32": ["--optimizer=adamw", "--dtype=float32"]})
    monkeypatch.setattr(speed, "SIDE", 64)
    speed.main([f"--nanogpt={peer}", f"--dataset={data_dir}", "--rounds=1", "--steps=10",
                "--n_layer=1", "--n_embd=16", "--block_size=16", "--batch_size=2",
                "--vocab_size=320", f"--json={tmp_path / 'speed.json'}"])
    assert "| nanoGPT's train.py, AdamW, float32 | " in capsys.readouterr().out
    report = json.loads((tmp_path / "speed.json").read_text())
    assert list(report["rows"]) == ["nanoGPT's train.py, AdamW, float32", "AdamW, float32"]
    assert report["tokens"] == 64 and report["flops_per_step"] > 64 * 6 * 16 * 320
    assert report["rows"]["AdamW, float32"]["peak_bytes"] > 100 << 20  # torch was imported


def test_every_contender_of_the_speed_table_is_one_that_train_takes():
    settings = speed.SpeedSettings()
    for flags in speed.contenders(settings).values():
        argv = speed.our_command(settings, flags, 21, "x")[2:]
        config = RunSpec("", tuple(argv)).config()
        assert config.max_iters == 21 and 10 % config.hessian_interval == 0
        optimizers.check(config, 1)


@pytest.mark.parametrize("flags, words", [
    (["--steps=15"], "no multiple of 10"), (["--nanogpt=nowhere"], "holds no train.py")])
def test_speed_refuses_mistakes_in_words(refused, flags, words):
    assert words in refused(speed.main, flags)


def test_a_command_that_fails_is_named_with_its_last_line(tmp_path, data_dir, monkeypatch, refused):
    monkeypatch.setattr(speed, "contenders", lambda settings: {"AdamW, float32": ["--nope=1"]})
    line = refused(speed.main, [f"--dataset={data_dir}", "--rounds=1"])
    assert "ended with 2: error: unknown key nope" in line


def test_ways_of_sampling_are_timed_against_the_copy_limit(capsys):
    sampling.main(["--max_new_tokens=2", "--rounds=1", "--batch=2"])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| cache, ") for line in lines) == 8
    assert any(line.startswith("| cache, bfloat16, by columns, 2 texts | ") for line in lines)

"""The experiments: figures against known values, runs that are carried out once, their verdicts."""

import dataclasses
import json
import math
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch

from configurator import load
from experiments import compare, figures, gamma, runs, study, theory, toy
from experiments.runs import Cell, Result

# A run of a second on the tests' own data.
QUICK = ("--n_layer=1", "--n_head=1", "--n_embd=8", "--block_size=8", "--batch_size=4",
         "--total_batch_size=4", "--hessian_batch_size=2", "--warmup_iters=1", "--max_iters=6",
         "--eval_interval=2", "--eval_windows=4", "--log_interval=1", "--device=cpu", "--gamma=1")


@pytest.fixture
def quick(data_dir, monkeypatch):
    """train.py's flags for such a run; train.py itself runs in this process."""
    import subprocess

    import train

    def run(command, stdout=None, stderr=None, **_):
        with redirect_stdout(stdout), redirect_stderr(stderr):
            try:
                train.main(command[command.index("train.py") + 1:])
            except SystemExit as ended:
                return subprocess.CompletedProcess(command, ended.code)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(runs.subprocess, "run", run)
    return (*QUICK, f"--dataset={data_dir}")


def test_toy_steps_are_those_of_the_paper_s_landscape():
    found = {name: toy.steps_to_solve(places) for name, places in toy.methods(400).items()}
    gd = found.pop(next(name for name in found if name.startswith("GD")))
    assert found == {"Sophia, lr 0.5": 11, "Sophia, lr 1": 4, "SignGD, lr 0.01": 396,
                     "Adam, lr 0.03": 161, "Newton": None}
    assert gd < 223  # of lr .02
    assert toy.steps_to_solve(toy.path(lambda x: torch.optim.SGD(x, lr=0.02), 300)) == 223
    torch.testing.assert_close(toy.newton(50)[-1], torch.tensor([0.0, 4.0], dtype=torch.float64))


def test_the_landscape_starts_concave_and_has_its_minimum_where_it_is_said():
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


def test_both_pictures_are_drawn(tmp_path, capsys):
    toy.main([f"--out_dir={tmp_path}", "--steps=40"])
    theory.main([f"--out_dir={tmp_path}", "--decades=2", "--limit=1000"])
    assert {p.name for p in tmp_path.iterdir()} == {"toy.svg", "toy.md", "theory.svg", "theory.md"}
    assert "| Newton | never | (0.000, 4.000) | 8 |" in capsys.readouterr().out


def test_a_list_of_runs_goes_on_where_it_stopped(quick, tmp_path):
    cells = [Cell(f"s{seed}", (*quick, f"--seed={seed}")) for seed in (0, 1)]
    said = []
    first = runs.carry_out(cells[:1], tmp_path, say=said.append)
    both = runs.carry_out(cells, tmp_path, say=said.append)
    assert [r.name for r in both] == ["s0", "s1"] and len(said) == 2  # s0 ran once
    assert both[0].loss == first[0].loss == both[0].records[-1]["val/loss"]
    assert both[0].tokens == 6 * 32 and both[0].seconds > 0
    per_token = both[0].flops / both[0].tokens
    # one estimate on half the batch in ten steps
    N = 8 * 64 * ((257 + 63) // 64) + 12 * 8 * 8 + 8 * 3
    assert per_token == pytest.approx((6 * N + 12 * 8 * 8) * 1.05)


def test_a_folder_with_another_run_is_refused_before_any_run(quick, tmp_path):
    cell = Cell("a", quick)
    runs.carry_out([cell], tmp_path)
    other = dataclasses.replace(cell, flags=(*quick, "--seed=7"))
    with pytest.raises(runs.ConfigError, match="holds a run with other settings"):
        runs.carry_out([Cell("b", quick), other], tmp_path)
    assert not (tmp_path / "b").exists()
    with pytest.raises(runs.ConfigError, match="unknown key"):
        runs.carry_out([Cell("c", ("--lr=1",))], tmp_path)


@pytest.mark.parametrize("optimizer", ["adamw", "sophiag"])
@pytest.mark.parametrize("every, steps", [(1, 6), (2, 6), (6, 6), (1, 2), (9, 2)])
def test_a_run_that_diverges_is_a_result(quick, tmp_path, every, steps, optimizer):
    """Wherever it shows first: in a training loss, an evaluation, the last one, a save."""
    cell = Cell("a", (*quick, f"--optimizer={optimizer}", "--learning_rate=1e38",
                      "--warmup_iters=0", f"--eval_interval={every}", f"--max_iters={steps}",
                      "--hessian_interval=1", "--min_lr_ratio=1", "--weight_decay=1"))
    result = runs.carry_out([cell], tmp_path)[0]
    assert result.diverged and result.loss == math.inf and gamma.blew_up(result)
    assert result.steps_to(math.inf) is None and result.steps <= steps
    assert runs.carry_out([cell], tmp_path)[0].diverged


def test_two_runs_of_one_name_are_refused(quick, tmp_path):
    with pytest.raises(runs.ConfigError, match="share the name a"):
        runs.carry_out([Cell("a", quick), Cell("a", (*quick, "--seed=1"))], tmp_path)


def test_no_verdict_is_given_where_a_run_diverged(quick, tmp_path, capsys):
    baseline, candidate, out = contenders(quick, tmp_path)
    compare.main([baseline, candidate.replace("rate=1e-2", "rate=1e38,weight_decay=1"), out])
    assert "no verdict on 0.5 T, 1 of 2 runs diverged" in capsys.readouterr().out
    table = json.loads((tmp_path / "comparison.json").read_text(), parse_constant=pytest.fail)
    assert table[-1]["losses"] == [None] and table[-1]["met"] == [None]


def test_a_run_that_breaks_otherwise_is_an_error_with_its_last_line(quick, tmp_path):
    with pytest.raises(RuntimeError, match="did not finish"):
        runs.carry_out([Cell("a", (*quick, "--dataset=nowhere"))], tmp_path)


def contenders(quick, tmp_path):
    flags = ",".join(flag[2:] for flag in quick)
    return [f"--baseline=optimizer=adamw,learning_rate=1e-2,{flags}",
            f"--candidate=optimizer=sophiag,learning_rate=1e-2,{flags}", f"--out_dir={tmp_path}"]


def test_compare_judges_half_the_steps_against_the_tuned_baseline(quick, tmp_path, capsys):
    compare.main([*contenders(quick, tmp_path), "--max_iters=6,12", "--rates=0.1,1,100",
                  "--ratios=0.5,1", "--seeds=2"])
    out = capsys.readouterr().out
    table = json.loads((tmp_path / "comparison.json").read_text())
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
    assert compare.one("x", f"{contenders(quick, tmp_path)[0][11:]}", 12, 0).config() \
        .warmup_iters == 2


def test_a_best_rate_at_the_end_of_the_ladder_is_said(quick, tmp_path, capsys):
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


def recorded(tmp_path, losses, warmup=0, unclipped=0.3):
    result = Recorded("r", tmp_path, False)
    object.__setattr__(result, "records", [
        {"step": i, "train/loss": loss, "val/loss": loss, "unclipped_fraction": unclipped}
        for i, loss in enumerate(losses)])
    flags = (f"--max_iters={len(losses)}", f"--warmup_iters={warmup}")
    object.__setattr__(result, "config", Cell("", flags).config())
    return result


def test_a_loss_a_quarter_above_what_it_had_been_is_a_blow_up_after_the_warm_up(tmp_path):
    assert not gamma.blew_up(recorded(tmp_path, [4] * 5 + [3] * 5 + [3.7] * 5))
    assert gamma.blew_up(recorded(tmp_path, [4] * 5 + [3] * 5 + [3.8] * 5 + [3] * 5))
    assert not gamma.blew_up(recorded(tmp_path, [3] * 5 + [5] * 5 + [3.2] * 10, warmup=10))
    one_easy_batch = [3] * 8 + [1.5] + [3] * 8
    assert not gamma.blew_up(recorded(tmp_path, one_easy_batch))


def test_the_finder_brackets_gamma_and_halves(tmp_path, monkeypatch):
    """The unclipped share of these runs is gamma / (gamma + 1): 22 % at gamma .29."""
    def carry_out(self, cells):
        value = cells[0].config().gamma
        tried.append(value)
        return [recorded(tmp_path, [3, 2], unclipped=value / (value + 1))]

    monkeypatch.setattr(runs.RunSettings, "carry_out", carry_out)
    for start in (1e-4, 0.3, 1e4):
        tried: list[float] = []
        settings = load(gamma.GammaSettings, [f"--config=optimizer=sophiag,gamma={start}",
                                              "--find=gamma"], "")[0]
        found = gamma.search(settings)["gamma"]
        assert 0.1 <= found / (found + 1) <= 0.5 and len(tried) <= 8
    tried = []
    settings = load(gamma.GammaSettings, ["--config=optimizer=sophiag,gamma=1e-9", "--find=gamma",
                                          "--most=3"], "")[0]
    with pytest.raises(gamma.ConfigError, match="no gamma near"):
        gamma.search(settings)


@pytest.mark.parametrize("limit, start, largest, blown", [
    (0.05, 0.01, 0.04, 0.08), (0.05, 0.4, 0.05, 0.1), (10, 0.01, 0.01 * 2**4, None)])
def test_ladders_climb_side_by_side_until_a_run_blows_up(tmp_path, monkeypatch, limit, start,
                                                         largest, blown):
    def carry_out(self, cells):
        rounds.append([c.name for c in cells])
        rates = [c.config().learning_rate for c in cells]
        return [recorded(tmp_path, [2] * 5 + [9 if r > limit else 2 + (r - 0.02) ** 2] * 5)
                for r in rates]

    def at(rate):
        return Cell("x", (f"--learning_rate={rate}",))

    rounds: list[list[str]] = []
    monkeypatch.setattr(runs.RunSettings, "carry_out", carry_out)
    ladders = gamma.climb(runs.RunSettings(), {"a": (at, start), "b": (at, 0.02)}, most=5)
    found = ladders["a"]
    assert found.largest == pytest.approx(largest) and found.blown == pytest.approx(blown)
    assert found.best == pytest.approx(0.02 if start < 0.02 else largest)
    assert ladders["b"].best == 0.02 and len(rounds[0]) == 2
    below = gamma.climb(runs.RunSettings(), {"a": (at, 0.02)}, below=True, most=9)["a"]
    assert below.best == 0.02 and below.least == 0.01  # the best has a neighbour on either side
    monkeypatch.setattr(gamma, "blew_up", lambda result: True)
    with pytest.raises(gamma.ConfigError, match="all of 5 learning rates from 0.02"):
        gamma.climb(runs.RunSettings(), {"a": (at, 0.02)}, most=5)


def test_a_rate_that_unlearns_is_not_stable(tmp_path):
    """A model that ends at the loss of byte frequencies never rose above what it had been."""
    assert gamma.stable({1.0: 2.4, 2.0: 2.9, 4.0: 3.3}) == {1.0: 2.4, 2.0: 2.9}
    assert gamma.stable({1.0: math.inf, 2.0: math.inf}) == {}
    assert gamma.next_rate({1.0: 2.4, 2.0: 2.9, 4.0: 3.3}, 1.0, 2.0, below=False) is None
    assert gamma.next_rate({1.0: 2.4, 2.0: 2.9, 4.0: 3.3}, 1.0, 2.0, below=True) == 0.5
    assert gamma.next_rate({1.0: 3.3}, 1.0, 2.0, below=False) == 2.0


def test_gamma_and_rate_are_printed_as_config_lines(quick, tmp_path, capsys):
    flags = ",".join(flag[2:] for flag in quick)
    gamma.main([f"--config=optimizer=sophiag,{flags}", "--steps=20", f"--out_dir={tmp_path}",
                "--most=14"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("gamma = ") and lines[-1].startswith("learning_rate = ")


@pytest.mark.parametrize("flags, words", [
    ([], "config is not given"),
    (["--config=config/quickstart.py", "--find=gamma"], "controls gamma itself"),
    (["--config=config/nothing.py"], "not found")])
def test_gamma_refuses_mistakes_in_words(refused, flags, words):
    assert words in refused(gamma.main, flags)


@pytest.mark.parametrize("preset", ["paper", "small"])
@pytest.mark.parametrize("figure", sorted(figures.FIGURES))
def test_every_figure_is_drawn_from_runs_of_its_configs(figure, preset, tmp_path, monkeypatch,
                                                        capsys):
    seen = {}

    def carry_out(self, cells):
        found = []
        for cell in cells:
            config = cell.config()  # a run that train.py would take
            seen[cell.name] = config
            result = Recorded(cell.name, tmp_path, False)
            object.__setattr__(result, "config", config)
            object.__setattr__(result, "records", [
                {"step": i, "train/loss": 4 / (i + 1), "val/loss": 4 / (i + 1),
                 "norm_clip_rate": 0.5, "unclipped_fraction": 0.2} for i in range(3)])
            found.append(result)
        return found

    monkeypatch.setattr(runs.RunSettings, "carry_out", carry_out)
    figures.main([f"--figure={figure}", f"--preset={preset}", f"--out_dir={tmp_path}"])
    assert len(seen) >= 3
    tokens = {c.tokens_per_step for c in seen.values()}
    assert tokens == ({480 * 1024} if preset == "paper" else {32 * 64})
    assert (tmp_path / f"{preset}_{figure}.svg").exists()
    lines = capsys.readouterr().out.count("\n| ") - 1  # without the heading
    assert lines == {"6b": 6, "6c": 3}.get(figure, len(seen))
    if figure == "7a":
        assert {c.hessian_interval for c in seen.values()} == {1, 10, 100}


def test_the_study_lists_runs_that_train_takes():
    cells = study.cells("bpe", "a") + study.cells("bytes", "b")
    assert len({cell.name for cell in cells}) == len(cells)
    for cell in cells:
        assert cell.config().max_iters > cell.config().warmup_iters

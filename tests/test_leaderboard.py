"""The judge: tuning alike, speed-ups against known curves, verdicts, tables from stored runs."""

import json
import math

import numpy as np
import pytest

from experiments import (
    every_optimizer,
    judge,
    leaderboard,
    report,
    runs,
    starting_values,
    study,
)
from experiments.leaderboard import Contender, LeaderboardSettings, Setting, tune
from experiments.runs import RunSpec
from nanosophia import optimizers
from nanosophia.configurator import ConfigError
from tests.conftest import ROOT
from tests.test_experiments import quick  # noqa: F401  (a fixture)

CONTENDER = "a: optimizer=adamw,learning_rate=1|2|4,beta1=0.9|0.8,beta2=0.99|0.95"


def tuned(loss, *, warmups=(0.1, 0.2), budget=9, text=CONTENDER):
    """The best setting for a loss function, and all that were tried, in their order."""
    tuning, tried = tune(Contender.parse(text), list(warmups), budget), {}
    wanted = next(tuning)
    while True:
        tried |= {setting: loss(setting) for setting in wanted}
        try:
            wanted = tuning.send(tried)
        except StopIteration as stopped:
            return stopped.value, tried


def bowl(rate, warmup=0.1, options=("0.9", "0.99")):
    """A loss with its least at a setting."""
    return lambda s: (math.log2(s.rate / rate) ** 2 + (s.warmup != warmup)
                      + sum(x != y for x, y in zip(s.options, options, strict=False)))


@pytest.mark.parametrize("rate", [0.26, 1.0, 2.1, 3.9, 15.0])
@pytest.mark.parametrize("warmup", [0.1, 0.2])
@pytest.mark.parametrize("options", [("0.9", "0.99"), ("0.8", "0.95")])
def test_tuning_finds_the_least_loss_within_its_budget(rate, warmup, options):
    best, tried = tuned(bowl(rate, warmup, options), budget=10)
    assert len(tried) == 10 and (best.warmup, best.options) == (warmup, options)
    assert abs(math.log2(best.rate / rate)) <= 0.75
    assert best == min(tried, key=tried.get)


def test_every_contender_has_as_many_runs_whatever_it_has_to_tune():
    for text in (CONTENDER, "b: optimizer=lion,learning_rate=1|2|4", "c: optimizer=adamw"):
        for budget in (6, 7, 12):
            assert len(tuned(bowl(3e-3), text=text, budget=budget)[1]) == budget


@pytest.mark.parametrize("factor", [1 / 4, 1, 4])
def test_the_rate_is_sought_anew_with_the_options_that_were_best(factor):
    """With beta1 = 0.8 the best rate is another one, which the first ladder could not see."""
    def loss(s):
        right = s.options[0] == "0.8"
        return (math.log2(s.rate / (2 * factor if right else 2))) ** 2 / 8 - 2 * right

    best, tried = tuned(loss, budget=12)
    assert best.options[0] == "0.8" and best.rate == 2 * factor
    beside = [s.rate for s in tried if (s.warmup, s.options) == (best.warmup, best.options)]
    assert min(beside) < best.rate < max(beside) and len(tried) == 12


def test_a_ladder_goes_on_where_its_end_is_best_also_beside_runs_that_diverge():
    best, tried = tuned(lambda s: math.inf if s.rate > 2 else -s.rate, text="a: optimizer=adamw,"
                        "learning_rate=0.25|0.5|1", warmups=(0.1,), budget=7)
    assert [s.rate for s in tried][:5] == [0.25, 0.5, 1, 2, 4]
    assert best.rate == 2 and any(2 < s.rate < 4 for s in list(tried)[5:])
    # Where all diverge it goes down.
    best, tried = tuned(lambda s: math.inf if s.rate > 0.2 else 1.0, budget=9)
    assert best.rate < 0.2 and len(tried) == 9


@pytest.mark.parametrize("text, words", [
    ("adamw", "is no contender"), (": optimizer=adamw", "is no contender"), ("a:", "no contender"),
    ("a/b: optimizer=adamw", "is no contender"),
    ("a: optimizer=adamw,learning_rate=x|y", "are no numbers"),
    ("a: optimizer=adamw,beta1=1|1", "an alternative of beta1 is given twice"),
    ("a: optimizer=adamw,warmup_iters=3|5", "sets warmup_iters, which the leaderboard sets"),
    ("a: optimizer=adamw,seed=3", "sets seed, which the leaderboard sets itself")])
def test_what_is_no_contender_is_refused(text, words):
    with pytest.raises(ConfigError, match=words):
        Contender.parse(text)


@pytest.mark.parametrize("flags, words", [
    (dict(max_iters="10.5"), "are not whole numbers"), (dict(longer="0.5"), "multiples above 1"),
    (dict(warmups="1"), "shares below 1"), (dict(baseline=""), "baseline is not given"),
    (dict(candidates="a: optimizer=lion"), "contenders need a name each"),
    (dict(candidates=" ; "), "contenders need a name each"),
    (dict(max_iters="10"), "one length of the baseline gives no curve"),
    (dict(budget=4, candidates="b: optimizer=lion,beta1=0.9|0.8"), "less than the 5 runs that b")])
def test_settings_that_make_no_leaderboard_are_refused(flags, words):
    given = dict(baseline="a: optimizer=adamw", candidates="b: optimizer=lion", max_iters="10,20")
    with pytest.raises(ConfigError, match=words):
        LeaderboardSettings(**given | flags)


def test_a_speed_up_is_read_off_the_baselines_curve():
    lengths = [100, 200, 400]
    curve = np.array([[3.0, 2.0, 1.0]])
    for loss, T, expected in ((2.0, 100, 2.0), (1.0, 100, 4.0), (3.0, 100, 1.0), (2.0, 400, 0.5),
                              (1.5, 100, 2 * 2 ** 0.5), (0.5, 100, 4.0), (9.0, 200, 0.5)):
        found = judge.speed_ups(lengths, curve, T, np.array([loss]))
        assert found[0] == pytest.approx(expected)
    # A length at which the baseline is worse is left out.
    for loss, expected in ((2.5, 2), (2.2, 400 ** 0.8 * 100 ** 0.2 / 100), (2.0, 8), (1.9, 8)):
        found = judge.speed_ups([100, 200, 400, 800], np.array([[3.0, 3.1, 2.0, 2.0]]), 100,
                                np.array([loss]))
        assert found[0] == pytest.approx(expected)


@pytest.mark.parametrize("T", [100, 150, 450, 600, 1200, 1150])
def test_beyond_the_ends_of_the_curve_nothing_more_than_the_end_is_claimed(T):
    base = {T: [3.0, 3.01, 2.99], 2 * T: [2.5, 2.51, 2.49]}
    rows = judge.compare(base, {"bad": {T: [4.0, 4.01, 3.99]}, "good": {T: [1.0, 1.01, 0.99]}}, T)
    assert rows["bad"].verdict() == "at most 1.00 times as fast in steps: no verdict"
    assert rows["good"].verdict() == "at least 2.00 times as fast in steps: at least twice as fast"
    assert rows["bad"].speed_up.value == 1 and rows["good"].speed_up.value == 2


def cells(speed, *, noise, seed, lengths=(100, 200, 400), seeds=3):
    """Losses of a contender that is `speed` times as fast as 5 - log2 T."""
    rng = np.random.default_rng(seed)
    return {T: list(12 - math.log2(T * speed) + noise * rng.standard_normal(seeds))
            for T in lengths}


def test_intervals_cover_the_truth_and_verdicts_keep_their_word():
    """Of 200 comparisons without a difference few may claim one; of real ones most must."""
    covered, false, found = 0, 0, 0
    for seed in range(200):
        base = cells(1, noise=0.05, seed=2 * seed, lengths=(100, 200, 400, 800, 1600))
        others = {"same": cells(1, noise=0.05, seed=2 * seed + 1),
                  "fast": cells(1.6, noise=0.05, seed=seed + 1000)}
        rows = judge.compare(base, others, 200)
        covered += rows["same"].speed_up.low <= 1 <= rows["same"].speed_up.high
        false += not rows["same"].verdict().endswith("no verdict")
        found += rows["fast"].verdict().endswith(": faster")
    assert covered >= 188 and false <= 10 and found > 190


def test_a_claim_is_harder_among_many_contenders():
    """Holm's correction: of families of twelve without a difference few have one that claims."""
    families = 0
    for seed in range(40):
        base = cells(1, noise=0.05, seed=seed, lengths=(100, 200, 400, 800, 1600))
        others = {str(i): cells(1, noise=0.05, seed=1000 + 12 * seed + i) for i in range(12)}
        rows = judge.compare(base, others, 200)
        families += any(not row.verdict().endswith("no verdict") for row in rows.values())
    assert families <= 5
    base = cells(1, noise=0.05, seed=3, lengths=(100, 200, 400, 800, 1600))
    one = {"x": cells(1.25, noise=0.05, seed=4)}
    alone = judge.compare(base, one, 200)["x"].p_one
    many = judge.compare(base, one | {str(i): cells(1, noise=0.05, seed=9 + i)
                                      for i in range(11)}, 200)["x"].p_one
    assert many > 6 * alone


def test_a_verdict_of_twice_needs_an_interval_above_two():
    base = cells(1, noise=0.01, seed=0, lengths=(100, 200, 400, 800, 1600))
    rows = judge.compare(base, {str(speed): cells(speed, noise=0.01, seed=i)
                                for i, speed in enumerate((3, 2, 0.5), 1)}, 200)
    assert rows["3"].verdict().endswith("at least twice as fast")
    assert rows["2"].verdict().endswith(": faster")
    assert rows["0.5"].verdict().endswith(": slower")
    assert rows["3"].speed_up.text(1.0).startswith(("2.9", "3.0", "3.1"))


def test_one_seed_and_diverged_runs_give_no_verdict():
    base = cells(1, noise=0, seed=0, seeds=1)
    rows = judge.compare(base, {"one": cells(2, noise=0, seed=0, seeds=1),
                                "lost": {T: [math.inf] for T in (100, 200, 400)}}, 200)
    assert "one seed, so no verdict" in rows["one"].verdict()
    assert "nan" not in rows["one"].speed_up.text(1.0) + rows["one"].difference_text()
    assert rows["lost"].verdict() == "it diverged" and rows["lost"].difference_text() == ""
    base[200] = [math.inf]
    row = judge.compare(base, {"one": cells(2, noise=0, seed=0, seeds=1)}, 200)["one"]
    assert row.verdict() == "no verdict: the baseline diverged" and math.isfinite(row.mean)


def test_holm_steps_down():
    assert judge.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx(
        {"a": 0.03, "c": 0.06, "b": 0.06})
    assert judge.holm({"a": 0.5, "b": 0.9}) == {"a": 1.0, "b": 1.0}


def test_intervals_are_students():
    mean, half = judge.t_interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.30265 / math.sqrt(3), rel=1e-4)
    assert math.isnan(judge.t_interval([1.0])[1])


def test_a_leaderboard_runs_each_cell_once_and_its_table_is_made_again(
        quick, tmp_path, capsys):  # noqa: F811
    flags = " ".join(flag for flag in quick if not flag.startswith(("--gamma", "--warmup")))
    argv = ["--baseline=adamw: optimizer=adamw,learning_rate=1e-3|1e-2|1e-1",
            "--candidates=muon: optimizer=muon,muon_momentum=0.9|0.95; soap: optimizer=soap",
            "--max_iters=4,8", "--longer=2", "--seeds=2", "--budget=4", "--warmups=0.25",
            f"--flags={flags}", f"--out_dir={tmp_path / 'out'}"]
    leaderboard.main(argv)
    printed = capsys.readouterr().out
    # Tuned at T = 8, the longest and the middle, with seed 0, which is one of the cells; the
    # baseline has one length more.
    assert printed.count(": loss ") == 3 * 4 + 3 * (2 * 2 - 1) + 2
    assert printed.count("| adamw | lr ") == printed.count("| soap | lr ") == 2
    assert "- muon: " in printed and "after Holm's correction over 2 contenders" in printed
    leaderboard.main(argv)
    assert ": loss " not in capsys.readouterr().out
    results = tmp_path / "results"
    (results / "runs").mkdir(parents=True)
    (results / "runs" / "board.json").write_text(
        (tmp_path / "out" / "leaderboard.json").read_text())
    (results / "page.md").write_text("<!-- board -->\n<!-- end -->\n")
    report.main([f"--results={results}"])
    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert [line for line in (results / "page.md").read_text().splitlines()
            if line.startswith("|")] == table
    data = json.loads((results / "runs" / "board.json").read_text())
    assert len(data["groups"]["all"]) == 3 * 4 + 3 * 3 + 2


def test_branches_of_a_trunk_end_as_runs_of_their_own_would(quick, tmp_path, capsys):  # noqa: F811
    flags = " ".join(flag for flag in quick if not flag.startswith(("--gamma", "--warmup")))
    argv = ["--baseline=adamw: optimizer=adamw", "--candidates=soap: optimizer=soap", "--trunk",
            "--max_iters=10,20", "--longer=2", "--seeds=1", "--budget=3", "--warmups=0.2",
            f"--flags={flags}", f"--out_dir={tmp_path / 'out'}"]
    leaderboard.main(argv)
    assert "| adamw | lr " in capsys.readouterr().out
    settings = LeaderboardSettings(baseline="adamw: optimizer=adamw", candidates="soap: "
                                   "optimizer=soap", max_iters="10,20", longer="2", seeds=1,
                                   budget=3, warmups="0.2", trunk=True, flags=flags)
    branches = [path for path in (tmp_path / "out").iterdir() if path.name.endswith("_branch")]
    assert len(branches) == 3  # T = 10 and 20 of one, 10 of the other
    for path in branches:
        first = json.loads((path / "metrics.jsonl").read_text().splitlines()[0])
        config = json.loads((path / "config.json").read_text())
        assert first["step"] == round(0.8 * config["max_iters"])
        contender = next(c for c in settings.contenders if path.name.startswith(c.name))
        setting = Setting(config["learning_rate"], 0.2, ())
        alone = leaderboard.spec_of(settings, contender, setting, config["max_iters"], 0)
        alone = RunSpec("alone", (*alone.flags, "--warmup_iters=2"))
        result, = runs.run_all([alone], tmp_path / path.name)
        assert result.loss == runs.Result("", path, False).loss


def test_a_trunk_whose_branches_have_no_common_step_is_refused(refused):
    assert "have no large common divisor" in refused(leaderboard.main, [
        "--baseline=adamw: optimizer=adamw", "--candidates=soap: optimizer=soap", "--trunk",
        "--max_iters=101,503,997", "--budget=4"])


def test_contenders_of_other_batches_are_refused(refused):
    assert "soap has total_batch_size = 7, adamw 480: give both the same" in refused(
        leaderboard.main, ["--baseline=adamw: optimizer=adamw", "--max_iters=10000",
                           "--candidates=soap: optimizer=soap,total_batch_size=7",
                           "--longer=2"])


def test_an_alternative_that_train_refuses_is_told_before_the_first_run(tmp_path, refused):
    line = refused(leaderboard.main, [
        "--baseline=adamw: optimizer=adamw", "--candidates=soap: optimizer=soap,beta1=0.9|7",
        "--max_iters=100,200", f"--out_dir={tmp_path / 'out'}"])
    assert "beta1 = 7" in line and not (tmp_path / "out").exists()


def test_arguments_of_a_packages_optimizer_may_have_commas():
    flags = Contender.parse("a: optimizer=torch.optim:NAdam, optimizer_args=betas=(0.9, 0.99),"
                            "optimizer_args='eps=1, x=2', learning_rate=1|2").flags
    assert flags == ("--optimizer=torch.optim:NAdam", "--optimizer_args=betas=(0.9, 0.99)",
                     "--optimizer_args=eps=1, x=2")


@pytest.mark.parametrize("name", study.SETTINGS)
def test_every_setting_of_the_study_lists_runs_that_train_takes(name, capsys):
    board = study.board(study.StudySettings(setting=name))
    for contender in board.contenders:
        for values in ([v[0] for v in contender.options.values()],
                       [v[-1] for v in contender.options.values()]):
            setting = Setting(contender.rates[0], 0.05, tuple(values))
            for T in board.lengths:
                config = leaderboard.spec_of(board, contender, setting, T, 0).config()
                assert config.max_iters == T > config.warmup_iters
                optimizers.check(config, 1)
    study.main([f"--setting={name}", "--dry_run"])
    out = capsys.readouterr().out
    assert f"{len(board.contenders) * board.budget} runs to tune" in out


def test_the_study_refuses_a_setting_that_is_not_there(refused):
    assert "is none of stdlib, " in refused(study.main, ["--setting=mars"])


def test_every_optimizer_is_in_the_smoke_test_and_its_table_is_made_again(
        data_dir, tmp_path, capsys):
    names = {name.partition(",")[0] for name in every_optimizer.SETTINGS}
    assert names == optimizers.OPTIMIZERS.keys()
    for spec in every_optimizer.specs(every_optimizer.EverySettings()):
        config, sources = spec.load()
        optimizers.check(config, 1)
        optimizers.require_effect(config, sources)
    flags = "--n_layer=1 --n_embd=8 --block_size=8 --max_iters=3 --warmup_iters=0 " \
        f"--eval_windows=4 --device=cpu --dtype=float32 --dataset={data_dir} --total_batch_size=4"
    some = {name: every_optimizer.SETTINGS[name] for name in ("adamw", "lion")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(every_optimizer, "SETTINGS", some)
        every_optimizer.main([f"--out_dir={tmp_path}", f"--flags={flags}"])
        printed = capsys.readouterr().out
        data = json.loads((tmp_path / "optimizers_200_steps.json").read_text())
        assert every_optimizer.remake(data) in printed
    assert printed.count("| adamw | --learning_rate=8e-3 --beta2=0.99 | ") == 1


def test_the_picture_is_drawn_from_the_stored_runs(tmp_path, refused):
    study.main([f"--picture={tmp_path / 'x.svg'}"])
    text = (tmp_path / "x.svg").read_text()
    assert text.startswith("<?xml") and (tmp_path / "x.png").stat().st_size > 10_000
    assert "holds no study_SETTING.json; make the runs first" in refused(
        study.main, [f"--picture={tmp_path / 'y.svg'}", f"--stored={tmp_path}"])


def test_the_sizes_are_drawn_where_two_widths_are_stored(tmp_path, monkeypatch, refused):
    """With a stored setting in place of another width, whose runs have the same form."""
    file = ROOT / "results" / "runs" / "study_books_bytes.json"
    board = study.stored_board(json.loads(file.read_text()))
    drawn = []
    monkeypatch.setattr(study, "save_figure", lambda picture, *files: drawn.append(picture))
    monkeypatch.setattr(study, "stored_boards", lambda stored: dict(
        books_bytes=board, books_bytes_w96=board))
    study.main([f"--sizes_picture={tmp_path / 'z.svg'}"])
    widths, rates = drawn[0].axes  # no batches
    assert [c.get_label() for c in widths.containers] == list(study.FIVE[1:])
    assert widths.get_title(loc="left") == "Books, bytes, 800 steps"
    assert [line.get_label() for line in rates.lines] == list(study.FOUR)
    rate = next(o.setting.rate for o in board[1] if o.contender.name == "Muon")
    assert list(rates.lines[2].get_ydata()) == [rate, rate]
    monkeypatch.setattr(study, "stored_boards", lambda stored: dict(books_bytes=board))
    assert "has no two of books_bytes, " in refused(
        study.main, [f"--sizes_picture={tmp_path / 'y.svg'}"])


def test_starting_values_are_tuned_at_each_size_and_their_table_is_made_again(
        data_dir, tmp_path, capsys, refused):
    command = [f"--dataset={data_dir}", "--tokens=256,128", "--max_iters=20", "--budget=4",
               "--jobs=2", f"--out_dir={tmp_path}",
               "--flags=--n_layer=1 --n_embd=8 --device=cpu --dtype=float32 --eval_windows=4"]
    starting_values.main(command)
    out = capsys.readouterr().out
    data = json.loads((tmp_path / "starting_values.json").read_text())
    assert {name: len(group) for name, group in data["groups"].items()} == {
        "128": 4 * 7, "256": 4 * 7}
    settings = [run["config"] | data["common"] for run in data["groups"]["256"]]
    assert {(c["total_batch_size"], c["hessian_batch_size"]) for c in settings
            if c["optimizer"] == "sophiag"} == {(4, 2)}
    table = report.block(tmp_path / "starting_values.json").partition("; ")[2]
    assert out.endswith(table + "\n")
    rows = [line.split(" | ") for line in table.splitlines() if line[:3] in ("| 1", "| 2")]
    assert [row[0] for row in rows] == ["| 128", "| 256"]
    for row, group in zip(rows, data["groups"].values(), strict=True):
        losses = [run["records"]["val/loss"][-1] for run in group
                  if run["name"].startswith("Sophia-G, controlled gamma 0.9_")]
        assert row[-2].startswith(f"{min(losses):.3f} (x ")
    for tokens in ("100", "64", "2048,x"):
        refused(starting_values.main, [f"--tokens={tokens}"])
    assert "must be a multiple of 64" in refused(starting_values.main, ["--tokens=64"])

"""Records reach metrics.jsonl in order; a recorder that fails never stops training."""

import json
import sys
from typing import get_args, get_type_hints

import pytest

from nanosophia.metrics import PEAK_FLOPS, Health, Recorder, peak_flops
from nanosophia.options import Config
from nanosophia.trackers import asked_for


def recorder(tmp_path, first_step=0, **kwargs):
    return Recorder(tmp_path, first_step=first_step, max_iters=10, active=True, **kwargs)


def stored(tmp_path):
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def test_one_json_object_a_line_and_one_line_to_read(tmp_path, capsys):
    r = recorder(tmp_path)
    r.record({"step": 0, "train/loss": 5.5, "lr": 1e-3, "tokens_per_second": 1234.5, "mfu": None})
    r.record({"step": 4, "val/loss": 3.25})
    r.record({"step": 5, "val/loss": float("nan")})
    r.close()
    assert stored(tmp_path) == [
        {"step": 0, "train/loss": 5.5, "lr": 1e-3, "tokens_per_second": 1234.5},
        {"step": 4, "val/loss": 3.25}, {"step": 5, "val/loss": None}]
    assert capsys.readouterr().out.splitlines() == [
        "step 0: loss 5.5000, lr 1.00e-03, 1,234 tokens/s", "step 4: val loss 3.2500",
        "step 5: val loss nan"]


def test_resuming_drops_the_records_that_will_come_again(tmp_path):
    first = recorder(tmp_path)
    for step in range(5):
        first.record({"step": step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "tr')  # cut off by a kill
    recorder(tmp_path, first_step=3).record({"step": 3, "again": True})
    assert stored(tmp_path) == [{"step": 0}, {"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_a_failing_recorder_warns_once_and_training_goes_on(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").mkdir()
    def start():
        raise ImportError("No module named 'wandb'")

    r = recorder(tmp_path, trackers={"wandb": start})
    r.record({"step": 0})
    r.record({"step": 1})
    r.close()
    errors = capsys.readouterr().err
    assert errors.count("recording to metrics.jsonl failed") == 1
    assert errors.count("recording to wandb failed") == 1


class FakeWandb:
    """Stands in for the package: what it was started with, and what it was told."""

    def __init__(self):
        self.runs = []

    def init(self, **settings):
        self.settings, self.logged, self.summary = settings, [], {}
        self.runs.append(self)
        self.log = lambda record, step: self.logged.append((step, record))
        self.finish = lambda: self.logged.append("end")
        return self


def test_wandb_gets_parameters_and_the_best_loss_and_stays_in_the_runs_folder(
        tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = Config(out_dir=str(tmp_path), wandb_log=True)
    start, = asked_for(config).values()
    r = recorder(tmp_path, trackers={"wandb": lambda: start(config, 123, 0)})
    for step, loss in enumerate((3.0, 2.0, 2.5)):
        r.record({"step": step, "val/loss": loss})
    r.close()
    assert fake.settings["config"]["parameters"] == 123
    assert fake.settings["dir"] == str(tmp_path) and fake.settings["name"] == tmp_path.name
    assert fake.summary == {"best_val_loss": 2.0} and fake.logged[-1] == "end"
    assert [step for step, _ in fake.logged[:-1]] == [0, 1, 2]
    start(config, 123, 3)
    assert fake.settings["id"] == (tmp_path / "wandb_id").read_text()


def test_tensorboard_holds_the_records_of_the_run_that_went_on(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = Config(out_dir=str(tmp_path), tensorboard_log=True)
    start, = asked_for(config).values()
    for first, last in ((0, 5), (3, 6)):  # stopped after step 4, resumed from step 3
        r = recorder(tmp_path, first_step=first,
                     trackers={"tensorboard": lambda first=first: start(config, 123, first)})
        for step in range(first, last):
            r.record({"step": step, "train/loss": 10.0 * first + step})
        r.close()
    events = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (0, 0.0), (1, 1.0), (2, 2.0), (3, 33.0), (4, 34.0), (5, 35.0)]
    assert any("parameters" in tag for tag in events.Tags()["tensors"])


def test_no_tracker_is_started_that_was_not_asked_for():
    assert asked_for(Config()) == {}


def test_other_ranks_record_nothing(tmp_path, capsys):
    r = Recorder(tmp_path, first_step=0, max_iters=10, active=False)
    r.record({"step": 0})
    r.say("hello")
    r.close()
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""


def test_peak_flops_are_known_by_device_name():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-40GB") == 312e12
    assert peak_flops("Tesla T4") == 65e12 and peak_flops("NVIDIA RTX A5000") == 111.1e12
    assert peak_flops("NVIDIA L40S") == 362e12 and peak_flops("NVIDIA L4") == 121e12
    assert peak_flops("NVIDIA A10") == 125e12 and peak_flops("NVIDIA GeForce RTX 4090") == 165.2e12
    for other in ("NVIDIA A10G", "NVIDIA L40", "NVIDIA GeForce RTX 3090 Ti", "AMD Instinct MI300X"):
        assert peak_flops(other) is None
    assert get_args(get_type_hints(Config)["dry_run_gpu"]) == tuple(PEAK_FLOPS)


def healthy(**changes):
    return {"step": 100, "unclipped_fraction": 0.3, "hessian_norm": 1.0} | changes


def test_a_healthy_run_is_not_warned():
    health = Health(50, 10, fixed_gamma=True)
    assert not any(health.warnings(healthy(step=step, hessian_norm=1 + step))
                   for step in range(0, 1000, 10))
    assert not health.warnings({"step": 5, "train/loss": 3.0})  # a first-order optimizer


def test_each_departure_gives_one_warning_in_words():
    health = Health(50, 10, fixed_gamma=True)
    low = [health.warnings(healthy(unclipped_fraction=0.04)) for _ in range(60)]
    assert [bool(w) for w in low].index(True) == Health.PATIENCE - 1 and sum(map(len, low)) == 1
    assert "4% of the coordinates are unclipped" in low[Health.PATIENCE - 1][0]
    assert "raise gamma" in low[Health.PATIENCE - 1][0]
    high = [w for _ in range(60) for w in health.warnings(healthy(unclipped_fraction=0.9))]
    assert len(high) == 1 and "lower gamma" in high[0]
    for norm, words in ((0.0, "still zero"), (float("nan"), "not finite")):
        assert words in health.warnings(healthy(hessian_norm=norm))[0]
        assert not health.warnings(healthy(hessian_norm=norm))


def test_a_curvature_that_stands_still_gives_a_warning():
    health = Health(0, 10, fixed_gamma=True)
    warned = [health.warnings(healthy(step=step, hessian_norm=1 + min(step, 50) // 10))
            for step in range(0, 100, 5)]
    warned = [w for w in warned if w]
    assert len(warned) == 1 and "h has not changed since step 50" in warned[0][0]


def test_warm_up_and_a_controlled_gamma_are_not_judged():
    warming = [Health(10_000, 10, fixed_gamma=True), Health(0, 10, fixed_gamma=False)]
    assert not any(h.warnings(healthy(unclipped_fraction=0.99)) for h in warming for _ in range(60))


def test_warnings_reach_the_log(tmp_path, capsys):
    r = recorder(tmp_path, health=Health(0, 10, fixed_gamma=True))
    r.record(healthy(step=3, hessian_norm=0.0))
    assert "warning: step 3: the curvature h is still zero" in capsys.readouterr().out

"""bench.py: it times train.py's own step, and each contender runs with the settings it names."""

import dataclasses
import json

import pytest
import torch

import bench
import train
from nanosophia.configurator import load
from nanosophia.distributed import start_ranks

SMALL = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=2",
         "--total_batch_size=4", "--hessian_batch_size=2", "--vocab_size=320", "--device=cpu",
         "--hessian_interval=3", "--repeats=3"]


def test_a_table_and_json_of_contenders(tmp_path, capsys):
    bench.main([*SMALL, f"--json={tmp_path / 'a' / 'b.json'}", f"--profile={tmp_path / 't.json'}",
                "--compare=optimizer=adamw; optimizer=sophiag; "
                "optimizer=sophiag,hessian_chunks=2; plain"])
    report = json.loads((tmp_path / "a" / "b.json").read_text())
    assert list(report["rows"]) == ["optimizer=adamw", "optimizer=sophiag",
                                    "optimizer=sophiag,hessian_chunks=2", "plain"]
    adamw, sophia, _, plain = report["rows"].values()
    assert plain["hessian_ms"] == 0 and plain["step_ms"] > 0
    assert adamw["ratio"] == 1 and adamw["hessian_ms"] == 0 <= sophia["hessian_ms"]
    assert sophia["least"] <= sophia["ratio"] <= sophia["most"]
    assert report["cycle"] == 3 and report["tokens_per_step"] == 64
    for row in report["rows"].values():
        assert row["tokens_per_second"] > 0 and row["peak_bytes"] > 1e7
        assert row["data_wait"] >= 0
        assert row["optimizer_ms"] > 0 and row["optimizer_ratio"] > 0
        assert 0 <= row["compile_s"] <= row["first_step_s"]
    per_token = report["flops_per_token"] * 64 / 1e12
    assert adamw["tflop"] == plain["tflop"] == pytest.approx(per_token)
    assert sophia["tflop"] == pytest.approx(per_token * (1 + 0.5 / 3))
    assert report["attention"] in ("math", "flash")
    assert "traceEvents" in json.loads((tmp_path / "t.json").read_text())
    out = capsys.readouterr().out
    assert "| optimizer=sophiag | " in out and "Self CPU" in out


def test_it_times_the_steps_of_train(monkeypatch):
    seen = []
    original = train.train_step
    monkeypatch.setattr(train, "train_step", lambda run, step: (
        seen.append((run.config.optimizer, step)), original(run, step))[1])
    bench.main([*SMALL, "--compare=optimizer=lion; optimizer=sophiag"])
    for optimizer in ("lion", "sophiag"):  # one cycle to warm up and three, in order
        assert [step for name, step in seen if name == optimizer] == list(range(12))
    # alternated: a cycle of the one, a cycle of the other
    assert [name for name, step in seen if step >= 3] == (["lion"] * 3 + ["sophiag"] * 3) * 3


def test_a_ratio_that_grew_since_the_baseline_is_reported_and_exits_with_1(tmp_path, capsys):
    stored = tmp_path / "stored.json"
    bench.main([*SMALL, f"--json={stored}", "--compare=optimizer=adamw; optimizer=sophiag"])
    report = json.loads(stored.read_text())
    bench.main([f"--baseline={stored}", "--tolerance=50"])
    assert "SLOWER" not in capsys.readouterr().out
    report["rows"]["optimizer=sophiag"]["ratio"] /= 100
    stored.write_text(json.dumps(report))
    with pytest.raises(SystemExit) as ended:
        bench.main([f"--baseline={stored}"])
    assert ended.value.code == 1
    lines = [x for x in capsys.readouterr().out.splitlines() if "SLOWER" in x]
    assert len(lines) == 1 and "optimizer=sophiag: " in lines[0]


def test_the_plain_loop_learns_as_trains_own_does():
    """The same model, optimizer and schedule on the same one batch: nothing is left out."""
    losses = []
    for plain in (False, True):
        settings, sources = load(bench.BenchSettings, [
            *SMALL, "--learning_rate=1e-2", "--warmup_iters=0", "--total_batch_size=2"], "")
        ranks = start_ranks("cpu")
        config = bench.contender_config(settings, sources, "plain")
        data = bench.random_data(config)
        data = dataclasses.replace(data, train=data.train[:17])  # one window
        run = bench.build_run(config, ranks, data)
        step = bench.plain_step(run, data.train) if plain else \
            (lambda number, run=run: train.train_step(run, number))
        for number in range(30):
            step(number)
        idx = torch.as_tensor(data.train[:16].astype("int64")).unsqueeze(0)
        targets = torch.as_tensor(data.train[1:17].astype("int64")).unsqueeze(0)
        losses.append(run.model(idx, targets).item())
    assert losses[0] < 1 and losses[1] == pytest.approx(losses[0], abs=0.1)


def test_each_contender_has_its_own_defaults_and_flags_win():
    def contender(text, *argv):
        return bench.contender_config(*load(bench.BenchSettings, list(argv), ""), text)

    config = "config/train_gpt2_30m_sophiag.py"
    adamw = contender("optimizer=adamw", config)
    assert (adamw.beta1, adamw.eps, adamw.n_layer) == (0.9, 1e-8, 6)
    hutchinson = contender("optimizer=sophiah", config)
    assert (hutchinson.hessian_batch_size, hutchinson.gamma) == (32, 0.01)
    flagged = contender("optimizer=sophiah", config, "--hessian_batch_size=48")
    assert flagged.hessian_batch_size == 48
    assert contender("optimizer=sophiag,gamma=2", config).gamma == 2
    assert contender("hessian_chunks=4", config).hessian_batch_size == 240


@pytest.mark.parametrize("flags, words", [
    (["--compare= ; "], "names no contender"), (["--compare=optimizer=adan"], "is none of"),
    (["--compare=optimiser=adamw"], "did you mean optimizer?"),
    (["--real_data", "--dataset=nowhere"], "train.bin not found"),
    (["--repeats=1"], "must be at least 3"),
    (["--baseline=nothing.json"], "wrote: ")])
def test_mistakes_are_refused_in_words(refused, flags, words):
    assert words in refused(bench.main, [*SMALL, *flags])


def test_a_baseline_of_other_contenders_is_refused(refused, tmp_path):
    stored = tmp_path / "stored.json"
    row = dict(ratio=1.0, least=1.0, most=1.0)
    stored.write_text(json.dumps(dict(command=SMALL, device_name="cpu", torch="2", rows={
        "optimizer=adamw": row, "plain": row})))
    message = refused(bench.main, [f"--baseline={stored}", "--compare=plain"])
    assert "compares optimizer=adamw; plain; leave --compare out" in message


def test_the_stored_speed_guard_can_be_repeated():
    report = bench.read_report("results/speed_guard.json")
    settings, _ = load(bench.BenchSettings, report["command"], "")
    assert settings.contenders == list(report["rows"])

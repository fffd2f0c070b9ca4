"""The benchmark: it times train.py's own step, and compares what it says it compares."""

import json

import pytest

import bench
import train
from configurator import load

SMALL = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=2",
         "--total_batch_size=4", "--hessian_batch_size=2", "--vocab_size=320", "--device=cpu",
         "--hessian_interval=3", "--repeats=3"]


def test_a_table_and_json_of_contenders(tmp_path, capsys):
    bench.main([*SMALL, f"--json={tmp_path / 'a' / 'b.json'}", f"--profile={tmp_path / 't.json'}",
                "--compare=optimizer=adamw; optimizer=sophiag; optimizer=sophiag,hessian_chunks=2"])
    report = json.loads((tmp_path / "a" / "b.json").read_text())
    assert list(report["rows"]) == ["optimizer=adamw", "optimizer=sophiag",
                                    "optimizer=sophiag,hessian_chunks=2"]
    adamw, sophia, _ = report["rows"].values()
    assert adamw["ratio"] == 1 and adamw["hessian_ms"] == 0 < sophia["hessian_ms"]
    assert sophia["least"] <= sophia["ratio"] <= sophia["most"]
    assert report["cycle"] == 3 and report["tokens_per_step"] == 64
    for row in report["rows"].values():
        assert row["tokens_per_second"] > 0 and row["peak_bytes"] > 1e7
        assert 0 <= row["data_wait"] < 1
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


def test_each_contender_has_its_own_defaults_and_flags_win():
    def contender(text, *argv):
        return bench._contender(*load(bench.BenchSettings, list(argv), ""), text)

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
    (["--repeats=1"], "must be at least 3")])
def test_mistakes_are_refused_in_words(refused, flags, words):
    assert words in refused(bench.main, [*SMALL, *flags])


def test_optimizers_are_timed_alone(capsys):
    bench.main([*SMALL, "--what=optimizers"])
    assert "| AdamW, torch fused | " in capsys.readouterr().out

"""Settings: every mistake is one line that says what, which value, where from, what to do."""

import re

import pytest

import train
from nanosophia.configurator import ConfigError, help_text, load
from nanosophia.options import Config


def loaded(*argv):
    return load(Config, list(argv), "usage")[0]


def test_flags_win_over_config_files_wherever_they_stand(tmp_path):
    file = tmp_path / "c.py"
    file.write_text('"""A docstring."""\n_width = 2 ** 5\nn_embd = _width * 6  # 192\n'
                    "learning_rate = 6e-4 / 2\nbias = True\nout_dir = 'a=b'\n")
    config = loaded("--n_embd=96", str(file))
    assert config.n_embd == 96
    assert config.learning_rate == 3e-4
    assert config.bias is True
    assert config.out_dir == "a=b"


def test_values_may_hold_equals_signs_and_whole_floats_are_integers():
    config = loaded("--out_dir=x=y", "--max_iters=1e5", "--learning_rate=1")
    assert (config.out_dir, config.max_iters, config.learning_rate) == ("x=y", 100_000, 1.0)


@pytest.mark.trial(13)
@pytest.mark.parametrize("flag, words", [
    ("--learning_rat=1", "did you mean learning_rate?"),
    ("--gradient_accumulation_steps=8", "set total_batch_size"),
    ("--min_lr=6e-5", "min_lr_ratio"),
    ("--zzz=1", "--help lists every key"),
    ("--max_iters", "--max_iters=value"),
    ("-max_iters=5", "write it as --max_iters=value"),
    ("--out_dir=", "the value is empty"),
    ("--max_iters=many", "max_iters = 'many' is not a whole number"),
    ("--max_iters=2.5", "max_iters = 2.5 is not a whole number"),
    ("--max_iters=True", "max_iters = True is not a whole number"),
    ("--cooldown_fraction=0.3", "cooldown_fraction = 0.3 has no effect on schedule = cosine"),
    ("--batch_size=-1", "batch_size = -1 must be at least 0"),
    ("--beta1=1", "beta1 = 1.0 must be below 1"),
    ("--learning_rate=0", "learning_rate = 0.0 must be above 0"),
    ("--bias=yes", "bias = 'yes' is not True or False"),
    ("--optimizer=adanw", "did you mean adamw?"),
    ("--dtype=float8", "is none of auto, float32"),
    ("--n_head=7", "n_embd = 768 does not divide into n_head = 7"),
    ("--hessian_batch_size=481", "is more than total_batch_size"),
    ("--hessian_chunks=7", "does not divide into hessian_chunks = 7"),
    ("config/train_gpt2_30m_sofiag.py", "did you mean config/train_gpt2_30m_sophiag.py?"),
    ("quickstrat.py", "did you mean config/quickstart.py?"),
    ("config/nothing.py", "settings are given as --key=value"),
])
def test_each_mistake_is_refused_by_name(refused, flag, words):
    assert words in refused(train.main, [flag])


def test_a_mistake_in_a_file_is_named_with_its_line(tmp_path, refused):
    file = tmp_path / "c.py"
    file.write_text("\nn_head = 7\n")
    assert f"n_head from {file}:2" in refused(train.main, [str(file)])


@pytest.mark.trial(12)
@pytest.mark.parametrize("line", [
    "import os", "max_iters = __import__('os').system('touch owned')", "max_iters = len('x')",
    "x = 9 ** 9 ** 9", "max_iters = [1]", "max_iters: int = 5", "max_iters = 'a' * 3",
    "max_iters = 1 / 0", "max_iters = unknown", "max_iters = (",
])
def test_a_config_file_is_read_and_never_executed(tmp_path, monkeypatch, refused, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.py").write_text(line + "\n")
    assert "c.py:1" in refused(train.main, ["c.py"])
    assert not (tmp_path / "owned").exists()


def test_help_lists_every_key_with_its_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert text.strip() == help_text(Config, "train.py [config/FILE.py] [--key=value]").strip()
    assert "--hessian_batch_size=int" in text and "default 240" in text


def test_programs_get_the_same_checks_as_users():
    with pytest.raises(ConfigError, match="max_iters = 0 must be at least 1"):
        Config(max_iters=0)


def test_nanogpts_spellings_mean_what_they_mean_there(tmp_path):
    file = tmp_path / "train_shakespeare_char.py"
    file.write_text("learning_rate = 1e-3\nmax_iters = 5000\nlr_decay_iters = 5000\n"
                    "min_lr = 1e-4\ngradient_accumulation_steps = 5 * 8\nbatch_size = 12\n"
                    "compile = False\ndecay_lr = True\n")
    config, sources = load(Config, [str(file), "--compile_optimizer=True"], "")
    assert config.min_lr_ratio == pytest.approx(0.1) and config.total_batch_size == 480
    assert (config.compile, config.compile_optimizer, config.max_iters) == ("off", "on", 5000)
    assert sources["min_lr_ratio"] == f"{file}:4"
    config, _ = load(Config, ["--decay_lr=False", "--compile=True"], "")
    assert config.min_lr_ratio == 1 and config.compile == "on"


def test_every_wrong_key_is_told_at_once_with_what_to_do(tmp_path):
    file = tmp_path / "a.py"
    file.write_text("eval_iters = 200\nn_layers = 4\nmin_lr = 1e-4\nlr_decay_iters = 7\n"
                    "max_iters = 8\n")
    with pytest.raises(ConfigError) as raised:
        load(Config, [str(file), "--rho=0.04", "--gradient_accumulation_steps=4", "--qqq=x"], "")
    parts = str(raised.value).split(" | ")
    assert len(parts) == 7
    for part, words in zip(parts, (
            "eval_iters in .*a.py:1; set eval_windows, which counts", "n_layers in .*:2; did you",
            "min_lr in .*:3; it needs learning_rate beside it", "the schedule ends at max_iters",
            "rho in flag --rho=0.04; the paper's gamma", "it needs batch_size beside it",
            "qqq in flag --qqq=x; --help lists"), strict=True):
        assert re.search(words, part), part

"""Every command ends with one line for whatever its user can cause."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import fields

import pytest

import bench
import sample
import train
from experiments import compare, frequent, plot, preparation, runs, sampling
from model import GPTConfig
from nanosophia import dry_run, huggingface, superglue
from nanosophia.command import command
from nanosophia.configurator import ConfigError, load, read_config_file
from nanosophia.dataloader import open_dataset
from nanosophia.distributed import start_ranks
from nanosophia.documents import CorpusError, local_documents
from nanosophia.metrics import Recorder, read_records
from nanosophia.options import Config, GPTOptions
from nanosophia.tokenizer import TokenizerError, get_tokenizer
from tests.conftest import ROOT, script
from tests.test_bench import SMALL
from tests.test_corpus import all_train, texts

COMMANDS = {
    "train.py": ["config/quickstart.py"], "sample.py": [], "bench.py": [],
    "data/text/prepare.py": [], "data/pile/prepare.py": [], "data/openwebtext/prepare.py": [],
    "data/stdlib/prepare.py": ["--out_dir=/dev/null/x"], "-m nanosophia.huggingface": [],
    "-m nanosophia.superglue": [], "-m nanosophia.dry_run": ["config/quickstart.py"],
    "-m experiments.plot": [], "-m experiments.compare": [],
}


def start(name, *argv, stdout=subprocess.PIPE, env=(), **kwargs):
    return subprocess.Popen(
        [sys.executable, *name.split(), *argv], cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE,
        text=True, env={**os.environ, **dict(env)}, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler), **kwargs)


def run(name, *argv, **kwargs):
    process = start(name, *argv, **kwargs)
    out, errors = process.communicate(timeout=120)
    assert "Traceback" not in errors and "Exception ignored" not in errors, errors
    return process.returncode, out, errors


@pytest.mark.trial(18)
@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_at_any_moment_from_the_first_import_on_prints_no_traceback(name, tmp_path, trials):
    moments = random.Random(name)
    for _ in range(4):
        process = start(name, *COMMANDS[name], *([f"--out_dir={tmp_path}"] * (name == "train.py")))
        wait_for_startup(process)
        time.sleep(moments.uniform(0, 3))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
        assert "Traceback" not in errors and "Exception ignored" not in errors, errors
    trials(4)


def test_a_ctrl_c_that_python_drops_comes_again():
    """As where it hits a finaliser: Python would report it and go on."""
    code = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
import nanosophia.startup
from nanosophia.command import command

class Finalised:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
        [None for _ in range(100)]

@command()
def main(argv):
    Finalised()
    time.sleep(60)
    print("went on")

main([])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def wait_for_startup(process) -> None:
    """Waits until Python handles Ctrl-C and the command's first import has set that aside."""
    handled, until = False, time.monotonic() + 2
    while process.poll() is None and time.monotonic() < until:
        try:
            with open(f"/proc/{process.pid}/status") as file:
                mask = next(int(line.split()[1], 16) for line in file if line.startswith("SigCgt"))
        except (OSError, StopIteration):
            return
        if handled and not mask & 1 << signal.SIGINT - 1:
            return
        handled |= bool(mask & 1 << signal.SIGINT - 1)
        time.sleep(0.0005)


@pytest.mark.trial(18)
@pytest.mark.parametrize("name, argv", [
    ("train.py", ["--help"]), ("train.py", ["config/quickstart.py", "--print_config"]),
    ("-m nanosophia.dry_run", ["config/train_gpt2_small_sophiag.py"]), ("sample.py", ["--help"])])
def test_output_that_nobody_takes_ends_a_command_in_a_line_or_silently(name, argv):
    reader, writer = os.pipe()
    os.close(reader)
    code, _, errors = run(name, *argv, stdout=writer)
    os.close(writer)
    assert (code, errors) == (128 + signal.SIGPIPE, "")
    with open("/dev/full", "w") as full:
        code, _, errors = run(name, *argv, stdout=full)
    assert (code, errors) == (2, "error: standard output or a file: No space left on device\n")


@pytest.mark.trial(18)
def test_closed_and_ascii_only_outputs_are_served(tmp_path):
    closed = subprocess.run(f"{sys.executable} sample.py --help >&- 2>&- <&-", shell=True, cwd=ROOT)
    assert closed.returncode == 0
    name = tmp_path / "é日"
    code, _, errors = run("sample.py", f"--out_dir={name}", env=dict(
        PYTHONIOENCODING="ascii").items())
    assert code == 2 and r"\xe9\u65e5 holds no checkpoint" in errors


@pytest.mark.trial(18)
def test_a_full_log_does_not_stop_training(tmp_path, tiny, monkeypatch, capsys):
    class Full:
        def write(self, text):
            if text.startswith("step "):
                raise OSError(errno.ENOSPC, "No space left on device")
            return len(text)

        def flush(self):
            pass

        def isatty(self):
            return False

    monkeypatch.setattr(sys, "stdout", Full())
    train.main(tiny())
    assert "recording to standard output failed and is off" in capsys.readouterr().err
    assert len(read_records(tmp_path / "run" / "metrics.jsonl")) == 6


def test_the_reader_of_a_run_that_has_gone_ends_it(tmp_path):
    class Gone:
        def write(self, text):
            raise BrokenPipeError

        flush = isatty = lambda self: None

    recorder = Recorder(tmp_path, first_step=0, max_iters=1, active=True)
    stdout, sys.stdout = sys.stdout, Gone()
    try:
        with pytest.raises(BrokenPipeError):
            recorder.say("x")
    finally:
        sys.stdout = stdout


@pytest.mark.trial(18)
@pytest.mark.parametrize("variable, value", [
    ("WORLD_SIZE", "x"), ("WORLD_SIZE", "0"), ("WORLD_SIZE", "-1"), ("RANK", "²"),
    ("LOCAL_RANK", "one"), ("WORLD_SIZE", "9" * 5000), ("RANK", "1")])
def test_a_malformed_environment_is_refused(monkeypatch, tiny, refused, variable, value):
    monkeypatch.setenv(variable, value)
    if variable == "RANK":
        monkeypatch.delenv("WORLD_SIZE", raising=False)
    line = refused(train.main, tiny())
    assert f"the environment has {variable} = " in line and len(line) < 300


@pytest.mark.trial(18)
@pytest.mark.parametrize("error, code, line", [
    (OSError(errno.EIO, "Input/output error", "a/file"), 2, "error: a/file: Input/output error"),
    (OSError(errno.ENAMETOOLONG, "File name too long", "x"), 2, "error: x: File name too long"),
    (UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates"), 2,
     "error: text that is not valid Unicode"),
    (type("PanicException", (BaseException,), {})("a regex"), 2,
     "error: a library refused its input: a regex"),
    (MemoryError(), 1, "error: out of memory"), (KeyboardInterrupt(), 130, "interrupted"),
    (RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: you tried to"), 1,
     "error: out of memory")])
def test_what_the_system_or_a_library_raises_is_a_line(error, code, line, capsys):
    @command()
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == code and capsys.readouterr().err.startswith(line)


def test_what_no_user_can_cause_keeps_its_traceback():
    @command()
    def main(argv):
        raise IndexError("a defect")

    with pytest.raises(IndexError):
        main([])


@pytest.mark.trial(18)
@pytest.mark.parametrize("main, argv, words", [
    (train.main, ["--n_layer=1e30"], "n_layer = 1000000000000000019884624838656 must be at most"),
    (train.main, ["--dry_run", "--n_layer=100000"], "n_layer = 100000 must be at most 1000"),
    (train.main, ["--n_layer=" + "9" * 5000], "is not a whole number"),
    (train.main, ["--total_batch_size=1000000000001"], "must be at most 1048576"),
    (train.main, ["--warmup_iters=1" + "0" * 400], "must be at most 9007199254740992"),
    (train.main, ["--eps=1e308"], "must be at most 3e+38"),
    (train.main, ["--init_from=auto", "--eval_only"], "holds no checkpoint to resume"),
    (train.main, ["--out_dir=" + "x" * 300], "File name too long"),
    (train.main, ["--dataset=" + "x" * 5000], "File name too long"),
    (train.main, ["--out_dir=/dev/null"], "cannot write to --out_dir=/dev/null"),
    (train.main, ["--device=cpu:3"], "device = cpu:3 is not supported"),
    (train.main, ["--wandb_project=a\0b"], "holds a NUL character"),
    (train.main, ["--n_embd=65536", "--n_layer=1000", "--n_head=1"], "GiB, this machine has"),
    (sample.main, ["--out_dir=nowhere"], "nowhere holds no checkpoint"),
    (sample.main, ["--init_from=/dev/zero"], "neither a ckpt.pt, nor a folder"),
    (sample.main, ["--start=FILE:" + "x" * 300], "File name too long"),
    (huggingface.main, ["--out_dir=nowhere", "--export=x"], "nowhere holds no checkpoint"),
    (superglue.main, ["--out_dir=nowhere"], "nowhere holds no checkpoint"),
    (dry_run.main, ["--n_layer=3"], "give config files"),
    (preparation.main, ["--input=nowhere"], "--input=nowhere is no file"),
    (compare.main, ["--baseline=a", "--candidate=b", "--ratios=1e308"], "list of positive numbers"),
    (compare.main, ["--baseline=help", "--candidate=help"], "flag --help: write it as"),
    (bench.main, ["--compare=help"], "help"),
    (sampling.main, ["--batch=" + "9" * 27], "batch = " + "9" * 27 + " must be at most 10000"),
    (huggingface.main, ["--export=x", "--licence=a\nb"], "more than a line of text"),
    (dry_run.main, ["--no-such=1"], "unknown key"),
    (plot.main, ["--runs=nowhere"], "nowhere/metrics.jsonl cannot be read"),
    (plot.main, ["--runs=x", "--file=x.gif"], "x.gif is not the name of a png, svg or pdf"),
])
def test_odd_arguments_are_refused_in_a_line(tiny, tmp_path, refused, main, argv, words):
    if main is train.main:
        argv = tiny(*argv)
    if main is sample.main and "nowhere" not in argv[0]:
        argv = [*argv, "--device=cpu"]
    if "--start" in argv[0]:
        train.main(tiny())
        argv = [*argv, f"--out_dir={tmp_path / 'run'}"]
    assert words in refused(main, argv)


@pytest.mark.trial(18)
@pytest.mark.parametrize("text, words", [
    ("a = 10\n" + "a = a * a\n" * 60, "a number above 1e+30"),
    ("a = " + "(" * 3000, "not a Python"), ("a = " + "-" * 100000 + "1", "not a Python"),
    ("a = 1e300 * 1e300", "a number above"), ("a = 2 ** 0.5 ** -9999", "power out of bounds")])
def test_config_arithmetic_is_bounded(tmp_path, text, words):
    path = tmp_path / "x.py"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_config_file(path)
    assert words in str(error.value)


@pytest.mark.trial(18)
def test_rows_that_no_reader_can_take_are_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    broken = pyarrow.array([b"fine", b"\xff\xfe"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": broken}), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match="a.parquet, after row 1: unreadable"):
        texts(local_documents(str(tmp_path / "a.parquet"), all_train))
    (tmp_path / "b.jsonl").write_text("[" * 100_000 + "\n")
    with pytest.raises(CorpusError, match="b.jsonl, line 1: not a JSON object"):
        texts(local_documents(str(tmp_path / "b.jsonl"), all_train))
    row = json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False)
    (tmp_path / "c.jsonl").write_text(row + "\n" + row + "\n", encoding="utf-8")
    assert texts(local_documents(str(tmp_path / "c.jsonl"), all_train)) == ["a\u2028b\x85c"] * 2
    (tmp_path / "BoolQ").mkdir()
    row = dict(passage="a\u2028b", question="c", label=True)
    (tmp_path / "BoolQ" / "val.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n",
                                                  encoding="utf-8")
    assert superglue.read_rows("boolq", "val", str(tmp_path))[0]["passage"] == "a\u2028b"


@pytest.mark.trial(18)
@pytest.mark.parametrize("content, words", [
    (b"{", "could not be read"), (b"\xff", "could not be read"), (b"{}", "could not be read"),
    (b"[" * 10_000, "could not be read"),
    (json.dumps(dict(version="1.0", pre_tokenizer=dict(
        type="Split", pattern=dict(Regex="(?<a"), behavior="Isolated", invert=False),
        model=dict(type="BPE", vocab={"a": 0}, merges=[]))).encode(), "could not be read"),
    (json.dumps(dict(version="1.0", model=dict(type="BPE", vocab={"a": 0, "b": 4_000_000_000},
                                               merges=[]))).encode(), "has an id of 4000000000")])
def test_a_tokenizer_file_that_is_none_is_refused(tmp_path, content, words):
    pytest.importorskip("tokenizers")
    path = tmp_path / "t.json"
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match=words):
        get_tokenizer(str(path))


@pytest.mark.trial(18)
def test_a_torn_last_record_is_left_out_and_a_bad_one_is_named(tmp_path, refused):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "train/loss": 3.0}\n{"step": 1, "tra')
    assert read_records(path) == [{"step": 0, "train/loss": 3.0}]
    for line in ('"step": -1', '"lr": 1', '"step": 1.5', '"step": 1, "lr": "high"',
                 '"step": 1, "lr": [1]', '"step": 1, "lr": 1' + "0" * 400, '"step": 1, "lr": 1e400',
                 '"step": 1, "lr": NaN', '"step": 1, "lr": true'):
        path.write_text('{"step": 0}\n{' + line + "}\n")
        assert "metrics.jsonl cannot be read: line 2: " in refused(plot.main, [
            f"--runs={tmp_path}"])


@pytest.fixture
def recorded(tmp_path):
    """The folder of a run with one record."""
    folder = tmp_path / "_a$b"
    folder.mkdir()
    (folder / "config.json").write_text(
        '{"init_from": "scratch", "total_batch_size": 1, "block_size": 1}')
    (folder / "metrics.jsonl").write_text('{"step": 0, "train/loss": 3.0, "val/loss": 3.0}\n')
    return folder


@pytest.mark.trial(18)
@pytest.mark.parametrize("flag", ["--title=a\0b", "--title=a\x1b[1m", "--labels=a\nb",
                                  "--samples=1000000000"])
def test_what_no_picture_can_show_is_refused(recorded, refused, flag):
    assert f"{flag[2:].partition('=')[0]} = " in refused(plot.main, [f"--runs={recorded}", flag])


@pytest.mark.trial(18)
def test_a_run_of_huge_numbers_is_refused(recorded, refused):
    (recorded / "config.json").write_text(
        '{"init_from": "scratch", "total_batch_size": 1' + "0" * 400 + ', "block_size": 1}')
    assert "config.json cannot be read" in refused(plot.main, [f"--runs={recorded}"])


def test_the_papers_range_is_named_and_drawn_for_a_fixed_gamma_alone(recorded):
    pytest.importorskip("matplotlib")

    def texts():
        axes = plot.picture([recorded], ["run"], ["unclipped"]).axes[0]
        return [text.get_text() for text in axes.texts], len(axes.patches)

    said, bands = texts()
    assert "the paper's range, 10-50 %" in said and bands == 1
    config = json.loads((recorded / "config.json").read_text()) | dict(gamma_target=0.9)
    (recorded / "config.json").write_text(json.dumps(config))
    said, bands = texts()
    assert "the paper's range, 10-50 %" not in said and bands == 0


def test_every_run_is_in_the_legend_and_every_panel_is_drawn_once(recorded, tmp_path):
    pytest.importorskip("matplotlib")
    legend = plot.picture([recorded], [recorded.name], ["loss"]).axes[0].get_legend()
    names = [text.get_text().strip() for text in legend.get_texts()]
    assert names == ["_a$b", "validation", "training"]
    sizes = []
    for panels in ("loss,lr", ",".join(["loss", "lr"] * 500)):
        plot.main([f"--runs={recorded}", f"--panels={panels}", f"--file={tmp_path / 'x.svg'}"])
        sizes.append((tmp_path / "x.svg").stat().st_size)
    assert sizes[0] == sizes[1]


@pytest.mark.trial(16)
@pytest.mark.parametrize("name", ["model.safetensors", "val.jsonl", "prompt", "metrics.jsonl"])
def test_no_command_waits_for_a_pipe(tmp_path, refused, recorded, name):
    if name == "metrics.jsonl":
        (recorded / name).unlink()
    os.mkfifo((recorded if name == "metrics.jsonl" else tmp_path) / name)
    if name == "model.safetensors":
        (tmp_path / "config.json").write_text(json.dumps(dict(
            model_type="gpt2", n_layer=1, n_head=1, n_embd=8, n_positions=8, vocab_size=50257)))
        line = refused(sample.main, [f"--init_from={tmp_path}", "--device=cpu"])
    elif name == "val.jsonl":
        (tmp_path / "BoolQ").mkdir()
        (tmp_path / name).rename(tmp_path / "BoolQ" / name)
        with pytest.raises(ConfigError) as error:
            superglue.read_rows("boolq", "val", str(tmp_path))
        line = str(error.value)
    elif name == "prompt":
        with pytest.raises(ConfigError) as error:
            sample._read_start(f"FILE:{tmp_path / name}")
        line = str(error.value)
    else:
        line = refused(plot.main, [f"--runs={recorded}"])
    assert "not a regular file" in line


@pytest.mark.trial(16)
def test_a_list_of_runs_does_not_write_through_a_link(tmp_path, data_dir):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "out" / "a").mkdir(parents=True)
    (tmp_path / "out" / "a" / "log.txt").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError):
        runs.run_all([runs.RunSpec("a", ())], tmp_path / "out")
    assert (tmp_path / "victim").read_text() == "precious"


@pytest.mark.trial(18)
@pytest.mark.parametrize("key", ["json", "profile"])
def test_where_nothing_can_be_written_nothing_is_measured(tmp_path, refused, monkeypatch, key):
    monkeypatch.setattr(bench, "measure", None)  # would be called
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "file" / "x", "x" * 300):
        assert f"--{key}={place}" in refused(bench.main, [f"--{key}={place}"])


def test_a_trace_replaces_a_link_and_not_what_it_names(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "x.json").symlink_to(tmp_path / "victim")
    settings, sources = load(bench.BenchSettings, ["--compare=plain", *SMALL], "")
    config = bench.contender_config(settings, sources, "plain")
    contender = bench.warm_up("plain", config, start_ranks("cpu"), 1, real_data=False)
    bench.write_profile(contender, 1, tmp_path / "x.json")
    assert (tmp_path / "victim").read_text() == "precious"
    assert json.loads((tmp_path / "x.json").read_text())["traceEvents"]


def test_a_dollar_in_a_title_is_drawn_as_it_is(recorded, tmp_path):
    pytest.importorskip("matplotlib")
    plot.main([f"--runs={recorded}", "--title=$1 and $\\x", f"--file={tmp_path / 'x.svg'}"])
    assert (tmp_path / "x.svg").is_file()


def test_a_picture_replaces_a_link_and_not_what_it_names(tmp_path):
    figure = plot.pyplot().figure()
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "x.svg").symlink_to(tmp_path / "victim")
    plot.save_figure(figure, tmp_path / "x.svg")
    assert (tmp_path / "victim").read_text() == "precious"
    assert not (tmp_path / "x.svg").is_symlink()


def test_more_processes_than_cores_are_not_started(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    (tmp_path / "in.txt").write_text("x" * 90_000)
    script("text").main([f"--input={tmp_path / 'in.txt'}", "--tokenizer=bytes", "--num_proc=99",
                         f"--out_dir={tmp_path / 'out'}"])
    assert "num_proc = 99: this machine has 1 cores, so 1 are used" in capsys.readouterr().out


def test_the_most_frequent_tokens_train_like_any_folder_and_replace_none(data_dir, tmp_path,
                                                                         refused, tiny):
    flags = [f"--dataset={data_dir}", f"--out_dir={tmp_path / 'few'}", "--vocab_size=12"]
    frequent.main(flags)
    assert open_dataset(str(tmp_path / "few"), 16).vocab_size == 12
    train.main([*tiny(), f"--dataset={tmp_path / 'few'}"])
    assert "is not empty; give a new --out_dir" in refused(frequent.main, flags)
    assert "leaves nothing of the" in refused(frequent.main, [
        *flags, "--val_tokens=10000000", f"--out_dir={tmp_path / 'other'}"])


@pytest.mark.trial(18)
@pytest.mark.parametrize("content, words", [
    (dict(command=["--n_layer=1"], rows={"sophiag": {}}, device_name="x", torch="y"), "'ratio'"),
    (dict(command=[1], rows={}, device_name="x", torch="y"), "not a list of flags"),
    (dict(command=[], rows=5, device_name="x", torch="y"), "is not a file that bench.py --json")])
def test_a_baseline_that_is_none_is_refused_before_the_measurement(tmp_path, refused, content,
                                                                   words):
    path = tmp_path / "baseline.json"
    path.write_text(json.dumps(content))
    assert words in refused(bench.main, [f"--baseline={path}"])


@pytest.mark.trial(18)
def test_a_baseline_does_not_say_where_files_are_written(tmp_path, refused):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "baseline.json").write_text(json.dumps(dict(
        command=[f"--json={victim}", f"--profile={victim}", "--n_layer=x"], rows={},
        device_name="x", torch="y")))
    assert "n_layer = 'x'" in refused(bench.main, [f"--baseline={tmp_path / 'baseline.json'}"])
    assert "is no file; give another" in refused(bench.main, [f"--profile={tmp_path}"])
    assert victim.read_text() == "precious"


def imported(*argv):
    """What a command printed, and the modules that it imported."""
    process = subprocess.run([sys.executable, "-X", "importtime", *argv], cwd=ROOT, text=True,
                             capture_output=True, timeout=120)
    lines = process.stderr.splitlines()
    modules = {x.rpartition("|")[2].strip() for x in lines if x.startswith("import time:")}
    others = [x for x in lines if not x.startswith("import time:")]
    return process.returncode, process.stdout + "\n".join(others), modules


@pytest.mark.parametrize("flag, code, words", [
    ("--help", 0, "--gamma_target=float"), ("--learning_rat=1", 2, "did you mean learning_rate?"),
    ("--n_embd=5.5", 2, "n_embd = 5.5 is not a whole number")])
def test_help_and_mistakes_are_answered_without_torch(flag, code, words):
    found, text, modules = imported("train.py", flag)
    assert found == code and words in text and "torch" not in modules


def test_a_run_imports_neither_the_compiler_nor_what_shards(tmp_path, tiny):
    code, text, modules = imported("train.py", *tiny("--max_iters=2"))
    assert code == 0 and "saved in" in text and "torch" in modules
    assert not modules & {"torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor"}


def test_the_options_that_need_no_torch_are_the_models():
    theirs, ours = fields(GPTConfig), fields(GPTOptions)
    assert [(f.name, f.type, f.default, f.metadata) for f in theirs] == \
        [(f.name, f.type, f.default, f.metadata) for f in ours]
    assert type(Config().model) is GPTConfig

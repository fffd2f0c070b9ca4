"""Small data, small runs and ranks for the tests."""

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from nanosophia.corpus import write_corpus
from nanosophia.documents import Documents

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
GPT2_CACHE = SHARED / "tiktoken_cache"

TINY = ["--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=2",
        "--total_batch_size=8", "--hessian_batch_size=4", "--warmup_iters=2", "--max_iters=6",
        "--eval_interval=4", "--eval_windows=6", "--log_interval=1", "--checkpoint_interval=3",
        "--learning_rate=1e-2", "--gamma=1", "--device=cpu", "--dtype=float32"]


# What `pytest -m fast` runs: these files without the tests that take longer than two seconds.
FAST_FILES = {"test_architecture", "test_checkpoint", "test_configurator", "test_dataloader",
              "test_metrics", "test_model", "test_old_run", "test_optimizers", "test_sample",
              "test_sophia"}
LONGER = {"test_slope_against_the_exact_diagonal_of_a_gpt_is_one",
          "test_on_fsdp2_shards_it_steps_as_on_whole_parameters",
          "test_hutchinson_averages_to_the_hessians_diagonal_negative_entries_included",
          "test_gaussian_likelihood_gives_the_gauss_newton_diagonal_of_squared_error",
          "test_chunks_shrink_the_noise_of_the_estimate",
          "test_hutchinson_is_u_times_hessian_times_u_for_any_number_of_parts",
          "test_the_compiled_update_equals_the_eager_one",
          "test_model_loss_and_the_drawing_of_labels_compile_into_one_graph"}


def pytest_collection_modifyitems(items):
    """Marks the fast tests."""
    for item in items:
        if item.path.stem in FAST_FILES and item.originalname not in LONGER:
            item.add_marker("fast")


class CutOff:
    """Ends this process, as kill -9 does, at its n-th call that changes a file or waits for it."""

    def __init__(self, monkeypatch, places):
        self.calls, self.stop = 0, None
        for module, name in places:
            monkeypatch.setattr(module, name, self._counted(getattr(module, name)))

    def _counted(self, function):
        def call(*args, **kwargs):
            self.calls += 1
            if self.calls == self.stop:
                os._exit(9)
            return function(*args, **kwargs)
        return call

    def run(self, stop, action) -> bool:
        """Whether a child process that does it, cut off at call number `stop`, got to its end."""
        child = os.fork()
        if child == 0:
            self.calls, self.stop = 0, stop
            action()
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A prepared byte-level folder of made-up text, the same whatever the project's code is."""
    folder = tmp_path_factory.mktemp("data")
    texts = [("val", made_up_text(10_005, seed=0))]  # no multiple of a window
    texts += [("train", made_up_text(12_000, seed)) for seed in range(1, 21)]
    write_corpus(listed(texts), folder, "bytes")
    return folder


def made_up_text(characters: int, seed: int) -> str:
    """Lines of words from a vocabulary of 300, the n-th of which is as frequent as 1/n."""
    words = random.Random(0)
    vocabulary = ["".join(words.choices("etaoinshrdlucm", k=words.randint(1, 8)))
                  for _ in range(300)]
    drawn = random.Random(seed).choices(vocabulary, [1 / n for n in range(1, 301)], k=characters)
    lines = (" ".join(drawn[i:i + 9]) for i in range(0, len(drawn), 9))
    return "\n".join(lines)[:characters]


def listed(documents: list[tuple[str, str]], name: str = "a list") -> Documents:
    """(split, text) pairs as a source of documents."""
    return Documents(name, name, len(documents), lambda start: iter(documents[start:]))


@pytest.fixture
def tiny(data_dir, tmp_path):
    """Flags of a tiny run in a folder of its own; later flags win."""
    def flags(*extra, out_dir=tmp_path / "run"):
        return [*TINY, f"--dataset={data_dir}", f"--out_dir={out_dir}", *extra]
    return flags


@pytest.fixture
def refused(capsys):
    """Runs a command that must exit with code 2 and one line; returns the line."""
    def run(main, argv):
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        captured = capsys.readouterr()
        assert stopped.value.code == 2, captured
        assert "Traceback" not in captured.err
        lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, captured.err
        return lines[0]
    return run


@pytest.fixture
def golden_run():
    """Replays a golden trajectory through an optimizer and compares every step to 1e-12."""
    folder = SHARED / "golden"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")

    def replay(name, seed, make, estimate=None, m="exp_avg", h=None):
        golden = json.loads((folder / f"{name}_s{seed}.json").read_text())
        inputs = json.loads((folder / f"inputs_s{seed}.json").read_text())
        decayed = torch.tensor(golden["decay_mask"])
        parts = [decayed, ~decayed]
        params = [torch.nn.Parameter(_float64(golden["theta0"])[part]) for part in parts]
        settings = golden["hparams"]
        optimizer = make([dict(params=params[:1], weight_decay=settings["wd"]),
                          dict(params=params[1:], weight_decay=0.0)], settings)
        for t, lr in enumerate(golden["lrs"]):
            for group in optimizer.param_groups:
                group["lr"] = lr
            g = _float64(inputs["grads"][t])
            if estimate and t % settings["k"] == 0:
                hhat = 64 * g * g if estimate == "true_labels" else \
                    _float64(inputs[estimate][str(t + 1)])
                optimizer.update_hessian([hhat[part] for part in parts])
            for p, part in zip(params, parts, strict=True):
                p.grad = g[part]
            optimizer.step()
            for p, part in zip(params, parts, strict=True):
                torch.testing.assert_close(p.detach(), _float64(golden["theta_by_step"][t])[part],
                                           atol=1e-12, rtol=1e-12)
            statistics = optimizer.statistics() if hasattr(optimizer, "statistics") else {}
            if "unclipped_fraction" in statistics and golden["unclipped"]:
                assert statistics["unclipped_fraction"].item() == \
                    pytest.approx(golden["unclipped"][t])
        for key, state in (("m", m), ("h", h)):
            for p, part in zip(params, parts, strict=True):
                if state:
                    stored = golden["final"].get(key, golden["final"].get("v"))
                    final = _float64(stored)[part]
                    torch.testing.assert_close(optimizer.state[p][state], final, atol=0, rtol=1e-12)

    return replay


@pytest.fixture
def gpt2_cache(monkeypatch):
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        if not GPT2_CACHE.is_dir():
            pytest.skip(f"GPT-2's tokenizer files are not available: {GPT2_CACHE} is not there and "
                        "TIKTOKEN_CACHE_DIR is not set")
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(GPT2_CACHE))


@pytest.fixture
def trials(record_property):
    """Counts the trials in one test marked `trial`, for results/reliability.md."""
    def count(number, failures=0, differing=0):
        for name, value in (("trials", number), ("failures", failures), ("differing", differing)):
            record_property(name, value)
    return count


def _float64(values):
    return torch.tensor(values, dtype=torch.float64)


def torchrun(ranks: int, script: str, *argv: str, timeout: int = 240):
    """Runs a script of the project under torchrun on CPU ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}",
               "--master_port=0", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", script,
               *argv]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                               "PYTHONPATH": str(ROOT)})


def script(name: str):
    """Returns the module data/<name>/prepare.py."""
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", ROOT / "data" / name /
                                                  "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_train(*argv: str) -> None:
    """Runs train.py in this process."""
    train.main(list(argv))

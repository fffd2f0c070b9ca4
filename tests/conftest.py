"""Small data, small runs and ranks for the tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import train
from corpus import write_corpus

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"

TINY = ["--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=2",
        "--total_batch_size=8", "--hessian_batch_size=4", "--warmup_iters=2", "--max_iters=6",
        "--eval_interval=4", "--eval_windows=6", "--log_interval=1", "--checkpoint_interval=3",
        "--learning_rate=1e-2", "--gamma=1", "--device=cpu"]


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A prepared byte-level folder: this project's own source, one module for validation."""
    folder = tmp_path_factory.mktemp("data")
    documents = [("val" if p.name == "model.py" else "train", p.read_text())
                 for p in sorted(ROOT.glob("*.py"))]
    write_corpus(documents, folder, "bytes", source="the project's source")
    return folder


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


def torchrun(ranks: int, script: str, *argv: str, timeout: int = 240):
    """Runs a script of the project under torchrun on CPU ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}",
               "--master_port=0", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", script,
               *argv]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})


def run_train(*argv: str) -> None:
    """Runs train.py in this process."""
    train.main(list(argv))

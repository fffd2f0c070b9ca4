"""A model changed in model.py trains, samples and exports as itself, or is refused."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT

HUGGINGFACE = ["-m", "nanosophia.huggingface"]
FIELD = 'norm: Literal["layer", "rms"] = option("layer", "kind of normalisation")'


@pytest.fixture(scope="module")
def changed_project(tmp_path_factory, data_dir):
    """A copy of the project whose model.py has RMSNorm behind a new field, and a run made by it."""
    root = tmp_path_factory.mktemp("changed")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, root)
    shutil.copytree(ROOT / "nanosophia", root / "nanosophia")
    text = (root / "model.py").read_text()
    text = text.replace("    dropout: float", f"    {FIELD}\n    dropout: float", 1)
    made = "nn.LayerNorm(config.n_embd, bias=config.bias)"
    assert FIELD in text and text.count(made) == 3
    text = text.replace(made, f"(nn.RMSNorm(config.n_embd) if config.norm == 'rms' else {made})")
    (root / "model.py").write_text(text)
    command(root, "train.py", "--norm=rms", "--n_layer=2", "--n_head=2", "--n_embd=16",
            "--block_size=16", "--batch_size=4", "--total_batch_size=4", "--hessian_batch_size=4",
            "--max_iters=4", "--warmup_iters=2", "--device=cpu", "--dtype=float32",
            f"--dataset={data_dir}",
            "--out_dir=run", "--learning_rate=1e-2", "--eval_windows=0")
    return root


def command(root, *argv, code=0):
    """Runs a command of the project in `root`; returns what it printed."""
    done = subprocess.run([sys.executable, *argv], cwd=root, capture_output=True, text=True,
                          timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_new_field_is_a_flag_and_part_of_the_checkpoint(changed_project):
    state = json.loads((changed_project / "run" / "step_00000004" / "state.json").read_text())
    assert state["model"]["norm"] == "rms"
    assert "--norm=layer|rms" in command(changed_project, "train.py", "--help")


def test_a_checkpoint_is_read_as_the_model_that_was_trained(changed_project, data_dir):
    """On the whole validation split the model read by weights.py has the trainer's loss."""
    lines = (changed_project / "run" / "metrics.jsonl").read_text().splitlines()
    recorded = json.loads(lines[-1])["val/loss"]
    script = f"""
from pathlib import Path
from nanosophia.weights import run_weights
from nanosophia.dataloader import ValidationWindows, inputs_and_targets, open_dataset
import torch
model = run_weights(Path("run")).build().eval()
windows = ValidationWindows(open_dataset({str(data_dir)!r}, 16).val, block_size=16, limit=0)
x, y = inputs_and_targets(windows.rows(0, len(windows)), torch.device("cpu"))
with torch.no_grad():
    print(torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).item())
"""
    assert float(command(changed_project, "-c", script)) == pytest.approx(recorded, abs=1e-5)
    text = command(changed_project, "sample.py", "--out_dir=run", "--num_samples=1",
                   "--max_new_tokens=5")
    assert text.strip()


def test_code_without_the_field_refuses_the_checkpoint(changed_project, tmp_path):
    run = shutil.copytree(changed_project / "run", tmp_path / "run")
    for argv in (["sample.py"], [*HUGGINGFACE, f"--export={tmp_path / 'hf'}"],
                 ["train.py", "--eval_only"]):
        output = command(ROOT, *argv, f"--out_dir={run}", code=2)
        assert "was trained with norm = 'rms', which this code does not know" in output


def test_an_export_refuses_what_transformers_cannot_compute(changed_project, tmp_path):
    output = command(changed_project, *HUGGINGFACE, "--out_dir=run",
                   f"--export={tmp_path / 'hf'}", code=2)
    assert "norm = 'rms', which transformers' GPT-2 cannot compute" in output
    assert not (tmp_path / "hf").exists()

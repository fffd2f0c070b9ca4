"""Run folders that older code wrote resume, or are refused in one line.

tests/old_run was written by commit c4231aa: 8 steps, of which the checkpoint of step 4 is kept.
"""

import json
import shutil

import pytest

import train
from nanosophia.checkpoint import file_digest
from tests.conftest import ROOT, run_train

OLD = ROOT / "tests" / "old_run"


@pytest.fixture
def old_run(tmp_path):
    """A copy of the run, and the flags of the command that wrote it."""
    run = shutil.copytree(OLD / "run", tmp_path / "run")
    return run, [f"--dataset={OLD / 'data'}", f"--out_dir={run}", "--init_from=resume",
                 "--device=cpu"]


def test_a_run_of_older_code_resumes_with_the_losses_it_would_have_had(old_run, capsys):
    run, flags = old_run
    before = [json.loads(x) for x in (OLD / "run" / "metrics.jsonl").read_text().splitlines()]
    run_train(*flags)
    after = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in after] == [r["step"] for r in before] == list(range(8))
    for old, new in zip(before, after, strict=True):
        # Other processors round otherwise, hence not to the last bit.
        for key in ("train/loss", "val/loss", "gamma", "lr", "grad_norm", "unclipped_fraction"):
            if key in old:
                assert new[key] == pytest.approx(old[key], rel=1e-3), (old["step"], key)


def test_a_run_of_other_code_with_a_setting_unknown_here_is_refused(old_run, refused):
    run, flags = old_run
    state = run / "step_00000004" / "state.json"
    spoiled = json.loads(state.read_text())
    spoiled["config"]["norm"] = "rms"
    state.write_text(json.dumps(spoiled))
    (run / "step_00000004" / "manifest.json").write_text(json.dumps({
        path.name: file_digest(path)
        for path in (run / "step_00000004").iterdir() if path.name != "manifest.json"}))
    line = refused(train.main, flags)
    assert "was trained with norm = 'rms', which this code does not know" in line

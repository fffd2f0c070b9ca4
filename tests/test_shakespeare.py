"""python -m experiments.shakespeare: nanoGPT's own program beside ours, with other seeds."""


import pytest
import torch

from experiments import shakespeare
from experiments.shakespeare import ShakespeareSettings
from model import GPT, GPTConfig
from nanosophia.configurator import UserError
from tests.conftest import made_up_text, script

STAND_IN = """
import os, shutil, sys, torch
torch.manual_seed(1337)
flags = dict(a[2:].split("=", 1) for a in sys.argv[1:] if a.startswith("--"))
with open("calls.txt", "a") as file:
    print(torch.initial_seed(), flags["max_iters"], flags["eval_interval"], file=file)
shutil.copy("ckpt.pt", flags["out_dir"])
"""


@pytest.fixture
def peer(tmp_path):
    """A folder with a train.py that writes a ckpt.pt, and a folder of characters."""
    folder = tmp_path / "nanogpt"
    folder.mkdir()
    (folder / "train.py").write_text(STAND_IN)
    (tmp_path / "in.txt").write_text(made_up_text(20_000, 3))
    script("shakespeare_char").main([f"--input={tmp_path / 'in.txt'}",
                                     f"--out_dir={tmp_path / 'data'}"])
    classes = len(set((tmp_path / "in.txt").read_text()))
    args = dict(n_layer=1, n_head=2, n_embd=16, block_size=64, bias=False, vocab_size=classes)
    torch.manual_seed(0)
    model = GPT(GPTConfig(**args, activation="gelu"))
    torch.save(dict(model=model.state_dict(), model_args=args), folder / "ckpt.pt")
    return ShakespeareSettings(nanogpt=str(folder), dataset=str(tmp_path / "data"), seeds=3,
                               max_iters=40), folder, classes


def test_each_seed_is_its_own_and_the_saved_weights_are_evaluated(peer):
    settings, folder, classes = peer
    runs = shakespeare.nanogpt_runs(settings)
    assert (folder / "calls.txt").read_text().split("\n")[:-1] == [
        "1337 1 1", "1337 40 40", "1338 40 40", "1339 40 40"]
    losses = {run["loss"] for run in runs}
    assert len(runs) == 3 and len(losses) == 1
    assert losses.pop() == pytest.approx(torch.tensor(float(classes)).log().item(), abs=0.1)


def test_a_nanogpt_that_fails_is_named_with_its_last_line(peer):
    settings, folder, _ = peer
    (folder / "train.py").write_text("raise SystemExit('no such dataset')")
    with pytest.raises(UserError, match=r"nanoGPT's train.py ended with 1: no such dataset"):
        shakespeare.nanogpt_runs(settings)


def test_its_folder_must_hold_it(refused, tmp_path):
    assert "holds no train.py of nanoGPT" in refused(
        shakespeare.main, [f"--nanogpt={tmp_path}"])

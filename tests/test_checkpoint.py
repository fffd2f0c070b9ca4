"""Checkpoints: complete or absent, verified, never a pickle."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import sample
import train
from model import GPT, GPTConfig
from nanosophia import checkpoint
from nanosophia.checkpoint import (
    CheckpointError,
    checkpoint_folders,
    load_latest,
    open_checkpoint,
    run_state,
    save,
)
from nanosophia.optimizer_state import flatten_state, restore_state
from nanosophia.weights import foreign_weights, saved_model_config
from tests.conftest import TINY


def state(step):
    return run_state(step=step, config={}, model={}, tokenizer="bytes", num_classes=257)


def write(out_dir, step, keep=2):
    return save(out_dir, {"w": torch.full((4, 4), float(step))}, {"0.m": torch.arange(3.0)},
                state(step), keep)


def test_what_is_saved_is_what_is_loaded(tmp_path):
    write(tmp_path, 7)
    found = load_latest(tmp_path)
    assert found.state == state(7)
    assert torch.equal(found.model_tensors()["w"], torch.full((4, 4), 7.0))
    assert torch.equal(found.optimizer_tensors()["0.m"], torch.arange(3.0))


def test_the_newest_are_kept_and_latest_names_the_last(tmp_path):
    for step in (1, 2, 10):
        write(tmp_path, step)
    assert [p.name for p in checkpoint_folders(tmp_path)] == ["step_00000010", "step_00000002"]
    assert (tmp_path / "latest").read_text() == "step_00000010\n"
    assert load_latest(tmp_path / "nothing") is None


@pytest.mark.trial(6)
@pytest.mark.parametrize("name", [checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.STATE,
                                  checkpoint.MANIFEST])
@pytest.mark.parametrize("fault", ["flip", "truncate", "remove"])
def test_a_damaged_file_is_named_and_the_one_before_is_taken(tmp_path, capsys, name, fault):
    write(tmp_path, 1)
    path = write(tmp_path, 2) / name
    content = bytearray(path.read_bytes())
    if fault == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif fault == "truncate":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    assert load_latest(tmp_path).state["step"] == 1 and path.parent.exists()  # a reader only looks
    assert "trying the one before" in capsys.readouterr().err
    assert load_latest(tmp_path, quarantine=True).state["step"] == 1
    warning = capsys.readouterr().err
    assert "step_00000002" in warning and "renamed to step_00000002.corrupt" in warning
    assert (tmp_path / "step_00000002.corrupt").is_dir()


def test_when_none_is_intact_nothing_is_loaded(tmp_path):
    (write(tmp_path, 1) / checkpoint.MODEL).unlink()
    for _ in range(2):  # a restart loop must not begin anew either
        with pytest.raises(CheckpointError, match="no checkpoint in .* is intact"):
            load_latest(tmp_path, quarantine=True)


@pytest.mark.trial(16)
@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE])
@pytest.mark.parametrize("name", ["step_00000002", checkpoint.MANIFEST, checkpoint.MODEL,
                                  checkpoint.STATE, "run"])
def test_what_cannot_be_read_is_named_and_nothing_is_renamed(tmp_path, monkeypatch, name, number):
    for step in (1, 2):
        write(tmp_path / "run", step)
    before = sorted(tmp_path.rglob("*"))
    original = dict(open=os.open, scandir=os.scandir)

    def refusing(which):
        def call(path, *args, **kwargs):
            newest = Path(path).parent.name == "step_00000002" and name == Path(path).name
            if newest or name == Path(path).name == "run":
                raise OSError(number, os.strerror(number), str(path))
            return original[which](path, *args, **kwargs)
        return call

    for which in original:
        monkeypatch.setattr(os, which, refusing(which))
    if name == "step_00000002":  # the folder itself
        monkeypatch.setattr(checkpoint, "read", refuse_folder(number))
    with pytest.raises(CheckpointError, match=rf"{name}.* cannot be read: "
                                              rf"{os.strerror(number)}; nothing was changed"):
        load_latest(tmp_path / "run", quarantine=True)
    monkeypatch.undo()
    assert sorted(tmp_path.rglob("*")) == before
    assert load_latest(tmp_path / "run", quarantine=True).state["step"] == 2


def refuse_folder(number):
    def read(path, schema):
        raise OSError(number, os.strerror(number), str(path.parent))
    return read


@pytest.mark.trial(16)
def test_a_quarantined_checkpoint_that_is_intact_after_all_is_taken_again(tmp_path, capsys):
    write(tmp_path, 1)
    folder = write(tmp_path, 2)
    corrupt = folder.rename(tmp_path / "step_00000002.corrupt")
    assert load_latest(tmp_path).folder == corrupt  # a reader only looks
    assert load_latest(tmp_path, quarantine=True).folder == folder
    assert "is intact after all and is taken again" in capsys.readouterr().err
    assert not corrupt.exists() and folder.exists()


@pytest.mark.trial(16)
@pytest.mark.parametrize("name", ["../victim", "/dev/zero", "pipe", "link", "..", "a/b", ""])
def test_a_manifest_names_plain_files_alone(tmp_path, name):
    write(tmp_path, 1)
    folder = write(tmp_path, 2)
    (tmp_path / "victim").write_text("precious")
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to("/dev/zero")
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest | {
        name: dict(size=8, sha256="0" * 64)}))
    if name in ("pipe", "link"):
        with pytest.raises(CheckpointError, match=f"{name} is a link or no file"):
            load_latest(tmp_path, quarantine=True)
        assert folder.exists()
    else:
        assert load_latest(tmp_path).state["step"] == 1


@pytest.mark.trial(16)
def test_one_that_cannot_be_read_keeps_a_damaged_newer_one_from_being_renamed(tmp_path):
    for step in (1, 2):
        write(tmp_path, step)
    (tmp_path / "step_00000002" / checkpoint.STATE).write_text("{}")
    (tmp_path / "step_00000001" / checkpoint.MANIFEST).unlink()
    os.mkfifo(tmp_path / "step_00000001" / checkpoint.MANIFEST)
    with pytest.raises(CheckpointError, match="cannot be read: not a regular file; nothing was ch"):
        load_latest(tmp_path, quarantine=True)
    assert not list(tmp_path.glob("*.corrupt*"))


@pytest.mark.trial(16)
def test_a_checkpoint_of_other_code_is_not_called_damaged(tmp_path):
    write(tmp_path, 1)
    folder = write(tmp_path, 2)
    change_state(folder, json.loads((folder / checkpoint.STATE).read_text()) | dict(format=2))
    with pytest.raises(CheckpointError, match="was written by other code or by hand: format: Inp"):
        load_latest(tmp_path, quarantine=True)
    assert folder.exists()


@pytest.mark.trial(16)
@pytest.mark.parametrize("fault", ["absent", "garbage"])
def test_tensors_that_are_absent_or_garbage_by_the_manifest_are_refused(tmp_path, fault):
    folder = write(tmp_path, 1)
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    if fault == "absent":
        (folder / checkpoint.OPTIMIZER).unlink()
        del manifest[checkpoint.OPTIMIZER]
    else:
        (folder / checkpoint.OPTIMIZER).write_bytes(b"garbage" * 9)
        manifest[checkpoint.OPTIMIZER] = checkpoint.file_digest(folder / checkpoint.OPTIMIZER)
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="does not name optimizer|not written by this code"):
        open_checkpoint(folder).optimizer_tensors()


def change_state(folder, content):
    (folder / checkpoint.STATE).write_text(json.dumps(content))
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    manifest[checkpoint.STATE] = checkpoint.file_digest(folder / checkpoint.STATE)
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.trial(16)
@pytest.mark.parametrize("name", ["lock", "latest.partial", "best.partial", "config.json.partial",
                                  "metrics.jsonl.partial", "step_00000003.partial",
                                  "step_00000006.partial", "metrics.jsonl"])
def test_a_run_writes_through_no_planted_link(tmp_path, tiny, capsys, name):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kept").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / ("folder" if "step" in name else "victim"))
    try:
        train.main(tiny())
        assert name != "lock" and load_latest(tmp_path / "run").state["step"] == 6
    except SystemExit as stopped:
        assert name == "lock" and stopped.code == 2
        assert "is a file that no lock of ours wrote" in capsys.readouterr().err
    assert (tmp_path / "victim").read_text() == "precious"
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["kept"]


EDITS = [
    (dict(step=-5), "step: Input should be greater than or equal to 0"),
    (dict(step=True), "step: Input should be a valid integer"), (dict(step=4), "is of step 4"),
    (dict(step="6"), "step: Input"), (dict(step=10**15), "step: Input"),
    (dict(format=2), "format: Input should be 1"), (dict(tally={}), "tally.steps: Field required"),
    (dict(tally=[]), "tally: Input"), (dict(tally=dict(steps=-1, clipped=0.0)), "tally.steps"),
    (dict(tally=dict(steps=1, clipped="x")), "tally.clipped"), (dict(config=5), "config: Input"),
    (dict(config=dict(seed=[])), "config.seed"), (dict(guard=dict(in_a_row=[1])), "guard.in_a_row"),
    (dict(guard=None), "guard: Input"), (dict(data=[1]), "data: Input"),
    (dict(tokenizer=None), "tokenizer: Input"), (dict(num_classes=0), "num_classes: Input"),
    (dict(num_classes=10**9), "num_classes = 1000000000 is more than vocab_size"),
    (dict(world_size=0), "world_size"), (dict(val_loss="x"), "val_loss"),
    (dict(model=dict(n_layer=10**9)), "n_layer = 1000000000 must be at most 1000"),
    (dict(model=dict(n_layer="2")), "n_layer = '2' is not a whole number"),
    (dict(model=dict(n_layer=3)), "transformer.h.2.attn.c_attn.weight is absent, for such a model"),
    (dict(model=dict(n_embd=32)), "of shape (48, 16), for such a model it is of shape (96, 32)"),
    (dict(model=dict(n_head=3)), "n_embd = 16 does not divide into n_head = 3"),
    (dict(model=dict(activation="relu")), "activation = 'relu' is none of"),
    (dict(model=dict(norm="rms")), "was trained with norm = 'rms', which this code"),
    (dict(model=None), "model: Input"), ([], "Input should be an object"), (5, "Input should be"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_dir):
    out_dir = tmp_path_factory.mktemp("trained") / "run"
    train.main([*TINY, f"--dataset={data_dir}", f"--out_dir={out_dir}", "--keep_best=False"])
    return out_dir


@pytest.mark.trial(17)
@pytest.mark.parametrize("edit, words", EDITS, ids=[words[:40] for _, words in EDITS])
def test_an_edited_state_of_a_valid_checksum_is_refused_in_a_line(tmp_path, trained, refused, tiny,
                                                                  edit, words):
    run = shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(run / "step_00000003")
    folder = run / "step_00000006"
    content = json.loads((folder / checkpoint.STATE).read_text())
    if isinstance(edit, dict) and isinstance(edit.get("model"), dict):
        edit = dict(model=content["model"] | edit["model"])
    change_state(folder, content | edit if isinstance(edit, dict) else edit)
    with pytest.raises(CheckpointError) as error:
        found = open_checkpoint(folder)
        saved_model_config(found)
    assert words in str(error.value) and "\n" not in str(error.value)
    line = refused(train.main, [f for f in tiny("--init_from=resume", "--max_iters=9")
                                if not f.startswith("--n_")])
    assert words in line
    refused(sample.main, [f"--out_dir={run}", "--device=cpu"])


@pytest.mark.trial(4)
def test_a_save_cut_off_at_any_write_leaves_the_old_or_the_new(tmp_path, monkeypatch, trials):
    """Stops the save at its n-th call to the file system, for every n."""
    class Killed(BaseException):
        pass

    calls = dict(n=0, stop=None)

    def counted(function):
        def call(*args, **kwargs):
            calls["n"] += 1
            if calls["n"] == calls["stop"]:
                raise Killed
            return function(*args, **kwargs)
        return call

    for module, name in ((checkpoint, "save_file"), (os, "fsync"), (os, "rename"),
                         (os, "replace"), (shutil, "rmtree"), (checkpoint, "file_digest")):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    points = 0
    while True:
        out_dir = tmp_path / str(points)
        calls.update(n=0, stop=None)
        write(out_dir, 1)
        write(out_dir, 2)
        calls.update(n=0, stop=points + 1)
        try:
            write(out_dir, 3)
            break
        except Killed:
            points += 1
        calls.update(stop=None)
        step = load_latest(out_dir).state["step"]
        assert step in (2, 3)
        assert not list(out_dir.glob("*.corrupt"))
        write(out_dir, 4)  # and the next save works
        assert load_latest(out_dir).state["step"] == 4
    assert points > 10
    trials(points)


@pytest.mark.trial(7)
def test_a_full_disk_is_reported_and_earlier_checkpoints_stay(tmp_path, monkeypatch):
    write(tmp_path, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(CheckpointError, match="of disk space are free"):
        write(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["step_00000001"]


@pytest.mark.trial(7)
def test_an_out_dir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        write(tmp_path / "file", 1)


def test_saving_a_step_again_replaces_it(tmp_path):
    write(tmp_path, 1)
    folder = write(tmp_path, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", folder.name]
    assert json.loads((folder / checkpoint.STATE).read_text()) == state(1)


def test_optimizer_state_round_trips_and_keeps_new_hyperparameters():
    def optimizer(lr):
        torch.manual_seed(0)
        return torch.optim.AdamW([torch.nn.Parameter(torch.randn(3)) for _ in range(2)], lr=lr)

    first, second = optimizer(0.1), optimizer(0.5)
    for p in first.param_groups[0]["params"]:
        p.grad = torch.randn(3)
    first.step()
    restore_state(second, *flatten_state(first))
    assert second.param_groups[0]["lr"] == 0.5
    for a, b in zip(first.state.values(), second.state.values(), strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def nanogpt_file(path, *, authors=False, prefix="", vocab_size=320, **changes):
    """A ckpt.pt of the shape that nanoGPT (or the authors' code) writes, and its model."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=32, bias=True,
                          vocab_size=vocab_size, activation="gelu_tanh" if authors else "gelu",
                          scale_attn_by_inverse_layer_idx=authors))
    state = {prefix + name: x for name, x in model.state_dict().items()}
    state[prefix + "lm_head.weight"] = model.transformer.wte.weight.detach()
    args = dict(n_layer=2, n_head=2, n_embd=16, block_size=32, bias=True,
                vocab_size=vocab_size, dropout=0.0)
    if authors:
        args["scale_attn_by_inverse_layer_idx"] = True
        state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
        state["transformer.h.1.attn.bias"] = torch.ones(1, 1, 32, 32)
    optimizer = torch.optim.AdamW(model.parameters())
    torch.save(dict(model=state, model_args=args, iter_num=7, best_val_loss=torch.tensor(3.0),
                    optimizer=optimizer.state_dict(), config=dict(a=1)) | changes, path)
    return model


@pytest.mark.parametrize("authors, prefix", [(False, ""), (False, "_orig_mod."), (True, "")])
def test_foreign_checkpoints_give_the_weights_of_the_same_model(tmp_path, authors, prefix):
    model = nanogpt_file(tmp_path / "ckpt.pt", authors=authors, prefix=prefix)
    if authors:  # with biases the mask has the name of c_attn's parent's bias, not of a parameter
        assert "transformer.h.0.attn.bias" not in model.state_dict()
    weights = foreign_weights(str(tmp_path / "ckpt.pt"))
    again = GPT(weights.config)
    again.load_state_dict(weights.tensors)
    idx = torch.arange(10).unsqueeze(0)
    assert torch.equal(model(idx), again(idx))


def test_a_pipe_as_a_checkpoint_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match="not a regular file"):
        foreign_weights(str(tmp_path / "ckpt.pt"))


class Malice:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.trial(12)
@pytest.mark.parametrize("place", ["model", "optimizer", "extra", "all"])
def test_a_malicious_pickle_is_refused_and_runs_nothing(tmp_path, place):
    malice = Malice(tmp_path / "owned")
    if place == "all":
        torch.save(malice, tmp_path / "ckpt.pt")
    else:
        nanogpt_file(tmp_path / "ckpt.pt", **{place: malice})
    with pytest.raises(CheckpointError, match="nothing in it was executed"):
        foreign_weights(str(tmp_path / "ckpt.pt"))
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content, words", [
    (dict(weights=1), "is not a checkpoint of nanoGPT"), (None, "cannot read"),
    (b"junk", "does not load as plain weights")])
def test_what_is_no_foreign_checkpoint_is_refused_in_words(tmp_path, content, words):
    if isinstance(content, bytes):
        (tmp_path / "ckpt.pt").write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match=words):
        foreign_weights(str(tmp_path / "ckpt.pt"))


@pytest.mark.trial(17)
@pytest.mark.parametrize("edit, words", [
    (dict(n_layer=10**9), "n_layer = 1000000000 must be at most 1000"),
    (dict(n_layer=-1), "n_layer = -1 must be at least 1"), (dict(n_layer="2"), "n_layer: Input"),
    (dict(n_layer=[2]), "n_layer: Input"), (dict(n_layer=3), "transformer.h.2.attn.c_attn."),
    (dict(n_embd=24), "of shape (48,), for such a model"), (dict(n_head=3), "does not divide"),
    (dict(vocab_size=300), "transformer.wte.weight"), (dict(bias=1), "bias: Input should be a"),
    (5, "model_args: Input should be"), ([], "model_args: Input should be")])
def test_edited_model_args_are_refused_before_anything_is_allocated(tmp_path, edit, words):
    nanogpt_file(tmp_path / "ckpt.pt")
    content = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    content["model_args"] = content["model_args"] | edit if isinstance(edit, dict) else edit
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError) as error:
        foreign_weights(str(tmp_path / "ckpt.pt"))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_run_starts_from_foreign_weights(tmp_path, tiny, refused):
    model = nanogpt_file(tmp_path / "ckpt.pt")
    flags = [f for f in tiny("--learning_rate=1e-12", "--weight_decay=0", "--max_iters=1")
             if not f.startswith(("--n_", "--block_size"))]
    train.main([*flags, f"--init_from={tmp_path / 'ckpt.pt'}", "--block_size=8"])
    found = load_latest(tmp_path / "run")
    assert found.state["config"]["activation"] == "gelu" and found.state["config"]["bias"]
    tensors = found.model_tensors()
    assert tensors["transformer.wpe.weight"].shape == (8, 16)
    torch.testing.assert_close(tensors["transformer.wte.weight"], model.transformer.wte.weight)
    line = refused(train.main, [*flags, f"--init_from={tmp_path / 'ckpt.pt'}", "--n_layer=3",
                                f"--out_dir={tmp_path / 'other'}"])
    assert "has n_layer = 2, not 3" in line and "from flag --n_layer=3" in line
    line = refused(train.main, [*flags, "--init_from=nowhere.pt",
                                f"--out_dir={tmp_path / 'other'}"])
    assert "cannot read nowhere.pt" in line

"""Batches are a pure function of (seed, step); data that does not fit is refused."""

import json

import numpy as np
import pytest
import torch

import train
from nanosophia.dataloader import (
    PURPOSES,
    DataError,
    Prefetcher,
    TrainBatches,
    ValidationWindows,
    inputs_and_targets,
    keyed_bits,
    keyed_seed,
    open_dataset,
)


def batches(tokens=1001, block_size=10, total_batch_size=7, seed=0, sampling="epochs"):
    return TrainBatches(np.arange(tokens, dtype=np.uint16), block_size=block_size,
                        total_batch_size=total_batch_size, seed=seed, sampling=sampling)


def first_tokens(loader, step):
    return loader.rows(step, 0, loader.total_batch_size)[:, 0].tolist()


def test_an_epoch_visits_every_window_once_and_the_next_in_another_order():
    loader = batches(total_batch_size=10)
    epochs = [[t for step in range(10 * e, 10 * e + 10) for t in first_tokens(loader, step)]
              for e in range(2)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(0, 1000, 10))
    assert epochs[0] != epochs[1] != sorted(epochs[1])


def test_targets_are_the_next_tokens():
    x, y = inputs_and_targets(batches().rows(3, 0, 7), torch.device("cpu"))
    assert x.shape == y.shape == (7, 10) and x.dtype == torch.int64
    assert torch.equal(y, x + 1)


def test_random_sampling_draws_any_place_by_seed_and_step():
    loader = batches(total_batch_size=500, sampling="random")
    rows = loader.rows(2, 0, 500)
    assert torch.equal(rows[100:200], batches(total_batch_size=500, sampling="random")
                       .rows(2, 100, 200))
    starts = rows[:, 0]
    assert starts.max() <= 990 and len(set((starts % 10).tolist())) == 10
    assert not torch.equal(rows, loader.rows(3, 0, 500))


def test_prefetching_gives_the_same_rows_in_any_order():
    plain = batches()
    loader = Prefetcher(batches(), lambda step: [(0, 7), (2, 4)], torch.device("cpu"))
    for step in (0, 1, 2, 5, 3, 3):
        assert torch.equal(loader.rows(step, 0, 3), plain.rows(step, 0, 3))
        assert torch.equal(loader.rows(step, 2, 4), plain.rows(step, 2, 4))
    assert loader.seconds_waited > 0
    with pytest.raises(IndexError, match="rows 5..8 are in none"):
        loader.rows(3, 5, 8)


def test_rows_do_not_depend_on_what_was_read_before_or_on_the_split_over_ranks():
    whole = batches().rows(19, 0, 7)  # straddles the end of an epoch of 100 windows
    parts = torch.cat([batches().rows(19, a, b) for a, b in ((0, 3), (3, 7))])
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, batches(seed=1).rows(19, 0, 7))


def test_keyed_streams_differ_by_seed_purpose_and_index_and_never_change():
    draws = {tuple(keyed_bits(4, seed, purpose, index).tolist())
             for seed in (0, 1) for purpose in PURPOSES for index in (0, 1, 2)}
    assert len(draws) == 2 * len(PURPOSES) * 3
    # Any change here changes the data order of every stored run.
    assert keyed_seed(1337, "hessian", 10) == 723611161988692919
    assert batches(seed=1337).window(0) == 98


def test_validation_windows_are_evenly_spaced_and_all_of_them_on_request():
    tokens = np.arange(1001, dtype=np.uint16)
    some = ValidationWindows(tokens, block_size=10, limit=4)
    assert some.rows(0, 4)[:, 0].tolist() == [0, 250, 500, 750]
    assert len(ValidationWindows(tokens, block_size=10, limit=0)) == 100
    assert len(ValidationWindows(tokens, block_size=10, limit=10**6)) == 100


def test_an_id_outside_the_vocabulary_is_refused_wherever_it_stands():
    tokens = np.zeros(101, dtype=np.uint16)
    tokens[57] = 9
    loader = TrainBatches(tokens, block_size=10, total_batch_size=10, seed=0, vocab_size=9)
    with pytest.raises(DataError, match="holds id 9 within 10 of position 50, outside the vocab"):
        loader.rows(0, 0, 10)


def test_data_that_changed_has_another_fingerprint(folder):
    path, _ = folder
    before = open_dataset(str(path), 8).fingerprint
    (np.arange(100) % 49).astype(np.uint16).tofile(path / "train.bin")
    after = open_dataset(str(path), 8).fingerprint
    assert after["train"] != before["train"] and after["val"] == before["val"]


@pytest.fixture
def folder(tmp_path):
    """A valid prepared folder to spoil."""
    def meta(**changes):
        splits = {split: dict(file=f"{split}.bin", tokens=100, documents=2, sha256="0" * 64)
                  for split in ("train", "val")}
        content = dict(format=1, vocab_size=257, eot_token=256, tokenizer="bytes", dtype="uint16",
                       tokenizer_sha256="0" * 64, splits=splits) | changes
        (tmp_path / "meta.json").write_text(json.dumps(content))
    for split in ("train", "val"):
        (np.arange(100) % 50).astype(np.uint16).tofile(tmp_path / f"{split}.bin")
    meta()
    return tmp_path, meta


def test_files_that_no_meta_describes_are_refused_unless_the_user_says_what_they_are(folder):
    path, _ = folder
    (path / "meta.json").unlink()
    with pytest.raises(DataError, match=r"nothing says what the ids .* --bare_tokens=gpt2"):
        open_dataset(str(path), 8)
    data = open_dataset(str(path), 8, "gpt2")
    assert (data.vocab_size, data.tokenizer) == (50257, "gpt2") and "no meta.json" in data.note
    (path / "progress.json").write_text("{}")
    with pytest.raises(DataError, match="is not prepared to the end; run the same preparation"):
        open_dataset(str(path), 8, "gpt2")


def test_a_file_that_cannot_be_read_is_named(folder, monkeypatch):
    path, _ = folder
    def refuse(name, *args):
        raise PermissionError(13, "Permission denied", str(name))
    monkeypatch.setattr("nanosophia.schemas.read_bytes", refuse)
    with pytest.raises(DataError, match="meta.json cannot be read: Permission denied"):
        open_dataset(str(path), 8)


def test_missing_data_says_how_to_prepare_it(refused):
    line = refused(train.main, ["--dataset=openwebtext", "--device=cpu"])
    assert "train.bin not found; run python data/openwebtext/prepare.py" in line
    line = refused(train.main, ["--dataset=nowhere", "--device=cpu"])
    assert "takes a prepared folder, or one of data/: fineweb, openwebtext, pile" in line


def shorten(path, meta):
    (path / "val.bin").write_bytes(bytes(16))
    splits = {split: dict(file=f"{split}.bin", tokens=tokens, documents=2, sha256="0" * 64)
              for split, tokens in (("train", 100), ("val", 8))}
    meta(splits=splits)


@pytest.mark.trial(9)
@pytest.mark.parametrize("spoil, words", [
    (lambda p, meta: (p / "val.bin").unlink(), "val.bin not found"),
    (lambda p, meta: (p / "train.bin").write_bytes(b"123"), "odd size of 3 bytes"),
    (lambda p, meta: (p / "train.bin").write_bytes(b""), "holds 0 tokens"),
    (lambda p, meta: shorten(p, meta), "window needs block_size + 1 = 9"),
    (lambda p, meta: (p / "train.bin").write_bytes(bytes(80)), "holds 40 tokens but"),
    (lambda p, meta: meta(vocab_size=40), "holds id 49 at position 49, outside the"),
    (lambda p, meta: meta(dtype="uint32"), "dtype: Input should be 'uint16'"),
    (lambda p, meta: (p / "meta.json").write_text("{"), "not what preparation writes"),
    (lambda p, meta: (p / "meta.json").write_text("{}"), "not what preparation writes"),
    (lambda p, meta: (p / "meta.json").write_bytes(b"\xff"), "not what preparation writes"),
    (lambda p, meta: meta(vocab_size="abc"), "not what preparation writes"),
    (lambda p, meta: meta(vocab_size=-5), "not what preparation writes"),
    (lambda p, meta: meta(splits={"train": 5}), "not what preparation writes"),
])
def test_data_that_does_not_fit_is_refused_by_file(folder, spoil, words):
    spoil(*folder)
    with pytest.raises(DataError, match=words.replace("+", r"\+")):
        open_dataset(str(folder[0]), 8)

"""Folders that nanoGPT's shakespeare_char prepared: read with their characters, or refused."""

import pickle

import numpy as np
import pytest

import sample
import train
from nanosophia.dataloader import DataError, open_dataset
from nanosophia.tokenizer import TextStream, TokenizerError, byte_lengths
from tests.conftest import made_up_text, run_train

TEXT = "First Citizen:\nBefore we proceed, hör mich!\n" + made_up_text(20_000, 3)


@pytest.fixture
def folder(tmp_path):
    """A folder as nanoGPT's prepare.py writes it."""
    characters = sorted(set(TEXT))
    numbers = {c: i for i, c in enumerate(characters)}
    for name, part in (("train", TEXT[:18_000]), ("val", TEXT[18_000:])):
        np.array([numbers[c] for c in part], dtype=np.uint16).tofile(tmp_path / f"{name}.bin")
    write(tmp_path, dict(vocab_size=len(characters), stoi=numbers,
                         itos=dict(enumerate(characters))))
    return tmp_path


def write(folder, meta):
    with open(folder / "meta.pkl", "wb") as file:
        pickle.dump(meta, file)


@pytest.mark.parametrize("bare", ["none", "gpt2"])
def test_its_characters_are_the_vocabulary(folder, bare):
    data = open_dataset(str(folder), 64, bare)
    assert data.vocab_size == len(set(TEXT)) + 1 and "nanoGPT's" in data.note
    encoding = data.encoding()
    ids = data.train[:100].astype(int).tolist()
    assert encoding.decode(ids) == TEXT[:100]
    assert encoding.encode_ordinary(TEXT[:100]) == ids
    lengths = byte_lengths(encoding)
    assert sum(lengths[i] for i in ids) == len(TEXT[:100].encode())
    stream = TextStream(encoding)
    assert "".join([*(stream.push(i) for i in ids), stream.end()]) == TEXT[:100]
    with pytest.raises(TokenizerError, match="the text has '日', which the vocabulary lacks"):
        encoding.encode_ordinary("a日a")


def test_a_run_trains_resumes_and_samples_its_characters(folder, tiny, tmp_path, capsys, refused):
    flags = [*tiny("--max_iters=4"), f"--dataset={folder}", "--sample_tokens=20"]
    run_train(*flags)
    assert "lists " in capsys.readouterr().out
    run_train(*flags, "--init_from=resume", "--max_iters=6")
    capsys.readouterr()
    out = f"--out_dir={tmp_path / 'run'}"
    sample.main([out, "--start=First", "--num_samples=1", "--max_new_tokens=30", "--device=cpu"])
    assert set(capsys.readouterr().out) <= set(TEXT) | set("-\n<|endoftext|>")
    assert "which the vocabulary lacks" in refused(
        sample.main, [out, "--start=日", "--num_samples=1", "--max_new_tokens=3", "--device=cpu"])


class Evil:
    def __reduce__(self):
        return print, ("it ran",)


@pytest.mark.parametrize("meta, words", [
    (Evil(), "it asks for builtins.print"), (dict(stoi=Evil()), "it asks for builtins.print"),
    ({}, "'stoi'"), ([1], "list indices"), (dict(stoi={"a": 0}, vocab_size=2), "does not number"),
    (dict(stoi={"a": 1}, vocab_size=1), "does not number"),
    (dict(stoi={"ab": 0}, vocab_size=1), "does not number"),
    (dict(stoi={b"a": 0}, vocab_size=1), "does not number"),
    (dict(stoi={"a": False}, vocab_size=1), "does not number"),
    (dict(stoi={}, vocab_size=0), "does not number"), (np.float64(3), "it asks for numpy")])
def test_anything_but_a_plain_list_of_characters_is_refused(folder, capsys, refused, meta, words):
    write(folder, meta)
    line = refused(train.main, [f"--dataset={folder}", "--block_size=64"])
    assert words in line and "prepare the folder again" in line
    assert "it ran" not in capsys.readouterr().out


def test_damaged_lists_and_ids_outside_are_refused(folder, refused):
    content = (folder / "meta.pkl").read_bytes()
    for damaged in (b"", content[:50], b"\x80\x04" + b"(" * 100):
        (folder / "meta.pkl").write_bytes(damaged)
        with pytest.raises(TokenizerError, match="not a nanoGPT's list of characters"):
            open_dataset(str(folder), 64)
    (folder / "meta.pkl").write_bytes(content)
    np.full(5000, 300, dtype=np.uint16).tofile(folder / "train.bin")
    with pytest.raises(DataError, match="outside the vocabulary"):
        open_dataset(str(folder), 64)


def test_ids_that_are_too_small_for_gpt2_are_not_taken_for_its_tokens(folder):
    (folder / "meta.pkl").unlink()
    with pytest.raises(DataError, match="no id above .* so GPT-2's tokenizer did not make it"):
        open_dataset(str(folder), 64, "gpt2")

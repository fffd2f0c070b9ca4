"""nanoGPT's folders and checkpoints, read and written."""

import hashlib
import io
import json
import pickle
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch

import sample
import train
from nanosophia import huggingface
from nanosophia.corpus import write_corpus
from nanosophia.dataloader import DataError, open_dataset
from nanosophia.tokenizer import TextStream, TokenizerError, byte_lengths, start_token
from nanosophia.weights import foreign_weights, run_weights
from tests.conftest import listed, made_up_text, run_train, script

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
    assert data.vocab_size == len(set(TEXT)) and "nanoGPT's" in data.note
    encoding = data.encoding()
    assert encoding.n_vocab == data.vocab_size and encoding.eot_token is None
    assert encoding.decode([start_token(encoding)]) == "\n"
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
    assert set(capsys.readouterr().out) <= set(TEXT) | set("-\n")
    (tmp_path / "empty.txt").touch()
    sample.main([out, f"--start=FILE:{tmp_path / 'empty.txt'}", "--num_samples=2",
                 "--max_new_tokens=30", "--device=cpu"])
    assert "endoftext" not in capsys.readouterr().out
    transformers = pytest.importorskip("transformers")
    huggingface.main([out, f"--export={tmp_path / 'hf'}"])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs.decode(theirs(TEXT[:50])["input_ids"]) == TEXT[:50] and len(theirs) == len(
        set(TEXT))
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


def test_characters_without_a_line_break_are_sampled_and_scored_or_refused(tiny, tmp_path, capsys,
                                                                            refused):
    from experiments import plot
    (tmp_path / "in.txt").write_text("abcd" * 2000)
    script("shakespeare_char").main([f"--input={tmp_path / 'in.txt'}",
                                     f"--out_dir={tmp_path / 'data'}"])
    flags = [*tiny("--max_iters=2"), f"--dataset={tmp_path / 'data'}"]
    run_train(*flags)
    out = f"--out_dir={tmp_path / 'run'}"
    for more in ([], ["--start=<|endoftext|>"], ["--start=<|endoftext|>ab"]):
        sample.main([out, "--num_samples=2", "--max_new_tokens=5", "--device=cpu", *more])
    plot.main([f"--runs={tmp_path / 'run'}", f"--report={tmp_path / 'x.html'}"])
    assert "abcd" in (tmp_path / "x.html").read_text()
    question = dict(ind=0, ctx="A man", endings=["eats.", "flies.", "swims.", "sits."], label=0,
                    ctx_a="A man", ctx_b="", activity_label="x")
    (tmp_path / "q.jsonl").write_text(json.dumps(question) + "\n")
    line = refused(train.main, [*flags, "--eval_tasks=hellaswag", f"--out_dir={tmp_path / 'other'}",
                                f"--hellaswag_file={tmp_path / 'q.jsonl'}"])
    assert "which the vocabulary lacks" in line
    assert not list((tmp_path / "other").glob("metrics.jsonl"))


def test_bytes_are_spelled_for_nanogpt_and_other_tokens_are_not(tmp_path, gpt2_cache):
    text = made_up_text(9000, 1) + "Grüße"
    documents = listed([("train", text), ("val", text)])
    write_corpus(documents, tmp_path, "bytes")
    meta = pickle.loads((tmp_path / "meta.pkl").read_bytes())
    ids = [meta["stoi"][c] for c in text if c.isascii()]
    assert "".join(meta["itos"][i] for i in ids) == "".join(c for c in text if c.isascii())
    assert meta["vocab_size"] == 257 and meta["itos"][256] == "<|endoftext|>"
    (tmp_path / "meta.json").unlink()  # as on the way to nanoGPT and back
    data = open_dataset(str(tmp_path), 64)
    assert (data.tokenizer, data.vocab_size) == ("bytes", 257)
    assert data.encoding().decode(data.train.tolist()) == text + "<|endoftext|>"
    write_corpus(documents, tmp_path, "gpt2")
    assert not (tmp_path / "meta.pkl").exists()


def serve(monkeypatch, answer):
    """Lets the script fetch an answer, or meet an error."""
    def urlopen(address, timeout):
        if isinstance(answer, Exception):
            raise answer
        return io.BytesIO(answer)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)


def test_shakespeare_is_prepared_as_nanogpt_does(tmp_path, monkeypatch, capsys, refused):
    prepare = script("shakespeare_char")
    content = TEXT.encode()
    monkeypatch.setattr(prepare, "SHA256", hashlib.sha256(content).hexdigest())
    serve(monkeypatch, content)
    prepare.main([f"--out_dir={tmp_path / 'a'}"])
    (tmp_path / "mine.txt").write_bytes(TEXT.replace("\n", "\r\n").encode())
    prepare.main([f"--out_dir={tmp_path / 'b'}", f"--input={tmp_path / 'mine.txt'}"])
    characters = sorted(set(TEXT))
    cut = int(len(TEXT) * 0.9)
    for name, part in (("train.bin", TEXT[:cut]), ("val.bin", TEXT[cut:])):
        expected = np.array([characters.index(c) for c in part], dtype=np.uint16).tobytes()
        assert (tmp_path / "a" / name).read_bytes() == expected
        assert (tmp_path / "b" / name).read_bytes() == expected
    meta = pickle.loads((tmp_path / "a" / "meta.pkl").read_bytes())
    assert meta == dict(vocab_size=len(characters), itos=dict(enumerate(characters)),
                        stoi={c: i for i, c in enumerate(characters)})
    assert open_dataset(str(tmp_path / "a"), 64).vocab_size == len(characters)
    capsys.readouterr()
    serve(monkeypatch, content + b"x")
    assert "gave another file than the published one" in refused(
        prepare.main, [f"--out_dir={tmp_path / 'c'}"])
    serve(monkeypatch, urllib.error.URLError("no network"))
    assert "could not be fetched" in refused(prepare.main, [f"--out_dir={tmp_path / 'c'}"])
    (tmp_path / "latin1.txt").write_bytes("Grüße".encode("latin-1"))
    for name, words in (("latin1.txt", "is not UTF-8"), ("none.txt", "cannot be read")):
        assert words in refused(prepare.main, [f"--input={tmp_path / name}"])
    write_corpus(listed([("train", TEXT), ("val", TEXT)]), tmp_path / "d", "bytes")
    assert "holds data of another preparation" in refused(
        prepare.main, [f"--input={tmp_path / 'mine.txt'}", f"--out_dir={tmp_path / 'd'}"])


@pytest.mark.parametrize("flags", [(), ("--bias", "--activation=gelu", "--dropout=0.1")])
def test_a_run_becomes_a_checkpoint_of_nanogpt(tiny, tmp_path, capsys, refused, flags):
    run_train(*tiny("--max_iters=4", "--eval_interval=2", *flags))
    file = tmp_path / "ng" / "ckpt.pt"
    command = [f"--out_dir={tmp_path / 'run'}", f"--export_nanogpt={file}"]
    capsys.readouterr()
    huggingface.main(command)
    said = capsys.readouterr().out
    assert ("tanh approximation" in said) is (not flags) and "meta.pkl" in said
    content = torch.load(file, weights_only=True)
    assert set(content) == {"model", "model_args", "optimizer", "iter_num", "best_val_loss",
                            "config"}
    assert content["iter_num"] == 4 and 0 < content["best_val_loss"] < 10
    assert set(content["model_args"]) == {"n_layer", "n_head", "n_embd", "block_size", "bias",
                                          "vocab_size", "dropout"}
    run, back = run_weights(tmp_path / "run"), foreign_weights(str(file))
    assert back.config.activation == run.config.activation and back.num_classes == 257
    for name, x in run.tensors.items():
        assert torch.equal(back.tensors[name], x[:257] if "wte" in name else x), name
    # The optimizer that nanoGPT makes: matrices, then vectors, in the order of the module.
    parameters = list(back.build().parameters())
    groups = [[p for p in parameters if (p.dim() >= 2) is matrices] for matrices in (True, False)]
    optimizer = torch.optim.AdamW([dict(params=g) for g in groups])
    optimizer.load_state_dict(content["optimizer"])
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    sum(p.sum() for p in parameters).backward()
    optimizer.step()
    assert "exists; remove it" in refused(huggingface.main, command)


def test_what_nanogpt_cannot_compute_is_not_exported(tiny, tmp_path, refused, capsys):
    run_train(*tiny("--max_iters=2", "--scale_attn_by_inverse_layer_idx"))
    capsys.readouterr()
    command = [f"--out_dir={tmp_path / 'run'}", f"--export_nanogpt={tmp_path / 'ckpt.pt'}"]
    line = refused(huggingface.main, command)
    assert "scale_attn_by_inverse_layer_idx = True, which nanoGPT cannot compute" in line
    assert "nanoGPT opens FOLDER/ckpt.pt; give that name" in refused(
        huggingface.main, [command[0], f"--export_nanogpt={tmp_path / 'out'}"])
    assert "give one of --export=FOLDER" in refused(
        huggingface.main, [*command, f"--export={tmp_path / 'hf'}"])
    assert not (tmp_path / "ckpt.pt").exists()

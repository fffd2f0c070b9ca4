"""Preparation: nanoGPT's format, the same bytes for any number of processes, clear refusals."""

import hashlib
import importlib.util
import json
import os

import numpy as np
import pytest

from corpus import CorpusError, find_files, read_documents, write_corpus
from tests.conftest import ROOT, SHARED
from tokenizer import EOT, TokenizerError, fingerprint, get_tokenizer

GPT2_CACHE = SHARED / "tiktoken_cache"


def script(name):
    """The module data/<name>/prepare.py."""
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", ROOT / "data" / name /
                                                  "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def gpt2_cache(monkeypatch):
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        if not GPT2_CACHE.is_dir():
            pytest.skip(f"GPT-2's tokenizer files are not at hand: {GPT2_CACHE} is not there and "
                        "TIKTOKEN_CACHE_DIR is not set")
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(GPT2_CACHE))


def test_bytes_tokenizer_is_one_id_a_byte():
    encoding = get_tokenizer("bytes")
    text = "héllo\n\t世界" * 50
    assert encoding.encode_ordinary(text) == list(text.encode())
    assert encoding.decode(encoding.encode_ordinary(text)) == text
    assert (encoding.n_vocab, encoding.eot_token) == (257, 256)
    assert encoding.encode(EOT, allowed_special={EOT}) == [256]


def test_an_unknown_tokenizer_is_refused():
    with pytest.raises(TokenizerError, match="'gpt3' is none of gpt2, bytes"):
        get_tokenizer("gpt3")


def test_a_damaged_gpt2_file_is_refused_and_kept(tmp_path, monkeypatch):
    path = tmp_path / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"
    path.write_text("damaged")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(TokenizerError, match=r"is damaged .*vocab\.bpe"):
        get_tokenizer("gpt2")
    assert path.read_text() == "damaged"


def test_without_network_or_files_gpt2_says_how_to_supply_them(tmp_path, monkeypatch):
    import tiktoken.load
    import tiktoken.registry
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setattr(tiktoken.load, "read_file", lambda path: 1 / 0)
    with pytest.raises(TokenizerError, match="set TIKTOKEN_CACHE_DIR.*vocab.bpe.*encoder.json"):
        get_tokenizer("gpt2")


@pytest.mark.parametrize("num_proc", [1, 2])
def test_files_hold_each_document_and_end_of_text_in_order(tmp_path, monkeypatch, num_proc):
    monkeypatch.setattr("corpus.BATCH_CHARACTERS", 50)
    documents = [("val" if i % 7 == 3 else "train", f"document {i} " * (i % 5)) for i in range(60)]
    meta = write_corpus(documents, tmp_path, "bytes", source="here", num_proc=num_proc)
    assert json.loads((tmp_path / "meta.json").read_text()) == meta
    for split in ("train", "val"):
        expected = [i for s, text in documents if s == split for i in [*text.encode(), 256]]
        ids = np.fromfile(tmp_path / f"{split}.bin", dtype=np.uint16)
        assert ids.tolist() == expected
        said = meta["splits"][split]
        assert said["tokens"] == len(expected)
        assert said["documents"] == sum(s == split for s, _ in documents)
        assert said["sha256"] == hashlib.sha256(ids.tobytes()).hexdigest()
    assert meta["tokenizer_sha256"] == fingerprint(get_tokenizer("bytes"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["meta.json", "train.bin", "val.bin"]


def test_an_empty_split_or_a_failing_source_leaves_nothing_behind(tmp_path):
    with pytest.raises(CorpusError, match="no document for the val split"):
        write_corpus([("train", "a")], tmp_path, "bytes", source="here")

    def failing():
        yield "train", "a"
        raise CorpusError("row 1 is bad")

    with pytest.raises(CorpusError, match="row 1 is bad"):
        write_corpus(failing(), tmp_path, "bytes", source="here")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, content, words", [
    ("a.jsonl", '{"text": "x"}\n{"txt": "x"}\n', r"a.jsonl, line 2: not a JSON object with 'text'"),
    ("a.jsonl", '{"text": "x"}\n{"te', r"a.jsonl, line 2"),
    ("a.jsonl", '{"text": 5}\n', r"line 1: text is 5, not text"),
    ("a.parquet", "no parquet", r"a.parquet is not a readable parquet file"),
])
def test_bad_rows_are_named_by_file_and_row(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(CorpusError, match=words):
        list(read_documents(find_files(str(tmp_path))))


def test_inputs_are_files_folders_and_globs(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["p0", "p1"], "n": [1, 2]}),
                        tmp_path / "b.parquet")
    (tmp_path / "a.jsonl").write_text('{"text": "j0"}\n\n{"text": "j1"}\n')
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.txt").write_text("t0")
    assert list(read_documents(find_files(str(tmp_path)))) == ["j0", "j1", "p0", "p1", "t0"]
    both = find_files(f"{tmp_path}/*.jsonl,{tmp_path}/sub")
    assert list(read_documents(both)) == ["j0", "j1", "t0"]
    with pytest.raises(CorpusError, match="matches no file"):
        find_files(str(tmp_path / "*.csv"))
    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "d.parquet")
    with pytest.raises(CorpusError, match="no column 'text', only body"):
        list(read_documents([tmp_path / "d.parquet"]))


def test_openwebtext_takes_nanogpts_validation_documents():
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"row": list(range(5001))})
    split = rows.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    module = script("openwebtext")
    assert module.validation_rows(5001) == set(split["test"]["row"])
    assert [s for s, _ in module.with_split(["a", "b"], 2)].count("val") == 1


def test_openwebtext_prepares_local_files(tmp_path, gpt2_cache, capsys, refused):
    (tmp_path / "in.jsonl").write_text("".join(f'{{"text": "document {i}"}}\n' for i in range(20)))
    module = script("openwebtext")
    module.main([f"--input={tmp_path / 'in.jsonl'}", f"--out_dir={tmp_path / 'out'}"])
    assert "train, 19 documents" in capsys.readouterr().out
    ids = np.fromfile(tmp_path / "out" / "train.bin", dtype=np.uint16)
    assert get_tokenizer("gpt2").decode(ids.tolist()).count(EOT) == 19
    assert "matches no file" in refused(module.main, [f"--input={tmp_path / 'none.txt'}"])
    assert "unknown key inptu in flag" in refused(module.main, ["--inptu=x"])


def test_stdlib_prepares_the_running_pythons_library(tmp_path, capsys):
    script("stdlib").main([f"--out_dir={tmp_path}"])
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["splits"]["train"]["tokens"] > 2_000_000
    share = meta["splits"]["val"]["tokens"] / meta["splits"]["train"]["tokens"]
    assert 0.01 < share < 0.2
    val = np.fromfile(tmp_path / "val.bin", dtype=np.uint16)
    text = get_tokenizer("bytes").decode(val.tolist())
    assert "import " in text

"""Preparation: nanoGPT's format, the same bytes for any number of processes, clear refusals."""

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nanosophia import corpus, files
from nanosophia.corpus import verify, write_corpus
from nanosophia.dataloader import DataError, open_dataset
from nanosophia.documents import CorpusError, Documents, hub_documents, local_documents
from nanosophia.folder_lock import LockError
from nanosophia.tokenizer import EOT, TokenizerError, byte_lengths, fingerprint, get_tokenizer
from tests.conftest import ROOT, CutOff, listed, script


def read_meta(folder):
    return json.loads((folder / "meta.json").read_text())


def test_bytes_tokenizer_is_one_id_a_byte():
    encoding = get_tokenizer("bytes")
    text = "héllo\n\t世界" * 50
    assert encoding.encode_ordinary(text) == list(text.encode())
    assert encoding.decode(encoding.encode_ordinary(text)) == text
    assert (encoding.n_vocab, encoding.eot_token) == (257, 256)
    assert encoding.encode(EOT, allowed_special={EOT}) == [256]


def test_lengths_of_ids_add_up_to_the_texts_bytes(gpt2_cache, tokenizer_json):
    text = "naïve  text\n日本 🎉 of many  words"
    for name in ("bytes", "gpt2", str(tokenizer_json)):
        encoding = get_tokenizer(name)
        lengths = byte_lengths(encoding)
        assert sum(lengths[i] for i in encoding.encode_ordinary(text)) == len(text.encode()), name
        assert lengths[encoding.eot_token] == 0 and len(lengths) == encoding.n_vocab


def test_documents_cannot_be_ended_without_an_end_of_text(tmp_path):
    pytest.importorskip("tokenizers")
    path = tmp_path / "t.json"
    path.write_text(json.dumps(dict(version="1.0", model=dict(
        type="BPE", vocab={"a": 0, "b": 1}, merges=[]))))
    assert get_tokenizer(str(path)).encode_ordinary("ab") == [0, 1]
    with pytest.raises(CorpusError, match=r"has no <\|endoftext\|> to end documents with"):
        write_corpus(listed([("train", "ab"), ("val", "ab")]), tmp_path / "out", str(path))


def test_an_unknown_tokenizer_is_refused():
    with pytest.raises(TokenizerError, match="'gpt3' is none of gpt2, bytes"):
        get_tokenizer("gpt3")
    with pytest.raises(TokenizerError, match=r"nowhere.json could not be read"):
        get_tokenizer("nowhere.json")


@pytest.fixture
def tokenizer_json(tmp_path):
    """A small byte-level BPE in the format of GPT-NeoX's tokenizer.json."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator(["the cat sat on the mat " * 20], tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=[EOT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.save(str(tmp_path / "some.json"))
    return tmp_path / "some.json"


def test_a_tokenizer_file_gives_what_tiktoken_does(tokenizer_json):
    encoding = get_tokenizer(str(tokenizer_json))
    text = "the cat, 世界" + EOT
    ids = encoding.encode_ordinary(text)
    assert encoding.eot_token not in ids and encoding.decode(ids) == text
    assert encoding.encode_to_numpy(text).tolist() == ids
    assert encoding.encode(text, allowed_special={EOT})[-1] == encoding.eot_token
    assert max(ids) < encoding.n_vocab <= 300


def test_the_pile_keeps_its_splits_and_its_tokenizer(tmp_path, tokenizer_json, refused, capsys):
    for name, count in (("train0", 5), ("train1", 4), ("val", 3)):
        (tmp_path / f"{name}.jsonl").write_text("".join(
            json.dumps({"text": f"the {name} cat {i}", "meta": {}}) + "\n" for i in range(count)))
    module, out = script("pile"), tmp_path / "out"
    flags = [f"--train={tmp_path}/train*.jsonl", f"--val={tmp_path}/val.jsonl",
             f"--tokenizer={tokenizer_json}", f"--out_dir={out}", "--block_size=4"]
    module.main(flags)
    tokenizer_json.unlink()
    assert (out / "tokenizer.json").is_file()
    data = open_dataset(str(out), 4)
    encoding = get_tokenizer(data.tokenizer)
    assert encoding.decode(data.val.tolist()) == "".join(f"the val cat {i}{EOT}" for i in range(3))
    assert encoding.decode(data.train.tolist()).count(EOT) == 9
    capsys.readouterr()
    module.main([*flags[:2], "--verify", f"--out_dir={out}"])
    assert "3 documents" in capsys.readouterr().out
    assert "could not be read" in refused(module.main, flags)
    assert "give --train=FILES and --val=FILES" in refused(
        module.main, [f"--tokenizer={out / 'tokenizer.json'}", f"--out_dir={tmp_path / 'p'}"])


def test_any_text_is_prepared_and_its_share_is_for_validation(tmp_path, refused):
    module = script("text")
    (tmp_path / "many").mkdir()
    for i in range(12):
        (tmp_path / "many" / f"{i:02d}.txt").write_text(f"{i}")
    for share, expected in ((0.25, "3 7 11"), (0.4, "2 4 7 9"), (0.5, "1 3 5 7 9 11"),
                            (0.01, "11")):
        documents = module.text_documents(str(tmp_path / "many"), share)
        assert [t for s, t in documents.read(0) if s == "val"] == expected.split(), share
    assert "no input: give files, folders or globs" in refused(
        module.main, [f"--out_dir={tmp_path / 'x'}", "--tokenizer=bytes"])
    assert "val_fraction = 0.6 must be at most 0.5" in refused(
        module.main, [f"--out_dir={tmp_path / 'x'}", "--val_fraction=0.6"])


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
@pytest.mark.parametrize("text", ["x" * 3000, "\n" + "x" * 2999, "wording " * 1000,
                                  "a line of text\n" * 300, "世" * 1000, "ab"])
def test_one_document_is_cut_in_two_at_a_token(tmp_path, request, monkeypatch, tokenizer, text):
    if tokenizer == "gpt2":
        request.getfixturevalue("gpt2_cache")
    monkeypatch.setattr("nanosophia.encoding.BATCH_CHARACTERS", 300)
    (tmp_path / "one.txt").write_text(text)
    documents = script("text").text_documents(str(tmp_path / "one.txt"), 0.1)
    encoding = get_tokenizer(tokenizer)
    ids = encoding.encode_ordinary(text)
    if round(0.9 * len(ids)) == len(ids):  # a single token
        with pytest.raises(CorpusError, match="of 1 tokens for the val split"):
            write_corpus(documents, tmp_path / "out", tokenizer)
        return
    meta = write_corpus(documents, tmp_path / "out", tokenizer)
    data = open_dataset(str(tmp_path / "out"), 1)
    cut, end = round(0.9 * len(ids)), [encoding.eot_token]
    assert data.train.tolist() == ids[:cut] + end and data.val.tolist() == ids[cut:] + end
    assert meta["splits"]["val"]["documents"] == 1 and verify(tmp_path / "out")


@pytest.mark.parametrize("content, words", [
    (b"", "1 documents of 1 tokens"), (b"x", "needs block_size"), (b"x" * 9000, "val split")])
def test_a_split_too_short_for_a_window_is_refused_and_leaves_nothing(tmp_path, refused, content,
                                                                      words):
    (tmp_path / "one.txt").write_bytes(content)
    flags = [f"--input={tmp_path / 'one.txt'}", f"--out_dir={tmp_path / 'out'}",
             "--tokenizer=bytes"]
    line = refused(script("text").main, flags)
    assert words in line and "give more text" in line
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["lock"]
    if len(content) == 9000:
        script("text").main([*flags, "--block_size=400"])
        open_dataset(str(tmp_path / "out"), 400)


@pytest.mark.parametrize("changed, words", [
    ("--val_fraction=0.1", "val_fraction = 0.05, now 0.1"),
    ("--tokenizer=gpt2", "tokenizer = bytes, now gpt2"),
    ("--input=.", "input = ")])
def test_what_continues_is_what_began(tmp_path, monkeypatch, refused, request, changed, words):
    if "gpt2" in changed:
        request.getfixturevalue("gpt2_cache")
    (tmp_path / "in.jsonl").write_text("".join(
        json.dumps({"text": f"document {i} " * 200}) + "\n" for i in range(60)))
    (tmp_path / "in.txt").write_text("bad" * 1000)
    module = script("text")
    with open(tmp_path / "in.txt", "ab") as file:
        file.write(b"\xff")  # read last, after the others were saved
    flags = [f"--input={tmp_path}", "--tokenizer=bytes", f"--out_dir={tmp_path / 'out'}"]
    assert "is not readable UTF-8" in refused(module.main, flags)
    monkeypatch.chdir(tmp_path)
    assert words in refused(module.main, [*flags, changed])
    assert "is not readable UTF-8" in refused(module.main, flags)  # the first one still continues


def test_two_preparations_of_one_folder_are_refused_by_name(tmp_path):
    def read(start):
        yield from [("train", "a b"), ("val", "c d")]
        with pytest.raises(LockError, match=f"{tmp_path} is in use by process {os.getpid()} on"):
            write_corpus(listed([("train", "a"), ("val", "b")]), tmp_path, "bytes")

    write_corpus(Documents("a list", "a list", 2, read), tmp_path, "bytes")
    verify(tmp_path)


@pytest.mark.trial(14)
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_cut_off_at_any_call_a_preparation_is_the_old_one_unfinished_or_the_new(
        tmp_path, monkeypatch, trials, tokenizer_json):
    """A folder is prepared anew from other documents with another tokenizer."""
    monkeypatch.setattr("nanosophia.encoding.BATCH_CHARACTERS", 64)
    monkeypatch.setattr(corpus, "SAVE_TOKENS", 100)
    old = listed([("train", "old " * 40), ("val", "former " * 9)], "old")
    new = listed([("val" if i % 5 == 0 else "train", f"the cat {i} " * 9) for i in range(20)])
    whole = write_corpus(new, tmp_path / "whole", str(tokenizer_json))
    cut = CutOff(monkeypatch, [(os, "replace"), (os, "fsync"), (os, "unlink"), (os, "open"),
                               (files, "create"), (corpus, "create"),
                               (corpus._SplitFile, "append")])
    points, seen, finished = 0, set(), False
    while not finished:
        folder = tmp_path / f"cut{points}"
        before = write_corpus(old, folder, "bytes")
        points += 1
        finished = cut.run(points, lambda folder=folder: write_corpus(new, folder,
                                                                      str(tokenizer_json)))
        try:
            open_dataset(str(folder), 8)
            verify(folder)
            meta = json.loads((folder / "meta.json").read_text())
            assert meta in (before, whole)
            seen.add(meta["source"])
        except DataError as error:
            assert "is not prepared to the end; run the same preparation again" in str(error)
            seen.add("unfinished")
        write_corpus(new, folder, str(tokenizer_json))
        assert_same_files(tmp_path / "whole", folder)
        verify(folder)
    assert points > 30 and seen == {"old", "a list", "unfinished"}
    trials(points)


@pytest.mark.parametrize("name", ["lock", "progress.json.partial", "meta.json.partial",
                                  "train.bin.partial", "val.bin.partial", "train.bin", "meta.json"])
def test_nothing_is_written_through_a_planted_link(tmp_path, name):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to(victim)
    documents = listed([("train", "a b"), ("val", "c d")])
    try:
        write_corpus(documents, tmp_path / "out", "bytes")
        assert name != "lock" and verify(tmp_path / "out")
    except LockError as error:
        assert name == "lock" and "is a file that no lock of ours wrote" in str(error)
    assert victim.read_text() == "precious"


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
    monkeypatch.setattr("nanosophia.encoding.BATCH_CHARACTERS", 50)
    documents = [("val" if i % 7 == 3 else "train", f"document {i} " * (i % 5)) for i in range(60)]
    meta = write_corpus(listed(documents), tmp_path, "bytes", num_proc=num_proc)
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
    assert sorted(p.name for p in tmp_path.iterdir()) == [
            "lock", "meta.json", "meta.pkl", "train.bin", "val.bin"]


def test_a_long_document_in_pieces_tokenises_as_a_whole(tmp_path, monkeypatch, gpt2_cache):
    monkeypatch.setattr("nanosophia.encoding.BATCH_CHARACTERS", 40)
    monkeypatch.setattr("nanosophia.corpus.SAVE_TOKENS", 1)
    text = (ROOT / "README.md").read_text() + "\n\n  x\n's\r\n don't\n1\n \n2" * 20
    write_corpus(listed([("train", text), ("val", "v"), ("train", text[::-1])]), tmp_path, "gpt2")
    encoding = get_tokenizer("gpt2")
    expected = [*encoding.encode_ordinary(text), encoding.eot_token,
                *encoding.encode_ordinary(text[::-1]), encoding.eot_token]
    assert np.fromfile(tmp_path / "train.bin", dtype=np.uint16).tolist() == expected


def test_a_failing_source_keeps_what_is_done_and_the_next_run_ends_with_the_same_bytes(
        tmp_path, monkeypatch):
    monkeypatch.setattr("nanosophia.encoding.BATCH_CHARACTERS", 64)
    documents = [("val" if i % 5 == 0 else "train", f"document {i} " * 9) for i in range(40)]
    write_corpus(listed(documents), tmp_path / "whole", "bytes")

    def failing(start):
        yield from documents[start:23]
        raise CorpusError("row 23 is bad")

    source = Documents("a list", "a list", 40, failing)
    with pytest.raises(CorpusError, match="row 23 is bad"):
        write_corpus(source, tmp_path / "parts", "bytes")
    saved = json.loads((tmp_path / "parts" / "progress.json").read_text())["splits"]
    assert (saved["train"]["documents"], saved["val"]["documents"]) == (18, 5)
    with pytest.raises(CorpusError, match="holds unfinished work of another command .*source = "
                       "a list, now another"):
        write_corpus(listed(documents, "another"), tmp_path / "parts", "bytes")
    started = []

    def rest(start):
        started.append(start)
        return iter(documents[start:])

    write_corpus(Documents("a list", "a list", 40, rest), tmp_path / "parts", "bytes")
    assert started == [23]
    assert_same_files(tmp_path / "whole", tmp_path / "parts")


def third_are_val(count):
    return lambda row: "val" if row % 3 == 2 else "train"


@pytest.fixture
def divisible(tmp_path, monkeypatch):
    """A folder of parquet and txt files that processes read by themselves, in small groups."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("nanosophia.encoding.PART_BYTES", 4000)
    monkeypatch.setattr("nanosophia.encoding.BATCH_CHARACTERS", 64)
    folder = tmp_path / "in"
    folder.mkdir()
    for name in "bd":
        rows = [f"{name} {i} " * (1 + 97 * i % 40) for i in range(50)]
        parquet.write_table(pyarrow.table({"text": rows}), folder / f"{name}.parquet",
                            row_group_size=12)
    for i in range(30):
        (folder / f"c{i:02}.txt").write_text(f"file {i}\n" * (i + 1))
    return folder


def test_processes_that_read_by_themselves_write_the_same_files(tmp_path, divisible):
    source = local_documents(str(divisible), third_are_val)
    assert len(list(source.parts(0))) == 5 + 30 + 5
    for start in (0, 1, 12, 49, 50, 55, 80, 129, 130):
        assert [x for part in source.parts(start) for x in part.read()] == list(source.read(start))
    one = write_corpus(source, tmp_path / "one", "bytes")
    two = write_corpus(source, tmp_path / "two", "bytes", num_proc=2)
    assert one == two and one["splits"]["val"]["documents"] == 43
    assert_same_files(tmp_path / "one", tmp_path / "two")


def test_an_error_of_a_process_that_reads_keeps_what_was_before_it(tmp_path, divisible):
    bad = divisible / "c17.txt"
    good = bad.read_bytes()
    bad.write_bytes(b"\xff" * len(good))
    os.utime(bad, ns=(0, 0))
    source = local_documents(str(divisible), third_are_val)
    with pytest.raises(CorpusError, match="c17.txt is not readable UTF-8"):
        write_corpus(source, tmp_path / "parts", "bytes", num_proc=2)
    saved = json.loads((tmp_path / "parts" / "progress.json").read_text())["splits"]
    assert saved["train"]["documents"] + saved["val"]["documents"] == 50 + 17
    bad.write_bytes(good)
    os.utime(bad, ns=(0, 0))
    write_corpus(source, tmp_path / "parts", "bytes", num_proc=2)
    write_corpus(source, tmp_path / "whole", "bytes")
    assert_same_files(tmp_path / "whole", tmp_path / "parts")


def test_what_cannot_be_divided_is_read_by_one(tmp_path, divisible, monkeypatch):
    assert local_documents(str(divisible / "c00.txt"), all_train).parts(0) is None
    monkeypatch.setattr("nanosophia.documents.LARGEST_PART", 100)
    assert local_documents(str(divisible), all_train).parts(0) is None
    monkeypatch.undo()
    (divisible / "a.jsonl").write_text('{"text": "x"}\n')
    source = local_documents(str(divisible), third_are_val)
    assert source.parts(0) is None
    write_corpus(source, tmp_path / "two", "bytes", num_proc=2)
    write_corpus(source, tmp_path / "one", "bytes")
    assert_same_files(tmp_path / "one", tmp_path / "two")


def assert_same_files(a, b):
    assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir())
    for path in a.iterdir():
        if path.suffix == ".bin":
            assert path.read_bytes() == (b / path.name).read_bytes()


def written(folder):
    """Bytes of token ids so far, in whatever is there of the files."""
    return sum(path.stat().st_size for path in folder.glob("*.bin.partial"))


@pytest.mark.trial(14)
@pytest.mark.parametrize("num_proc, most", [
    (1, 10), (2, 10), pytest.param(2, 100, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path, num_proc, most, trials):
    """kill -9, so often, then to the end; progress is saved often."""
    (tmp_path / "in.jsonl").write_text("".join(
        json.dumps({"text": f"document {i} " * 200}) + "\n" for i in range(3000)))
    code = ("import sys\nfrom nanosophia import corpus, documents, encoding\n"
            "corpus.SAVE_TOKENS = encoding.BATCH_CHARACTERS = 1 << 16\n"
            "from pathlib import Path\n"
            "source = documents.local_documents(sys.argv[1], lambda n: lambda i: "
            "'val' if i % 9 == 4 else 'train')\n"
            "corpus.write_corpus(source, Path(sys.argv[2]), 'bytes', num_proc=int(sys.argv[3]))")

    def start(out):
        return subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "in.jsonl"), str(tmp_path / out),
             str(num_proc)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start("whole").wait() == 0
    whole_size = sum(path.stat().st_size for path in (tmp_path / "whole").glob("*.bin"))
    random, kills, children = np.random.default_rng(num_proc), 0, set()
    for attempt in range(most + 1):
        process, goal = start("parts"), whole_size * (attempt + random.random()) / (most + 2)
        # Killed when that much is written, however fast the machine is; the last one to the end.
        while process.poll() is None and (attempt == most or written(tmp_path / "parts") < goal):
            time.sleep(0.001)
        if process.poll() is None:
            tasks = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            children |= set(tasks.read_text().split()) if tasks.exists() else set()
            process.kill()
            process.wait()
            kills += 1
            continue
        assert process.returncode == 0
        break
    assert kills > 0.8 * most
    deadline = time.monotonic() + 20  # no worker may outlive its parent for long
    while any(_alive(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [child for child in children if _alive(child)]
    assert_same_files(tmp_path / "whole", tmp_path / "parts")
    trials(kills)


@pytest.mark.parametrize("num_proc", [1, 2])
def test_ctrl_c_ends_a_preparation_in_one_line(tmp_path, num_proc):
    (tmp_path / "in.jsonl").write_text((json.dumps({"text": "some text " * 900}) + "\n") * 9000)
    process = subprocess.Popen(
        [sys.executable, "data/text/prepare.py", f"--input={tmp_path / 'in.jsonl'}",
         "--tokenizer=bytes", f"--out_dir={tmp_path / 'out'}", f"--num_proc={num_proc}"],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,  # a suite started in the background has SIGINT ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    while not (tmp_path / "out" / "progress.json").exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert errors == "interrupted; the same command continues\n"


def _alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_lone_surrogates_of_web_dumps_are_replaced(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "a\\ud800b"}\n{"text": "c"}\n')
    source = local_documents(f"{tmp_path}/in.jsonl,", lambda n: lambda i: ("train", "val")[i])
    write_corpus(source, tmp_path / "out", "bytes")
    ids = np.fromfile(tmp_path / "out" / "train.bin", dtype=np.uint16)
    assert ids.tolist() == [*"a\ufffdb".encode(), 256]


def test_a_full_disk_is_reported(tmp_path, monkeypatch):
    import errno

    def full(self, ids, documents, left_out):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(corpus._SplitFile, "append", full)
    with pytest.raises(CorpusError, match="No space left on device; mend that and run the"):
        write_corpus(listed([("train", "a")]), tmp_path, "bytes")


def test_an_empty_split_is_refused(tmp_path):
    with pytest.raises(CorpusError, match="0 documents of 0 tokens for the val split"):
        write_corpus(listed([("train", "a")]), tmp_path, "bytes")
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.parametrize("name, content, words", [
    ("a.jsonl", b'{"text": "x"}\n{"txt": "x"}\n', "a.jsonl, line 2: no 'text', only 'txt'"),
    ("a.jsonl", b'{"text": "x"}\n[5]\n', "a.jsonl, line 2: not a JSON object with 'text'"),
    ("a.jsonl", b'{"text": "x"}\n\n{"te', "a.jsonl, line 3"),
    ("a.jsonl", b'{"text": 5}\n', "line 1: text is 5, not text"),
    ("a.parquet", b"no parquet", "a.parquet is not a readable parquet file"),
    ("a.jsonl.gz", b"no gzip", "a.jsonl.gz, after line 0: unreadable"),
    ("a.jsonl.zst", b"no zstd", "a.jsonl.zst, after line 0: unreadable"),
    ("a.txt", b"\xff\xfe", "a.txt is not readable UTF-8"),
])
def test_bad_rows_are_named_by_file_and_row(tmp_path, name, content, words):
    pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=words):
        list(texts(local_documents(str(tmp_path), all_train)))


@pytest.mark.parametrize("num_proc", [1, 2])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_without_text_are_left_out_and_counted(tmp_path, capsys, refused, num_proc, kind):
    rows = ["one", None, "", "four", None, "six"] * 20
    if kind == "jsonl":
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(dict(body=row)) + "\n"
                                                   for row in rows))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"body": rows}), tmp_path / "in.parquet",
                            row_group_size=25)
    module = script("text")

    def flags(out, *more):
        return [f"--input={tmp_path / f'in.{kind}'}", "--tokenizer=bytes", "--block_size=1",
                "--column=body", f"--num_proc={num_proc}", f"--out_dir={tmp_path / out}", *more]

    for out, kept, more in (("plain", 80, ()), ("full", 60, ("--skip_empty",))):
        module.main(flags(out, *more))
        said = capsys.readouterr().out
        assert f"{120 - kept} rows had no text and were left out" in said
        splits = read_meta(tmp_path / out)["splits"]
        assert sum(split["documents"] for split in splits.values()) == kept
        module.main(flags(out, "--verify"))
    words = refused(module.main, flags("strict", "--strict"))
    assert "body is None, not text" in words and ("row 1" in words or "line 2" in words)
    assert "only" in refused(module.main, flags("other", "--column=text"))


def test_a_preparation_that_left_rows_out_continues_after_them(tmp_path, monkeypatch):
    """Cut off by an error in the middle, it ends with the bytes of an undisturbed one."""
    rows = [("val", "v" * 50)] + [("train", None if i % 3 else f"text {i}") for i in range(60)]
    source = listed(rows)
    monkeypatch.setattr(corpus, "SAVE_TOKENS", 1)
    monkeypatch.setattr("nanosophia.encoding.BATCH_CHARACTERS", 10)

    def broken(start):
        for row, document in enumerate(rows[start:], start):
            if row == 31:
                raise CorpusError("gone")
            yield document

    with pytest.raises(CorpusError, match="gone"):
        write_corpus(replace(source, read=broken), tmp_path / "a", "bytes")
    first = write_corpus(source, tmp_path / "a", "bytes")
    second = write_corpus(source, tmp_path / "b", "bytes")
    assert first == second
    assert (first["splits"]["train"]["documents"], first["splits"]["train"]["left_out"]) == (20, 40)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_subset_of_a_hub_is_prepared_and_a_missing_one_named_with_those_there_are(
        tmp_path, gpt2_cache, monkeypatch, refused, streaming):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    hub = tmp_path / "hub"
    for name in ("small", "large"):
        (hub / name).mkdir(parents=True)
        parquet.write_table(pyarrow.table({"text": [f"{name} {i}" for i in range(40)]}),
                            hub / name / "train-00000-of-00001.parquet")
    (hub / "README.md").write_text(
        "---\nconfigs:\n" + "".join(
            f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/*\n"
            for name in ("small", "large"))
        + "dataset_info:\n" + "".join(
            f"- config_name: {name}\n  features:\n  - name: text\n    dtype: string\n  splits:\n"
            "  - name: train\n    num_bytes: 400\n    num_examples: 40\n"
            for name in ("small", "large")) + "---\n")
    module = script("fineweb")

    def flags(*more):
        return [f"--hub={hub}", f"--out_dir={tmp_path / 'out'}", "--block_size=1",
                "--val_fraction=0.1", f"--streaming={streaming}", *more]

    module.main(flags("--subset=large"))
    ids = np.fromfile(tmp_path / "out" / "val.bin", dtype=np.uint16)
    assert get_tokenizer("gpt2").decode(ids.tolist()).split(EOT)[:4] == [
        "large 9", "large 19", "large 29", "large 39"]
    line = refused(module.main, flags("--subset=sample-10BT"))
    assert "sample-10BT" in line and "small" in line and "large" in line
    assert "has no column 'body', only text" in refused(
        module.main, flags("--subset=small", "--column=body"))
    if not streaming:
        module.main(flags("--subset=small", "--split=train[:50%]"))
        meta = read_meta(tmp_path / "out")
        assert sum(split["documents"] for split in meta["splits"].values()) == 20


def all_train(count):
    return lambda row: "train"


def texts(documents, start=0):
    return [text for _, text in documents.read(start)]


def test_inputs_are_files_folders_and_globs_read_from_any_document_on(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["p0", "p1", "p2"], "n": [1, 2, 3]}),
                        tmp_path / "b.parquet", row_group_size=2)
    (tmp_path / "a.jsonl").write_text('{"text": "j0"}\n\n{"text": "j1"}')
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.txt").write_text("t0")
    with gzip.open(tmp_path / "sub" / "d.jsonl.gz", "wt") as file:
        file.write('{"text": "g0"}\n')
    with pyarrow.output_stream(str(tmp_path / "sub" / "e.jsonl.zst"), compression="zstd") as file:
        file.write(b'{"text": "z0"}\n{"text": "z1"}\n')
    everything = local_documents(str(tmp_path), all_train)
    expected = ["j0", "j1", "p0", "p1", "p2", "t0", "g0", "z0", "z1"]
    assert everything.count == 9
    for start in range(10):
        assert texts(everything, start) == expected[start:]
    both = local_documents(f"{tmp_path}/*.jsonl,{tmp_path}/sub/c.txt", all_train)
    assert texts(both) == ["j0", "j1", "t0"]
    assert both.identity != everything.identity
    assert local_documents(f"{tmp_path}/a.jsonl,{tmp_path}/*.jsonl", all_train).count == 2
    with pytest.raises(CorpusError, match="matches no file"):
        local_documents(str(tmp_path / "*.csv"), all_train)
    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "d.parquet")
    with pytest.raises(CorpusError, match="no column 'text', only body"):
        texts(local_documents(str(tmp_path / "d.parquet"), all_train))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_local_folder_stands_in_for_the_hub(tmp_path, monkeypatch, gpt2_cache, streaming,
                                              refused):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    rows = [f"document {i}" for i in range(30)]
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for part in (0, 1):
        parquet.write_table(pyarrow.table({"text": rows[15 * part:15 * part + 15]}),
                            tmp_path / "hub" / "data" / f"train-0000{part}-of-00002.parquet")
    (tmp_path / "hub" / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - name: text\n    dtype: string\n  splits:\n"
        "  - name: train\n    num_bytes: 330\n    num_examples: 30\n  download_size: 1\n"
        "  dataset_size: 330\n---\n")
    module = script("openwebtext")
    module.main([f"--hub={tmp_path / 'hub'}", f"--out_dir={tmp_path / 'out'}",
                 f"--streaming={streaming}", "--block_size=1"])
    documents = hub_documents(str(tmp_path / "hub"), "train", module.validation_split,
                              streaming=streaming)
    assert texts(documents, 12) == rows[12:]
    ids = np.fromfile(tmp_path / "out" / "train.bin", dtype=np.uint16)
    assert get_tokenizer("gpt2").decode(ids.tolist()).count(EOT) == 29
    assert "could not be loaded" in refused(module.main, [f"--hub={tmp_path / 'nowhere'}"])


def test_a_hub_that_holds_only_a_loading_script_is_tried_again_and_refused_in_words(
        tmp_path, gpt2_cache, refused):
    pytest.importorskip("datasets")
    (tmp_path / "openwebtext").mkdir()
    (tmp_path / "openwebtext" / "openwebtext.py").write_text("raise SystemExit('it ran')")
    line = refused(script("openwebtext").main, [f"--hub={tmp_path / 'openwebtext'}",
                                                f"--out_dir={tmp_path / 'out'}"])
    assert "could not be loaded" in line and "; then " in line and "--input=FILES" in line


def test_openwebtext_takes_nanogpts_validation_documents():
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"row": list(range(5001))})
    split = rows.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    split_of = script("openwebtext").validation_split(5001)
    assert {row for row in range(5001) if split_of(row) == "val"} == set(split["test"]["row"])


def test_the_full_openwebtext_is_checked_against_the_published_counts():
    module = script("openwebtext")
    published = module.PUBLISHED
    splits = {"train": dict(tokens=published["train"], documents=published["documents"] - 4007),
              "val": dict(tokens=published["val"], documents=4007)}
    module.check_published(dict(splits=splits))
    splits["val"]["tokens"] += 1
    with pytest.raises(CorpusError, match="val.bin holds 4,434,898 tokens, nanoGPT's 4,434,897"):
        module.check_published(dict(splits=splits))


def test_openwebtext_prepares_local_files(tmp_path, gpt2_cache, capsys, refused):
    (tmp_path / "in.jsonl").write_text("".join(f'{{"text": "document {i}"}}\n' for i in range(20)))
    module = script("openwebtext")
    flags = [f"--input={tmp_path / 'in.jsonl'}", f"--out_dir={tmp_path / 'out'}"]
    line = refused(module.main, flags)
    assert "gives 19 documents of 57 tokens for the train split, a window needs block_size" in line
    module.main([*flags, "--block_size=2"])
    assert "train.bin: 19 documents" in capsys.readouterr().out
    module.main([f"--out_dir={tmp_path / 'out'}", "--verify"])
    report = capsys.readouterr().out
    assert "19 documents" in report and "document 0: 'document " in report
    assert "matches no file" in refused(module.main, [f"--input={tmp_path / 'none.txt'}"])
    assert "unknown key inptu in flag" in refused(module.main, ["--inptu=x"])
    (tmp_path / "one.txt").write_text("x")
    assert "1 document is not enough" in refused(module.main, [f"--input={tmp_path / 'one.txt'}",
                                                               f"--out_dir={tmp_path / 'o'}"])


def changed_json(tokenizer_json, tmp_path, **changes):
    content = json.loads(tokenizer_json.read_text()) | changes
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(content))
    return str(path)


def test_a_tokenizer_file_that_truncates_or_pads_does_neither(tmp_path, tokenizer_json):
    documents = listed([("train", "the cat sat " * 50), ("val", "the mat " * 30)])
    plain = write_corpus(documents, tmp_path / "a", str(tokenizer_json))
    changed = write_corpus(documents, tmp_path / "b", changed_json(
        tokenizer_json, tmp_path,
        truncation=dict(direction="Right", max_length=20, strategy="LongestFirst", stride=0),
        padding=dict(strategy=dict(Fixed=800), direction="Right", pad_to_multiple_of=None, pad_id=0,
                     pad_type_id=0, pad_token=EOT)))
    assert changed["splits"] == plain["splits"]


def test_a_tokenizer_file_that_ends_documents_inside_a_text_is_refused(tmp_path, tokenizer_json):
    tokens = json.loads(tokenizer_json.read_text())["added_tokens"]
    path = changed_json(tokenizer_json, tmp_path, added_tokens=[t | dict(special=False)
                                                                for t in tokens])
    with pytest.raises(TokenizerError, match="in a text for the end of a document"):
        get_tokenizer(path)


def test_lone_surrogates_are_replaced_for_a_tokenizer_file_too(tmp_path, tokenizer_json):
    documents = listed([("train", "a\ud800b cat"), ("val", "the cat sat")])
    write_corpus(documents, tmp_path / "out", str(tokenizer_json))
    data = open_dataset(str(tmp_path / "out"), 1)
    assert get_tokenizer(data.tokenizer).decode(data.train.tolist()) == f"a\ufffdb cat{EOT}"


def test_line_ends_of_a_text_stay_as_they_are(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\rthree\n")
    assert texts(local_documents(str(tmp_path / "a.txt"), all_train)) == ["one\r\ntwo\rthree\n"]


@pytest.mark.parametrize("left", ["train.bin.partial", "val.bin.partial", "tokenizer.json.partial"])
def test_files_that_vanish_meanwhile_are_missed_and_the_old_ones_stay(tmp_path, tokenizer_json,
                                                                      monkeypatch, left):
    old = write_corpus(listed([("train", "old " * 40), ("val", "former " * 9)]), tmp_path / "out",
                       "bytes")
    original = corpus._publish

    def publish(out_dir, meta):
        (out_dir / left).unlink()
        original(out_dir, meta)

    monkeypatch.setattr(corpus, "_publish", publish)
    new = listed([("train", "the cat " * 40), ("val", "the mat " * 9)])
    with pytest.raises(CorpusError, match=f"{left} has vanished; remove progress.json"):
        write_corpus(new, tmp_path / "out", str(tokenizer_json))
    assert json.loads((tmp_path / "out" / "meta.json").read_text()) == old
    verify(tmp_path / "out")


def test_a_source_that_ends_early_is_an_error(tmp_path):
    source = Documents("a list", "a list", 5, lambda start: iter([("train", "a"), ("val", "b")]))
    with pytest.raises(CorpusError, match="had 5 documents at first and gave 2; it has changed"):
        write_corpus(source, tmp_path, "bytes")


def test_unfinished_files_that_were_changed_are_not_continued(tmp_path, monkeypatch):
    monkeypatch.setattr("nanosophia.encoding.BATCH_CHARACTERS", 64)
    monkeypatch.setattr(corpus, "SAVE_TOKENS", 50)

    def failing(start):
        yield from [("train", "a text " * 20), ("val", "a text " * 20)][start:]
        raise CorpusError("bad")

    source = Documents("a list", "a list", 3, failing)
    with pytest.raises(CorpusError, match="bad"):
        write_corpus(source, tmp_path, "bytes")
    flip(tmp_path / "train.bin.partial", 3)
    with pytest.raises(CorpusError, match="train.bin.partial is not what progress.json says"):
        write_corpus(source, tmp_path, "bytes")
    (tmp_path / "train.bin.partial").unlink()
    with pytest.raises(CorpusError, match="train.bin.partial is missing; remove progress.json"):
        write_corpus(source, tmp_path, "bytes")


def test_a_lock_that_is_the_users_file_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "lock").write_text("my notes")
    with pytest.raises(LockError, match="is a file that no lock of ours wrote"):
        write_corpus(listed([("train", "a"), ("val", "b")]), tmp_path / "out", "bytes")
    assert (tmp_path / "out" / "lock").read_text() == "my notes"


def test_a_name_that_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "a.txt").write_text("a")
    for pattern in (f"{tmp_path}/a.txt,{tmp_path}/pipe.txt", f"{tmp_path}/*.txt"):
        with pytest.raises(CorpusError, match="pipe.txt is no regular file"):
            local_documents(pattern, all_train)
    with pytest.raises(CorpusError, match="no input"):
        local_documents(",", all_train)


def test_text_that_is_not_utf8_is_refused_among_the_settings(tmp_path, refused):
    line = refused(script("text").main, ["--input=caf\udce9.txt", f"--out_dir={tmp_path}"])
    assert "input = 'caf\\udce9.txt' is not valid UTF-8 at character 3" in line


@pytest.mark.parametrize("changes", [dict(vocab_size=60000), dict(tokenizer_sha256="0" * 64)])
def test_another_tokenizer_than_the_datas_is_refused_where_it_is_needed(tmp_path, changes):
    write_corpus(listed([("train", "abc" * 50), ("val", "xyz")]), tmp_path, "bytes")
    change_meta(tmp_path, **changes)
    with pytest.raises(DataError, match="the tokenizer bytes is not the one that made"):
        open_dataset(str(tmp_path), 2).encoding()


def test_the_next_command_finds_the_folder_and_its_short_splits(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.txt").write_text("x" * 3000)
    script("text").main(["--input=in.txt", "--tokenizer=bytes", "--block_size=64",
                         "--out_dir=a b"])
    assert "--dataset='./a b' --block_size=64" in capsys.readouterr().out


@pytest.mark.parametrize("spoil, words", [
    (lambda p: (p / "meta.json").unlink(), "meta.json is missing, so .* is no prepared folder"),
    (lambda p: change_meta(p, tokenizer_sha256="0" * 64), "tokenizer bytes is not the one of"),
    (lambda p: change_meta(p, vocab_size=256), "vocab_size is 257, not 256"),
    (lambda p: change_meta(p, splits={}), "not what preparation writes .splits.train: Field requi"),
    (lambda p: (p / "val.bin").unlink(), "val.bin is missing or not of"),
    (lambda p: (p / "train.bin").write_bytes((p / "train.bin").read_bytes()[:-2]), "train.bin is"),
    (lambda p: flip(p / "train.bin", 0), "train.bin: sha256 is"),
    (lambda p: flip(p / "val.bin", 3), "val.bin holds id"),
])
def test_verify_finds_what_is_wrong_by_file(tmp_path, spoil, words):
    write_corpus(listed([("train", "abc" * 50), ("val", "xyz"), ("train", "b")]), tmp_path, "bytes")
    assert "document 1: 'b'" in verify(tmp_path)
    spoil(tmp_path)
    with pytest.raises(CorpusError, match=words):
        verify(tmp_path)


def change_meta(folder, **changes):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | changes))


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 64
    path.write_bytes(content)


def test_stdlib_prepares_the_running_pythons_library(tmp_path, capsys):
    script("stdlib").main([f"--out_dir={tmp_path}"])
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["splits"]["train"]["tokens"] > 2_000_000
    share = meta["splits"]["val"]["tokens"] / meta["splits"]["train"]["tokens"]
    assert 0.01 < share < 0.2
    assert "import " in verify(tmp_path)

"""Documents -> train.bin, val.bin (raw uint16 token ids) and meta.json.

The .bin files are nanoGPT's format: the ids of one document after the other, each followed by
end-of-text. meta.json says what they hold, so that train.py can refuse data that does not fit.
Memory is bounded by the largest document; the bytes are the same for any number of processes; a
preparation that was killed continues where it last saved, and ends with the same bytes.
"""

import gzip
import hashlib
import json
import os
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from glob import glob
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from nanosophia.configurator import Settings, UserError, knob
from nanosophia.files import write_text
from nanosophia.tokenizer import (
    EOT,
    FILE_NAME,
    FileEncoding,
    beside,
    fingerprint,
    get_tokenizer,
)

META_FORMAT = 1
SPLITS = ("train", "val")
BATCH_CHARACTERS = 1 << 19  # text handed to a worker at a time
SAVE_TOKENS = 1 << 22  # between two savings of the progress
PROGRESS = "progress.json"


class CorpusError(UserError):
    """A corpus cannot be read or written; the message says which file and what to do."""


@dataclass(frozen=True, kw_only=True)
class PrepareSettings(Settings):
    """What every prepare script takes. `out_dir` defaults to the script's own folder."""

    out_dir: str = knob("", "where train.bin, val.bin and meta.json go; empty = beside the script")
    num_proc: int = knob(1, "tokenising processes", low=1)
    verify: bool = knob(False, "check the prepared folder instead: sizes, ids, checksums; shows a "
                               "few documents")


@dataclass(frozen=True)
class Documents:
    """An ordered collection of documents that can be read from any place on."""

    name: str  # for meta.json and messages
    identity: str  # changes when the documents do, so that no half-done work is mixed
    count: int | None  # None: not known beforehand
    read: Callable[[int], Iterator[tuple[str, str]]]  # (split, text) from document number n on


def prepare(settings: PrepareSettings, here: Path, documents: Callable[[], Documents],
            tokenizer: str) -> dict | None:
    """A prepare script's main: verifies, or writes the corpus and reports. None after verifying."""
    out_dir = Path(settings.out_dir) if settings.out_dir else here
    if settings.verify:
        print(verify(out_dir))
        return None
    get_tokenizer(tokenizer)  # before a long download
    try:
        meta = write_corpus(documents(), out_dir, tokenizer, num_proc=settings.num_proc)
    except KeyboardInterrupt:
        raise CorpusError("interrupted; the same command continues where it stopped") from None
    for split in meta["splits"].values():
        print(f"{out_dir / split['file']}: {split['documents']:,} documents, "
              f"{split['tokens']:,} tokens ({meta['tokenizer']})")
    return meta


def write_corpus(documents: Documents, out_dir: Path, tokenizer: str, *, num_proc: int = 1) -> dict:
    """Tokenises the documents into `out_dir`; returns what meta.json holds.

    Files take their names only when complete; until then they and progress.json hold what is done,
    and the same call continues it. Raises CorpusError when a split stays empty, the disk refuses, a
    document cannot be read, or the folder holds half-done work on other documents.
    """
    encoding = get_tokenizer(tokenizer)
    if encoding.n_vocab > 1 << 16:
        raise CorpusError(f"tokenizer {tokenizer} has {encoding.n_vocab} classes, more than the "
                          "65536 of uint16 ids")
    task = dict(source=documents.name, identity=documents.identity,
                tokenizer_sha256=fingerprint(encoding))
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        splits, done = _open_splits(out_dir, task)
        try:
            _fill(splits, documents, done, task, out_dir, tokenizer, num_proc)
            for name in SPLITS:
                if splits[name].documents == 0:
                    raise CorpusError(f"no document for the {name} split in {documents.name}; give "
                                      "more documents")
            meta = dict(
                format=META_FORMAT, source=documents.name, dtype="uint16", tokenizer=tokenizer,
                tokenizer_sha256=task["tokenizer_sha256"], vocab_size=encoding.n_vocab,
                eot_token=encoding.eot_token,
                splits={name: split.describe() for name, split in splits.items()})
        finally:
            for split in splits.values():
                split.file.close()
        (out_dir / "meta.json").unlink(missing_ok=True)  # it would speak of the old files
        if isinstance(encoding, FileEncoding):
            write_text(out_dir / FILE_NAME, encoding.json)
            meta["tokenizer"] = FILE_NAME
        for split in splits.values():
            os.replace(split.partial, split.path)
        write_text(out_dir / "meta.json", json.dumps(meta, indent=1) + "\n")
        (out_dir / PROGRESS).unlink(missing_ok=True)
    except OSError as error:
        raise CorpusError(f"cannot write to {out_dir}: {error.strerror}; what is done is kept: "
                          "free some space and run the same command again, or give another "
                          "--out_dir") from error
    return meta


class _SplitFile:
    """A .bin file under a temporary name, with its running checksum and counts."""

    def __init__(self, path: Path, saved: dict | None):
        """`saved` is what `progress` said when it was last written; what follows is cut off."""
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        self.digest, self.tokens, self.documents = hashlib.sha256(), 0, 0
        self.file: BinaryIO = open(self.partial, "r+b" if saved else "w+b")  # noqa: SIM115
        if saved:
            self.tokens, self.documents = saved["tokens"], saved["documents"]
            left = 2 * self.tokens
            while left:
                block = self.file.read(min(left, 1 << 20))
                if not block:
                    raise CorpusError(f"{self.partial} is shorter than {PROGRESS} says; remove "
                                      f"both and start again")
                self.digest.update(block)
                left -= len(block)
            self.file.seek(2 * self.tokens)
            self.file.truncate()

    def append(self, ids: bytes, documents: int) -> None:
        self.file.write(ids)
        self.digest.update(ids)
        self.tokens += len(ids) // 2
        self.documents += documents

    def progress(self) -> dict:
        self.file.flush()
        os.fsync(self.file.fileno())
        return dict(tokens=self.tokens, documents=self.documents)

    def describe(self) -> dict:
        return dict(file=self.path.name, **self.progress(), sha256=self.digest.hexdigest())


def _open_splits(out_dir: Path, task: dict) -> tuple[dict[str, _SplitFile], int]:
    """The split files, new or continued, and the number of documents they hold."""
    saved = {}
    if (out_dir / PROGRESS).is_file():
        try:
            progress = json.loads((out_dir / PROGRESS).read_text())
            same, saved = progress["task"] == task, progress["splits"]
        except (ValueError, KeyError, TypeError):
            same = False
        if not same:
            raise CorpusError(f"{out_dir} holds half-done work on other documents ({PROGRESS}); "
                              "remove that file to start again, or give another --out_dir")
    splits = {name: _SplitFile(out_dir / f"{name}.bin", saved.get(name)) for name in SPLITS}
    return splits, sum(split.documents for split in splits.values())


def _fill(splits: dict[str, _SplitFile], documents: Documents, done: int, task: dict,
          out_dir: Path, tokenizer: str, num_proc: int) -> None:
    """Appends every document from number `done` on, saving progress on the way and on errors."""
    def tokens() -> int:
        return sum(split.tokens for split in splits.values())

    def save() -> None:
        progress = dict(task=task, splits={n: split.progress() for n, split in splits.items()})
        write_text(out_dir / PROGRESS, json.dumps(progress, indent=1) + "\n")

    if done:
        print(f"continuing after {done:,} documents and {tokens():,} tokens")
    last_saved, started, whole = tokens(), tokens(), True
    encoded = _encoded(documents.read(done), tokenizer, num_proc)
    try:
        with tqdm(total=documents.count, initial=done, unit=" documents", disable=None) as bar:
            for split, n_documents, whole, ids in encoded:
                splits[split].append(ids, n_documents)
                rate = (tokens() - started) / max(1e-9, bar.format_dict["elapsed"])
                bar.set_postfix_str(f"{tokens():,} tokens, {rate:,.0f}/s", refresh=False)
                bar.update(n_documents)
                if whole and tokens() - last_saved >= SAVE_TOKENS:
                    save()
                    last_saved = tokens()
    except CorpusError:
        if whole:
            save()
        raise
    finally:
        encoded.close()


# Tokenising ---------------------------------------------------------------------------------------


def _encoded(documents: Iterator[tuple[str, str]], tokenizer: str,
             num_proc: int) -> Iterator[tuple[str, int, bool, bytes]]:
    """Consecutive batches, in order: split, number of documents that end in the batch, whether it
    ends with the end of one, uint16 ids."""
    batches = _batched(documents)
    if num_proc == 1:
        for split, texts, ended in batches:
            yield split, sum(ended), ended[-1], _encode(tokenizer, texts, ended)
        return
    with ProcessPoolExecutor(num_proc, initializer=_die_with, initargs=(os.getpid(),)) as pool:
        pending = deque()
        try:
            for split, texts, ended in batches:
                pending.append((split, sum(ended), ended[-1],
                                pool.submit(_encode, tokenizer, texts, ended)))
                if len(pending) > 2 * num_proc:
                    *facts, future = pending.popleft()
                    yield *facts, future.result()
            while pending:
                *facts, future = pending.popleft()
                yield *facts, future.result()
        except BrokenProcessPool:
            raise CorpusError("a tokenising process died (out of memory?); the same command "
                              "continues; try a smaller --num_proc") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _die_with(parent: int) -> None:
    """Ends this worker soon after its parent was killed; it would wait for work forever.

    Ctrl-C is the parent's to answer.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _batched(documents: Iterator[tuple[str, str]]) -> Iterator[tuple[str, list[str], list[bool]]]:
    """Consecutive pieces of one split, about BATCH_CHARACTERS; whether each ends its document.

    A source that fails does so after the batch of what it gave before.
    """
    texts, ended, size, current, failed = [], [], 0, "", None
    try:
        for split, text in documents:
            for piece, ends in _pieces(text):
                if texts and (split != current or size >= BATCH_CHARACTERS):
                    yield current, texts, ended
                    texts, ended, size = [], [], 0
                current = split
                texts.append(piece)
                ended.append(ends)
                size += len(piece)
    except CorpusError as error:
        failed = error
    if texts:
        yield current, texts, ended
    if failed:
        raise failed


# Between a non-space and a line break that a non-space follows, GPT-2's pattern (and NeoX's, the
# same) always splits: both sides tokenise as they do together. The byte-level one does so anywhere.
_CUT = re.compile(r"(?<=\S)\n(?=\S)")


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    """A long document in parts that tokenise as the whole does; the last one is marked."""
    start = 0
    while len(text) - start > 2 * BATCH_CHARACTERS:
        cut = _CUT.search(text, start + BATCH_CHARACTERS)
        if cut is None:
            break
        yield text[start:cut.start()], False
        start = cut.start()
    yield text[start:], True


@cache
def _worker_tokenizer(name: str):
    return get_tokenizer(name)


def _encode(tokenizer: str, texts: list[str], ended: list[bool]) -> bytes:
    """uint16 ids of the pieces, end-of-text after each that ends its document."""
    encoding = _worker_tokenizer(tokenizer)
    end = np.array([encoding.eot_token], dtype=np.uint16)
    parts = []
    for text, ends in zip(texts, ended, strict=True):
        # Text that spells a special token is text, as with encode_ordinary.
        try:
            ids = encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # lone surrogates, replaced as encode_ordinary does
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            ids = encoding.encode_to_numpy(text, disallowed_special=())
        parts.append(ids.astype(np.uint16))
        if ends:
            parts.append(end)
    return np.concatenate(parts).tobytes()


# Sources ------------------------------------------------------------------------------------------


def local_documents(pattern: str, split: Callable[[int], Callable[[int], str]],
                    column: str = "text") -> Documents:
    """The documents of local files: the column of parquet and jsonl files, each whole txt file.

    `pattern` is a comma-separated list of files, folders (searched deeply) and globs; parquet,
    jsonl, jsonl.gz, jsonl.zst and txt. `split(count)` gives the function from a document's number
    to its split. Raises CorpusError when nothing matches or a file cannot be read.
    """
    files = find_files(pattern)
    counts = [_reader(path).count(path) for path in files]
    total = sum(counts)
    split_of = split(total)

    def read(start: int) -> Iterator[tuple[str, str]]:
        first = 0
        for path, count in zip(files, counts, strict=True):
            if start < first + count:
                skip = max(0, start - first)
                for row, text in enumerate(_reader(path).read(path, column, skip), first + skip):
                    yield split_of(row), text
            first += count

    identity = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return Documents(pattern, hashlib.sha256(repr((identity, column)).encode()).hexdigest(), total,
                     read)


def hub_documents(name: str, hub_split: str, split: Callable[[int], Callable[[int], str]], *,
                  streaming: bool, column: str = "text") -> Documents:
    """The documents of a data set of the Hugging Face hub, or of a local folder like one.

    `streaming` reads them without keeping a copy on the disk. Tries the hub's own parquet
    conversion when the main revision is refused (it may hold only a loading script). Raises
    CorpusError when neither can be had.
    """
    try:
        import datasets
    except ImportError:
        raise CorpusError("the package `datasets` is missing; run pip install -r requirements.txt, "
                          "or give local files with --input") from None
    errors = []
    for revision in (None, "refs/convert/parquet"):
        try:
            rows = datasets.load_dataset(name, split=hub_split, revision=revision,
                                         streaming=streaming)
            count = _count_rows(rows, hub_split)
            break
        except Exception as error:  # the hub's clients raise of many kinds
            first_line = str(error).strip().partition("\n")[0]
            errors.append(f"{type(error).__name__}: {first_line}")
    else:
        raise CorpusError(f"{name} could not be loaded ({'; then '.join(errors)}); check the "
                          "network, or give local files with --input=FILES")
    split_of = split(count)

    def read(start: int) -> Iterator[tuple[str, str]]:
        rest = rows.skip(start) if start else rows
        for row, example in enumerate(rest, start):
            if not isinstance(example.get(column), str):
                raise CorpusError(f"{name}, row {row}: no text in the column {column!r}")
            yield split_of(row), example[column]

    identity = f"{name} {hub_split} {count} {rows.info.version}"
    return Documents(name, identity, count, read)


def _count_rows(rows, hub_split: str) -> int:
    if hasattr(rows, "__len__"):
        return len(rows)
    count = rows.info.splits[hub_split].num_examples if rows.info.splits else None
    if count is None:
        raise CorpusError("its number of documents is not known in advance; leave out --streaming")
    return count


def find_files(pattern: str) -> list[Path]:
    """Files of a comma-separated list of files, folders and globs; sorted within each, once."""
    if not pattern:
        raise CorpusError("no input: give --input=FILES (files, folders or globs)")
    files = []
    for part in filter(None, pattern.split(",")):
        path = Path(part)
        found = ([p for p in path.rglob("*") if _reader(p)] if path.is_dir()
                 else [Path(p) for p in glob(part, recursive=True)])
        if not found:
            raise CorpusError(f"--input: {part} matches no file; give {', '.join(READERS)} files, "
                              "a folder or a glob")
        files += sorted(p for p in found if p.is_file())
    for path in files:
        if _reader(path) is None:
            raise CorpusError(f"--input: {path} is none of {', '.join(READERS)}")
    return list(dict.fromkeys(files))


@dataclass(frozen=True)
class Reader:
    """How a kind of file is read: its number of documents; its documents from number n on."""

    count: Callable[[Path], int]
    read: Callable[[Path, str, int], Iterator[str]]


def _reader(path: Path) -> "Reader | None":
    return next((reader for suffix, reader in READERS.items() if path.name.endswith(suffix)), None)


def _open_parquet(path: Path):
    import pyarrow
    import pyarrow.parquet
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise CorpusError(f"{path} is not a readable parquet file: {error}") from None


def _read_parquet(path: Path, column: str, skip: int) -> Iterator[str]:
    import pyarrow
    file = _open_parquet(path)
    if column not in file.schema_arrow.names:
        raise CorpusError(f"{path} has no column {column!r}, only "
                          f"{', '.join(file.schema_arrow.names)}")
    groups, row = list(range(file.num_row_groups)), 0
    while groups and row + file.metadata.row_group(groups[0]).num_rows <= skip:
        row += file.metadata.row_group(groups.pop(0)).num_rows
    try:
        for batch in file.iter_batches(batch_size=64, columns=[column], row_groups=groups):
            for value in batch.column(0):
                if row >= skip:
                    yield _text(value.as_py(), column, f"{path}, row {row}")
                row += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise CorpusError(f"{path}, after row {row}: unreadable: {error}") from None


def _open_lines(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return gzip.open(path)
    if path.suffix == ".zst":
        import pyarrow
        return pyarrow.input_stream(str(path), compression="zstd")
    return open(path, "rb")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line) of the lines of a jsonl file that are not blank."""
    import zlib
    number = 0
    try:
        with _open_lines(path) as file:
            rest = b""
            while block := file.read(1 << 20):
                *lines, rest = (rest + block).split(b"\n")
                for line in lines:
                    number += 1
                    if line.strip():
                        yield number, line
            if rest.strip():
                yield number + 1, rest
    except (OSError, EOFError, zlib.error) as error:
        raise CorpusError(f"{path}, after line {number}: unreadable: {error}") from None


def _read_jsonl(path: Path, column: str, skip: int) -> Iterator[str]:
    for document, (number, line) in enumerate(_lines(path)):
        if document < skip:
            continue
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)[column]
        except (ValueError, KeyError, TypeError) as error:
            raise CorpusError(f"{where}: not a JSON object with {column!r}: {error}") from None
        yield _text(value, column, where)


def _text(value: object, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise CorpusError(f"{where}: {column} is {value!r}, not text")
    return value


def _read_txt(path: Path, column: str, skip: int) -> Iterator[str]:
    if skip:
        return
    try:
        yield path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise CorpusError(f"{path} is not readable UTF-8 text: {error}") from None


_JSONL = Reader(lambda path: sum(1 for _ in _lines(path)), _read_jsonl)
READERS = {".parquet": Reader(lambda path: _open_parquet(path).metadata.num_rows, _read_parquet),
           ".jsonl": _JSONL, ".jsonl.gz": _JSONL, ".jsonl.zst": _JSONL,
           ".txt": Reader(lambda path: 1, _read_txt)}


# Checking -----------------------------------------------------------------------------------------


def verify(folder: Path, shown: int = 2) -> str:
    """Reads a prepared folder in full; a report with a few decoded documents.

    Raises CorpusError naming the file whose size, ids, checksum or number of documents is not what
    meta.json says.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text())
        splits, vocab_size, eot = meta["splits"], meta["vocab_size"], meta["eot_token"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorpusError(f"{folder / 'meta.json'} is missing or damaged ({error!r}); prepare the "
                          "folder again") from None
    encoding = get_tokenizer(beside(folder, meta["tokenizer"]))
    lines = []
    for said in splits.values():
        path = folder / said["file"]
        if not path.is_file() or path.stat().st_size != 2 * said["tokens"]:
            raise CorpusError(f"{path} is missing or not of {2 * said['tokens']} bytes; prepare "
                              "the folder again")
        tokens = np.memmap(path, dtype=np.uint16, mode="r")
        digest, documents = hashlib.sha256(), 0
        for start in range(0, len(tokens), 1 << 22):
            block = np.asarray(tokens[start:start + (1 << 22)])
            if block.max() >= vocab_size:
                raise CorpusError(f"{path} holds id {block.max()} near position {start}, outside "
                                  f"the vocabulary of {vocab_size}; prepare the folder again")
            documents += int((block == eot).sum())
            digest.update(block)
        for what, found in (("sha256", digest.hexdigest()), ("documents", documents)):
            if said[what] != found:
                raise CorpusError(f"{path}: {what} is {found}, meta.json says {said[what]}; "
                                  "prepare the folder again")
        lines.append(f"{path}: {documents:,} documents, {len(tokens):,} tokens, ids and checksum "
                     "are right")
        head = encoding.decode(tokens[:4096].tolist()).split(EOT)[:shown]
        lines += [f"  document {i}: {text[:200]!r}" for i, text in enumerate(head)]
    return "\n".join(lines)

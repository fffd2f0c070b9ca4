"""Tokenises documents into train.bin, val.bin (raw uint16 token ids) and meta.json.

The .bin files are nanoGPT's format: the ids of one document after the other, each followed by
end-of-text. meta.json describes them; files without it are no prepared folder. It is written last,
so that a folder is finished all at once; a preparation that was killed, wherever that was,
continues with the same command and ends with the same bytes. For nanoGPT, bytes get a meta.pkl too.
"""

import hashlib
import io
import json
import os
import shlex
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from nanosophia.characters import BYTES, CHARACTERS, EOT, write_characters
from nanosophia.configurator import Settings, Stopped, option
from nanosophia.documents import Column, CorpusError, Documents
from nanosophia.encoding import cut_in_two, encode_documents
from nanosophia.files import create, fsync, open_file, reason, reopen, write_text
from nanosophia.folder_lock import FolderLock
from nanosophia.schemas import META, PROGRESS, Meta, Progress, read
from nanosophia.tokenizer import (
    FILE_NAME,
    FileEncoding,
    fingerprint,
    get_tokenizer,
    resolve_tokenizer,
)

META_FORMAT = 1
SPLITS = ("train", "val")
SAVE_TOKENS = 1 << 22  # tokens between two writes of progress.json
PARTIAL = ".partial"


@dataclass(frozen=True, kw_only=True)
class PrepareSettings(Settings):
    """The options of every prepare script. `out_dir` defaults to the script's own folder."""

    out_dir: str = option("", "folder for train.bin, val.bin, meta.json; empty = beside the script")
    num_proc: int = option(1, "tokenising processes, at most one per core", low=1)
    block_size: int = option(1024, "shortest context that you will train with: each split must "
                                   "hold a window of it", unit="tokens", low=1)
    verify: bool = option(False, "check sizes, ids and checksums of the prepared folder instead, "
                                 "and show a few documents")

    def shaping(self) -> dict[str, str]:
        """Returns every setting that shapes the result: all that are not named here."""
        others = {"out_dir", "num_proc", "block_size", "verify", "streaming"}
        return {key: str(value) for key, value in asdict(self).items() if key not in others}

    def next_flags(self) -> str:
        """Returns the flags with which train.py trains on the folder."""
        folder = self.out_dir if "/" in self.out_dir else f"./{self.out_dir}"
        flags = [f" --dataset={shlex.quote(folder)}"] if self.out_dir else []
        return "".join(flags + [f" --block_size={self.block_size}"] * (self.block_size < 1024))


@dataclass(frozen=True, kw_only=True)
class ColumnSettings(PrepareSettings):
    """The options of a prepare script that reads rows with a column of text."""

    column: str = option("text", "column of parquet and jsonl files, or of the hub's rows",
                         section="rows")
    skip_empty: bool = option(False, "leave out empty texts, which otherwise are documents too")
    strict: bool = option(False, "refuse a row without text, which otherwise is left out and "
                                 "counted")

    @property
    def text_column(self) -> Column:
        """Returns the column that is read, and what becomes of rows without text."""
        return Column(self.column, self.skip_empty, self.strict)


def prepare(settings: PrepareSettings, here: Path, documents: Callable[[], Documents],
            tokenizer: str) -> dict | None:
    """Runs a prepare script: writes the corpus and returns meta.json, or verifies it (None)."""
    out_dir = Path(settings.out_dir) if settings.out_dir else here
    if settings.verify:
        print(verify(out_dir))
        return None
    cores = os.cpu_count() or 1
    if settings.num_proc > cores:
        print(f"num_proc = {settings.num_proc}: this machine has {cores} cores, so {cores} are "
              "used")
    source = documents()
    meta = write_corpus(source, out_dir, tokenizer, num_proc=min(settings.num_proc, cores),
                        min_tokens=settings.block_size + 1,
                        settings=settings.shaping() | {"script": here.name})
    for split in meta["splits"].values():
        print(f"{out_dir / split['file']}: {split['documents']:,} documents, "
              f"{split['tokens']:,} tokens ({meta['tokenizer']})")
    if left_out := sum(split.get("left_out", 0) for split in meta["splits"].values()):
        print(f"{left_out:,} rows had no text and were left out; --strict refuses them")
    return meta


def write_corpus(documents: Documents, out_dir: Path, tokenizer: str, *, num_proc: int = 1,
                 min_tokens: int = 2, settings: dict[str, str] | None = None) -> Meta:
    """Tokenises the documents into `out_dir`; returns what meta.json holds.

    Until all is done the folder holds `*.partial` files and progress.json, from which the same call
    continues; earlier files stay valid. `settings` are those that shape the result. Raises
    CorpusError when a split has fewer than `min_tokens`, the disk refuses, a document cannot be
    read, or the folder holds unfinished work of another command; Stopped after Ctrl-C; LockError
    when another process prepares it.
    """
    encoding = get_tokenizer(tokenizer)
    if encoding.eot_token is None:
        raise CorpusError(f"tokenizer {tokenizer} has no {EOT} to end documents with; give another")
    if encoding.n_vocab > 1 << 16:
        raise CorpusError(f"tokenizer {tokenizer} has {encoding.n_vocab} classes, more than the "
                          "65536 of uint16 ids")
    task = dict(source=documents.name, identity=documents.identity,
                tokenizer_sha256=fingerprint(encoding), **(settings or {}))
    with FolderLock(out_dir) as lock:
        lock.take()
        try:
            progress = _read_progress(out_dir, task)
            if "meta" not in progress:
                splits = {name: _SplitFile(out_dir / f"{name}.bin", progress["splits"].get(name))
                          for name in SPLITS}
                try:
                    _fill(splits, documents, task, out_dir, tokenizer, num_proc)
                    meta = _describe(splits, task, tokenizer, encoding)
                finally:
                    for split in splits.values():
                        split.file.close()
                if isinstance(encoding, FileEncoding):
                    with create(out_dir / (FILE_NAME + PARTIAL)) as file:
                        file.write(encoding.json.encode())
                        file.flush()
                        os.fsync(file.fileno())
                _check_lengths(meta, out_dir, min_tokens)
                progress = dict(task=task, splits={}, meta=meta)
                _write_json(out_dir / PROGRESS, progress)
            _check_lengths(progress["meta"], out_dir, min_tokens)
            _publish(out_dir, progress["meta"])
        except OSError as error:
            raise CorpusError(f"cannot write to {error.filename or out_dir}: {reason(error)}; mend "
                              "that and run the same command again, which continues, or give "
                              "another --out_dir") from error
    return progress["meta"]


def _write_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


class _SplitFile:
    """Writes a .bin file under a temporary name, with a running checksum and counts."""

    def __init__(self, path: Path, saved: dict | None):
        """Continues after what `saved`, an earlier `progress()`, counts; cuts off what follows."""
        self.path, self.partial = path, path.with_name(path.name + PARTIAL)
        self.digest, self.tokens, self.documents, self.left_out = hashlib.sha256(), 0, 0, 0
        if saved and not self.partial.is_file():
            raise CorpusError(f"{self.partial} is missing; remove {PROGRESS} there to start again")
        self.file: BinaryIO = reopen(self.partial) if saved else create(self.partial)
        if saved:
            self.tokens, self.documents = saved["tokens"], saved["documents"]
            self.left_out = saved.get("left_out", 0)
            left = 2 * self.tokens
            while left and (block := self.file.read(min(left, 1 << 20))):
                self.digest.update(block)
                left -= len(block)
            if self.digest.hexdigest() != saved["sha256"]:
                raise CorpusError(f"{self.partial} is not what {PROGRESS} says; remove {PROGRESS} "
                                  "there to start again")
            self.file.seek(2 * self.tokens)
            self.file.truncate()

    def append(self, ids: bytes, documents: int, left_out: int) -> None:
        self.file.write(ids)
        self.digest.update(ids)
        self.tokens += len(ids) // 2
        self.documents += documents - left_out
        self.left_out += left_out

    def progress(self) -> dict:
        self.file.flush()
        os.fsync(self.file.fileno())
        left_out = dict(left_out=self.left_out) if self.left_out else {}
        return dict(tokens=self.tokens, documents=self.documents, sha256=self.digest.hexdigest(),
                    **left_out)


def _read_progress(out_dir: Path, task: dict[str, str]) -> Progress:
    """Returns the unfinished work that this task continues, or that of a new one."""
    path, new = out_dir / PROGRESS, dict(task=task, splits={})
    try:
        progress = read(path, Progress)
    except FileNotFoundError:
        return new
    except ValueError as error:
        raise CorpusError(f"{path} is not what this script writes ({error}); remove it to start "
                          "again, or give another --out_dir") from None
    meta = progress.get("meta")
    if meta is not None and (out_dir / META).is_file() and _read_meta(out_dir) == meta:
        path.unlink()  # the kill came after the last rename
        return new
    if progress["task"] != task:
        before = progress["task"]
        differing = ", ".join(f"{key} = {before.get(key)}, now {task.get(key)}"
                              for key in sorted(before.keys() | task) if before.get(key)
                              != task.get(key) and key not in ("identity", "tokenizer_sha256"))
        raise CorpusError(f"{out_dir} holds unfinished work of another command or other documents "
                          f"({differing or 'files have changed'}); run that one, remove {PROGRESS} "
                          "there to start again, or give another --out_dir")
    return progress


def _describe(splits: dict[str, _SplitFile], task: dict, tokenizer: str, encoding) -> Meta:
    return dict(
        format=META_FORMAT, source=task["source"], dtype="uint16",
        tokenizer=FILE_NAME if isinstance(encoding, FileEncoding) else tokenizer,
        tokenizer_sha256=task["tokenizer_sha256"], vocab_size=encoding.n_vocab,
        eot_token=encoding.eot_token,
        splits={name: dict(file=split.path.name, **split.progress())
                for name, split in splits.items()})


def _check_lengths(meta: Meta, out_dir: Path, min_tokens: int) -> None:
    """Raises CorpusError, and leaves nothing behind, where a split cannot be trained on."""
    for name, split in meta["splits"].items():
        if split["tokens"] < min_tokens:
            for left in (*(file + PARTIAL for file in _names(meta)), PROGRESS):
                (out_dir / left).unlink(missing_ok=True)
            raise CorpusError(
                f"{meta['source']} gives {split['documents']:,} documents of {split['tokens']:,} "
                f"tokens for the {name} split, a window needs block_size + 1 = {min_tokens:,}; "
                "give more text, another split, or a smaller --block_size if you train with one")


def _names(meta: Meta) -> list[str]:
    files = [split["file"] for split in meta["splits"].values()]
    return files + [FILE_NAME] * (meta["tokenizer"] == FILE_NAME)


def _publish(out_dir: Path, meta: Meta) -> None:
    """Gives the complete files their names; with meta.json, the last, the folder is finished.

    Before anything of an earlier preparation is replaced, all files must be there.
    """
    sha256 = {split["file"]: split["sha256"] for split in meta["splits"].values()}
    sha256 |= {FILE_NAME: meta["tokenizer_sha256"]}
    for name in _names(meta):
        path = out_dir / name
        if path.with_name(name + PARTIAL).exists():
            continue
        with open_file(path) if path.exists() else io.BytesIO() as file:  # renamed before a kill
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256[name]:
                raise CorpusError(f"{path}{PARTIAL} has vanished; remove {PROGRESS} there to start "
                                  "again")
    (out_dir / META).unlink(missing_ok=True)  # it describes the old files
    fsync(out_dir)
    for name in _names(meta):
        partial = out_dir / (name + PARTIAL)
        if partial.exists():
            os.replace(partial, out_dir / name)
    (out_dir / CHARACTERS).unlink(missing_ok=True)
    if meta["tokenizer"] == "bytes":
        write_characters(out_dir / CHARACTERS, BYTES)
    fsync(out_dir)
    _write_json(out_dir / META, meta)
    (out_dir / PROGRESS).unlink(missing_ok=True)


def _fill(splits: dict[str, _SplitFile], documents: Documents, task: dict, out_dir: Path,
          tokenizer: str, num_proc: int) -> None:
    """Appends every document that is not there yet, saving progress on the way and on errors."""
    def tokens() -> int:
        return sum(split.tokens for split in splits.values())

    def save() -> None:
        _write_json(out_dir / PROGRESS, dict(
            task=task, splits={name: split.progress() for name, split in splits.items()}))

    def documents_read() -> int:
        return sum(split.documents + split.left_out for split in splits.values())

    done = documents_read()
    if done:
        print(f"continuing after {done:,} documents and {tokens():,} tokens")
    last_saved, started, whole = tokens(), tokens(), True
    batches = encode_documents(documents, done, tokenizer, num_proc)
    if documents.val_share:
        batches = cut_in_two(batches, documents.val_share)
    try:
        with _ctrl_c_noted() as interrupted, \
                tqdm(total=documents.count, initial=done, unit=" documents", disable=None) as bar:
            for split, n_documents, left_out, whole, ids in batches:
                splits[split].append(ids, n_documents, left_out)
                rate = (tokens() - started) / max(1e-9, bar.format_dict["elapsed"])
                bar.set_postfix_str(f"{tokens():,} tokens, {rate:,.0f}/s", refresh=False)
                bar.update(n_documents)
                if whole and tokens() - last_saved >= SAVE_TOKENS:
                    save()
                    last_saved = tokens()
                if interrupted():
                    raise Stopped("interrupted; the same command continues", signal.SIGINT)
        count = documents_read()
        if not documents.val_share and documents.count not in (None, count):
            raise CorpusError(f"{documents.name} had {documents.count:,} documents at first and "
                              f"gave {count:,}; it has changed: remove {PROGRESS} to start again")
    except (CorpusError, Stopped):
        if whole:
            save()
        raise
    finally:
        batches.close()


@contextmanager
def _ctrl_c_noted() -> Iterator[Callable[[], bool]]:
    """Within it the first Ctrl-C is only noted: gives a function that says whether there was one.

    A second one is a KeyboardInterrupt, which may hit anywhere, also where Python drops it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    noted = False

    def note(number: int, frame: object) -> None:
        nonlocal noted
        noted = True
        signal.signal(number, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, before)


def _read_meta(folder: Path) -> Meta:
    """Returns meta.json; raises CorpusError where it is missing or not one."""
    path = folder / META
    try:
        return read(path, Meta)
    except FileNotFoundError:
        raise CorpusError(f"{path} is missing, so {folder} is no prepared folder; prepare it") \
            from None
    except ValueError as error:
        raise CorpusError(f"{path} is not what preparation writes ({error}); prepare the folder "
                          "again") from None


def verify(folder: Path, shown: int = 2) -> str:
    """Reads a prepared folder in full; returns a report with a few decoded documents.

    Raises CorpusError naming the file whose size, ids, checksum or number of documents differ from
    meta.json, or whose tokenizer is another one.
    """
    meta = _read_meta(folder)
    name = resolve_tokenizer(folder, meta["tokenizer"])
    encoding = get_tokenizer(name)
    facts = dict(tokenizer_sha256=fingerprint(encoding), vocab_size=encoding.n_vocab,
                 eot_token=encoding.eot_token)
    for key, value in facts.items():
        if meta[key] != value:
            raise CorpusError(f"the tokenizer {name} is not the one of {folder / META}: {key} is "
                              f"{value}, not {meta[key]}; supply that tokenizer, or prepare the "
                              "folder again")
    lines = [f"tokenizer {name}: the one that made the files"]
    for recorded in meta["splits"].values():
        path = folder / recorded["file"]
        if not path.is_file() or path.stat().st_size != 2 * recorded["tokens"]:
            raise CorpusError(f"{path} is missing or not of {2 * recorded['tokens']} bytes; "
                              "prepare the folder again")
        tokens = np.memmap(path, dtype=np.uint16, mode="r")
        digest, documents = hashlib.sha256(), 0
        for start in range(0, len(tokens), 1 << 22):
            block = np.asarray(tokens[start:start + (1 << 22)])
            if block.max() >= encoding.n_vocab:
                raise CorpusError(f"{path} holds id {block.max()} near position {start}, outside "
                                  f"the vocabulary of {encoding.n_vocab}; prepare the folder again")
            documents += int((block == encoding.eot_token).sum())
            digest.update(block)
        for key, value in (("sha256", digest.hexdigest()), ("documents", documents)):
            if recorded[key] != value:
                raise CorpusError(f"{path}: {key} is {value}, meta.json says {recorded[key]}; "
                                  "prepare the folder again")
        lines.append(f"{path}: {documents:,} documents, {len(tokens):,} tokens, ids and checksum "
                     "are right")
        head = encoding.decode(tokens[:4096].tolist()).split(EOT)[:shown]
        lines += [f"  document {i}: {text[:200]!r}" for i, text in enumerate(head)]
    return "\n".join(lines)

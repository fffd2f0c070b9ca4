"""Tokenises documents into train.bin, val.bin (raw uint16 token ids) and meta.json.

The .bin files are nanoGPT's format: the ids of one document after the other, each followed by
end-of-text. meta.json describes them, so that train.py can refuse data that does not fit.
Memory is bounded by the largest document; the bytes are the same for any number of processes; a
preparation that was killed continues where it last saved, and ends with the same bytes.
"""

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
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from nanosophia.configurator import Settings, option
from nanosophia.documents import CorpusError, Documents
from nanosophia.files import write_text
from nanosophia.tokenizer import (
    EOT,
    FILE_NAME,
    FileEncoding,
    fingerprint,
    get_tokenizer,
    resolve_tokenizer,
)

META_FORMAT = 1
SPLITS = ("train", "val")
BATCH_CHARACTERS = 1 << 19  # text handed to a worker at a time
SAVE_TOKENS = 1 << 22  # tokens between two writes of progress.json
PROGRESS = "progress.json"


@dataclass(frozen=True, kw_only=True)
class PrepareSettings(Settings):
    """The options of every prepare script. `out_dir` defaults to the script's own folder."""

    out_dir: str = option("", "folder for train.bin, val.bin, meta.json; empty = beside the script")
    num_proc: int = option(1, "tokenising processes", low=1)
    verify: bool = option(False, "check sizes, ids and checksums of the prepared folder instead, "
                                 "and show a few documents")


def prepare(settings: PrepareSettings, here: Path, documents: Callable[[], Documents],
            tokenizer: str) -> dict | None:
    """Runs a prepare script: writes the corpus and returns meta.json, or verifies it (None)."""
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

    Files get their names when complete; until then they and progress.json hold what is done, and
    the same call continues it. Raises CorpusError when a split stays empty, the disk refuses, a
    document cannot be read, or the folder holds unfinished work on other documents.
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
        (out_dir / "meta.json").unlink(missing_ok=True)  # it describes the old files
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
    """Writes a .bin file under a temporary name, with a running checksum and counts."""

    def __init__(self, path: Path, saved: dict | None):
        """Continues after what `saved`, an earlier `progress()`, counts; cuts off what follows."""
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
    """Opens the split files, new or continued; returns them and how many documents they hold."""
    saved = {}
    if (out_dir / PROGRESS).is_file():
        try:
            progress = json.loads((out_dir / PROGRESS).read_text())
            same, saved = progress["task"] == task, progress["splits"]
        except (ValueError, KeyError, TypeError):
            same = False
        if not same:
            raise CorpusError(f"{out_dir} holds unfinished work on other documents ({PROGRESS}); "
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


def _encoded(documents: Iterator[tuple[str, str]], tokenizer: str,
             num_proc: int) -> Iterator[tuple[str, int, bool, bytes]]:
    """Yields batches in order: split, number of documents that end in it, whether it ends with the
    end of one, uint16 ids."""
    batches = _batched(documents)
    if num_proc == 1:
        for split, texts, ended in batches:
            yield split, sum(ended), ended[-1], _encode(tokenizer, texts, ended)
        return
    with ProcessPoolExecutor(num_proc, initializer=_exit_with_parent,
                             initargs=(os.getpid(),)) as pool:
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


def _exit_with_parent(parent: int) -> None:
    """Ends this worker soon after its parent was killed, instead of waiting for work forever.

    Ctrl-C is handled by the parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _batched(documents: Iterator[tuple[str, str]]) -> Iterator[tuple[str, list[str], list[bool]]]:
    """Yields consecutive pieces of one split, about BATCH_CHARACTERS, and whether each ends its
    document. An error of the source is raised after the batch of what it gave before."""
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
    """Yields a long document in parts that tokenise as the whole does; the last one is marked."""
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
    """Returns uint16 ids of the pieces, with end-of-text after each that ends its document."""
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


def verify(folder: Path, shown: int = 2) -> str:
    """Reads a prepared folder in full; returns a report with a few decoded documents.

    Raises CorpusError naming the file whose size, ids, checksum or number of documents differ from
    meta.json.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text())
        splits, vocab_size, eot = meta["splits"], meta["vocab_size"], meta["eot_token"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorpusError(f"{folder / 'meta.json'} is missing or damaged ({error!r}); prepare the "
                          "folder again") from None
    encoding = get_tokenizer(resolve_tokenizer(folder, meta["tokenizer"]))
    lines = []
    for recorded in splits.values():
        path = folder / recorded["file"]
        if not path.is_file() or path.stat().st_size != 2 * recorded["tokens"]:
            raise CorpusError(f"{path} is missing or not of {2 * recorded['tokens']} bytes; "
                              "prepare the folder again")
        tokens = np.memmap(path, dtype=np.uint16, mode="r")
        digest, documents = hashlib.sha256(), 0
        for start in range(0, len(tokens), 1 << 22):
            block = np.asarray(tokens[start:start + (1 << 22)])
            if block.max() >= vocab_size:
                raise CorpusError(f"{path} holds id {block.max()} near position {start}, outside "
                                  f"the vocabulary of {vocab_size}; prepare the folder again")
            documents += int((block == eot).sum())
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

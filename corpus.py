"""An iterator of documents -> train.bin, val.bin (raw uint16 token ids) and meta.json.

The .bin files are nanoGPT's format: the ids of one document after the other, each followed by
end-of-text. meta.json says what they hold, so that train.py can refuse data that does not fit.
Memory is bounded whatever the corpus; the bytes are the same for any number of processes.
"""

import glob
import hashlib
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tokenizer import fingerprint, get_tokenizer

META_FORMAT = 1
BATCH_CHARACTERS = 1 << 20  # text handed to a worker at a time


class CorpusError(ValueError):
    """A corpus cannot be read or written; the message says which file and what to do."""


def write_corpus(documents: Iterable[tuple[str, str]], out_dir: Path, tokenizer: str, *,
                 source: str, num_proc: int = 1, total: int | None = None) -> dict:
    """Tokenises (split, text) pairs into `out_dir`; returns what meta.json holds.

    `split` is "train" or "val". `source` goes into meta.json. `total` is the number of documents,
    for the progress bar. Files take their names only when complete. Raises CorpusError when a split
    stays empty or the disk refuses.
    """
    encoding = get_tokenizer(tokenizer)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        splits = {split: _SplitFile(out_dir / f"{split}.bin") for split in ("train", "val")}
        try:
            with tqdm(total=total, unit=" documents", desc="tokenise", disable=None) as bar:
                for split, n_documents, ids in _encoded(documents, tokenizer, num_proc):
                    splits[split].append(ids, n_documents)
                    bar.set_postfix_str(f"{sum(s.tokens for s in splits.values()):,} tokens",
                                        refresh=False)
                    bar.update(n_documents)
            for name, split in splits.items():
                if split.documents == 0:
                    raise CorpusError(f"no document for the {name} split in {source}; give more "
                                      "documents")
            for split in splits.values():
                split.publish()
        finally:
            for split in splits.values():
                split.discard()
        meta = dict(
            format=META_FORMAT, source=source, dtype="uint16", tokenizer=tokenizer,
            tokenizer_sha256=fingerprint(encoding), vocab_size=encoding.n_vocab,
            eot_token=encoding.eot_token,
            splits={name: split.describe() for name, split in splits.items()})
        _replace_text(out_dir / "meta.json", json.dumps(meta, indent=1) + "\n")
    except OSError as error:
        raise CorpusError(f"cannot write to {out_dir}: {error.strerror}; free some space or give "
                          "another --out_dir") from error
    return meta


def report(meta: dict, out_dir: Path) -> None:
    """Prints what was prepared and what to do next."""
    for name, split in meta["splits"].items():
        print(f"{out_dir / split['file']}: {name}, {split['documents']:,} documents, "
              f"{split['tokens']:,} {meta['tokenizer']} tokens")


class _SplitFile:
    """A .bin file under a temporary name, with its running checksum and counts."""

    def __init__(self, path: Path):
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        self.file = open(self.partial, "wb")  # noqa: SIM115 (closed by publish or discard)
        self.digest, self.tokens, self.documents = hashlib.sha256(), 0, 0

    def append(self, ids: bytes, documents: int) -> None:
        self.file.write(ids)
        self.digest.update(ids)
        self.tokens += len(ids) // 2
        self.documents += documents

    def publish(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.partial, self.path)

    def discard(self) -> None:
        self.file.close()
        self.partial.unlink(missing_ok=True)

    def describe(self) -> dict:
        return dict(file=self.path.name, tokens=self.tokens, documents=self.documents,
                    sha256=self.digest.hexdigest())


def _replace_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def _encoded(documents, tokenizer: str, num_proc: int) -> Iterator[tuple[str, int, bytes]]:
    """(split, number of documents, uint16 ids) of consecutive batches, in order."""
    batches = _batched(documents)
    if num_proc == 1:
        for split, texts in batches:
            yield split, len(texts), _encode(tokenizer, texts)
        return
    with ProcessPoolExecutor(num_proc) as pool:
        pending = deque()
        try:
            for split, texts in batches:
                pending.append((split, len(texts), pool.submit(_encode, tokenizer, texts)))
                if len(pending) > 2 * num_proc:
                    split_, n, future = pending.popleft()
                    yield split_, n, future.result()
            for split_, n, future in pending:
                yield split_, n, future.result()
        except BrokenProcessPool:
            raise CorpusError("a tokenising process died (out of memory?); try a smaller "
                              "--num_proc") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _batched(documents: Iterable[tuple[str, str]]) -> Iterator[tuple[str, list[str]]]:
    """Groups consecutive documents of one split into lists of about BATCH_CHARACTERS."""
    texts, size, current = [], 0, ""
    for split, text in documents:
        if texts and (split != current or size >= BATCH_CHARACTERS):
            yield current, texts
            texts, size = [], 0
        current = split
        texts.append(text)
        size += len(text)
    if texts:
        yield current, texts


def _encode(tokenizer: str, texts: list[str]) -> bytes:
    encoding = get_tokenizer(tokenizer)
    end = np.array([encoding.eot_token], dtype=np.uint16)
    parts = []
    for text in texts:
        # Text that spells a special token is text, as with encode_ordinary.
        parts += [encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16), end]
    return np.concatenate(parts).tobytes()


def find_files(pattern: str) -> list[Path]:
    """Files of a comma-separated list of files, folders (searched deeply) and globs, sorted.

    Raises CorpusError when one of them matches nothing.
    """
    files = []
    for part in pattern.split(","):
        path = Path(part)
        found = ([p for p in path.rglob("*") if p.suffix in READERS] if path.is_dir()
                 else [Path(p) for p in glob.glob(part, recursive=True)])
        if not found:
            raise CorpusError(f"--input: {part} matches no file; give parquet, jsonl or txt files, "
                              "a folder or a glob")
        files += sorted(p for p in found if p.is_file())
    for path in files:
        if path.suffix not in READERS:
            raise CorpusError(f"--input: {path} is none of {', '.join(READERS)}")
    return files


def count_documents(files: list[Path]) -> int:
    """Number of documents that `read_documents` will give for these files."""
    return sum(READERS[path.suffix][1](path) for path in files)


def read_documents(files: list[Path], column: str = "text") -> Iterator[str]:
    """The documents of parquet and jsonl files (their column `text`) and txt files (one each).

    Raises CorpusError naming file and row where there is none.
    """
    for path in files:
        yield from READERS[path.suffix][0](path, column)


def _read_parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow.parquet
    file = _open_parquet(path)
    if column not in file.schema_arrow.names:
        raise CorpusError(f"{path} has no column {column!r}, only "
                          f"{', '.join(file.schema_arrow.names)}")
    row = 0
    try:
        for batch in file.iter_batches(batch_size=64, columns=[column]):
            for value in batch.column(0):
                text = value.as_py()
                if not isinstance(text, str):
                    raise CorpusError(f"{path}, row {row}: {column} is {text!r}, not text")
                yield text
                row += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise CorpusError(f"{path}, after row {row}: unreadable: {error}") from None


def _open_parquet(path: Path):
    import pyarrow.parquet
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise CorpusError(f"{path} is not a readable parquet file: {error}") from None


def _count_parquet(path: Path) -> int:
    return _open_parquet(path).metadata.num_rows


def _read_jsonl(path: Path, column: str) -> Iterator[str]:
    with open(path, "rb") as file:
        for row, line in enumerate(file):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[column]
            except (ValueError, KeyError, TypeError) as error:
                raise CorpusError(f"{path}, line {row + 1}: not a JSON object with {column!r}: "
                                  f"{error}") from None
            if not isinstance(text, str):
                raise CorpusError(f"{path}, line {row + 1}: {column} is {text!r}, not text")
            yield text


def _count_jsonl(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(1 for line in file if line.strip())


def _read_txt(path: Path, column: str) -> Iterator[str]:
    try:
        yield path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 text: {error}") from None


# suffix -> (documents of a file, their number)
READERS = {".parquet": (_read_parquet, _count_parquet), ".jsonl": (_read_jsonl, _count_jsonl),
           ".txt": (_read_txt, lambda path: 1)}

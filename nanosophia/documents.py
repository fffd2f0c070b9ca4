"""Reads documents in order, from parquet, jsonl and txt files or from the Hugging Face hub."""

import gzip
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import BinaryIO

from nanosophia.configurator import UserError

LARGEST_PART = 1 << 28  # bytes that a process reads and tokenises at once


class CorpusError(UserError):
    """A corpus cannot be read or written; the message says which file and what to do."""


@dataclass(frozen=True)
class Column:
    """The column that holds the text, and what becomes of rows that have none there."""

    name: str = "text"
    skip_empty: bool = False  # leave out empty texts too
    strict: bool = False  # refuse a row whose value is null

    def text(self, value: object, where: str) -> str | None:
        """Returns a row's text, None where it is left out; raises CorpusError on another value."""
        if value is None and not self.strict:
            return None
        if not isinstance(value, str):
            raise CorpusError(f"{where}: {self.name} is {repr(value)[:80]}, not text; mend or "
                              "remove it")
        return value if value or not self.skip_empty else None


TEXT = Column()


@dataclass(frozen=True)
class Documents:
    """An ordered collection of documents that can be read from any document on."""

    name: str  # for meta.json and messages
    identity: str  # changes when the documents do, so that unfinished work is not mixed
    count: int | None  # None: not known beforehand
    # (split, text) from document number n on; a text of None is left out, and counted
    read: Callable[[int], Iterator[tuple[str, str | None]]]
    val_share: float = 0.0  # above 0: there is one document, whose last tokens are for validation
    # The same for processes that read by themselves; None where one must read everything.
    parts: Callable[[int], Iterator["Part"] | None] = lambda first: None


@dataclass(frozen=True)
class Part:
    """Consecutive documents of one file, which any process can read by itself."""

    path: Path
    column: Column
    skip: int  # documents of the file before it
    splits: list[str]  # one per document
    size: int  # bytes, about

    def read(self) -> Iterator[tuple[str, str | None]]:
        """Yields (split, text)."""
        return zip(self.splits, _reader(self.path).read(self.path, self.column, self.skip),
                   strict=False)


def local_documents(pattern: str, split: Callable[[int], Callable[[int], str]],
                    column: Column = TEXT) -> Documents:
    """Returns the documents of local files: a column of parquet and jsonl files, whole txt files.

    `pattern` is a comma-separated list of files, folders (searched recursively) and globs; parquet,
    jsonl, jsonl.gz, jsonl.zst and txt. `split(count)` gives the function from a document's number
    to its split. Raises CorpusError when nothing matches or a file cannot be read.
    """
    files = find_files(pattern)
    counts = [_reader(path).count(path) for path in files]
    total = sum(counts)
    split_of = split(total)

    def read(start: int) -> Iterator[tuple[str, str | None]]:
        first = 0
        for path, count in zip(files, counts, strict=True):
            if start < first + count:
                skip = max(0, start - first)
                for row, text in enumerate(_reader(path).read(path, column, skip), first + skip):
                    yield split_of(row), text
            first += count

    def parts(start: int) -> Iterator[Part] | None:
        found = [(path, *part) for path in files for part in _reader(path).parts(path)]
        if len(found) < 2 or sum(count for _, _, count, _ in found) < total \
                or max(size for *_, size in found) > LARGEST_PART:
            return None
        return _parts_from(start, found, column, split_of)

    return Documents(pattern, _identity(files, repr(column)), total, read, parts=parts)


def _parts_from(start: int, found: list[tuple[Path, int, int, int]], column: Column,
                split_of: Callable[[int], str]) -> Iterator[Part]:
    """Yields the parts from document number `start` on; `found` has (path, skip, count, bytes)."""
    first = 0
    for path, skip, count, size in found:
        cut = max(0, start - first)
        if cut < count:
            splits = [split_of(row) for row in range(first + cut, first + count)]
            yield Part(path, column, skip + cut, splits, size)
        first += count


def hub_documents(name: str, hub_split: str, split: Callable[[int], Callable[[int], str]], *,
                  streaming: bool, subset: str = "",
                  column: Column = TEXT) -> Documents:
    """Returns the documents of a data set of the Hugging Face hub, or of a local folder like one.

    `hub_split` may be a part of a split, as "train[:10%]"; `subset` is the name of a configuration.
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
            rows = datasets.load_dataset(name, subset or None, split=hub_split, revision=revision,
                                         streaming=streaming)
            count = _count_rows(rows, hub_split)
            break
        except Exception as error:  # the hub's clients raise of many kinds
            errors.append(f"{type(error).__name__}: {_first_line(error)}")
    else:
        raise CorpusError(f"{name} could not be loaded ({'; then '.join(errors)}); check the "
                          "network, or give local files with --input=FILES")
    names = rows.column_names
    if names and column.name not in names:
        raise CorpusError(f"{name} has no column {column.name!r}, only {', '.join(names)}")
    split_of = split(count)

    def read(start: int) -> Iterator[tuple[str, str | None]]:
        rest, row = iter(rows.skip(start) if start else rows), start
        while True:
            try:
                example = next(rest, None)
            except Exception as error:  # of many kinds, as above
                raise CorpusError(f"{name}, after row {row}: {type(error).__name__}: "
                                  f"{_first_line(error)}; the same command continues") from None
            if example is None:
                return
            yield split_of(row), column.text(example.get(column.name), f"{name}, row {row}")
            row += 1

    identity = f"{name} {subset} {hub_split} {count} {rows.info.version} {column}"
    if Path(name).is_dir():
        identity += _identity(sorted(p for p in Path(name).rglob("*") if p.is_file()))
    return Documents(name, identity, count, read)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:500]


def _identity(files: list[Path], *more: str) -> str:
    """Returns what changes when files do."""
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr((facts, *more)).encode(errors="backslashreplace")).hexdigest()


def _count_rows(rows, hub_split: str) -> int:
    if hasattr(rows, "__len__"):
        return len(rows)
    count = rows.info.splits[hub_split].num_examples if rows.info.splits else None
    if count is None:
        raise CorpusError("its number of documents is not known in advance; leave out --streaming")
    return count


def find_files(pattern: str) -> list[Path]:
    """Returns files of a comma-separated list of files, folders and globs, each once, sorted."""
    parts = [part for part in pattern.split(",") if part]
    if not parts:
        raise CorpusError("no input: give files, folders or globs")
    files = []
    for part in parts:
        path = Path(part)
        matches = ([p for p in path.rglob("*") if _reader(p)] if path.is_dir()
                   else [Path(p) for p in glob(part, recursive=True)])
        if not matches:
            raise CorpusError(f"{part} matches no file; give {', '.join(READERS)} files, a folder "
                              "or a glob (a name with * ? [ or a comma: its folder)")
        for match in matches:
            if not match.is_file() and not (path.is_dir() or match.is_dir()):
                raise CorpusError(f"{match} is no regular file; leave it out, or copy it to one")
        files += sorted(p for p in matches if p.is_file())
    for path in files:
        if _reader(path) is None:
            raise CorpusError(f"{path} is none of {', '.join(READERS)}")
    return list(dict.fromkeys(files))


@dataclass(frozen=True)
class Reader:
    """How a kind of file is read: its number of documents, its documents from number n on, and its
    parts that can be read without those before them: (number of the first, documents, bytes)."""

    count: Callable[[Path], int]
    read: Callable[[Path, Column, int], Iterator[str | None]]
    parts: Callable[[Path], Iterator[tuple[int, int, int]]] = lambda path: iter(())


def _reader(path: Path) -> "Reader | None":
    return next((reader for suffix, reader in READERS.items() if path.name.endswith(suffix)), None)


def _open_parquet(path: Path):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise CorpusError(f"{path} needs the package `pyarrow`; run pip install -r "
                          "requirements.txt") from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise CorpusError(f"{path} is not a readable parquet file: {error}") from None


def _read_parquet(path: Path, column: Column, skip: int) -> Iterator[str | None]:
    import pyarrow
    file = _open_parquet(path)
    if column.name not in file.schema_arrow.names:
        raise CorpusError(f"{path} has no column {column.name!r}, only "
                          f"{', '.join(file.schema_arrow.names)}")
    groups, row = list(range(file.num_row_groups)), 0
    while groups and row + file.metadata.row_group(groups[0]).num_rows <= skip:
        row += file.metadata.row_group(groups.pop(0)).num_rows
    try:
        for batch in file.iter_batches(batch_size=64, columns=[column.name], row_groups=groups):
            for value in batch.column(0):
                if row >= skip:
                    yield column.text(value.as_py(), f"{path}, row {row}")
                row += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path}, after row {row}: unreadable: {error}") from None


def _open_lines(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return gzip.open(path)
    if path.suffix == ".zst":
        import pyarrow
        return pyarrow.input_stream(str(path), compression="zstd")
    return open(path, "rb")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields (line number from 1, line) of the lines of a jsonl file that are not blank."""
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


def _read_jsonl(path: Path, column: Column, skip: int) -> Iterator[str | None]:
    for document, (number, line) in enumerate(_lines(path)):
        if document < skip:
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
            value = row[column.name]
        except KeyError:
            raise CorpusError(f"{where}: no {column.name!r}, only {', '.join(map(repr, row))}; "
                              "give its --column") from None
        except (ValueError, TypeError, RecursionError) as error:
            raise CorpusError(f"{where}: not a JSON object with {column.name!r}: {error}") from None
        yield column.text(value, where)


def _read_txt(path: Path, column: Column, skip: int) -> Iterator[str | None]:
    if skip:
        return
    try:
        yield column.text(path.read_bytes().decode(), str(path))  # line ends stay as they are
    except (UnicodeDecodeError, OSError) as error:
        raise CorpusError(f"{path} is not readable UTF-8 text: {error}") from None


def _row_groups(path: Path) -> Iterator[tuple[int, int, int]]:
    metadata, first = _open_parquet(path).metadata, 0
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        yield first, group.num_rows, group.total_byte_size
        first += group.num_rows


def _whole_file(path: Path) -> Iterator[tuple[int, int, int]]:
    yield 0, 1, path.stat().st_size


_JSONL = Reader(lambda path: sum(1 for _ in _lines(path)), _read_jsonl)
READERS = {".parquet": Reader(lambda path: _open_parquet(path).metadata.num_rows, _read_parquet,
                              _row_groups),
           ".jsonl": _JSONL, ".jsonl.gz": _JSONL, ".jsonl.zst": _JSONL,
           ".txt": Reader(lambda path: 1, _read_txt, _whole_file)}

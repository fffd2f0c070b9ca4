"""The batch as a pure function of (seed, step); fixed validation windows; keyed randomness.

Row r of step t is sample t * total_batch_size + r of an endless sequence of epochs, each a
permutation of the corpus's non-overlapping windows. The step is therefore the only loader state:
any number of ranks sees the same rows, and a resumed run continues exactly. Does not depend on
a model.
"""

import hashlib
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanosophia.characters import BYTES, CHARACTERS, read_characters
from nanosophia.configurator import UserError
from nanosophia.files import reason
from nanosophia.schemas import META, PROGRESS, Meta, read
from nanosophia.tokenizer import GPT2_CLASSES, fingerprint, get_tokenizer, resolve_tokenizer

DATA = Path(__file__).resolve().parents[1] / "data"
# Streams of random numbers that must not meet; part of the key of every generator.
PURPOSES = ("epoch", "hessian", "dropout", "hessian_dropout", "random", "optimizer")


class DataError(UserError):
    """The prepared data cannot be used; the message says which file and what to do."""


def keyed_bits(count: int, seed: int, purpose: str, index: int) -> np.ndarray:
    """Returns `count` random uint64 that depend on the arguments alone (Philox, counter-based).

    Raw bits of a bit generator are the part of numpy that never changes between versions.
    """
    return np.random.Philox(key=[seed, PURPOSES.index(purpose)],
                            counter=[0, 0, 0, index]).random_raw(count)


def keyed_seed(seed: int, purpose: str, index: int) -> int:
    """Returns a seed for torch.Generator, below 2**63, that depends on the arguments alone."""
    return int(keyed_bits(1, seed, purpose, index)[0] >> 1)


@dataclass(frozen=True)
class Dataset:
    """A prepared folder: memory-mapped splits and what meta.json says about them."""

    folder: Path
    train: np.ndarray  # uint16 token ids
    val: np.ndarray
    vocab_size: int  # number of real classes
    tokenizer: str
    fingerprint: dict  # of the data a run has seen, for resume
    note: str = ""  # what the user should know
    tokenizer_sha256: str = ""  # of the tokenizer that made the files, if meta.json says it

    def encoding(self):
        """Returns the tokenizer; raises DataError where it is not the one that made the files."""
        encoding = get_tokenizer(self.tokenizer)
        if (self.tokenizer_sha256 and self.tokenizer_sha256 != fingerprint(encoding)) or \
                self.vocab_size != encoding.n_vocab:
            raise DataError(f"the tokenizer {self.tokenizer} is not the one that made "
                            f"{self.folder}, of {self.vocab_size} classes; supply that one, or "
                            "prepare the folder again")
        return encoding


def open_dataset(name: str, block_size: int, bare_tokens: str = "none") -> Dataset:
    """Opens the dataset called `name`: a folder under the project's data/, or a path.

    A folder without meta.json is refused unless `bare_tokens`, "gpt2", says what its ids are.
    Raises DataError where a file is missing, contradicts meta.json, or is shorter than a window.
    """
    folder = DATA / name
    if not folder.is_dir() or ("/" in name and Path(name).is_dir()):
        folder = Path(name)
    try:
        changed_at = _changed_at(folder / META)
        meta, note = _describe(folder, name, bare_tokens)
        arrays = {split: _map_tokens(folder / meta["splits"][split]["file"], name,
                                     meta["splits"][split].get("tokens"), block_size)
                  for split in ("train", "val")}
        if _changed_at(folder / META) != changed_at:
            raise DataError(f"{folder} is being prepared anew at this moment; wait for it")
        tokenizer = resolve_tokenizer(folder, meta["tokenizer"])
        seen = {split: f"{len(tokens)} tokens, sampled sha256 " + _check_ids(
            Path(tokens.filename), tokens, meta["vocab_size"]) for split, tokens in arrays.items()}
        if bare_tokens == "gpt2" and "tokens" not in meta["splits"]["train"] and \
                meta["tokenizer"] == "gpt2":
            _require_gpt2_ids(arrays["train"])
    except OSError as error:
        raise DataError(f"{error.filename or folder} cannot be read: {reason(error)}; check its "
                        "permissions and the disk") from error
    return Dataset(folder, arrays["train"], arrays["val"], meta["vocab_size"], tokenizer,
                   seen, note, meta.get("tokenizer_sha256", ""))


def _require_gpt2_ids(tokens: np.ndarray) -> None:
    """Raises DataError where so many ids of GPT-2's would go higher."""
    some = tokens[:1 << 20]
    if len(some) >= 10_000 and some.max() < 5000:
        raise DataError(f"{tokens.filename} holds no id above {some.max()} among its first "
                        f"{len(some):,}, so GPT-2's tokenizer did not make it; prepare it again, "
                        "or put the meta.pkl beside it that nanoGPT wrote")


def _changed_at(path: Path) -> tuple[int, int] | None:
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.is_file() else None


def _describe(folder: Path, name: str, bare_tokens: str) -> tuple[dict, str]:
    """Returns what meta.json says, or what the user says of a folder without it, and a note."""
    path = folder / META
    try:
        return read(path, Meta), ""
    except ValueError as error:
        raise DataError(f"{path} is not what preparation writes ({error}); prepare it again") \
            from None
    except FileNotFoundError:
        pass
    if (folder / PROGRESS).exists():
        raise DataError(f"{folder} is not prepared to the end; run the same preparation again, "
                        "which continues")
    if not (folder / "train.bin").exists():
        raise DataError(f"{folder / 'train.bin'} not found; {_how_to_prepare(name)}")
    splits = {split: dict(file=f"{split}.bin") for split in ("train", "val")}
    if (folder / CHARACTERS).exists():
        characters = read_characters(folder / CHARACTERS)
        if characters == BYTES:
            return (dict(vocab_size=len(BYTES), tokenizer="bytes", splits=splits),
                    f"{folder} has no meta.json: bytes, as its meta.pkl says")
        return (dict(vocab_size=len(characters), tokenizer=CHARACTERS, splits=splits),
                f"{folder} is nanoGPT's: its meta.pkl lists {len(characters)} characters")
    if bare_tokens != "gpt2":
        raise DataError(f"{path} not found, so nothing says what the ids in train.bin are; prepare "
                        "the folder again, or say --bare_tokens=gpt2 if GPT-2's tokenizer made "
                        "them (nanoGPT's files)")
    return (dict(vocab_size=GPT2_CLASSES, tokenizer="gpt2", splits=splits),
            f"{folder} has no meta.json: GPT-2 tokens, as --bare_tokens says")


def _map_tokens(path: Path, name: str, expected: int | None, block_size: int) -> np.ndarray:
    """Returns a .bin file's ids, of which there must be `expected` if that is given."""
    if not path.is_file():
        raise DataError(f"{path} not found; {_how_to_prepare(name)}")
    size = path.stat().st_size
    if size % 2:
        raise DataError(f"{path} has an odd size of {size} bytes, so it is no file of uint16 ids; "
                        "prepare it again")
    if expected is not None and size != 2 * expected:
        raise DataError(f"{path} holds {size // 2} tokens but meta.json says {expected}; prepare "
                        "the folder again")
    if size // 2 <= block_size:
        raise DataError(f"{path} holds {size // 2} tokens, a window needs block_size + 1 = "
                        f"{block_size + 1}; lower block_size or prepare more data")
    return np.memmap(path, dtype=np.uint16, mode="r")


def _how_to_prepare(name: str) -> str:
    if (DATA / name / "prepare.py").is_file():
        return f"run python data/{name}/prepare.py"
    known = ", ".join(sorted(p.parent.name for p in DATA.glob("*/prepare.py")))
    return f"--dataset takes a prepared folder, or one of data/: {known}"


def _check_ids(path: Path, tokens: np.ndarray, vocab_size: int, sample: int = 1 << 20) -> str:
    """Refuses ids outside the vocabulary among `sample` ids spread over the file.

    Returns the sha256 of these ids, by which a resumed run recognises its data.
    """
    pieces, digest = 64, hashlib.sha256()
    starts = np.linspace(0, max(0, len(tokens) - sample // pieces), pieces).astype(np.int64)
    for start in starts:
        piece = np.asarray(tokens[start:start + sample // pieces])
        digest.update(piece)
        if piece.max() >= vocab_size:
            at = int(start + piece.argmax())
            raise DataError(f"{path} holds id {piece.max()} at position {at}, outside the "
                            f"vocabulary of {vocab_size}; prepare it again")
    return digest.hexdigest()


class TrainBatches:
    """Provides the rows of any training step, for any rank."""

    def __init__(self, tokens: np.ndarray, *, block_size: int, total_batch_size: int, seed: int,
                 sampling: str = "epochs", vocab_size: int = 1 << 16):
        """`sampling` is "epochs" (every window once before any again) or "random" (nanoGPT's:
        windows at random places, with replacement). Ids must be below `vocab_size`."""
        self.tokens, self.block_size, self.seed = tokens, block_size, seed
        self.total_batch_size, self.sampling = total_batch_size, sampling
        self.vocab_size = vocab_size
        self.windows = (len(tokens) - 1) // block_size
        self._permutation = lru_cache(maxsize=2)(self._permute)

    def rows(self, step: int, start: int, stop: int) -> Tensor:
        """Returns ids, int64 (stop - start, block_size + 1), of a step's rows start..stop."""
        assert 0 <= start <= stop <= self.total_batch_size, (start, stop, self.total_batch_size)
        if self.sampling == "random":
            bits = keyed_bits(self.total_batch_size, self.seed, "random", step)[start:stop]
            offsets = (bits % np.uint64(len(self.tokens) - self.block_size)).tolist()
        else:
            first = step * self.total_batch_size
            offsets = [self.block_size * self.window(s) for s in range(first + start, first + stop)]
        return gather(self.tokens, offsets, self.block_size, self.vocab_size)

    def window(self, sample: int) -> int:
        """Returns which window sample number `sample` of the endless sequence of epochs is."""
        epoch, position = divmod(sample, self.windows)
        return int(self._permutation(epoch)[position])

    def _permute(self, epoch: int) -> np.ndarray:
        return np.argsort(keyed_bits(self.windows, self.seed, "epoch", epoch), kind="stable")


class ValidationWindows:
    """Provides evenly spaced, non-overlapping windows of the validation split, always the same."""

    def __init__(self, tokens: np.ndarray, *, block_size: int, limit: int,
                 vocab_size: int = 1 << 16):
        available = (len(tokens) - 1) // block_size
        count = min(available, limit) if limit else available
        self.tokens, self.block_size, self.vocab_size = tokens, block_size, vocab_size
        self.offsets = [block_size * (available * i // count) for i in range(count)]

    def __len__(self) -> int:
        return len(self.offsets)

    def rows(self, start: int, stop: int) -> Tensor:
        """Returns token ids, int64 (stop - start, block_size + 1), of windows start..stop."""
        return gather(self.tokens, self.offsets[start:stop], self.block_size, self.vocab_size)


class Prefetcher:
    """Reads TrainBatches' rows of the next step in a thread while this one is computed.

    On CUDA the rows lie in pinned memory, so that the copy does not wait. `seconds_waited` counts
    the time that `rows` made its caller wait.
    """

    def __init__(self, batches: TrainBatches,
                 row_ranges: Callable[[int], list[tuple[int, int]]],
                 device: torch.device):
        """`row_ranges(step)` lists the (start, stop) ranges of rows that a step will ask for."""
        self.batches, self.row_ranges, self.pin = batches, row_ranges, device.type == "cuda"
        self.seconds_waited = 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._steps: dict[int, Future] = {}

    def rows(self, step: int, start: int, stop: int) -> Tensor:
        """Returns TrainBatches.rows of rows within one of the step's ranges."""
        began = time.perf_counter()
        for expected in (step, step + 1):
            if expected not in self._steps:
                self._steps[expected] = self._thread.submit(self._load, expected)
        parts = self._steps[step].result()
        self.seconds_waited += time.perf_counter() - began
        for past in [s for s in self._steps if s not in (step, step + 1)]:
            del self._steps[past]
        for (first, last), rows in parts.items():
            if first <= start and stop <= last:
                return rows[start - first:stop - first]
        raise IndexError(f"rows {start}..{stop} are in none of the ranges {list(parts)}")

    def _load(self, step: int) -> dict[tuple[int, int], Tensor]:
        rows = {part: self.batches.rows(step, *part) for part in self.row_ranges(step)}
        return {part: r.pin_memory() for part, r in rows.items()} if self.pin else rows


def gather(tokens: np.ndarray, offsets: list[int], T: int, vocab_size: int) -> Tensor:
    """Returns token ids, int64 (len(offsets), T + 1), from each offset on.

    Raises DataError on an id outside the vocabulary.
    """
    if not offsets:  # of a rank without rows
        return torch.empty(0, T + 1, dtype=torch.int64)
    rows = np.stack([tokens[p:p + T + 1] for p in offsets])
    if rows.max() >= vocab_size:
        offset, file = offsets[int(rows.max(1).argmax())], getattr(tokens, "filename", "the data")
        raise DataError(f"{file} holds id {rows.max()} within {T} of position {offset}, outside "
                        f"the vocabulary of {vocab_size}; prepare it again")
    return torch.from_numpy(rows.astype(np.int64))


def inputs_and_targets(rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns inputs and next-token targets (n, T) of rows (n, T + 1), on the device.

    On CUDA the host does not wait for the copy.
    """
    rows = rows.to(device, non_blocking=device.type == "cuda")
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

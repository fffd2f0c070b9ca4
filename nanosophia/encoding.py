"""Turns documents into batches of token ids, in order, in this process or in several.

Workers read parquet and txt files by themselves; what cannot be divided is read here and handed to
them. Long documents are cut where the pieces tokenise as the whole does. The ids are the same for
any number of processes.
"""

import os
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from functools import cache
from itertools import chain

import numpy as np

from nanosophia.documents import CorpusError, Documents, Part
from nanosophia.tokenizer import fast_gpt2, get_tokenizer

BATCH_CHARACTERS = 1 << 19  # text that is tokenised at a time
PART_BYTES = 1 << 22  # small parts, such as txt files, are given to a worker together
Batch = tuple[str, int, int, bool, bytes]
Pieces = tuple[str, list[str | None], list[bool]]


def encode_documents(documents: Documents, first: int, tokenizer: str,
                     num_proc: int) -> Iterator[Batch]:
    """Yields the documents from number `first` on in batches: split, number of documents that end
    in it, how many of them are left out, whether it ends with the end of one, uint16 ids.

    Raises CorpusError where a document cannot be read, after the batches of those before it.
    """
    if num_proc == 1:
        for pieces in _batched(documents.read(first)):
            yield _encode(tokenizer, *pieces)
        return
    parts = documents.parts(first)
    if parts is not None:
        calls = ((_encode_parts, tokenizer, group) for group in _grouped(parts))
    else:
        calls = ((_encode_pieces, tokenizer, *pieces)
                 for pieces in _batched(documents.read(first)))
    for batches, error in _results(calls, num_proc):
        yield from batches
        if error:
            raise error


def _results(calls: Iterator[tuple], num_proc: int) -> Iterator:
    """Makes calls (function, *arguments) in processes; yields the results in order."""
    with ProcessPoolExecutor(num_proc, initializer=_exit_with_parent,
                             initargs=(os.getpid(),)) as pool:
        pending = deque()
        try:
            for call in calls:
                pending.append(_submit(pool, *call))
                if len(pending) > 2 * num_proc:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise CorpusError("a tokenising process died (out of memory?); the same command "
                              "continues; try a smaller --num_proc") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _grouped(parts: Iterator[Part]) -> Iterator[list[Part]]:
    """Yields consecutive parts, together about PART_BYTES unless one alone is larger."""
    group, size = [], 0
    for part in parts:
        if group and size + part.size > PART_BYTES:
            yield group
            group, size = [], 0
        group.append(part)
        size += part.size
    if group:
        yield group


def _encode_parts(tokenizer: str, parts: list[Part]) -> tuple[list[Batch], CorpusError | None]:
    """Returns the batches of some parts and the error, if there was one, that ended them."""
    batches = []
    try:
        for pieces in _batched(chain.from_iterable(part.read() for part in parts)):
            batches.append(_encode(tokenizer, *pieces))
    except CorpusError as error:
        return batches, error
    return batches, None


def _encode_pieces(tokenizer: str, *pieces) -> tuple[list[Batch], None]:
    return [_encode(tokenizer, *pieces)], None


def _submit(pool: ProcessPoolExecutor, *call) -> Future:
    """Hands a batch to the pool, which may start a worker for it.

    A worker starts with Ctrl-C blocked, as it is here, until it ignores it: one that arrived
    earlier would end the worker with a traceback.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(*call)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _exit_with_parent(parent: int) -> None:
    """Ends this worker soon after its parent was killed, instead of waiting for work forever.

    Ctrl-C is handled by the parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _batched(documents: Iterator[tuple[str, str | None]]) -> Iterator[Pieces]:
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
                size += len(piece or "")
    except CorpusError as error:
        failed = error
    if texts:
        yield current, texts, ended
    if failed:
        raise failed


# Between a non-space and a line break that a non-space follows, GPT-2's pattern (and NeoX's, the
# same) always splits: both sides tokenise as they do together. The byte-level one does so anywhere.
_CUT = re.compile(r"(?<=\S)\n(?=\S)")


def _pieces(text: str | None) -> Iterator[tuple[str | None, bool]]:
    """Yields a long document in parts that tokenise as the whole does; the last one is marked."""
    if text is None:
        yield None, True
        return
    start = 0
    while len(text) - start > 2 * BATCH_CHARACTERS:
        cut = _CUT.search(text, start + BATCH_CHARACTERS)
        if cut is None:
            break
        yield text[start:cut.start()], False
        start = cut.start()
    yield text[start:], True


@cache
def _encoder(name: str) -> tuple[Callable[[str], np.ndarray], np.ndarray]:
    """Returns a function from text to ids, in which text that spells a special token is text, and
    end-of-text."""
    encoding = get_tokenizer(name)
    end = np.array([encoding.eot_token], dtype=np.uint16)
    os.environ.setdefault("RAYON_NUM_THREADS", "1")  # processes share the cores
    if name == "gpt2" and (fast := fast_gpt2(encoding)):
        return lambda text: np.frombuffer(fast(text), dtype="<u4"), end
    return lambda text: encoding.encode_to_numpy(text, disallowed_special=()), end


def _encode(tokenizer: str, split: str, texts: list[str | None], ended: list[bool]) -> Batch:
    """Returns the batch of some pieces, with end-of-text after each that ends its document."""
    encode, end = _encoder(tokenizer)
    parts = [np.empty(0, dtype=np.uint16)]
    for text, ends in zip(texts, ended, strict=True):
        if text is None:
            continue
        try:
            text.encode()
        except UnicodeEncodeError:  # lone surrogates, replaced as tiktoken's encode_ordinary does
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        try:
            ids = encode(text)
        except BaseException as error:  # of tokenizers also a panic, which is no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            raise CorpusError(f"tokenizer {tokenizer} fails on a text that begins "
                              f"{text[:80]!r} ({error}); leave that "
                              "document out, or give another tokenizer") from None
        parts.append(ids.astype(np.uint16))
        if ends:
            parts.append(end)
    return split, sum(ended), texts.count(None), ended[-1], np.concatenate(parts).tobytes()


def cut_in_two(batches: Iterator[Batch], val_share: float) -> Iterator[Batch]:
    """Turns the batches of one document into its training part and its validation part.

    It is cut at a token, whatever the text is like; each part ends with end-of-text.
    """
    with closing(batches):
        ids = np.frombuffer(b"".join(ids for *_, ids in batches), dtype=np.uint16)
    if len(ids):
        cut = round((len(ids) - 1) * (1 - val_share))
        yield "train", 1, 0, False, np.append(ids[:cut], ids[-1:]).tobytes()
        yield "val", 1, 0, True, ids[cut:].tobytes()

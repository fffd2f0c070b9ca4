"""Turns documents into batches of token ids, in order, in this process or in several.

Long documents are cut where the parts tokenise as the whole does, so that a worker gets no more
than a bounded piece; the ids are the same for any number of processes.
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

import numpy as np

from nanosophia.documents import CorpusError
from nanosophia.tokenizer import fast_gpt2, get_tokenizer

BATCH_CHARACTERS = 1 << 19  # text handed to a worker at a time
Batches = Iterator[tuple[str, int, bool, bytes]]


def encode_documents(documents: Iterator[tuple[str, str]], tokenizer: str,
                     num_proc: int) -> Batches:
    """Yields batches in order: split, number of documents that end in it, whether it ends with the
    end of one, uint16 ids.

    Raises CorpusError where a document cannot be read, after the batches of those before it.
    """
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
                                _submit(pool, tokenizer, texts, ended)))
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


def _submit(pool: ProcessPoolExecutor, *args) -> Future:
    """Hands a batch to the pool, which may start a worker for it.

    A worker starts with Ctrl-C blocked, as it is here, until it ignores it: one that arrived
    earlier would end the worker with a traceback.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(_encode, *args)
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
def _encoder(name: str) -> tuple[Callable[[str], np.ndarray], np.ndarray]:
    """Returns a function from text to ids, in which text that spells a special token is text, and
    end-of-text."""
    encoding = get_tokenizer(name)
    end = np.array([encoding.eot_token], dtype=np.uint16)
    os.environ.setdefault("RAYON_NUM_THREADS", "1")  # processes share the cores
    if name == "gpt2" and (fast := fast_gpt2(encoding)):
        return lambda text: np.frombuffer(fast(text), dtype="<u4"), end
    return lambda text: encoding.encode_to_numpy(text, disallowed_special=()), end


def _encode(tokenizer: str, texts: list[str], ended: list[bool]) -> bytes:
    """Returns uint16 ids of the pieces, with end-of-text after each that ends its document."""
    encode, end = _encoder(tokenizer)
    parts = []
    for text, ends in zip(texts, ended, strict=True):
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
    return np.concatenate(parts).tobytes()


def cut_in_two(batches: Batches, val_share: float) -> Batches:
    """Turns the batches of one document into its training part and its validation part.

    It is cut at a token, whatever the text is like; each part ends with end-of-text.
    """
    with closing(batches):
        ids = np.frombuffer(b"".join(ids for *_, ids in batches), dtype=np.uint16)
    if len(ids):
        cut = round((len(ids) - 1) * (1 - val_share))
        yield "train", 1, False, np.append(ids[:cut], ids[-1:]).tobytes()
        yield "val", 1, True, ids[cut:].tobytes()

"""nanoGPT's meta.pkl: which character each id stands for, read without running anything in it.

Data of bytes gets one too, so that nanoGPT's train.py and sample.py take the folder: each byte is
spelled as the character of that number, which shows text beyond ASCII as its bytes.
"""

import io
import pickle
from collections.abc import Sequence
from pathlib import Path

from nanosophia.configurator import UserError
from nanosophia.files import read_bytes, write_bytes

CHARACTERS = "meta.pkl"
EOT = "<|endoftext|>"
BYTES = (*map(chr, range(256)), EOT)  # the spelling of the ids of the tokenizer "bytes"


class TokenizerError(UserError):
    """The tokenizer is not available; the message says how to supply it."""


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, text and containers; refuses everything that would import or run code."""

    def find_class(self, module: str, name: str) -> object:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: object) -> object:
        raise pickle.UnpicklingError("it refers to something outside")


def read_characters(path: Path) -> tuple[str, ...]:
    """Returns the characters of a meta.pkl in the order of their ids, or BYTES.

    Raises OSError where it cannot be read, TokenizerError where it holds anything else.
    """
    content = read_bytes(path)
    try:
        if len(content) > 1 << 24:
            raise ValueError(f"it has {len(content)} bytes")
        meta = _PlainUnpickler(io.BytesIO(content)).load()
        ids = meta["stoi"]
        characters = tuple(sorted(ids, key=ids.get))
        if [ids[c] for c in characters] != list(range(len(ids))) or meta["vocab_size"] != len(ids) \
                or not all(type(i) is int for i in ids.values()) or not characters \
                or not (characters == BYTES or all(
                    type(c) is str and len(c) == 1 for c in characters)):
            raise ValueError("its stoi does not number single characters from 0 on")
    except Exception as error:  # of damaged pickles any
        raise TokenizerError(f"{path} is not a nanoGPT's list of characters: {error}; prepare the "
                             "folder again") from None
    return characters


def write_characters(path: Path, characters: Sequence[str]) -> None:
    """Writes a meta.pkl with the characters in the order of their ids; raises OSError."""
    write_bytes(path, pickle.dumps(dict(
        vocab_size=len(characters), itos=dict(enumerate(characters)),
        stoi={c: i for i, c in enumerate(characters)})))

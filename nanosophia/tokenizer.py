"""Tokenizers: tiktoken's "gpt2", "bytes" (256 bytes and end-of-text), a tokenizer.json, or the
characters that nanoGPT's meta.pkl lists.

GPT-2's byte-pair encoding needs two published files, which tiktoken downloads once and caches;
"bytes" needs nothing. The path of a tokenizer.json, or a model's name on the hub, gives an object
with the same methods through the `tokenizers` library (GPT-NeoX: EleutherAI/gpt-neox-20b).
"""

import codecs
import hashlib
import json
import os
import re
import socket
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from nanosophia.characters import CHARACTERS, EOT, TokenizerError, read_characters
from nanosophia.files import read_bytes

NAMES = ("gpt2", "bytes")
FILE_NAME = "tokenizer.json"  # of a copy beside the data
MOST_CLASSES = 1 << 20  # of a vocabulary
GPT2_CLASSES = 50257  # of GPT-2's encoding, end-of-text included

# tiktoken's cache names (sha1 of the address), the published files' names and their sha256, from
# tiktoken_ext/openai_public.py.
_GPT2_FILES = {
    "6d1cbeee0f20b3d9449abfede4726ed8212e3aee": (
        "vocab.bpe", "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
    "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6": (
        "encoder.json", "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
}


def get_tokenizer(name: str):
    """Returns the encoding called `name`; `n_vocab` counts its classes, `eot_token` ends text.

    The latter is None where a vocabulary has no end-of-text, as one of characters. Raises
    TokenizerError for an unknown name, or when its files are neither cached nor downloadable.
    """
    if name == "bytes":
        return _bytes_encoding()
    if name != "gpt2":
        return FileEncoding(name)
    import tiktoken
    _check_cache()
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # tiktoken downloads without one
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:
        raise TokenizerError(f"GPT-2's tokenizer files could not be downloaded "
                             f"({type(error).__name__}); {_how_to_supply()}") from error
    finally:
        socket.setdefaulttimeout(timeout)


# What a fast encoder is asked before it is trusted, beside the tests, which ask it much more.
_PROBES = (
    "", " ", "a\tb\r\n\r\n c", "'s 'S\u2019s don't\n's", " \u180e\u00a0\u2003x", "½Ⅷ٣4 1234567",
    "naïve cafe\u0301 日本語 🎉🏽", f"a{EOT}b", "\x00\x7f", "   \n \n  def f(x):\n\treturn 3.14")


def fast_gpt2(encoding) -> Callable[[str], bytes] | None:
    """Returns a function from text to little-endian uint32 ids, those of tiktoken's GPT-2
    `encoding`, about ten times as fast; None where fastokens cannot be had or differs from it.

    Its own parameters for GPT-2's published files: with tiktoken's pattern it splits U+180E
    otherwise.
    """
    try:
        import fastokens
        vocab_bpe, encoder_json = (
            read_bytes(cache_dir() / cached).decode() for cached in _GPT2_FILES)
        vocab = {token: rank for token, rank in json.loads(encoder_json).items() if token != EOT}
        byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True,
                          use_regex=True)
        tokenizer = fastokens.Tokenizer.from_json_str(json.dumps(dict(
            version="1.0", added_tokens=[], pre_tokenizer=byte_level, decoder=byte_level,
            model=dict(type="BPE", vocab=vocab, merges=[
                line.split(" ") for line in vocab_bpe.split("\n")[1:-1]]))))

        def encode(text: str) -> bytes:
            return tokenizer.encode_batch_flat([text])[0]

        agrees = all(list(memoryview(encode(text)).cast("I")) == encoding.encode_ordinary(text)
                     for text in _PROBES)
    except Exception:  # no package, no cached files, another format: tiktoken is there
        return None
    return encode if agrees else None


def fingerprint(encoding) -> str:
    """Returns a sha256 over the vocabulary, so that data and model can be matched."""
    if isinstance(encoding, FileEncoding):
        return hashlib.sha256(encoding.json.encode()).hexdigest()
    digest = hashlib.sha256(encoding._pat_str.encode())
    for token, rank in sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1]):
        digest.update(len(token).to_bytes(4, "little") + token + rank.to_bytes(4, "little"))
    digest.update(repr(sorted(encoding._special_tokens.items())).encode())
    return digest.hexdigest()


def resolve_tokenizer(folder: Path, name: str) -> str:
    """Returns the tokenizer that meta.json in `folder` names; a file name is one in that folder."""
    return str(folder / name) if name in (FILE_NAME, CHARACTERS) else name


def _characters_json(characters: Sequence[str]) -> str:
    """Returns the tokenizer.json of an id per character; there is no end-of-text."""
    return json.dumps(dict(
        version="1.0", truncation=None, padding=None, normalizer=None, post_processor=None,
        added_tokens=[], decoder=dict(type="Fuse"), pre_tokenizer=dict(
            type="Split", pattern=dict(Regex=r"[\s\S]"), behavior="Isolated", invert=False),
        model=dict(type="WordLevel", vocab={c: i for i, c in enumerate(characters)},
                   unk_token="<unknown>")))


class FileEncoding:
    """Wraps a tokenizer.json in the methods of tiktoken.Encoding that this project uses."""

    def __init__(self, name: str):
        """`name` is a path of a tokenizer.json or meta.pkl, or a name on the hub.

        Raises TokenizerError.
        """
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise TokenizerError(f"tokenizer {name!r} needs the package `tokenizers`; run pip "
                                 "install -r requirements.txt") from None
        try:
            if name.endswith(".json"):
                self.json = read_bytes(Path(name)).decode()
                self._tokenizer = Tokenizer.from_str(self.json)
            elif Path(name).name == CHARACTERS:
                self.json = _characters_json(read_characters(Path(name)))
                self._tokenizer = Tokenizer.from_str(self.json)
            elif re.fullmatch(r"[\w.-]+/[\w.-]+", name):
                self._tokenizer = Tokenizer.from_pretrained(name)
                self.json = self._tokenizer.to_str()
            else:
                raise TokenizerError(f"tokenizer {name!r} is none of {', '.join(NAMES)}, no path "
                                     "of a tokenizer.json and no hub name OWNER/NAME")
        except BaseException as error:  # tokenizers raises Exception, and panics, which are none
            if isinstance(error, TokenizerError | KeyboardInterrupt):
                raise
            raise TokenizerError(f"tokenizer {name} could not be read ({error}); give the path of "
                                 "a tokenizer.json") from error
        self._tokenizer.encode_special_tokens = True  # text that spells a special token is text
        self._tokenizer.no_truncation()  # a published file may ask for either
        self._tokenizer.no_padding()
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.n_vocab = max(ids, default=0) + 1
        if self.n_vocab > MOST_CLASSES:
            raise TokenizerError(f"tokenizer {name} has an id of {self.n_vocab - 1}, above "
                                 f"{MOST_CLASSES}; give another tokenizer.json")
        self.eot_token: int | None = self._tokenizer.token_to_id(EOT)
        if self.eot_token is not None and self.eot_token in self.encode_ordinary(f"a{EOT}b"):
            raise TokenizerError(f"tokenizer {name} takes {EOT} in a text for the end of a "
                                 "document; mark it as special in its added_tokens")

    def encode_ordinary(self, text: str) -> list[int]:
        """Returns ids of the text; raises TokenizerError where the vocabulary lacks a character."""
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # of characters alone: others have one for what is unknown
            known = self._tokenizer.get_vocab()
            missing = sorted({c for c in text if c not in known})[:10]
            raise TokenizerError(f"the text has {', '.join(map(repr, missing))}, which the "
                                 f"vocabulary lacks ({error}); use its characters") from None

    def encode_to_numpy(self, text: str, *, disallowed_special=()):
        """Returns ids of the text as an array."""
        import numpy as np
        return np.array(self.encode_ordinary(text), dtype=np.uint32)

    def encode(self, text: str, *, allowed_special=frozenset()) -> list[int]:
        """Returns ids of the text, in which end-of-text is recognised when it is allowed."""
        if EOT not in allowed_special or self.eot_token is None:
            return self.encode_ordinary(text)
        first, *rest = text.split(EOT)
        ids = self.encode_ordinary(first)
        for part in rest:
            ids += [self.eot_token, *self.encode_ordinary(part)]
        return ids

    def decode(self, ids: list[int]) -> str:
        """Returns the text of ids."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def byte_lengths(encoding) -> list[int]:
    """Returns how many bytes of text each id stands for; end-of-text stands for none."""
    if isinstance(encoding, FileEncoding):
        letters = set(bytes_to_unicode().values()) if '"ByteLevel"' in encoding.json else set()
        tokens = [encoding._tokenizer.id_to_token(i) or "" for i in range(encoding.n_vocab)]
        lengths = [len(t) if set(t) <= letters else len(t.encode()) for t in tokens]
    else:
        lengths = [len(encoding.decode_single_token_bytes(i)) for i in range(encoding.n_vocab)]
    if encoding.eot_token is not None:
        lengths[encoding.eot_token] = 0
    return lengths


def start_token(encoding) -> int:
    """Returns the id that a text begins after: end-of-text, or a line break where there is none."""
    if encoding.eot_token is not None:
        return encoding.eot_token
    try:
        return encoding.encode_ordinary("\n")[0]
    except (TokenizerError, IndexError):  # of a vocabulary without one: any other does
        return 0


def bytes_to_unicode() -> dict[int, str]:
    """Returns the printable character that stands for each byte in GPT-2's vocabulary files."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}


class TextStream:
    """Decodes ids one by one; a character of several tokens is returned when it is complete."""

    def __init__(self, encoding):
        self._encoding = encoding
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._pieces = None
        if isinstance(encoding, FileEncoding):
            from tokenizers.decoders import DecodeStream
            self._pieces = DecodeStream(skip_special_tokens=False)

    def push(self, token: int) -> str:
        """Returns the text that this id completes, possibly none."""
        if self._pieces is not None:
            return self._pieces.step(self._encoding._tokenizer, token) or ""
        return self._utf8.decode(self._encoding.decode_bytes([token]))

    def end(self) -> str:
        """Returns a replacement character if the last one stayed incomplete, else nothing."""
        return "" if self._pieces is not None else self._utf8.decode(b"", final=True)


def _bytes_encoding():
    import tiktoken
    return tiktoken.Encoding(
        name="bytes", pat_str=r"[\s\S]{1,64}", mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={EOT: 256})


def cache_dir() -> Path:
    """Returns the folder where tiktoken keeps its files."""
    for variable in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        if os.environ.get(variable):
            return Path(os.environ[variable])
    return Path(tempfile.gettempdir()) / "data-gym-cache"


def _check_cache() -> None:
    """Refuses a damaged cached file, which tiktoken would delete and download again."""
    for cached, (published, sha256) in _GPT2_FILES.items():
        path = cache_dir() / cached
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            raise TokenizerError(f"{path} is damaged (it should be GPT-2's {published}, sha256 "
                                 f"{sha256}); replace or remove it")


def _how_to_supply() -> str:
    files = "; ".join(f"{published} (sha256 {sha256}) as {cached}"
                      for cached, (published, sha256) in _GPT2_FILES.items())
    return (f"set TIKTOKEN_CACHE_DIR to a folder that holds {files}. They are in OpenAI's GPT-2 "
            "release. Or use byte-level data, which needs no files")

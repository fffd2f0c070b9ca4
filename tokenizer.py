"""A tiktoken Encoding by name: "gpt2", or "bytes" (256 bytes and end-of-text).

GPT-2's byte-pair encoding needs two published files, which tiktoken fetches once and caches;
"bytes" needs nothing.
"""

import hashlib
import os
import socket
import tempfile
from pathlib import Path

EOT = "<|endoftext|>"
NAMES = ("gpt2", "bytes")

# tiktoken's cache names (sha1 of the address), the published files' names and their sha256, from
# tiktoken_ext/openai_public.py.
_GPT2_FILES = {
    "6d1cbeee0f20b3d9449abfede4726ed8212e3aee": (
        "vocab.bpe", "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
    "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6": (
        "encoder.json", "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
}


class TokenizerError(ValueError):
    """The tokenizer cannot be had; the message says how to supply it."""


def get_tokenizer(name: str):
    """The tiktoken.Encoding called `name`; its `n_vocab` counts the classes, `eot_token` ends text.

    Raises TokenizerError for an unknown name and when GPT-2's files are neither cached nor fetched.
    """
    if name == "bytes":
        return _bytes_encoding()
    if name != "gpt2":
        raise TokenizerError(f"tokenizer {name!r} is none of {', '.join(NAMES)}")
    import tiktoken
    _check_cache()
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # tiktoken fetches without one
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:
        raise TokenizerError(f"GPT-2's tokenizer files could not be fetched "
                             f"({type(error).__name__}); {_how_to_supply()}") from error
    finally:
        socket.setdefaulttimeout(timeout)


def fingerprint(encoding) -> str:
    """sha256 over the vocabulary, so that data and model can be matched."""
    digest = hashlib.sha256(encoding._pat_str.encode())
    for token, rank in sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1]):
        digest.update(len(token).to_bytes(4, "little") + token + rank.to_bytes(4, "little"))
    digest.update(repr(sorted(encoding._special_tokens.items())).encode())
    return digest.hexdigest()


def _bytes_encoding():
    import tiktoken
    return tiktoken.Encoding(
        name="bytes", pat_str=r"[\s\S]{1,64}", mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={EOT: 256})


def cache_dir() -> Path:
    """The folder where tiktoken keeps its files."""
    for variable in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        if os.environ.get(variable):
            return Path(os.environ[variable])
    return Path(tempfile.gettempdir()) / "data-gym-cache"


def _check_cache() -> None:
    """Refuses a damaged cached file, which tiktoken would delete and fetch again."""
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

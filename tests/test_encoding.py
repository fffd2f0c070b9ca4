"""The fast GPT-2 encoder gives tiktoken's ids, or is not used."""

import random
import sys
import unicodedata
from functools import cache

import numpy as np
import pytest

from nanosophia import encoding, tokenizer
from nanosophia.tokenizer import EOT, fast_gpt2, get_tokenizer
from tests.conftest import SHARED

SPACES = "".join(map(chr, range(0x300))) + "\u180e\u2000\u2003\u2028\u3000\ufeff"


@pytest.fixture
def gpt2(gpt2_cache):
    pytest.importorskip("fastokens")
    return get_tokenizer("gpt2")


@cache
def fast():
    return fast_gpt2(get_tokenizer("gpt2"))


def differing(gpt2, texts):
    """The texts that the fast encoder and tiktoken encode differently."""
    return [text[:80] for text in texts if not np.array_equal(
        np.frombuffer(fast()(text), "<u4"), gpt2.encode_to_numpy(text, disallowed_special=()))]


def test_every_character_is_encoded_as_by_tiktoken(gpt2):
    """Alone, and between letters, digits, spaces and apostrophes, where the pattern may split."""
    for first in range(0, sys.maxunicode + 1, 64):
        letters = [chr(c) for c in range(first, first + 64) if unicodedata.category(chr(c)) != "Cs"]
        if letters and unicodedata.category(letters[0]) not in ("Co", "Cn"):
            assert not differing(gpt2, ["".join(f"a{c}b {c}'s{c} 1{c}\n{c}{c} " for c in letters)])


def test_hostile_texts_are_encoded_as_by_tiktoken(gpt2):
    draw = random.Random(0)
    texts = ["", f"a{EOT}b", EOT * 3, "\r\n\r\n x\t\t\n", "\x00" * 5, "don't DON'T don’t '", "½Ⅷ٣٤",
             *(" " * n for n in range(1, 40)), *(" " * n + "x" for n in range(1, 40)),
             "x" * 100_000, " " * 100_000, "\n" * 100_000, "🏳️‍🌈👩‍👩‍👧" * 1000,
             bytes(draw.randbytes(10_000)).decode("latin-1")]
    for _ in range(3000):
        parts = [draw.choice((draw.choice(SPACES), draw.choice("'sS'tTllveREdDmM"), "word",
                              chr(draw.randrange(0x20, 0xD800)), str(draw.randrange(10**6))))
                 for _ in range(draw.randrange(1, 30))]
        texts.append("".join(parts))
    assert differing(gpt2, texts) == []


def test_a_corpus_of_books_is_encoded_as_by_tiktoken(gpt2):
    parquet = pytest.importorskip("pyarrow.parquet")
    file = SHARED / "corpus" / "books.parquet"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    texts = parquet.read_table(file, columns=["text"])["text"].to_pylist()
    assert len(texts) > 9000 and differing(gpt2, texts) == []


@pytest.mark.parametrize("missing", ["package", "files", "agreement"])
def test_without_a_trusted_fast_encoder_tiktoken_encodes(gpt2, monkeypatch, tmp_path, missing):
    assert fast_gpt2(gpt2) is not None
    if missing == "package":
        monkeypatch.setitem(sys.modules, "fastokens", None)
    elif missing == "files":
        monkeypatch.setattr(tokenizer, "cache_dir", lambda: tmp_path)
    else:
        monkeypatch.setattr(tokenizer, "_PROBES", ("\ud800",))
    assert fast_gpt2(gpt2) is None
    encoding._encoder.cache_clear()
    text = "naïve  text\n"
    if missing != "files":  # tiktoken keeps what it has read
        *_, ids = encoding._encode("gpt2", "train", [text], [True])
        found = np.frombuffer(ids, np.uint16).tolist()
        assert found == [*gpt2.encode_ordinary(text), gpt2.eot_token]
    encoding._encoder.cache_clear()

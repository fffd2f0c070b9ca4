"""The sampling command, as a person uses it."""

import io
import math

import pytest
import torch

import sample
from model import GPT, GPTConfig
from nanosophia.generate import lay_out_for_decoding
from nanosophia.tokenizer import TextStream, get_tokenizer
from tests.conftest import run_train
from tests.test_checkpoint import nanogpt_file

RULE = "---------------"


@pytest.fixture
def run(tiny, tmp_path, capsys):
    """Flags that sample from a small run."""
    run_train(*tiny())
    capsys.readouterr()
    return [f"--out_dir={tmp_path / 'run'}", "--max_new_tokens=12", "--device=cpu"]


def test_one_sample_is_streamed_and_several_are_a_batch(run, capsys):
    sample.main([*run, "--num_samples=1", "--start=def f"])
    one = capsys.readouterr().out
    assert one.startswith("def f") and one.endswith(f"\n{RULE}\n") and one.count(RULE) == 1
    sample.main([*run, "--num_samples=3", "--start=def f"])
    assert capsys.readouterr().out.count(RULE) == 3


def test_the_seed_decides(run, capsys):
    texts = []
    for seed in (1, 1, 2):
        sample.main([*run, "--num_samples=1", f"--seed={seed}"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_prompts_come_from_files_and_standard_input(run, capsys, monkeypatch, tmp_path):
    (tmp_path / "prompt").write_text("naïve")
    sample.main([*run, "--num_samples=1", f"--start=FILE:{tmp_path / 'prompt'}"])
    assert capsys.readouterr().out.startswith("naïve")
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe"))
    sample.main([*run, "--num_samples=1", "--start=-"])
    assert capsys.readouterr().out.startswith("from a pipe")
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n\nnever\n"))
    sample.main([*run, "--num_samples=1", "--interactive"])
    assert capsys.readouterr().out.count(RULE) == 2


def test_a_long_or_an_empty_prompt_works(run, capsys):
    sample.main([*run, "--num_samples=2", "--start=" + "x" * 100])
    assert capsys.readouterr().out.count(RULE) == 2
    sample.main([*run, "--num_samples=1", "--start=<|endoftext|>"])
    assert "<|endoftext|>" in capsys.readouterr().out


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
@pytest.mark.parametrize("temperature", [0, 1])
def test_weights_that_are_not_finite_are_refused(run, refused, monkeypatch, value, temperature):
    real = sample.run_weights

    def spoilt(*args):
        weights = real(*args)
        weights.tensors["transformer.h.0.attn.c_attn.weight"].fill_(value)
        return weights

    monkeypatch.setattr(sample, "run_weights", spoilt)
    assert "logits are not finite" in refused(sample.main, [*run, f"--temperature={temperature}"])


@pytest.mark.parametrize("flag, words", [
    ("--top_p=0", "top_p = 0.0 must be at least 1e-06"), ("--top_p=1.1", "must be at most 1"),
    ("--temperature=-1", "at least 0"), ("--start=FILE:nowhere", "cannot read nowhere"),
    ("--init_from=nowhere.pt", "cannot read nowhere.pt"),
    ("--start=ab\udce9", "not valid UTF-8 at character 2"),
    ("--checkpoint=bets", "did you mean best?")])
def test_mistakes_are_refused_in_words(run, refused, flag, words):
    assert words in refused(sample.main, [*run, flag])


def test_the_best_checkpoint_can_be_asked_for(tiny, tmp_path, capsys, refused):
    run_train(*tiny("--max_iters=6", "--eval_interval=3", "--checkpoint_interval=3"))
    sample.main([f"--out_dir={tmp_path / 'run'}", "--checkpoint=best", "--num_samples=1",
                 "--max_new_tokens=2"])
    (tmp_path / "run" / "best").unlink()
    line = refused(sample.main, [f"--out_dir={tmp_path / 'run'}", "--checkpoint=best"])
    assert "names no best checkpoint" in line


def test_a_nanogpt_checkpoint_gives_text(tmp_path, capsys, refused, gpt2_cache):
    nanogpt_file(tmp_path / "other.pt")
    line = refused(sample.main, [f"--init_from={tmp_path / 'other.pt'}", "--start=hello there"])
    assert "has 320 classes and does not say which tokenizer" in line
    nanogpt_file(tmp_path / "ckpt.pt", vocab_size=50304)
    sample.main([f"--init_from={tmp_path / 'ckpt.pt'}", "--start=!", "--num_samples=1",
                 "--max_new_tokens=3"])
    assert capsys.readouterr().out.startswith("!")


def test_characters_of_several_tokens_come_whole():
    encoding = get_tokenizer("bytes")
    stream = TextStream(encoding)
    text = "aé日🎉z"
    pieces = [stream.push(token) for token in encoding.encode(text)]
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    assert pieces[1] == "" and pieces[2] == "é"
    for token in "🎉".encode()[:2]:
        assert stream.push(token) == ""
    assert stream.end() == "\ufffd"


def test_the_layout_for_decoding_changes_no_logit():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=64)).eval()
    idx = torch.randint(64, (2, 16))
    with torch.no_grad():
        before = model(idx)
        lay_out_for_decoding(model)
        assert model.transformer.wte.weight.stride() == (1, 64)
        torch.testing.assert_close(model(idx), before)


@pytest.mark.parametrize("flags, computes, expected", [
    (["--num_samples=1"], True, torch.float32), (["--num_samples=2"], True, torch.bfloat16),
    (["--num_samples=2"], False, torch.float32),
    (["--num_samples=1", "--dtype=bfloat16"], False, torch.bfloat16)])
def test_the_precision_suits_the_number_of_texts(run, monkeypatch, flags, computes, expected):
    monkeypatch.setattr("nanosophia.precision.NARROW", 16)
    monkeypatch.setattr("nanosophia.precision.computes_bfloat16", lambda: computes)
    monkeypatch.setattr("nanosophia.precision.bfloat16_speed", lambda: 2.0)
    found = []
    monkeypatch.setattr(sample, "lay_out_for_decoding",
                        lambda model: found.append(next(model.parameters()).dtype))
    sample.main([*run, *flags])
    assert found == [expected]

"""To transformers and back: the same logits, the same tokens."""

import json
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sample
import train
from model import GPT
from nanosophia import checkpoint, huggingface
from nanosophia.checkpoint import load_latest
from nanosophia.corpus import write_corpus
from nanosophia.generate import generate
from nanosophia.tokenizer import EOT, get_tokenizer
from nanosophia.weights import foreign_weights, run_weights
from tests.conftest import CutOff, listed, run_train

transformers = pytest.importorskip("transformers")
TEXT = "Hello  world!\n\tdef f(x):  return 3.14 # naïve ünïcode 日本語 🎉 don't 'll \x00 end"


def exported(tmp_path, tiny, *flags):
    run_train(*tiny("--max_iters=4", *flags))
    huggingface.main([f"--out_dir={tmp_path / 'run'}", f"--export={tmp_path / 'hf'}"])
    return run_weights(tmp_path / "run"), tmp_path / "hf"


def ours(weights):
    model = GPT(weights.config).eval()
    model.load_state_dict(weights.tensors)
    return model


@pytest.mark.parametrize("flags", [
    (), ("--bias", "--activation=gelu"), ("--scale_attn_by_inverse_layer_idx",)])
def test_transformers_gpt2_computes_the_same_logits(tiny, tmp_path, flags, capsys):
    weights, folder = exported(tmp_path, tiny, *flags)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    idx = torch.randint(257, (3, 16), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = ours(weights)(idx)[..., :257]
        found = theirs(idx).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert theirs.config.vocab_size == 257


NEOX = ("--rotary_fraction=0.25", "--parallel_residual", "--tied_head=False", "--bias",
        "--activation=gelu")


@pytest.mark.parametrize("flags", [
    NEOX, ("--rotary_fraction=1",), (*NEOX[:1], "--tied_head=False"),
    ("--rotary_fraction=0.5", "--parallel_residual", "--bias")])
def test_transformers_gpt_neox_computes_the_same_logits(tiny, tmp_path, flags):
    weights, folder = exported(tmp_path, tiny, *flags)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(theirs).__name__ == "GPTNeoXForCausalLM" and theirs.config.vocab_size == 257
    idx = torch.randint(257, (3, 16), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = ours(weights)(idx)[..., :257]
        torch.testing.assert_close(theirs(idx).logits, expected, rtol=0, atol=1e-5)
    again = foreign_weights(str(folder))
    assert again.config == replace(weights.config, vocab_size=257)
    for name, x in weights.tensors.items():
        torch.testing.assert_close(again.tensors[name], x[:len(again.tensors[name])])


def saved(tmp_path, model):
    """The folder of a model with weights that are not small, as transformers itself writes it."""
    for p in model.eval().parameters():
        torch.nn.init.normal_(p, std=0.1)
    model.save_pretrained(tmp_path / "theirs")
    huggingface._write_tokenizer(tmp_path / "theirs", "bytes", get_tokenizer("bytes"), 32)
    return tmp_path / "theirs", model


def neox_folder(tmp_path, **changes):
    """A small GPT-NeoX that transformers itself wrote."""
    torch.manual_seed(0)
    return saved(tmp_path, transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**dict(
        num_hidden_layers=3, num_attention_heads=4, hidden_size=32, intermediate_size=128,
        max_position_embeddings=64, vocab_size=300, rope_parameters=dict(
            rope_type="default", rope_theta=10_000.0, partial_rotary_factor=0.25)) | changes)))


@pytest.mark.parametrize("changes", [
    {}, dict(use_parallel_residual=False, hidden_act="gelu_fast"), dict(tie_word_embeddings=True),
    dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=1))])
def test_a_gpt_neox_of_transformers_is_imported_and_sampled_with_its_logits(tmp_path, changes):
    folder, theirs = neox_folder(tmp_path, **changes)
    huggingface.main([f"--import_from={folder}", f"--out_dir={tmp_path / 'x'}"])
    model = ours(run_weights(tmp_path / "x"))
    idx = torch.randint(256, (2, 40))
    with torch.inference_mode():
        expected = theirs(idx).logits
        torch.testing.assert_close(model(idx), expected, rtol=1e-5, atol=1e-5)
        greedy = theirs.generate(idx[:1, :5], max_new_tokens=30, do_sample=False,
                                 pad_token_id=0, eos_token_id=None)
    assert generate(model, idx[:1, :5], 30, temperature=0.0).tolist() == greedy.tolist()
    sample.main([f"--out_dir={tmp_path / 'x'}", "--num_samples=1", "--max_new_tokens=5",
                 "--start=a"])


@pytest.mark.parametrize("spoil, words", [
    (dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0)),
     "rope_parameters: rope_type = 'linear' is not what model.py computes ('default')"),
    (dict(rope_parameters=dict(rope_type="default", rope_theta=5e5)), "rope_theta = 500000.0"),
    (dict(rope_parameters=dict(rope_theta=1e4, partial_rotary_factor=0.4)),
     "rotary_fraction = 0.4 turns 3 of the 8 channels"),
    (dict(rope_parameters=None, rotary_pct=0.5, rotary_emb_base=1e6), "rope_theta = 1000000"),
    (dict(rope_parameters=dict(rope_type="default"), rotary_emb_base=100), "rope_theta = 100 is"),
    (dict(rope_parameters=dict(partial_rotary_factor=0.0)), "leaves the model no positions"),
    (dict(rope_parameters=dict(partial_rotary_factor=True)), "rotary_fraction = True is not"),
    (dict(attention_bias=False), "attention_bias = False"),
    (dict(use_parallel_residual="yes"), "use_parallel_residual: Input should be a valid boolean"),
    (dict(intermediate_size=100), "intermediate_size = 100"),
    (dict(hidden_size=64, intermediate_size=256), "other weights than its settings say")])
def test_a_gpt_neox_of_another_kind_is_refused_in_words(tmp_path, refused, spoil, words):
    folder, _ = neox_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text()) | spoil
    (folder / "config.json").write_text(json.dumps(config))
    line = refused(huggingface.main, [f"--import_from={folder}", f"--out_dir={tmp_path / 'x'}"])
    assert words in line


def test_rotary_settings_are_completed_as_transformers_does(tmp_path):
    folder, theirs = neox_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(
        rope_parameters=dict(rope_type="default", rope_theta=10_000.0), rotary_pct=0.25)))
    (folder / "tokenizer.json").unlink()
    weights = foreign_weights(str(folder))
    assert weights.config.rotary_fraction == 0.25
    idx = torch.randint(256, (2, 40))
    with torch.inference_mode():
        torch.testing.assert_close(ours(weights)(idx), theirs(idx).logits, rtol=1e-5, atol=1e-5)
    assert weights.tokenizer == ""


def test_gpt_2_with_parts_of_gpt_neox_is_not_exported(tiny, tmp_path, refused):
    run_train(*tiny("--max_iters=2", "--parallel_residual"))
    assert "parallel_residual = True, which transformers' GPT-2 cannot" in refused(
        huggingface.main, [f"--out_dir={tmp_path / 'run'}", f"--export={tmp_path / 'hf'}"])


def test_the_exported_tokenizer_and_text_are_the_runs(tiny, tmp_path):
    weights, folder = exported(tmp_path, tiny)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    encoding = get_tokenizer("bytes")
    text = TEXT + "".join(map(chr, range(32, 400)))
    assert theirs(text)["input_ids"] == encoding.encode(text)
    assert theirs.decode(encoding.encode(text)) == text
    assert theirs.eos_token_id == encoding.eot_token
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = encoding.encode("def")
    expected = generate(ours(weights), torch.tensor([prompt]), 10, temperature=0, num_classes=257)
    found = model.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False,
                           pad_token_id=256, eos_token_id=None)
    assert found.tolist() == expected.tolist()


def test_gpt2s_tokenizer_is_exported_merge_for_merge(tmp_path, gpt2_cache):
    encoding = get_tokenizer("gpt2")
    huggingface._write_tokenizer(tmp_path, "gpt2", encoding, 1024)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = [TEXT, (checkpoint.__doc__ or "") * 3, " ".join(str(n * n) for n in range(500)),
             Path(train.__file__).read_text()]
    for text in texts:
        assert theirs(text)["input_ids"] == encoding.encode_ordinary(text)
    assert theirs.convert_tokens_to_ids(EOT) == 50256 and len(theirs) == 50257


def test_the_model_card_says_what_the_run_was(tiny, tmp_path):
    _, folder = exported(tmp_path, tiny)
    card = (folder / "README.md").read_text()
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"train {last['train/loss']:.4f}, val {last['val/loss']:.4f}" in card
    assert "512 in 4 steps" in card and "sophiag, peak learning rate 0.01" in card


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.trial(19)
@pytest.mark.parametrize("place", [".", "step_00000004", "../data", "metrics.jsonl"])
def test_an_export_replaces_nothing_but_an_export(tiny, tmp_path, refused, place):
    run_train(*tiny("--max_iters=4"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "config.json").write_text('{"model_type": "gpt2"}')
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    line = refused(huggingface.main, [f"--out_dir={tmp_path / 'run'}",
                                      f"--export={tmp_path / 'run' / place}"])
    assert "no export of this command" in line or "is a file" in line
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


@pytest.mark.trial(19)
def test_folders_beside_an_export_and_links_to_it_stay(tiny, tmp_path):
    _, folder = exported(tmp_path, tiny)
    for name in ("hf.partial", "hf.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("mine")
    (tmp_path / "link").symlink_to(folder)
    for name in ("hf", "link"):
        huggingface.main([f"--out_dir={tmp_path / 'run'}", f"--export={tmp_path / name}"])
    for name in ("hf.partial", "hf.replaced"):
        assert (tmp_path / name / "thesis.txt").read_text() == "mine"
    assert (tmp_path / "link").is_symlink() and (folder / "model.safetensors").is_file()


@pytest.mark.trial(19)
def test_an_import_replaces_nothing(gpt2_folder, tmp_path, refused):
    folder, _ = gpt2_folder
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "tokenizer.json").write_text("mine")
    line = refused(huggingface.main, [f"--import_from={folder}", f"--out_dir={tmp_path / 'x'}"])
    assert "is not empty; give a new --out_dir" in line
    assert (tmp_path / "x" / "tokenizer.json").read_text() == "mine"


@pytest.mark.trial(19)
def test_an_export_is_replaced_but_for_an_edited_card_and_added_files(tiny, tmp_path, capsys):
    _, folder = exported(tmp_path, tiny)
    card, config = (folder / "README.md").read_text(), (folder / "config.json").read_text()
    (folder / "LICENSE").write_text("mine")
    run_train(*tiny("--max_iters=6", "--init_from=resume"))
    flags = [f"--out_dir={tmp_path / 'run'}", f"--export={folder}"]
    huggingface.main(flags)
    assert "in 6 steps" in (folder / "README.md").read_text() and "in 4 steps" in card
    assert (folder / "config.json").read_text() != config
    (folder / "README.md").write_text("edited")
    capsys.readouterr()
    huggingface.main(flags)
    assert "README.md was edited and is kept" in capsys.readouterr().out
    assert (folder / "README.md").read_text() == "edited"
    assert (folder / "LICENSE").read_text() == "mine"
    assert not list(tmp_path.glob("hf.*"))


@pytest.mark.trial(19)
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_cut_off_at_any_call_an_export_is_the_old_one_or_the_new(tiny, tmp_path, monkeypatch,
                                                                 trials):
    _, folder = exported(tmp_path, tiny)
    (folder / "LICENSE").write_text("mine")
    old = (folder / "model.safetensors").read_bytes()
    run_train(*tiny("--max_iters=6", "--init_from=resume"))
    weights = run_weights(tmp_path / "run")
    monkeypatch.setattr(huggingface, "run_weights", lambda *_: weights)
    cut = CutOff(monkeypatch, [(os, "rename"), (os, "replace"), (os, "fsync"), (os, "mkdir"),
                               (huggingface, "save_file"), (huggingface, "remove")])
    settings = dict(out_dir=str(tmp_path / "run"))
    points, finished, seen = 0, False, set()
    while not finished:
        points += 1
        place = tmp_path / f"cut{points}" / "hf"
        shutil.copytree(folder, place)
        flags = huggingface.HuggingFaceSettings(export=str(place), **settings)
        finished = cut.run(points, lambda flags=flags: huggingface.export(flags))
        if place.exists():
            found = (place / "model.safetensors").read_bytes()
            seen.add("old" if found == old else "new")
            assert "config.json" in names(place) and "tokenizer.json" in names(place)
        else:  # between two renames: the same command goes on
            seen.add("none")
        huggingface.export(flags)
        assert (place / "LICENSE").read_text() == "mine"
        assert (place / "model.safetensors").read_bytes() != old
        assert names(place.parent) == ["hf"]
    assert points > 15 and seen >= {"old", "new"}
    trials(points)


@pytest.mark.trial(19)
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_killed_at_random_moments_an_export_is_whole_or_absent(tiny, tmp_path, trials):
    _, folder = exported(tmp_path, tiny)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    settings = huggingface.HuggingFaceSettings(out_dir=str(tmp_path / "run"), export=str(folder))
    began = time.monotonic()
    huggingface.export(settings)
    duration, moments = time.monotonic() - began, random.Random(19)
    for _ in range(20):
        child = os.fork()
        if child == 0:
            huggingface.export(settings)
            os._exit(0)
        time.sleep(moments.uniform(0, duration))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if folder.exists():
            assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    huggingface.export(settings)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    trials(20)


@pytest.fixture
def gpt2_folder(tmp_path):
    """A small GPT-2 that transformers itself wrote."""
    torch.manual_seed(0)
    return saved(tmp_path, transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=16, n_positions=32, vocab_size=300)))


def test_a_transformers_model_is_imported_with_its_logits(gpt2_folder, tmp_path, capsys, refused):
    folder, theirs = gpt2_folder
    out = tmp_path / "imported"
    huggingface.main([f"--import_from={folder}", f"--out_dir={out}"])
    weights = run_weights(out)
    idx = torch.randint(256, (2, 20))
    with torch.inference_mode():
        torch.testing.assert_close(ours(weights)(idx), theirs(idx).logits, rtol=1e-5, atol=1e-5)
    line = refused(huggingface.main, [f"--import_from={folder}", f"--out_dir={out}"])
    assert "already holds checkpoints" in line
    out.rename(tmp_path / "moved")
    shutil.rmtree(folder)
    sample.main([f"--out_dir={tmp_path / 'moved'}", "--num_samples=1", "--max_new_tokens=5",
                 "--start=a"])


def test_an_imported_run_is_evaluated_on_data_of_its_own_tokenizer(gpt2_folder, tmp_path, capsys):
    folder, _ = gpt2_folder
    huggingface.main([f"--import_from={folder}", f"--out_dir={tmp_path / 'x'}"])
    write_corpus(listed([("train", "abc " * 100), ("val", "abc " * 50)]), tmp_path / "data",
                 str(folder / "tokenizer.json"))
    capsys.readouterr()
    train.main(["--eval_only", f"--out_dir={tmp_path / 'x'}", f"--dataset={tmp_path / 'data'}",
                "--device=cpu"])
    assert "step 0: " in capsys.readouterr().out


def test_a_model_that_names_no_tokenizer_is_not_decoded_as_gpt2s(gpt2_folder, tmp_path, capsys,
                                                                 refused):
    folder, _ = gpt2_folder
    (folder / "tokenizer.json").unlink()
    assert "does not say which tokenizer" in refused(sample.main, [
        f"--init_from={folder}", "--device=cpu"])
    huggingface.main([f"--import_from={folder}", f"--out_dir={tmp_path / 'x'}"])
    assert "sample.py" not in capsys.readouterr().out


@pytest.mark.trial(16)
@pytest.mark.parametrize("spoilt", [torch.zeros(3, 16, 48), torch.zeros(16, 48).long(),
                                    torch.zeros(16, 48, dtype=torch.complex64)])
def test_tensors_of_another_kind_are_refused(gpt2_folder, refused, spoilt):
    folder, _ = gpt2_folder
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"transformer.h.0.attn.c_attn.weight": spoilt},
              folder / "model.safetensors")
    line = refused(sample.main, [f"--init_from={folder}", "--device=cpu"])
    assert "transformer.h.0.attn.c_attn.weight is " in line


@pytest.mark.trial(16)
def test_links_that_go_in_a_circle_are_refused(tmp_path, refused):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    refused(huggingface.main, [f"--import_from={tmp_path / 'a'}", f"--out_dir={tmp_path / 'x'}"])
    refused(huggingface.main, [f"--import_from={tmp_path}", f"--out_dir={tmp_path / 'a'}"])


def test_an_empty_folder_can_be_exported_to_from_within(tiny, tmp_path, monkeypatch):
    run_train(*tiny("--max_iters=4"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    huggingface.main([f"--out_dir={tmp_path / 'run'}", "--export=."])
    assert (tmp_path / "here" / "model.safetensors").is_file()


def test_what_is_exported_and_imported_again_is_what_it_was(tiny, tmp_path):
    weights, folder = exported(tmp_path, tiny)
    again = foreign_weights(str(folder))
    assert again.config == replace(weights.config, vocab_size=257)
    for name, x in weights.tensors.items():
        torch.testing.assert_close(again.tensors[name], x[:257] if "wte" in name else x)


def test_fine_tuning_starts_from_a_transformers_folder(gpt2_folder, tmp_path, tiny):
    folder, _ = gpt2_folder
    flags = [f for f in tiny("--max_iters=30", "--learning_rate=3e-3")
             if not f.startswith(("--n_", "--block_size"))]
    run_train(*flags, f"--init_from={folder}", "--block_size=16")
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["train/loss"] < lines[0]["train/loss"] - 0.2
    assert load_latest(tmp_path / "run").state["config"]["bias"]


@pytest.mark.parametrize("spoil, words", [
    (dict(model_type="llama"), "'model_type' does not match any of the expected tags: 'gpt2', "
                               "'gpt_neox'"),
    (dict(n_inner=7), "n_inner = 7 is not what"),
    (dict(activation_function="relu"), "activation_function = 'relu'"),
    (dict(layer_norm_epsilon=1e-3), "layer_norm_epsilon = 0.001"),
    (dict(n_embd=None), "n_embd: Input should be a valid integer"),
    (dict(n_layer=10**9), "n_layer = 1000000000 must be at most 1000"),
    (dict(n_layer=3), "other weights than its settings say: transformer.h.2.attn")])
def test_a_foreign_folder_is_refused_in_words(gpt2_folder, tmp_path, refused, spoil, words):
    folder, _ = gpt2_folder
    config = json.loads((folder / "config.json").read_text()) | spoil
    (folder / "config.json").write_text(json.dumps(config))
    line = refused(huggingface.main, [f"--import_from={folder}", f"--out_dir={tmp_path / 'x'}"])
    assert words in line


def test_an_empty_folder_is_refused_in_words(tmp_path, refused):
    (tmp_path / "empty").mkdir()
    line = refused(huggingface.main, [f"--import_from={tmp_path / 'empty'}",
                                      f"--out_dir={tmp_path / 'x'}"])
    assert "holds no GPT-2 or GPT-NeoX in transformers' format" in line


@pytest.mark.parametrize("argv, words", [
    (["--export=x"], "holds no checkpoint"), ([], "give one of --export"),
    (["--import_from=no-such-model-anywhere"], "could it be fetched")])
def test_mistakes_are_refused_in_words(tmp_path, refused, monkeypatch, argv, words):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert words in refused(huggingface.main, [*argv, f"--out_dir={tmp_path / 'none'}"])

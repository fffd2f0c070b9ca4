"""HellaSwag: likelihoods against a plain computation, scores, bad rows, while training."""

import json

import pytest
import torch

import train
from model import GPT, GPTConfig
from nanosophia import hellaswag
from nanosophia.configurator import ConfigError
from nanosophia.distributed import Ranks
from nanosophia.tokenizer import get_tokenizer
from tests.conftest import run_train, torchrun

ROWS = [dict(activity_label="Removing ice", ctx_a="A man scrapes [title] it [x] off.",
             ctx_b="then he", endings=["stops.", "sings a  song to the cat.", "ends", "x"],
             label=str(i % 4)) for i in range(6)]
ROWS += [dict(ROWS[0], ctx_a="Another. " * i, endings=["a" * i, "b", "cc", "ddd"], label=i % 4)
         for i in range(1, 6)]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "val.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def tiny_model(block_size=40):
    torch.manual_seed(0)
    return GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=block_size, vocab_size=320))


def test_texts_are_those_of_the_harness(file):
    first = hellaswag.read_questions(str(file))[0]
    # "[title]" becomes a period, other brackets go, one double space in each place becomes one.
    assert first.context == "Removing ice: A man scrapes. it off. Then he"
    assert first.endings[1] == "sings a song to the cat." and first.label == 0


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("block_size", [12, 40, 300])
def test_each_likelihood_is_the_plain_sum_over_the_endings_tokens(file, batch_size, block_size):
    model, tokenizer = tiny_model(block_size).eval(), get_tokenizer("bytes")
    questions = hellaswag.read_questions(str(file))
    endings = hellaswag.encode(questions, tokenizer, block_size, 257)
    found = hellaswag.log_likelihoods(model, endings, batch_size, torch.device("cpu"))
    assert len(found) == 4 * len(questions)
    texts = [(q.context, e) for q in questions for e in q.endings]
    for (context, ending), value in zip(texts, found, strict=True):
        ids = list(f"{context} {ending}".encode())
        number = min(len(ending.encode()) + 1, block_size)  # with the space before it
        window = ids[-(block_size + 1):]
        with torch.no_grad():
            logits = model(torch.tensor([window[:-1]]))[0].log_softmax(-1)
        expected = sum(logits[i, window[i + 1]].item()
                       for i in range(len(window) - 1 - number, len(window) - 1))
        assert value == pytest.approx(expected, abs=1e-4)


def test_accuracy_takes_the_sum_and_the_normalised_one_the_sum_per_character():
    questions = [hellaswag.Question("x", ["aaaa", "b"], 0), hellaswag.Question("y", ["a", "b"], 1)]
    endings = [hellaswag.Ending(q, [1, 2], 1) for q in (0, 0, 1, 1)]
    assert hellaswag.score(questions, endings, [-4.0, -2.0, -1.0, -3.0]) == (0, 1)
    assert hellaswag.score(questions, endings, [-1.0, -2.0, -2.0, -1.0]) == (2, 2)


@pytest.mark.parametrize("change, words", [
    (dict(endings=[]), "row 1: no question of HellaSwag"), (dict(label=7), "4 endings, label 7"),
    (dict(label=""), "invalid literal"), (dict(ctx_b=None), "row 1"), (dict(endings=None), "row 1"),
    (dict(endings=["a", ""]), "2 endings")])
def test_rows_that_are_no_questions_are_named(file, change, words):
    file.write_text(json.dumps(ROWS[0] | change) + "\n")
    with pytest.raises(ConfigError, match=words):
        hellaswag.read_questions(str(file))


def test_a_missing_or_empty_or_foreign_file_is_refused(tmp_path, refused, tiny):
    for content, words in ((None, "cannot be read"), ("", "holds no questions"),
                           ("{", "is no jsonl file"), ("[1]\n", "row 1: no question")):
        if content is not None:
            (tmp_path / "x.jsonl").write_text(content)
        line = refused(train.main, tiny("--eval_tasks=hellaswag",
                                        f"--hellaswag_file={tmp_path / 'x.jsonl'}"))
        assert words in line


def test_the_command_and_a_run_give_the_same_scores(file, tiny, tmp_path, capsys):
    run_train(*tiny("--eval_tasks=hellaswag", f"--hellaswag_file={file}", "--max_iters=4",
                    "--eval_tasks_interval=2"))
    assert "HellaSwag " in capsys.readouterr().out
    lines = [json.loads(line) for line in
             (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "hellaswag/accuracy" in line] == [1, 3]
    hellaswag.main([f"--out_dir={tmp_path / 'run'}", f"--file={file}", "--device=cpu"])
    stored = json.loads((tmp_path / "run" / "hellaswag.json").read_text())
    assert stored == dict(questions=len(ROWS), **{
        key: lines[-1][key] for key in ("hellaswag/accuracy", "hellaswag/normalised")})


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ranks_give_one_ranks_scores_and_training_goes_on_alike(file, tiny, tmp_path, parallel):
    flags = ("--max_iters=4", "--dtype=float64", "--eval_tasks_interval=2")
    scored = ("--eval_tasks=hellaswag", f"--hellaswag_file={file}")
    run_train(*tiny(*flags, out_dir=tmp_path / "plain"))
    result = torchrun(2, "train.py", *tiny(*flags, *scored, f"--parallel={parallel}",
                                           out_dir=tmp_path / "two"))
    assert result.returncode == 0, result.stderr
    run_train(*tiny(*flags, *scored, out_dir=tmp_path / "one"))
    records = [[json.loads(line) for line in
                (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
               for name in ("plain", "one", "two")]
    for plain, one, two in zip(*records, strict=True):
        assert plain["train/loss"] == one["train/loss"] == pytest.approx(two["train/loss"])
        assert one.get("hellaswag/accuracy") == two.get("hellaswag/accuracy")
    assert records[1][-1]["hellaswag/accuracy"] > 0
    assert Ranks(0, 1, torch.device("cpu")).share(5) == (0, 5)

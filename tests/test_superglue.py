"""Few-shot evaluation, on tasks whose answers are known."""

import json

import pytest
import torch

from nanosophia import superglue
from nanosophia.tokenizer import EOT, get_tokenizer
from tests.conftest import run_train

ROWS = {
    "BoolQ": [dict(passage=f"The ball {i} is red.", question="is it red", label=i % 3 == 0)
              for i in range(12)],
    "CB": [dict(premise=f"It rains {i}.", hypothesis="It is wet.",
                label=["entailment", "contradiction", "neutral"][i % 3]) for i in range(12)],
    "COPA": [dict(premise=f"It rained {i}.", choice1="I got wet.", choice2="I flew.",
                  question="effect", label=i % 2) for i in range(12)],
    "RTE": [dict(premise=f"It rains {i}.", hypothesis="It is wet.",
                 label="entailment" if i % 4 else "not_entailment") for i in range(12)],
}


@pytest.fixture
def data(tmp_path):
    for folder, rows in ROWS.items():
        (tmp_path / "glue" / folder).mkdir(parents=True)
        for split in ("train", "val"):
            (tmp_path / "glue" / folder / f"{split}.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "glue"


@pytest.fixture
def run(tiny, tmp_path, data, capsys):
    run_train(*tiny("--block_size=512", "--max_iters=1", "--total_batch_size=2",
                    "--hessian_batch_size=2"))
    capsys.readouterr()
    return [f"--out_dir={tmp_path / 'run'}", f"--data_dir={data}", "--device=cpu"]


def answering(monkeypatch, text):
    """Makes the model decode this text after any prompt."""
    ids = torch.tensor(get_tokenizer("bytes").encode(text, allowed_special={EOT}))
    ids = ids[:superglue.ANSWER_TOKENS]
    seen = []

    def generate(model, idx, tokens, **settings):
        assert settings["temperature"] == 0 and idx.size(1) + tokens <= 512
        seen.extend(get_tokenizer("bytes").decode(row) for row in idx.tolist())
        return torch.cat([idx, ids.expand(idx.size(0), -1)], dim=1)

    monkeypatch.setattr(superglue, "generate", generate)
    return seen


@pytest.mark.parametrize("text, expected", [
    (" yes\nno", dict(boolq=4 / 12, cb=0, copa=0, rte=9 / 12)),
    (" yes<|endoftext|>No", dict(boolq=4 / 12, cb=0, copa=0, rte=9 / 12)),
    (" No.", dict(boolq=8 / 12, cb=0, copa=0, rte=3 / 12)),
    (" Choice2\n", dict(boolq=0, cb=0, copa=6 / 12, rte=0)),
    (" true", dict(boolq=0, cb=4 / 12, copa=0, rte=0)),
    (" yesno", dict(boolq=0, cb=0, copa=0, rte=0)), ("\n", dict(boolq=0, cb=0, copa=0, rte=0))])
def test_the_first_line_is_the_answer(run, monkeypatch, tmp_path, text, expected, capsys):
    answering(monkeypatch, text)
    superglue.main([*run, "--draws=2"])
    found = json.loads((tmp_path / "run" / "superglue.json").read_text())
    assert {name: r["accuracy"] for name, r in found.items()} == pytest.approx(expected)
    assert all(r["spread"] == 0 and r["questions"] == 12 for r in found.values())
    assert found["rte"]["commonest"] == 9 / 12
    assert "| rte |" in capsys.readouterr().out


COPA = dict(premise="The man had lipstick on his cheek.", choice1="The woman kissed him.",
            choice2="The woman made him blush.", question="cause", label=0)
CB = dict(premise="They can't.", hypothesis="they killed them", label="entailment")


@pytest.mark.parametrize("task, row, flags, expected", [
    ("boolq", dict(passage="A lamp.", question="do lamps work", label=True), (),
     "Context: A lamp. Question: do lamps work\nAnswer: Yes"),
    ("copa", COPA, (), "Choice1: the woman kissed him.\nChoice2: the woman made him blush.\n"
                       "Context: The man had lipstick on his cheek because\nAnswer: Choice1"),
    ("copa", COPA | dict(premise="I try", question="effect", label=1), (),
     "Context: I try so\nAnswer: Choice2"),
    ("cb", CB, (), "Context: They can't. Question: they killed them\nAnswer: True"),
    ("cb", CB, ("--answers=shown",), "they killed them\nAnswer: Yes"),
    ("rte", CB | dict(label="not_entailment"), (), "they killed them\nAnswer: No"),
    ("rte", CB | dict(label="not_entailment"), ("--answers=shown",), "them\nAnswer: None")])
def test_prompts_have_the_layout_of_the_papers_figure(run, monkeypatch, data, tmp_path, task, row,
                                                     flags, expected):
    """Instruction, blank line, two worked examples, the question: all of this one row here."""
    for split in ("train", "val"):
        (data / superglue.TASKS[task].folder / f"{split}.jsonl").write_text(
            (json.dumps(row) + "\n") * 3)
    seen = answering(monkeypatch, expected.rpartition("Answer:")[2].upper())
    superglue.main([*run, f"--tasks={task}", "--draws=1", *flags])
    text = seen[0]
    assert text.startswith(superglue.TASKS[task].instruction + "\n\nC")
    assert text.count(expected + "\n\n") == 2 and text.endswith(expected.rpartition(" ")[0])
    found = json.loads((tmp_path / "run" / "superglue.json").read_text())[task]
    assert found["draws"] == [1.0] and found["accuracy"] == 1.0


def test_instructions_come_from_a_file(run, monkeypatch, tmp_path, refused):
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps(dict(boolq="Yes or no?")))
    seen = answering(monkeypatch, " yes")
    superglue.main([*run, "--tasks=boolq", "--draws=1", f"--prompts={file}"])
    assert seen[0].startswith("Yes or no?\n\nContext: ")
    for text, words in (('{"bolq": "x"}', "bolq is none of boolq, cb, copa, rte"),
                        ('{"boolq": 3}', "boolq: Input should be a valid string"),
                        ("[]", "should be a JSON object"), ("{", "cannot be read")):
        file.write_text(text)
        assert words in refused(superglue.main, [*run, f"--prompts={file}"])
    assert "cannot be read: No such file" in refused(superglue.main, [*run, "--prompts=nowhere"])


def test_draws_differ_and_repeat_with_the_seed():
    rows = [dict(n=n) for n in range(50)]
    draws = [superglue.draw_examples(rows, 2, 1, d) for d in range(5)]
    assert len({str(d) for d in draws}) == 5
    assert draws == [superglue.draw_examples(rows, 2, 1, d) for d in range(5)]


def test_prompts_longer_than_the_context_lose_their_beginning(run, monkeypatch, tmp_path, data):
    row = ROWS["BoolQ"][0] | dict(passage="long " * 300)
    (data / "BoolQ" / "val.jsonl").write_text(json.dumps(row) + "\n")
    seen = answering(monkeypatch, " yes")
    superglue.main([*run, "--tasks=boolq", "--draws=1"])
    assert len(seen[0]) == 512 - superglue.ANSWER_TOKENS and seen[0].endswith("Answer:")
    assert json.loads((tmp_path / "run" / "superglue.json").read_text())["boolq"]["cut"] == 1


def test_batches_answer_as_one_by_one(run, tmp_path):
    found = []
    for batch in (1, 5):
        superglue.main([*run, "--draws=1", f"--batch_size={batch}"])
        found.append((tmp_path / "run" / "superglue.json").read_text())
    assert found[0] == found[1]


@pytest.mark.parametrize("row, words", [
    (dict(passage="x", label=True), "row 2: field question is missing"),
    (5, "row 2: field passage, question, label is missing"), (None, "is missing or not text"),
    (dict(passage="x", question=7, label=True), "field question is missing or not text"),
    (dict(passage="x", question="y", label=[0]), "field label is missing"),
    (dict(passage="x", question="y", label="perhaps"), "row 2: label 'perhaps' is not one"),
    ("{", "cannot be read"),
    ('{"passage": "\\ud800", "question": "y", "label": true}', "cannot be read")])
def test_bad_files_are_named(run, data, refused, row, words):
    text = row if isinstance(row, str) else json.dumps(row)
    path = data / "BoolQ" / "val.jsonl"
    path.write_text(json.dumps(ROWS["BoolQ"][0]) + "\n" + text + "\n")
    line = refused(superglue.main, [*run, "--tasks=boolq"])
    assert words in line and "val.jsonl" in line


@pytest.mark.parametrize("flags, words", [
    (["--tasks=boolqs"], "boolqs is none of boolq, cb, copa, rte"),
    (["--data_dir=nowhere"], "nowhere/BoolQ/train.jsonl cannot be read"),
    (["--out_dir=nowhere"], "holds no checkpoint")])
def test_mistakes_are_refused_in_words(run, refused, flags, words):
    assert words in refused(superglue.main, [*run, *flags])

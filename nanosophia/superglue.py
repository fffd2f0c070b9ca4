"""Command for few-shot SuperGLUE, as appendix C.3 of the Sophia paper runs it.

    python -m nanosophia.superglue --out_dir=out/gpt2-small-sophiag --tasks=boolq,cb,copa,rte
    python -m nanosophia.superglue --out_dir=RUN --data_dir=FOLDER  with FOLDER/BoolQ/val.jsonl, ...

Two worked examples from the training split, then the question; greedy decoding; the answer counts
when the first line decoded is the expected word, in upper or lower case. Five draws of examples are
averaged. Layout and answer words are those of the paper's Fig. 11; the instructions are worded here
(--prompts takes others). The figure contradicts itself: for CB it asks for True, False or Neither
and answers with Yes and No, for RTE it asks for Yes or No and answers None once. --answers=asked
takes the words asked for, in the examples too, --answers=shown those of its examples (for a neutral
row of CB, of which it shows none, Neither). Without --data_dir the data come through `datasets`.
"""

if __name__ == "__main__":
    import nanosophia.startup  # noqa: F401

import json
import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from tqdm import tqdm

from model import GPT
from nanosophia.checkpoint import CheckpointError
from nanosophia.command import command
from nanosophia.configurator import ConfigError, Settings, load, option
from nanosophia.distributed import start_ranks
from nanosophia.files import read_bytes, write_text
from nanosophia.generate import generate
from nanosophia.schemas import parse
from nanosophia.tokenizer import get_tokenizer
from nanosophia.weights import Weights, foreign_weights, run_weights


class Task(NamedTuple):
    """One task: its data's folder, and how a row becomes text."""

    folder: str  # of SuperGLUE's release
    instruction: str
    asked: tuple[str, ...]  # answer words by label: those that Fig. 11 asks for
    shown: tuple[str, ...]  # and those that its examples have
    labels: dict[Any, int]  # what files and the hub call them
    fields: tuple[str, ...]
    question: Callable[[dict], str]  # all of a row's text before its answer


def _inference(row: dict) -> str:
    return f"Context: {row['premise']} Question: {row['hypothesis']}"


def _alternatives(row: dict) -> str:
    first, second = (row[key][:1].lower() + row[key][1:] for key in ("choice1", "choice2"))
    link = "because" if row["question"] == "cause" else "so"
    return (f"Choice1: {first}\nChoice2: {second}\n"
            f"Context: {row['premise'].strip().rstrip('.')} {link}")


TASKS = {
    "boolq": Task(
        "BoolQ", "Each context is a passage. Answer the question about it with 'Yes' or 'No'.",
        ("No", "Yes"), ("No", "Yes"), {False: 0, True: 1}, ("passage", "question"),
        lambda row: f"Context: {row['passage']} Question: {row['question']}"),
    "cb": Task(
        "CB", "Does the statement after the context follow from it? Answer with 'True', 'False' or "
        "'Neither'.", ("True", "False", "Neither"), ("Yes", "No", "Neither"),
        {"entailment": 0, "contradiction": 1, "neutral": 2}, ("premise", "hypothesis"),
        _inference),
    "copa": Task(
        "COPA", "Which choice ends the context correctly?", ("Choice1", "Choice2"),
        ("Choice1", "Choice2"), {}, ("premise", "choice1", "choice2", "question"), _alternatives),
    "rte": Task(
        "RTE", "Does the statement after the context follow from it? Answer with 'Yes' or 'No'.",
        ("Yes", "No"), ("Yes", "None"), {"entailment": 0, "not_entailment": 1},
        ("premise", "hypothesis"), _inference),
}
ANSWER_TOKENS = 8  # enough for every answer, bytes included


@dataclass(frozen=True, kw_only=True)
class SuperGlueSettings(Settings):
    """The settings of this command."""

    init_from: str = option("resume", "resume: the run in out_dir; or a ckpt.pt, a GPT-2 folder of "
                                      "transformers, a name on its hub")
    out_dir: str = option("out", "folder of the run; receives superglue.json")
    tasks: str = option("boolq,cb,copa,rte", "which, comma-separated")
    data_dir: str = option("", "folder of SuperGLUE's release; empty = downloaded through datasets")
    answers: Literal["asked", "shown"] = option(
        "asked", "answer words where the paper's figure contradicts itself: those that it asks "
                 "for, or those of its examples")
    prompts: str = option("", "JSON file with other instructions, from task to text")
    shots: int = option(2, "worked examples before each question", low=0)
    draws: int = option(5, "sets of examples that are averaged", low=1)
    limit: int = option(0, "questions per task, the first ones; 0 = all", low=0)
    batch_size: int = option(8, "prompts of one length at a time", low=1)
    seed: int = option(1337, "of the examples drawn", low=0, high=2**63 - 1)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")

    def check(self) -> None:
        unknown = [t for t in self.tasks.split(",") if t not in TASKS]
        if unknown:
            raise ConfigError(f"tasks = {self.tasks}: {', '.join(unknown) or 'nothing'} is none "
                              f"of {', '.join(TASKS)}", "tasks")


@command()
def main(argv: list[str]) -> None:
    """Runs the command; exits with 2 and one line after a user's mistake."""
    settings, _ = load(SuperGlueSettings, argv, "python -m nanosophia.superglue [--key=value]")
    results = run(settings)
    print(table(results))
    if settings.init_from == "resume":
        path = Path(settings.out_dir) / "superglue.json"
        write_text(path, json.dumps(results, indent=1) + "\n")
        print(f"\nwrote {path}")


def run(settings: SuperGlueSettings) -> dict[str, dict]:
    """Returns by task: mean accuracy, spread, each draw, chance, questions, prompts cut."""
    device = start_ranks(settings.device).device
    weights = run_weights(Path(settings.out_dir)) if settings.init_from == "resume" else \
        foreign_weights(settings.init_from)
    if weights is None:
        raise CheckpointError(f"{settings.out_dir} holds no checkpoint; give --out_dir=RUN")
    if weights.config.block_size <= ANSWER_TOKENS:
        raise CheckpointError(f"a context of {weights.config.block_size} tokens has no room for "
                              f"answers of {ANSWER_TOKENS}")
    instructions = read_instructions(settings.prompts)
    model = weights.build()
    model.to(device).eval()
    data = {name: {split: read_rows(name, split, settings.data_dir)
                   for split in ("train", "val")} for name in settings.tasks.split(",")}
    return {name: _run_task(TASKS[name]._replace(instruction=instructions[name]), splits, model,
                            weights, settings) for name, splits in data.items()}


def read_instructions(path: str) -> dict[str, str]:
    """Returns the instruction of each task, from a file where it has one; raises ConfigError."""
    own = {name: task.instruction for name, task in TASKS.items()}
    if not path:
        return own
    try:
        given = parse(read_bytes(Path(path)), dict[str, str])
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"prompts = {path} cannot be read: {reason}; it should be a JSON object "
                          "from task to instruction", "prompts") from None
    if unknown := given.keys() - own.keys():
        raise ConfigError(f"prompts = {path}: {min(unknown)} is none of {', '.join(own)}",
                          "prompts")
    return own | given


def read_rows(name: str, split: str, data_dir: str) -> list[dict]:
    """Returns rows of a task with integer `label`s; raises ConfigError naming file and row."""
    task = TASKS[name]
    if data_dir:
        path = Path(data_dir) / task.folder / f"{split}.jsonl"
        try:
            rows = [parse(line, Any) for line in read_bytes(path).split(b"\n")
                    if line.strip()]
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"{path} cannot be read: {reason}; it should be SuperGLUE's file",
                              "data_dir") from None
        where = str(path)
    else:
        rows, where = _fetch(name, split), f"{name} {split}"
    for number, row in enumerate(rows, 1):
        texts = row if isinstance(row, dict) else {}
        missing = [f for f in task.fields if not isinstance(texts.get(f), str)]
        missing += [] if isinstance(texts.get("label"), str | int) else ["label"]
        label = None if missing else task.labels.get(row["label"], row["label"])
        if missing or label not in range(len(task.asked)):
            raise ConfigError(f"{where}, row {number}: " + (
                f"field {', '.join(missing)} is missing or not text" if missing else
                f"label {row['label']!r} is not one of the task's"), "data_dir")
        row["label"] = int(label)
    if not rows:
        raise ConfigError(f"{where} holds no rows", "data_dir")
    return rows


def _fetch(name: str, split: str) -> list[dict]:
    try:
        import datasets
        hub = dict(train="train", val="validation")[split]
        return list(datasets.load_dataset("aps/super_glue", name, split=hub))
    except Exception as error:  # no network, no package, another layout: each its own type
        raise ConfigError(f"{name} could not be fetched ({type(error).__name__}); give "
                          "--data_dir=FOLDER with SuperGLUE's release", "data_dir") from None


def prompt(task: Task, words: tuple[str, ...], examples: list[dict], row: dict) -> str:
    """Returns instruction, worked examples with their answers in `words`, and the question."""
    worked = [f"{task.question(one)}\nAnswer: {words[one['label']]}\n\n" for one in examples]
    return f"{task.instruction}\n\n{''.join(worked)}{task.question(row)}\nAnswer:"


def draw_examples(rows: list[dict], shots: int, seed: int, draw: int) -> list[dict]:
    """Returns the worked examples of one draw."""
    return random.Random(f"{seed} {draw}").sample(rows, min(shots, len(rows)))


def _run_task(task: Task, splits: dict[str, list[dict]], model: GPT, weights: Weights,
              settings: SuperGlueSettings) -> dict:
    tokenizer = get_tokenizer(weights.tokenizer)
    rows = splits["val"][:settings.limit or None]
    room = model.config.block_size - ANSWER_TOKENS
    words = getattr(task, settings.answers)
    scores, cut = [], 0
    for draw in range(settings.draws):
        examples = draw_examples(splits["train"], settings.shots, settings.seed, draw)
        encoded = [tokenizer.encode_ordinary(prompt(task, words, examples, row))
                   for row in rows]
        highest = max(max(ids) for ids in encoded)
        if highest >= weights.num_classes:
            raise CheckpointError(f"the prompts have id {highest}, the model has "
                                  f"{weights.num_classes} classes; its tokenizer is another one")
        cut += sum(len(ids) > room for ids in encoded)
        answers = _answers(model, tokenizer, [ids[-room:] for ids in encoded], settings,
                           weights.num_classes, f"{task.folder}, draw {draw + 1}")
        right = [answer == words[row["label"]].lower()
                 for answer, row in zip(answers, rows, strict=True)]
        scores.append(sum(right) / len(right))
    common = max(sum(row["label"] == label for row in rows) for label in range(len(words)))
    return dict(accuracy=statistics.mean(scores), draws=scores,
                spread=statistics.stdev(scores) if len(scores) > 1 else 0.0,
                questions=len(rows), commonest=common / len(rows), cut=cut / settings.draws)


def _answers(model: GPT, tokenizer, prompts: list[list[int]], settings: SuperGlueSettings,
             num_classes: int, name: str) -> list[str]:
    """Returns the first line of each prompt's greedy continuation, stripped, in lower case."""
    by_length: dict[int, list[int]] = {}
    for index, ids in enumerate(prompts):
        by_length.setdefault(len(ids), []).append(index)
    answers = [""] * len(prompts)
    device = next(model.parameters()).device
    bar = tqdm(total=len(prompts), desc=name, leave=False, disable=not sys.stderr.isatty())
    for length, indices in sorted(by_length.items()):
        for start in range(0, len(indices), settings.batch_size):
            batch = indices[start:start + settings.batch_size]
            ids = torch.tensor([prompts[index] for index in batch], device=device)
            out = generate(model, ids, ANSWER_TOKENS, temperature=0,
                           num_classes=min(num_classes, tokenizer.n_vocab),
                           stop_token=tokenizer.eot_token)
            for index, row in zip(batch, out[:, length:].tolist(), strict=True):
                ended = row.index(tokenizer.eot_token) if tokenizer.eot_token in row else None
                text = tokenizer.decode(row[:ended]).strip()
                answers[index] = (text.splitlines() or [""])[0].strip().rstrip(".").lower()
            bar.update(len(batch))
    bar.close()
    return answers


def table(results: dict[str, dict]) -> str:
    """Returns the results as a Markdown table."""
    lines = ["| task | accuracy | ± | by draw | commonest answer | questions | prompts cut |",
             "|---|---|---|---|---|---|---|"]
    for name, r in results.items():
        lines.append(f"| {name} | {r['accuracy']:.1%} | {r['spread']:.1%} | "
                     f"{', '.join(f'{x:.1%}' for x in r['draws'])} | {r['commonest']:.1%} | "
                     f"{r['questions']} | {r['cut']:.0f} |")
    if len(results) > 1:
        mean = statistics.mean(r["accuracy"] for r in results.values())
        lines.append(f"| mean | {mean:.1%} | | | | | |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])

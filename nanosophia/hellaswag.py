"""Command for HellaSwag: which of four endings does the model find likeliest?

    python -m nanosophia.hellaswag --out_dir=out/gpt2-small-sophiag --file=hellaswag_val.jsonl

As lm-evaluation-harness scores it (its task `hellaswag`, zero-shot): the log-likelihood of each
ending after its context, summed over tokens; accuracy takes the largest, normalised accuracy the
largest per character. Rows have ctx_a, ctx_b, activity_label, endings and label, from --file, a
jsonl file of Zellers et al. 2019 (arXiv:1905.07830), or without one through `datasets`. train.py
does the same while it trains: --eval_tasks=hellaswag.
"""

if __name__ == "__main__":
    import nanosophia.startup  # noqa: F401

import json
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model import GPT
from nanosophia.checkpoint import CheckpointError
from nanosophia.command import command
from nanosophia.configurator import ConfigError, Settings, load, option
from nanosophia.dataloader import Dataset
from nanosophia.distributed import (
    Ranks,
    is_sharded,
    reshard,
    start_ranks,
    sum_over_ranks,
    widest_float,
)
from nanosophia.files import read_bytes, reason, write_text
from nanosophia.options import Config
from nanosophia.schemas import parse
from nanosophia.tokenizer import get_tokenizer
from nanosophia.weights import foreign_weights, run_weights


@dataclass(frozen=True, kw_only=True)
class HellaSwagSettings(Settings):
    """The settings of this command."""

    init_from: str = option("resume", "resume: the run in out_dir; or a ckpt.pt, a GPT-2 folder of "
                                      "transformers, a name on its hub")
    out_dir: str = option("out", "folder of the run; receives hellaswag.json")
    file: str = option("", "jsonl file of the task; empty = downloaded through datasets")
    limit: int = option(0, "questions, the first ones; 0 = all", low=0)
    batch_size: int = option(8, "endings at a time", low=1)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")


class Question(NamedTuple):
    """A context, its endings, and which is right."""

    context: str
    endings: list[str]
    label: int


class Ending(NamedTuple):
    """A question's ending as ids: of context and ending, and how many are the ending's."""

    question: int
    ids: list[int]
    length: int


def _plain(text: str) -> str:
    """Returns a text without WikiHow's marks, as lm-evaluation-harness takes it."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def read_questions(file: str, limit: int = 0) -> list[Question]:
    """Returns the questions of a file, or of the hub's validation split; raises ConfigError."""
    if file:
        try:
            rows = [parse(line, Any) for line in read_bytes(Path(file)).split(b"\n")
                    if line.strip()]
        except OSError as error:
            raise ConfigError(f"{file} cannot be read: {reason(error)}; give a jsonl file of "
                              "HellaSwag", "file") from None
        except ValueError as error:
            raise ConfigError(f"{file} is no jsonl file: {error}", "file") from None
    else:
        rows = _fetch()
    questions = []
    for number, row in enumerate(rows[:limit or None], 1):
        try:
            text = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
            endings, label = [_plain(ending) for ending in row["endings"]], int(row["label"])
            if len(endings) < 2 or not all(endings) or label not in range(len(endings)):
                raise ValueError(f"{len(endings)} endings, label {label}")
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"{file or 'hellaswag'}, row {number}: no question of HellaSwag "
                              f"({error!r}); it has activity_label, ctx_a, ctx_b, endings and "
                              "label", "file") from None
        questions.append(Question(_plain(text), endings, label))
    if not questions:
        raise ConfigError(f"{file or 'hellaswag'} holds no questions", "file")
    return questions


def _fetch() -> list[dict]:
    try:
        import datasets
        return list(datasets.load_dataset("Rowan/hellaswag", split="validation"))
    except Exception as error:  # no network, no package, another layout: each its own type
        raise ConfigError(f"hellaswag could not be fetched ({type(error).__name__}); give its "
                          "hellaswag_val.jsonl as --file", "file") from None


def encode(questions: list[Question], tokenizer, block_size: int, num_classes: int) -> list[Ending]:
    """Returns every ending of every question as ids, cut on the left to a window.

    Raises CheckpointError where an id is none of the model's classes.
    """
    found = []
    for number, question in enumerate(questions):
        before = len(tokenizer.encode_ordinary(question.context))
        for ending in question.endings:
            ids = tokenizer.encode_ordinary(f"{question.context} {ending}")
            if max(ids) >= num_classes:
                raise CheckpointError(f"the questions have id {max(ids)}, the model {num_classes} "
                                      "classes; its tokenizer is another one")
            length = min(len(ids) - before, block_size)
            found.append(Ending(number, ids[-(block_size + 1):], length))
    return found


@torch.no_grad()
def log_likelihoods(model: Callable[[Tensor], Tensor], endings: list[Ending], batch_size: int,
                    device: torch.device, autocast: Callable = nullcontext) -> list[float]:
    """Returns the summed log-likelihood of each ending after its context.

    `model` gives logits (B, T, V) of ids (B, T). Rows of like length go together; what is padded
    on the right no earlier position sees.
    """
    order = sorted(range(len(endings)), key=lambda i: -len(endings[i].ids))
    found = [0.0] * len(endings)
    for start in range(0, len(order), batch_size):
        batch = [endings[i] for i in order[start:start + batch_size]]
        width = len(batch[0].ids)
        ids = torch.tensor([e.ids + [0] * (width - len(e.ids)) for e in batch], device=device)
        with autocast():
            logits = model(ids[:, :-1])  # (B, T, V)
        losses = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(),
                                 reduction="none").view(len(batch), -1)
        for row, ending, i in zip(losses, batch, order[start:start + batch_size], strict=True):
            last = len(ending.ids) - 1
            found[i] = -row[last - ending.length:last].to(widest_float(device)).sum().item()
    return found


def score(questions: list[Question], endings: list[Ending], found: list[float],
          ) -> tuple[int, int]:
    """Returns how many questions are right, by the sum and by the sum per character."""
    by_question: dict[int, list[float]] = {}
    for ending, value in zip(endings, found, strict=True):
        by_question.setdefault(ending.question, []).append(value)
    plain = normalised = 0
    for number, values in by_question.items():
        question = questions[number]
        per_character = [v / len(e) for v, e in zip(values, question.endings, strict=True)]
        plain += values.index(max(values)) == question.label
        normalised += per_character.index(max(per_character)) == question.label
    return plain, normalised


def evaluate(model: GPT, questions: list[Question], tokenizer, num_classes: int, ranks: Ranks,
             batch_size: int, autocast: Callable = nullcontext) -> dict[str, float]:
    """Returns accuracy and normalised accuracy.

    The ranks share the questions, unless the model is split over them: then each does all.
    """
    shared = ranks.world_size > 1 and not any(map(is_sharded, model.parameters()))
    own = questions[slice(*ranks.share(len(questions)))] if shared else questions
    model.eval()
    endings = encode(own, tokenizer, model.config.block_size, num_classes)
    # Eager where the model is compiled: every batch has a width of its own.
    forward = model if ranks.world_size > 1 and not shared else model.forward
    right = score(own, endings, log_likelihoods(forward, endings, batch_size, ranks.device,
                                                autocast))
    reshard(model)
    model.train()
    counts = torch.tensor(right, dtype=widest_float(ranks.device), device=ranks.device)
    if shared:
        sum_over_ranks([counts])
    plain, normalised = (counts / len(questions)).tolist()
    return {"hellaswag/accuracy": plain, "hellaswag/normalised": normalised}


def during_training(config: Config, data: Dataset, ranks: Ranks,
                    ) -> Callable[[GPT, Callable], dict[str, float]] | None:
    """Returns what scores a model as the settings of a run ask for it, None where they do not.

    Raises ConfigError where the questions cannot be read, TokenizerError where the vocabulary lacks
    their characters, before the first step.
    """
    if config.eval_tasks == "none":
        return None
    questions = read_questions(config.hellaswag_file, config.eval_tasks_limit)
    tokenizer = data.encoding()
    rows = config.batch_size
    encode(questions, tokenizer, config.block_size, data.vocab_size)

    def score_model(model: GPT, autocast: Callable) -> dict[str, float]:
        return evaluate(model, questions, tokenizer, data.vocab_size, ranks, rows, autocast)

    return score_model


@command()
def main(argv: list[str]) -> None:
    """Runs the command; exits with 2 and one line after a user's mistake."""
    settings, _ = load(HellaSwagSettings, argv, "python -m nanosophia.hellaswag [--key=value]")
    ranks = start_ranks(settings.device)
    weights = run_weights(Path(settings.out_dir)) if settings.init_from == "resume" else \
        foreign_weights(settings.init_from)
    if weights is None:
        raise CheckpointError(f"{settings.out_dir} holds no checkpoint; give --out_dir=RUN")
    questions = read_questions(settings.file, settings.limit)
    model = weights.build().to(ranks.device)
    found = evaluate(model, questions, get_tokenizer(weights.tokenizer), weights.num_classes, ranks,
                     settings.batch_size)
    print(f"{len(questions):,} questions: accuracy {found['hellaswag/accuracy']:.4f}, normalised "
          f"{found['hellaswag/normalised']:.4f}")
    if settings.init_from == "resume":
        write_text(Path(settings.out_dir) / "hellaswag.json",
                   json.dumps(found | dict(questions=len(questions))) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])

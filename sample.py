"""Samples text from a trained model and a prompt.

    python sample.py --out_dir=out/quickstart --start="def main(" --num_samples=3
    python sample.py --init_from=gpt2 --interactive

Reads this project's runs, nanoGPT's ckpt.pt, and transformers' GPT-2 folders and names.
"""

if __name__ == "__main__":
    import nanosophia.startup  # noqa: F401

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from model import GPT
from nanosophia.checkpoint import MANIFEST, CheckpointError
from nanosophia.command import command
from nanosophia.configurator import ConfigError, Settings, load, option
from nanosophia.distributed import start_ranks
from nanosophia.files import read_bytes
from nanosophia.generate import lay_out_for_decoding, stream
from nanosophia.precision import fastest_dtype
from nanosophia.tokenizer import EOT, TextStream, get_tokenizer, start_token
from nanosophia.weights import Weights, foreign_weights, run_weights


@dataclass(frozen=True, kw_only=True)
class SampleSettings(Settings):
    """The settings of this command; the names are nanoGPT's."""

    init_from: str = option("resume", "resume: the run in out_dir; or a ckpt.pt, a GPT-2 folder of "
                                      "transformers, a name on its hub", section="model")
    out_dir: str = option("out", "folder of the run")
    checkpoint: Literal["newest", "best"] = option("newest", "which of the run's checkpoints")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "precision of the model; auto = float32 for one text on a CPU, else bfloat16 on "
                "GPUs and CPUs that compute it, float16 on older GPUs")

    start: str = option("\n", "prompt; FILE:path reads it from a file, - from standard input; "
                              "<|endoftext|> is understood", section="text")
    interactive: bool = option(False, "ask for prompts, line by line, until an empty one")
    num_samples: int = option(10, "number of texts; a single sample is streamed", low=1,
                              high=10_000)
    max_new_tokens: int = option(500, "length of each, unless end-of-text comes before",
                                 unit="tokens", low=1)

    temperature: float = option(0.8, "1 = the model's own distribution, 0 = the most likely token",
                                low=0, section="sampling")
    top_k: int = option(200, "only the k most likely tokens; 0 = all", low=0)
    top_p: float = option(1.0, "of these only the most likely that together have this probability",
                          low=1e-6, high=1)
    repetition_penalty: float = option(1.0, "above 1 makes tokens that occurred before less likely",
                                       low=0.01, high=100)
    seed: int = option(1337, "seed of the sampling", low=0, high=2**63 - 1)


@command()
def main(argv: list[str]) -> None:
    """Runs the command; exits with 2 and one line after a user's mistake."""
    settings, _ = load(SampleSettings, argv, "sample.py [--key=value]")
    sample(settings)


def sample(settings: SampleSettings) -> None:
    """Prints the samples, a line of dashes after each."""
    device = start_ranks(settings.device).device
    weights = read_weights(settings)
    dtype = settings.dtype
    if dtype == "auto":
        one = device.type == "cpu" and settings.num_samples == 1
        dtype = "float32" if one else fastest_dtype(device, weights.config.n_embd)
    model = weights.build()
    model.to(device, getattr(torch, dtype)).eval()
    if device.type == "cpu":
        lay_out_for_decoding(model)
    if not weights.tokenizer:
        raise CheckpointError(f"{settings.init_from} has {weights.num_classes} classes and does "
                              "not say which tokenizer made them, so its output cannot be decoded")
    tokenizer = get_tokenizer(weights.tokenizer)
    generator = torch.Generator(device).manual_seed(settings.seed)
    prompts = _typed_prompts() if settings.interactive else [_read_start(settings.start)]
    for prompt in prompts:
        ids = encode(tokenizer, prompt, weights.num_classes)
        for text in _texts(model, tokenizer, ids, settings, weights, generator):
            print(text, end="", flush=True)


def read_weights(settings: SampleSettings) -> Weights:
    """Returns the model that the settings name."""
    if settings.init_from != "resume":
        return foreign_weights(settings.init_from)
    found = run_weights(Path(settings.out_dir), settings.checkpoint)
    if found is None:
        raise CheckpointError(f"{settings.out_dir} holds no checkpoint; {_where_runs_are()}")
    return found


def encode(tokenizer, prompt: str, num_classes: int) -> list[int]:
    """Returns ids of a prompt, of an empty one the id that texts begin after.

    Raises ConfigError on ids that the model does not know.
    """
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(f"the prompt is not valid UTF-8 at character {error.start}; give it as "
                          "UTF-8 text", "start") from None
    if tokenizer.eot_token is None:  # of characters
        prompt = "" if prompt == "\n" else prompt.removeprefix(EOT)  # which start_token is for
    ids = tokenizer.encode(prompt, allowed_special={EOT}) or [start_token(tokenizer)]
    if max(ids) >= num_classes:
        raise ConfigError(f"the prompt has id {max(ids)}, the model knows {num_classes}; its "
                          "tokenizer is another one", "start")
    return ids


def _texts(model: GPT, tokenizer, prompt: list[int], settings: SampleSettings, weights: Weights,
           generator: torch.Generator) -> Iterator[str]:
    """Yields pieces to print: a single sample token by token, or several one after the other."""
    device = generator.device
    ids = torch.tensor([prompt] * settings.num_samples, device=device)  # (B, T)
    tokens = stream(
        model, ids, settings.max_new_tokens, temperature=settings.temperature,
        top_k=settings.top_k or None, top_p=settings.top_p,
        repetition_penalty=settings.repetition_penalty,
        num_classes=min(weights.num_classes, tokenizer.n_vocab), stop_token=tokenizer.eot_token,
        generator=generator)
    shown = [] if settings.interactive else prompt
    if settings.num_samples == 1:
        text = TextStream(tokenizer)
        for token in itertools.chain(shown, (t.item() for t in tokens)):
            yield text.push(token)
        yield text.end() + "\n---------------\n"
        return
    bar = tqdm(tokens, total=settings.max_new_tokens, unit="token", leave=False,
               disable=not sys.stderr.isatty())
    for row in torch.cat(list(bar), dim=1).tolist():
        end = row.index(tokenizer.eot_token) + 1 if tokenizer.eot_token in row else len(row)
        yield tokenizer.decode([*shown, *row[:end]]) + "\n---------------\n"


def _where_runs_are() -> str:
    runs = sorted({str(path.parents[1]) for path in Path("out").glob(f"**/{MANIFEST}")})
    if runs:
        return "give --out_dir=" + " or --out_dir=".join(runs)
    return "train one: python train.py config/quickstart.py"


def _read_start(start: str) -> str:
    if start == "-":
        return sys.stdin.read()
    if not start.startswith("FILE:"):
        return start
    path = Path(start[len("FILE:"):])
    try:
        return read_bytes(path).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--start={start}: cannot read {path}: {error}; --start=- reads a pipe",
                          "start") from None


def _typed_prompts() -> Iterator[str]:
    while True:
        try:
            prompt = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not prompt:
            return
        yield prompt.replace("\\n", "\n")


if __name__ == "__main__":
    main(sys.argv[1:])

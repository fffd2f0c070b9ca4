"""Times sampling with the key-value cache against a full forward pass per token.

    python -m experiments.sampling [--max_new_tokens=500]

The model is the 30M one with random weights, on the CPU. The methods take turns, one call each per
round. The table shows median tokens per second and the ratios to recomputing in each round.
"""

if __name__ == "__main__":
    import nanosophia.startup  # noqa: F401

import sys
import time
from dataclasses import dataclass
from statistics import median

import torch

from model import GPT, GPTConfig
from nanosophia.command import command
from nanosophia.configurator import Settings, load, option
from nanosophia.generate import generate, sample_token


@dataclass(frozen=True, kw_only=True)
class SamplingSettings(Settings):
    """Settings of `python -m experiments.sampling`."""

    max_new_tokens: int = option(500, "length of each text", unit="tokens", low=1)
    rounds: int = option(3, "rounds that are timed", low=1)
    top_k: int = option(200, "tokens are drawn from the k most likely", low=1)
    batch: int = option(10, "texts that are sampled together in the row `batch`", low=1,
                        high=10_000)


@torch.no_grad()
def recompute(model: GPT, idx: torch.Tensor, tokens: int, top_k: int) -> torch.Tensor:
    """Samples with a forward pass over the whole context for every token, as nanoGPT does."""
    for _ in range(tokens):
        logits = model(idx[:, -model.config.block_size:])[:, -1].float()
        idx = torch.cat([idx, sample_token(logits, 0.8, top_k)], dim=1)
    return idx


@command()
def main(argv: list[str]) -> None:
    """Runs the command."""
    settings, _ = load(SamplingSettings, argv, "python -m experiments.sampling [--key=value]")
    model = GPT(GPTConfig(n_layer=6, n_head=6, n_embd=384)).eval()
    n, k = settings.max_new_tokens, settings.top_k

    def cached(rows: int) -> None:
        generate(model, torch.zeros(rows, 1, dtype=torch.long), n, temperature=0.8, top_k=k)

    methods = dict(  # name: (texts, call)
        recompute=(1, lambda: recompute(model, torch.zeros(1, 1, dtype=torch.long), n, k)),
        cached=(1, lambda: cached(1)),
        batch=(settings.batch, lambda: cached(settings.batch)))
    speeds = {name: [] for name in methods}
    for _ in range(settings.rounds):
        for name, (rows, call) in methods.items():
            start = time.perf_counter()
            call()
            speeds[name].append(rows * n / (time.perf_counter() - start))
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {n} tokens\n\n"
          "| way | tokens/s | over recomputing, by round |\n|---|---|---|")
    for name, measured in speeds.items():
        ratios = [a / b for a, b in zip(measured, speeds["recompute"], strict=True)]
        texts = methods[name][0]
        print(f"| {name} ({texts} {'text' if texts == 1 else 'texts'}) | {median(measured):.1f} | "
              f"{', '.join(f'{r:.1f}' for r in ratios)} |")


if __name__ == "__main__":
    main(sys.argv[1:])

"""Times sampling with the key-value cache against recomputing everything, in one process.

    python -m experiments.sampling [--max_new_tokens=500]

The 30M model with random weights on the CPU; each way once per round, alternated; tokens per
second, medians, and ratios of each round.
"""

import sys
import time
from dataclasses import dataclass
from statistics import median

import torch

from model import GPT, GPTConfig
from nanosophia.configurator import Settings, command, knob, load
from nanosophia.generate import draw_token, generate


@dataclass(frozen=True, kw_only=True)
class SamplingSettings(Settings):
    """The settings of this command."""

    max_new_tokens: int = knob(500, "length of each text", unit="tokens", low=1)
    rounds: int = knob(3, "repetitions", low=1)
    top_k: int = knob(200, "of the draws", low=1)
    batch: int = knob(10, "texts of the batched way", low=1)


@torch.no_grad()
def recompute(model: GPT, idx: torch.Tensor, tokens: int, top_k: int) -> torch.Tensor:
    """The plain way: every token a pass over all of them, as nanoGPT's generate."""
    for _ in range(tokens):
        logits = model(idx[:, -model.config.block_size:])[:, -1].float()
        idx = torch.cat([idx, draw_token(logits, 0.8, top_k)], dim=1)
    return idx


@command()
def main(argv: list[str]) -> None:
    """The command."""
    settings, _ = load(SamplingSettings, argv, "python -m experiments.sampling [--key=value]")
    model = GPT(GPTConfig(n_layer=6, n_head=6, n_embd=384)).eval()
    n, k = settings.max_new_tokens, settings.top_k

    def cached(rows: int) -> None:
        generate(model, torch.zeros(rows, 1, dtype=torch.long), n, temperature=0.8, top_k=k)

    ways = dict(
        recompute=(1, lambda: recompute(model, torch.zeros(1, 1, dtype=torch.long), n, k)),
        cached=(1, lambda: cached(1)),
        batch=(settings.batch, lambda: cached(settings.batch)))
    speeds = {name: [] for name in ways}
    for _ in range(settings.rounds):
        for name, (rows, way) in ways.items():
            began = time.perf_counter()
            way()
            speeds[name].append(rows * n / (time.perf_counter() - began))
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {n} tokens\n\n"
          "| way | tokens/s | over recomputing, by round |\n|---|---|---|")
    for name, found in speeds.items():
        ratios = [a / b for a, b in zip(found, speeds["recompute"], strict=True)]
        rows = ways[name][0]
        print(f"| {name} ({rows} text{'s' * (rows > 1)}) | {median(found):.1f} | "
              f"{', '.join(f'{r:.1f}' for r in ratios)} |")


if __name__ == "__main__":
    main(sys.argv[1:])

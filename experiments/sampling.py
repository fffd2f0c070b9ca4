"""Times sampling: recomputing, a key-value cache, other layouts and precisions of the weights.

    python -m experiments.sampling [--max_new_tokens=500]

The model is the 30M one with random weights, on the CPU. The ways take turns, one call each per
round. For each token of one text every weight is read once, so the limit is the rate at which the
same bytes are copied, measured in each round. "By columns" is `generate.lay_out_for_decoding`, as
sample.py has it.
"""

if __name__ == "__main__":
    import nanosophia.startup  # noqa: F401

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from bench import publish
from experiments.archive import measured
from model import GPT, GPTConfig
from nanosophia.command import command
from nanosophia.configurator import Settings, load, option
from nanosophia.generate import generate, lay_out_for_decoding, sample_token


@dataclass(frozen=True, kw_only=True)
class SamplingSettings(Settings):
    """Settings of `python -m experiments.sampling`."""

    max_new_tokens: int = option(500, "length of each text", unit="tokens", low=1)
    rounds: int = option(3, "rounds that are timed", low=1)
    top_k: int = option(200, "tokens are drawn from the k most likely", low=1)
    batch: int = option(10, "texts that are sampled together in the row `batch`", low=1,
                        high=10_000)
    json: str = option("", "file that receives the measurements; empty = none")


@torch.no_grad()
def recompute(model: GPT, idx: torch.Tensor, tokens: int, top_k: int) -> torch.Tensor:
    """Samples with a forward pass over the whole context for every token, as nanoGPT does."""
    for _ in range(tokens):
        logits = model(idx[:, -model.config.block_size:])[:, -1].float()
        idx = torch.cat([idx, sample_token(logits, 0.8, top_k)], dim=1)
    return idx


def ways(settings: SamplingSettings) -> dict[str, tuple[int, int, Callable[[], object]]]:
    """Returns by name: texts, bytes of the weights, the call to time."""
    n, k, found = settings.max_new_tokens, settings.top_k, {}
    for dtype in (torch.float32, torch.bfloat16):
        for by_columns in (False, True):
            torch.manual_seed(0)
            model = GPT(GPTConfig(n_layer=6, n_head=6, n_embd=384)).to(dtype).eval()
            if by_columns:
                lay_out_for_decoding(model)
            size = sum(p.numel() * p.element_size() for p in model.parameters())
            if not found:
                found["recompute"] = (1, size, lambda model=model: recompute(
                    model, torch.zeros(1, 1, dtype=torch.long), n, k))
            for texts in (1, settings.batch):
                name = f"cache, {str(dtype)[6:]}" + (", by columns" if by_columns else "")
                found[f"{name}, {texts} texts" if texts > 1 else name] = (
                    texts, size, lambda model=model, texts=texts: generate(
                        model, torch.zeros(texts, 1, dtype=torch.long), n, temperature=0.8,
                        top_k=k))
    return found


def copy_seconds(size: int) -> float:
    """Returns the seconds that copying so many bytes takes, the best of three."""
    source, seconds = torch.ones(size, dtype=torch.uint8), []
    target = torch.empty_like(source)
    for _ in range(3):
        start = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def measure(settings: SamplingSettings) -> dict:
    """Times every way in turn; returns the report."""
    found = ways(settings)
    speeds, shares = ({name: [] for name in found} for _ in range(2))
    for _ in range(settings.rounds):
        for name, (texts, size, call) in found.items():
            limit, start = copy_seconds(size), time.perf_counter()
            call()
            per_token = (time.perf_counter() - start) / settings.max_new_tokens
            speeds[name].append(texts / per_token)
            shares[name].append(limit / per_token)
    rows = {name: dict(tokens_per_second=median(speed), share=median(shares[name]), ratios=[
        a / b for a, b in zip(speed, speeds["recompute"], strict=True)])
        for name, speed in speeds.items()}
    return dict(threads=torch.get_num_threads(), tokens=settings.max_new_tokens, rows=rows)


def table(report: dict) -> str:
    """Returns the report as a Markdown table."""
    lines = [f"{report['threads']} threads, {report['tokens']} tokens", "",
             "| way | tokens/s | over recomputing, by round | share of the copy limit |",
             "|---|---|---|---|"]
    for name, row in report["rows"].items():
        lines.append(f"| {name} | {row['tokens_per_second']:.1f} | "
                     f"{', '.join(f'{r:.1f}' for r in row['ratios'])} | {row['share']:.0%} |")
    return "\n".join(lines)


@command()
def main(argv: list[str]) -> None:
    """Runs the command."""
    settings, _ = load(SamplingSettings, argv, "python -m experiments.sampling [--key=value]")
    report = measure(settings) | measured("sampling", argv)
    publish(report, table(report), settings.json)


if __name__ == "__main__":
    main(sys.argv[1:])

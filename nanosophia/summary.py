"""What train.py prints before the first step and after the last one."""

import textwrap
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from model import GPT
from nanosophia.dataloader import Dataset
from nanosophia.distributed import Ranks
from nanosophia.generate import generate
from nanosophia.options import Config
from nanosophia.tokenizer import start_token


def print_summary(config: Config, model: GPT, ranks: Ranks, data: Dataset, windows: int,
                  notes: Iterable[str]) -> None:
    """Prints the resolved settings, what they make, and what the user should know.

    `windows` is the number of training windows, of which a step takes total_batch_size.
    """
    listed = ", ".join(f"{key}={value}" for key, value in asdict(config).items())
    print(textwrap.fill(f"config: {listed}", 100, subsequent_indent="  ", break_long_words=False))
    device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else \
        ranks.device
    print(f"model: {model.num_params(non_embedding=False):,} parameters, "
          f"{model.flops_per_token() / 1e6:,.1f} MFLOP per token")
    sizes = sorted({part.stop - part.start for rank in range(ranks.world_size)
                    for part in replace(ranks, rank=rank).micro_batches(
                        config.total_batch_size, config.batch_size)}, reverse=True)
    print(f"run: {config.tokens_per_step:,} tokens per step, {config.max_iters:,} steps = "
          f"{config.max_iters * config.total_batch_size / windows:,.2f} epochs of {data.folder}, "
          f"{ranks.world_size} x {device}, {config.dtype}; micro-batches of "
          f"{' and '.join(map(str, sizes))}", flush=True)
    for note in notes:
        print(f"note: {note}")


def print_sample(config: Config, model: GPT, data: Dataset, device: torch.device) -> None:
    """Prints a short text of the model."""
    tokenizer = data.encoding()
    start = torch.tensor([[start_token(tokenizer)]], device=device)
    ids = generate(model, start, config.sample_tokens, temperature=0.8, top_k=200,
                   num_classes=data.vocab_size,
                   generator=torch.Generator(device).manual_seed(config.seed))
    print(f"a sample:\n{tokenizer.decode(ids[0, 1:].tolist())}\n")


def print_next_steps(out_dir: Path) -> None:
    """Prints where the run is and the commands to try next."""
    print(f"saved in {out_dir}; next:\n"
          f"  python sample.py --out_dir={out_dir}\n"
          f"  python -m experiments.plot --runs={out_dir}\n"
          "  python train.py --help", flush=True)

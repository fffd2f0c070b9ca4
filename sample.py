"""Text from a trained checkpoint and a prompt.

    python sample.py --out_dir=out/quickstart --start="def main(" --num_samples=3
"""

import sys
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from checkpoint import MANIFEST, CheckpointError, newest
from configurator import ConfigError, Settings, exit_with, knob, load
from distributed import DeviceError, start_ranks
from model import GPT, GPTConfig
from tokenizer import EOT, TokenizerError, get_tokenizer


@dataclass(frozen=True, kw_only=True)
class SampleSettings(Settings):
    """The settings of this command; the names are nanoGPT's."""

    out_dir: str = knob("out", "folder of the run whose newest checkpoint is read")
    start: str = knob("\n", "prompt; FILE:path reads it from a file; <|endoftext|> is understood")
    num_samples: int = knob(10, "how many texts", low=1)
    max_new_tokens: int = knob(500, "length of each", unit="tokens", low=1)
    temperature: float = knob(0.8, "1 = the model's own distribution, 0 = the likeliest token",
                              low=0)
    top_k: int = knob(200, "only the so many likeliest tokens; 0 = all", low=0)
    seed: int = knob(1337, "seed of the sampling", low=0, high=2**63 - 1)
    device: str = knob("auto", "auto, cpu, cuda, cuda:N or mps")


def main(argv: list[str]) -> None:
    """The command; exits with 2 and one line after a user's mistake."""
    try:
        settings, _ = load(SampleSettings, argv, "sample.py [--key=value]")
        sample(settings)
    except (ConfigError, CheckpointError, TokenizerError, DeviceError) as error:
        exit_with(error)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def sample(settings: SampleSettings) -> None:
    """Prints the samples, a rule after each."""
    device = start_ranks(settings.device).device
    found = newest(Path(settings.out_dir))
    if found is None:
        raise CheckpointError(f"{settings.out_dir} holds no checkpoint; {_where_runs_are()}")
    config = found.state["config"]
    model = GPT(GPTConfig(**{f.name: config[f.name] for f in fields(GPTConfig)}))
    model.load_state_dict(found.model_tensors())
    model.to(device).eval()
    tokenizer = get_tokenizer(found.state["tokenizer"])
    prompt = tokenizer.encode(_read_start(settings.start), allowed_special={EOT})
    ids = torch.tensor([prompt or [tokenizer.eot_token]], device=device)  # (1, T)
    generator = torch.Generator(device).manual_seed(settings.seed)
    for _ in range(settings.num_samples):
        text = model.generate(ids, settings.max_new_tokens, temperature=settings.temperature,
                              top_k=settings.top_k or None, num_classes=tokenizer.n_vocab,
                              generator=generator)
        print(tokenizer.decode(text[0].tolist()))
        print("---------------", flush=True)


def _where_runs_are() -> str:
    runs = sorted({str(path.parents[1]) for path in Path("out").glob(f"**/{MANIFEST}")})
    if runs:
        return "give --out_dir=" + " or --out_dir=".join(runs)
    return "train one: python train.py config/quickstart.py"


def _read_start(start: str) -> str:
    if not start.startswith("FILE:"):
        return start
    path = Path(start[len("FILE:"):])
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--start={start}: cannot read {path}: {error}", "start") from None


if __name__ == "__main__":
    main(sys.argv[1:])

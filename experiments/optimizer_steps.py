"""Times one step of each optimizer, without a training loop, as ratios to torch's fused AdamW.

    python -m experiments.optimizer_steps config/train_gpt2_30m_sophiag.py --device=cpu

The optimizers step on the parameters of the config's model, which have random gradients. Each takes
turns with AdamW, round after round, so that the state of two is in memory at a time; a ratio is
taken within a round, and the table shows the median over the rounds with the smallest and the
largest, and the bytes of state. Optimizers of hidden matrices have AdamW for the rest; what SOAP
and Kron do now and then is timed apart. Times are processor time on the CPU and synchronised wall
time on CUDA; the first call, which includes compilation, is always wall time. bench.py times whole
training steps.
"""

if __name__ == "__main__":
    import nanosophia.startup  # noqa: F401

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import torch

from bench import environment, publish, time_action
from experiments.archive import measured
from model import GPT
from nanosophia.baselines import Lion
from nanosophia.command import command
from nanosophia.configurator import load, option
from nanosophia.controlled_gamma import ControlledSophia
from nanosophia.distributed import start_ranks
from nanosophia.optimizer_state import flatten_state
from nanosophia.optimizers import build, parameter_groups, with_own_defaults
from nanosophia.options import Config, padded_vocab_size
from nanosophia.precision import fastest_dtype
from nanosophia.tokenizer import GPT2_CLASSES
from nanosophia.update_rules import compiled_update, sliced_update
from sophia import Sophia

BASELINE = "AdamW, torch fused"


@dataclass(frozen=True, kw_only=True)
class OptimizerStepsSettings(Config):
    """train.py's settings, of which the model's and the device count, and this command's own."""

    repeats: int = option(9, "rounds that are timed", low=3, section="benchmark")
    json: str = option("", "file that receives the measurements; empty = none")


@dataclass(frozen=True)
class Contender:
    """A step that is timed, and what must be done before each call without being timed."""

    step: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    optimizer: torch.optim.Optimizer | None = None  # whose state is counted


# Builds what is timed together, by name.
Family = Callable[[], dict[str, Contender]]


def measure(settings: OptimizerStepsSettings) -> dict:
    """Times all contenders and returns the report: medians over the rounds, and the environment."""
    device = start_ranks(settings.device).device
    vocab_size = settings.vocab_size or padded_vocab_size(GPT2_CLASSES)
    model = GPT(replace(settings.model, vocab_size=vocab_size)).to(device)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    baseline, *families = contenders(settings, model)
    adamw, rows = baseline(), {}
    for family in (dict, *families):
        for name, row in time_in_turn(adamw | family(), settings.repeats, device).items():
            rows.setdefault(name, row)
    parameters = model.num_params(non_embedding=False)
    for row in rows.values():
        if "state_bytes" in row:
            row["state_bytes"] /= parameters
    return dict(rows=rows, parameters=parameters, repeats=settings.repeats, **environment(device))


def time_in_turn(contenders: dict[str, Contender], repeats: int, device: torch.device) -> dict:
    """Returns a row for each of some contenders that take turns; the first is the baseline."""
    def seconds(contender: Contender):
        contender.prepare()
        return time_action(contender.step, device)

    # Compilation works in other processes too, so wall time is what a first call costs.
    first = {name: seconds(contender).wall for name, contender in contenders.items()}
    for contender in contenders.values():  # one more call, so that every cache is warm
        seconds(contender)
    rounds = [{name: seconds(contender).compared for name, contender in contenders.items()}
              for _ in range(repeats)]
    baseline, rows = next(iter(contenders)), {}
    for name, contender in contenders.items():
        ratios = [times[name] / times[baseline] for times in rounds]
        rows[name] = dict(ms=1e3 * median(times[name] for times in rounds), ratio=median(ratios),
                          least=min(ratios), most=max(ratios), first_ms=1e3 * first[name])
        if contender.optimizer:
            rows[name]["state_bytes"] = sum(
                x.nbytes for x in flatten_state(contender.optimizer)[0].values())
    return rows


def contenders(settings: OptimizerStepsSettings, model: GPT) -> list[Family]:
    """Returns what builds the optimizers and gives their steps by name; the baseline is first."""
    device = model.transformer.wte.weight.device
    dtype = settings.dtype if settings.dtype != "auto" else fastest_dtype(device, settings.n_embd)

    def named(name: str) -> torch.optim.Optimizer:
        """Returns an optimizer as train.py builds it."""
        config = with_own_defaults(replace(settings, optimizer=name, dtype=dtype), {})
        return build(config, model, num_classes=GPT2_CLASSES).optimizer

    def one(label: str, make: Callable[[], torch.optim.Optimizer]) -> Family:
        return lambda: {label: whole(make())}

    def occasional(name: str, labels: dict[str, dict]) -> Family:
        """Returns one optimizer's steps with and without what it does now and then."""
        def family() -> dict[str, Contender]:
            optimizer = named(name)
            return {label: whole(optimizer, **entries) for label, entries in labels.items()}

        return family

    def adamw(**how) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameter_groups(model, settings), **how)

    return [
        one(BASELINE, lambda: adamw(fused=device.type in ("cpu", "cuda") or None)),
        one("AdamW, torch foreach", lambda: adamw(foreach=True)),
        one("Lion", lambda: Lion(parameter_groups(model, settings))),
        *sophias(settings, model),
        one("AdEMAMix", lambda: named("ademamix")), one("MARS", lambda: named("mars")),
        one("Schedule-Free AdamW", lambda: named("schedule_free")),
        one("Muon, torch", lambda: named("muon")),
        one("metric Muon", lambda: named("metric_muon")),
        occasional("soap", {"SOAP, no new basis": dict(frequency=10**9),
                            "SOAP, new basis": dict(frequency=1)}),
        occasional("kron", {"Kron, factors as they are": dict(probability=1e-9),
                            "Kron, factors follow": dict(probability=1.0)})]


def whole(optimizer: torch.optim.Optimizer, **entries) -> Contender:
    """Returns an optimizer's step with entries of the groups that have them set."""
    def prepare() -> None:
        for group in optimizer.param_groups:
            group.update({key: value for key, value in entries.items() if key in group})

    return Contender(optimizer.step, prepare, optimizer)


def sophias(settings: OptimizerStepsSettings, model: GPT) -> list[Family]:
    """Returns Sophia's forms: eager and compiled, with one gamma and with controlled ones."""
    groups = parameter_groups(model, settings)
    # Positive, as Gauss-Newton-Bartlett's are; the time does not depend on more.
    estimates = [torch.rand_like(p) for group in groups for p in group["params"]]

    def sophia(rule: Callable, **extra) -> Sophia:
        optimizer = (ControlledSophia if extra else Sophia)(
            [group | extra for group in parameter_groups(model, settings)])
        optimizer.rule = rule
        optimizer.update_hessian(estimates)
        return optimizer

    def eager() -> dict[str, Contender]:
        optimizer = sophia(sliced_update)
        return {"Sophia, eager": whole(optimizer), "Sophia, update_hessian":
                Contender(lambda: optimizer.update_hessian(estimates))}

    def controlled(label: str, by_rows: bool) -> Family:
        """Returns the steps of a compiled Sophia with controlled gammas, and after an estimate."""
        def family() -> dict[str, Contender]:
            optimizer = sophia(compiled_update, gamma_target=0.9)
            for group in optimizer.param_groups:
                group["gamma_rows"] = by_rows and group["kind"] == "embedding"
            # The step that follows an estimate sets the controlled gamma anew.
            return {f"Sophia, compiled, {label}, no refresh": Contender(optimizer.step),
                    f"Sophia, compiled, {label}, refresh": Contender(
                        optimizer.step, lambda: optimizer.update_hessian(estimates))}

        return family

    return [eager, lambda: {"Sophia, compiled": whole(sophia(compiled_update))},
            controlled("gamma per tensor", False), controlled("embedding by rows", True)]


def table(report: dict) -> str:
    """Returns the report as a Markdown table."""
    lines = [f"{report['parameters'] / 1e6:.1f}M parameters, {report['device']} "
             f"({report['device_name']}), {report['threads']} threads, torch {report['torch']}, "
             f"{report['repeats']} rounds", "",
             "| optimizer step | ms | x fused AdamW | least-most | first call, ms | bytes of state "
             "per parameter |", "|---" * 6 + "|"]
    for name, row in report["rows"].items():
        state = f"{row['state_bytes']:.1f}" if "state_bytes" in row else ""
        lines.append(f"| {name} | {row['ms']:.1f} | {row['ratio']:.2f} | {row['least']:.2f}-"
                     f"{row['most']:.2f} | {row['first_ms']:.0f} | {state} |")
    return "\n".join(lines)


@command()
def main(argv: list[str]) -> None:
    """Runs the command."""
    settings, _ = load(OptimizerStepsSettings, argv,
                       "python -m experiments.optimizer_steps [config/FILE.py] [--key=value]")
    report = measure(settings) | measured("optimizer_steps", argv)
    publish(report, table(report), settings.json)


if __name__ == "__main__":
    main(sys.argv[1:])

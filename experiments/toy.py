"""Fig. 2 of the paper: five methods on a two-dimensional landscape with a saddle.

    python -m experiments.toy --out_dir=out/toy

L(a, b) = 8 (a - 1)^2 (1.3 a^2 + 2 a + 1) + (b - 4)^2 / 2 from (0.2, 0), where L is concave in a.
Its minimum is (1, 4); (0, 4) is a saddle. Sophia is `sophia.Sophia` itself, without momentum, with
the exact diagonal Hessian at every step; SignGD is Lion without momentum; GD and Adam (betas .9,
.95) are torch's. Written to --out_dir: toy.svg, toy.md.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from experiments.plot import COLOURS, STYLES, pyplot
from nanosophia.configurator import Settings, command, knob, load
from nanosophia.optimizers import Lion
from sophia import Sophia

START, MINIMUM, SOLVED = (0.2, 0.0), (1.0, 4.0), 1e-3
NO_DECAY = dict(betas=(0.0, 0.0), weight_decay=0.0)


@dataclass(frozen=True, kw_only=True)
class ToySettings(Settings):
    """The settings of this command."""

    out_dir: str = knob("out/toy", "folder for toy.svg and toy.md")
    steps: int = knob(1000, "of each method", low=1)


def loss(x: Tensor) -> Tensor:
    """L at points (..., 2)."""
    a, b = x.unbind(-1)
    return 8 * (a - 1) ** 2 * (1.3 * a ** 2 + 2 * a + 1) + (b - 4) ** 2 / 2


def diagonal(x: Tensor) -> Tensor:
    """The Hessian's diagonal at a point (2,), all of the Hessian here."""
    hessian = torch.autograd.functional.hessian(loss, x.detach())
    return hessian.diagonal()


def path(make: Callable[[list[Tensor]], torch.optim.Optimizer], steps: int, *,
         curvature: bool = False) -> Tensor:
    """Places (steps + 1, 2) of an optimizer in float64."""
    x = torch.tensor(START, dtype=torch.float64, requires_grad=True)
    optimizer, places = make([x]), [x.detach().clone()]
    for _ in range(steps):
        if curvature:
            optimizer.update_hessian([diagonal(x)])
        optimizer.zero_grad()
        loss(x).backward()
        optimizer.step()
        places.append(x.detach().clone())
    return torch.stack(places)


def newton(steps: int) -> Tensor:
    """Places (steps + 1, 2) of Newton's method."""
    x, places = torch.tensor(START, dtype=torch.float64), []
    for _ in range(steps + 1):
        places.append(x)
        x = x - torch.func.grad(loss)(x) / diagonal(x)
    return torch.stack(places)


def steps_to_solve(places: Tensor) -> int | None:
    """Steps until the loss is first below SOLVED; None: never."""
    solved = (loss(places) < SOLVED).nonzero()
    return int(solved[0]) if len(solved) else None


def best_gd(steps: int) -> tuple[float, Tensor]:
    """The learning rate, of twenty per decade, with which gradient descent is soonest there."""
    rates = [10 ** (n / 20) for n in range(-80, 1)]
    paths = {lr: path(lambda x, lr=lr: torch.optim.SGD(x, lr=lr), steps) for lr in rates}
    return min(paths.items(), key=lambda item: (
        steps_to_solve(item[1]) or math.inf, loss(item[1][-1]).nan_to_num(math.inf).item()))


def methods(steps: int) -> dict[str, Tensor]:
    """Places of every method by its name."""
    rate, gd = best_gd(steps)
    return {
        "Sophia, lr 0.5": path(lambda x: Sophia(x, lr=0.5, gamma=1.0, **NO_DECAY), steps,
                               curvature=True),
        "Sophia, lr 1": path(lambda x: Sophia(x, lr=1.0, gamma=1.0, **NO_DECAY), steps,
                             curvature=True),
        f"GD, lr {rate:.3g} (its best)": gd,
        "SignGD, lr 0.01": path(lambda x: Lion(x, lr=0.01, **NO_DECAY), steps),
        "Adam, lr 0.03": path(lambda x: torch.optim.Adam(x, lr=0.03, betas=(0.9, 0.95)), steps),
        "Newton": newton(steps),
    }


def table(found: dict[str, Tensor]) -> str:
    """Steps, and where each method ends."""
    lines = [f"| method | steps to loss < {SOLVED:g} | place at the end | loss there |",
             "|---|---|---|---|"]
    for name, places in found.items():
        a, b = places[-1].tolist()
        lines.append(f"| {name} | {steps_to_solve(places) or 'never'} | ({a:.3f}, {b:.3f}) | "
                     f"{loss(places[-1]).item():.3g} |")
    return "\n".join(lines)


def draw(found: dict[str, Tensor], file: Path) -> None:
    """The landscape's level lines and the paths."""
    plt = pyplot()
    a, b = torch.meshgrid(torch.linspace(-0.4, 1.6, 200), torch.linspace(-0.6, 5.0, 200),
                          indexing="ij")
    values = loss(torch.stack([a, b], dim=-1))
    figure, axes = plt.subplots(figsize=(6.4, 4.8), layout="constrained")
    axes.contour(a, b, values, levels=torch.logspace(-1, 2, 16).tolist(), colors="#bbbbbb",
                 linewidths=0.6)
    for i, (name, places) in enumerate(found.items()):
        solved = steps_to_solve(places)
        places = places[:(solved or len(places) - 1) + 1]
        few = len(places) < 20
        axes.plot(*places.T, color=COLOURS[i], linestyle=STYLES[i % len(STYLES)], linewidth=1.4,
                  marker="o" if few else None, markersize=3.5, label=name)
    axes.plot(*START, "s", color="black", markersize=6)
    axes.annotate("start", START, xytext=(8, -4), textcoords="offset points")
    axes.plot(*MINIMUM, "*", color="black", markersize=12)
    axes.annotate("minimum", MINIMUM, xytext=(8, 6), textcoords="offset points")
    axes.plot(0, 4, "x", color="black", markersize=8)
    axes.annotate("saddle", (0, 4), xytext=(-14, 10), textcoords="offset points")
    axes.set_xlabel("a")
    axes.set_ylabel("b")
    figure.legend(frameon=False, fontsize="small", loc="outside lower center", ncols=3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else None)
    plt.close(figure)


@command()
def main(argv: list[str]) -> None:
    """The command."""
    settings, _ = load(ToySettings, argv, "python -m experiments.toy [--key=value]")
    out = Path(settings.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    found = methods(settings.steps)
    (out / "toy.md").write_text(table(found) + "\n")
    draw(found, out / "toy.svg")
    print(table(found))


if __name__ == "__main__":
    main(sys.argv[1:])

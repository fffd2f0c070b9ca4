"""Draws Fig. 2 of the paper: five methods on a two-dimensional loss with a saddle point.

    python -m experiments.toy --out_dir=out/toy

The loss is L(a, b) = 8 (a - 1)^2 (1.3 a^2 + 2 a + 1) + (b - 4)^2 / 2. The methods start at
(0.2, 0), where L is concave in a; the minimum is (1, 4), and (0, 4) is a saddle point. Sophia is
`sophia.Sophia` without momentum, given the exact diagonal Hessian at every step; SignGD is Lion
without momentum; GD and Adam (betas .9, .95) are torch's. The results in --out_dir are toy.svg and
toy.md.
"""

if __name__ == "__main__":
    import nanosophia.startup  # noqa: F401

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from experiments.plot import COLOURS, STYLES, clear_frame, pyplot, save_figure
from nanosophia.baselines import Lion
from nanosophia.command import command
from nanosophia.configurator import Settings, load, option
from nanosophia.files import write_text
from sophia import Sophia

START, MINIMUM = (0.2, 0.0), (1.0, 4.0)
SOLVED = 1e-3  # a method has solved the problem when its loss is below this
PLAIN = dict(betas=(0.0, 0.0), weight_decay=0.0)


@dataclass(frozen=True, kw_only=True)
class ToySettings(Settings):
    """Settings of `python -m experiments.toy`."""

    out_dir: str = option("out/toy", "folder for toy.svg and toy.md")
    steps: int = option(1000, "length of each method's path", unit="steps", low=1)


def loss(x: Tensor) -> Tensor:
    """Returns L at points (..., 2)."""
    a, b = x.unbind(-1)
    return 8 * (a - 1) ** 2 * (1.3 * a ** 2 + 2 * a + 1) + (b - 4) ** 2 / 2


def diagonal(x: Tensor) -> Tensor:
    """Returns the Hessian's diagonal at a point (2,); its other entries are 0."""
    hessian = torch.autograd.functional.hessian(loss, x.detach())
    return hessian.diagonal()


def path(make: Callable[[list[Tensor]], torch.optim.Optimizer], steps: int, *,
         curvature: bool = False) -> Tensor:
    """Returns the points (steps + 1, 2) that an optimizer visits, in float64."""
    x = torch.tensor(START, dtype=torch.float64, requires_grad=True)
    optimizer, points = make([x]), [x.detach().clone()]
    for _ in range(steps):
        if curvature:
            optimizer.update_hessian([diagonal(x)])
        optimizer.zero_grad()
        loss(x).backward()
        optimizer.step()
        points.append(x.detach().clone())
    return torch.stack(points)


def newton(steps: int) -> Tensor:
    """Returns the points (steps + 1, 2) that Newton's method visits."""
    x, points = torch.tensor(START, dtype=torch.float64), []
    for _ in range(steps + 1):
        points.append(x)
        x = x - torch.func.grad(loss)(x) / diagonal(x)
    return torch.stack(points)


def steps_to_solve(points: Tensor) -> int | None:
    """Returns the steps until the loss is first below SOLVED; None: never."""
    solved = (loss(points) < SOLVED).nonzero()
    return int(solved[0]) if len(solved) else None


def best_gd(steps: int) -> tuple[float, Tensor]:
    """Returns the learning rate at which gradient descent needs the fewest steps, and its path."""
    rates = [10 ** (n / 20) for n in range(-80, 1)]  # twenty per decade
    paths = {lr: path(lambda x, lr=lr: torch.optim.SGD(x, lr=lr), steps) for lr in rates}
    return min(paths.items(), key=lambda item: (
        steps_to_solve(item[1]) or math.inf, loss(item[1][-1]).nan_to_num(math.inf).item()))


def methods(steps: int) -> dict[str, Tensor]:
    """Returns every method's path by its name."""
    rate, gd = best_gd(steps)
    return {
        "Sophia, lr 0.5": path(lambda x: Sophia(x, lr=0.5, gamma=1.0, **PLAIN), steps,
                               curvature=True),
        "Sophia, lr 1": path(lambda x: Sophia(x, lr=1.0, gamma=1.0, **PLAIN), steps,
                             curvature=True),
        f"GD, lr {rate:.3g} (its best)": gd,
        "SignGD, lr 0.01": path(lambda x: Lion(x, lr=0.01, **PLAIN), steps),
        "Adam, lr 0.03": path(lambda x: torch.optim.Adam(x, lr=0.03, betas=(0.9, 0.95)), steps),
        "Newton": newton(steps),
    }


def table(paths: dict[str, Tensor]) -> str:
    """Returns a table of the steps that each method needs and of the point where it ends."""
    lines = [f"| method | steps to loss < {SOLVED:g} | place at the end | loss there |",
             "|---|---|---|---|"]
    for name, points in paths.items():
        a, b = points[-1].tolist()
        lines.append(f"| {name} | {steps_to_solve(points) or 'never'} | ({a:.3f}, {b:.3f}) | "
                     f"{loss(points[-1]).item():.3g} |")
    return "\n".join(lines)


def draw(paths: dict[str, Tensor], file: Path) -> None:
    """Draws the level lines of the loss and each path until it has solved the problem."""
    a, b = torch.meshgrid(torch.linspace(-0.4, 1.6, 200), torch.linspace(-0.6, 5.0, 200),
                          indexing="ij")
    values = loss(torch.stack([a, b], dim=-1))
    figure, axes = pyplot().subplots(figsize=(6.4, 4.8), layout="constrained")
    axes.contour(a, b, values, levels=torch.logspace(-1, 2, 16).tolist(), colors="#bbbbbb",
                 linewidths=0.6)
    for i, (name, points) in enumerate(paths.items()):
        solved = steps_to_solve(points)
        points = points[:(solved or len(points) - 1) + 1]
        marker = "o" if len(points) < 20 else None  # more would hide the line
        axes.plot(*points.T, color=COLOURS[i], linestyle=STYLES[i % len(STYLES)], linewidth=1.4,
                  marker=marker, markersize=3.5, label=name)
    axes.plot(*START, "s", color="black", markersize=6)
    axes.annotate("start", START, xytext=(8, -4), textcoords="offset points")
    axes.plot(*MINIMUM, "*", color="black", markersize=12)
    axes.annotate("minimum", MINIMUM, xytext=(8, 6), textcoords="offset points")
    axes.plot(0, 4, "x", color="black", markersize=8)
    axes.annotate("saddle", (0, 4), xytext=(-14, 10), textcoords="offset points")
    axes.set_xlabel("a")
    axes.set_ylabel("b")
    figure.legend(frameon=False, fontsize="small", loc="outside lower center", ncols=3)
    clear_frame(axes, grid=False)
    save_figure(figure, file)


@command()
def main(argv: list[str]) -> None:
    """Runs the command."""
    settings, _ = load(ToySettings, argv, "python -m experiments.toy [--key=value]")
    out = Path(settings.out_dir)
    paths = methods(settings.steps)
    text = table(paths)
    write_text(out / "toy.md", text + "\n")
    draw(paths, out / "toy.svg")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])

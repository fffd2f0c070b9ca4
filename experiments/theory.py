"""Measures how the steps to solve a quadratic grow with its condition number, beside the theorems.

    python -m experiments.theory --out_dir=out/theory

Theorem G.12: on L = mu a^2 / 2 + beta b^2 / 2 the steps that SignGD needs to bring the loss from
Delta to epsilon grow with sqrt(beta / mu), because its one learning rate must be small enough for
the steep direction and is then too small for the flat one. Theorem F.3: the steps of clipped
Newton, theta -= eta V clip(V^T H^-1 grad, -rho, rho) with H = V D V^T, do not grow. The last column
is Sophia's diagonal update on the same quadratic rotated by 30 degrees. There the diagonal is not
the curvature, and the theorem, which is about the eigenbasis, promises nothing.

Theorem G.17 (G.15 and, coordinate by coordinate, G.16): on a function that is concave in places the
clipped update reaches epsilon in a number of steps that grows with the distance in loss and with
the logarithm of 1 / epsilon. The second table has L(a) + condition L(b) with L(x) = log cosh x +
(1 - exp(-x^2 / 2)) / 2, which is concave from |x| = 1.46 to 4.37 and has one minimum, from
a = b = 4. Beside it is gradient descent at 0.95 of the largest rate that is stable, 2 / (1.5
condition). Alpha and G of Definition G.14 scale with L and gamma does not, so each coordinate has
its own bound, of which the larger is shown; with alpha = 1.4 for L (gamma 4.09, G .36, rho .12) it
is close to the tightest. The bound is equation 76 with
rho = 1 / (2 gamma); equation 77, which is said to follow, has 4 alpha / gamma^2 where alpha rho^2
is alpha / (4 gamma^2). The results in --out_dir are theory.svg and theory.md.
"""

if __name__ == "__main__":
    import nanosophia.startup  # noqa: F401

import math
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from experiments.plot import COLOURS, clear_frame, pyplot, save_figure
from nanosophia.baselines import Lion
from nanosophia.command import command
from nanosophia.configurator import Settings, load, option
from nanosophia.files import write_text
from sophia import Sophia

DELTA, EPSILON = 1.0, 1e-3  # loss of each direction at the start, and the loss to reach
PLAIN = dict(betas=(0.0, 0.0), weight_decay=0.0)


@dataclass(frozen=True, kw_only=True)
class TheorySettings(Settings):
    """Settings of `python -m experiments.theory`."""

    out_dir: str = option("out/theory", "folder for theory.svg and theory.md")
    decades: int = option(6, "condition numbers go from 1 to ten to this power", low=1, high=8)
    limit: int = option(100_000, "the diagonal update and gradient descent stop after as many",
                        unit="steps", low=10)


def sign_descent(condition: float) -> tuple[int, float]:
    """Returns SignGD's steps to EPSILON at its largest safe rate, and the theorem's lower bound.

    A rate eta is safe where beta eta^2 / 2 <= EPSILON, since a direction that oscillates moves by
    eta. Both directions start at a loss of about DELTA, the steep one where it will oscillate
    evenly around 0.
    """
    curvature = torch.tensor([1.0, condition], dtype=torch.float64)
    rate = math.sqrt(2 * EPSILON / condition)
    x = (2 * DELTA / curvature).sqrt()
    x[1] = (round(x[1].item() / rate) + 0.5) * rate
    steps = descend(x, lambda x: curvature * x, Lion([x], lr=rate, **PLAIN), curvature)
    bound = (math.sqrt(DELTA / EPSILON) - math.sqrt(2)) * math.sqrt(condition) / 2
    return steps, bound


def clipped_newton(condition: float, eta: float = 0.5, rho: float = 0.25) -> int:
    """Returns the steps of clipped Newton in the eigenbasis of the rotated quadratic."""
    eigenvalues, V = rotated(condition)
    x, steps = V @ (2 * DELTA / eigenvalues).sqrt(), 0
    while value(x, V, eigenvalues) > EPSILON:
        gradient = V @ (eigenvalues * (V.T @ x))
        newton = V @ ((V.T @ gradient) / eigenvalues)
        x = x - eta * V @ (V.T @ newton).clamp(-rho, rho)
        steps += 1
    return steps


def diagonal_newton(condition: float, limit: int, eta: float = 0.5) -> int | None:
    """Returns the steps of Sophia with the exact diagonal on the rotated quadratic; None: more
    than `limit`."""
    eigenvalues, V = rotated(condition)
    hessian = V @ torch.diag(eigenvalues) @ V.T
    x = V @ (2 * DELTA / eigenvalues).sqrt()
    optimizer = Sophia([x], lr=eta, gamma=1.0, **PLAIN)
    for steps in range(limit + 1):
        if value(x, V, eigenvalues) <= EPSILON:
            return steps
        optimizer.update_hessian([hessian.diagonal()])
        x.grad = hessian @ x
        optimizer.step()
    return None


def descend(x: Tensor, gradient, optimizer: torch.optim.Optimizer, curvature: Tensor) -> int:
    """Returns the steps until sum(curvature x^2) / 2 is at most EPSILON."""
    steps = 0
    while 0.5 * (curvature * x ** 2).sum() > EPSILON:
        x.grad = gradient(x)
        optimizer.step()
        steps += 1
    return steps


def rotated(condition: float) -> tuple[Tensor, Tensor]:
    """Returns eigenvalues (2,) and eigenvectors (2, 2) of a quadratic rotated by 30 degrees."""
    c, s = math.cos(math.pi / 6), math.sin(math.pi / 6)
    return (torch.tensor([1.0, condition], dtype=torch.float64),
            torch.tensor([[c, -s], [s, c]], dtype=torch.float64))


def value(x: Tensor, V: Tensor, eigenvalues: Tensor) -> float:
    """Returns the loss of a quadratic with these eigenvectors and eigenvalues."""
    return 0.5 * (eigenvalues * (V.T @ x) ** 2).sum().item()


def valley(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns L(x) and its first three derivatives, elementwise."""
    t, e = x.tanh(), 0.5 * (-x ** 2 / 2).exp()
    slope = 1 - t ** 2
    return (x.abs() + (-2 * x.abs()).exp().log1p() - math.log(2) + 0.5 - e, t + x * e,
            slope + (1 - x ** 2) * e, -2 * t * slope + (x ** 3 - 3 * x) * e)


@cache
def valley_constants(alpha: float = 1.4) -> tuple[float, float]:
    """Returns gamma and G of Definition G.14 for `valley`, on a grid over the part that counts.

    Beyond it the curvature is below alpha / 2 and the slope within 1e-12 of 1.
    """
    _, first, second, third = valley(torch.linspace(-15, 15, 3_000_001, dtype=torch.float64))
    bent = second >= alpha / 2
    return ((2 * third.abs() / second)[bent].max().item(),
            first[second <= alpha].abs().min().item())


def sophia_in_valleys(condition: float, start: float = 4.0, alpha: float = 1.4) -> tuple[int, int]:
    """Returns Sophia's steps to EPSILON on L(a) + condition L(b), and Theorem G.17's bound."""
    gamma, G = valley_constants(alpha)
    rho, scale = 1 / (2 * gamma), torch.tensor([1.0, condition], dtype=torch.float64)
    x, steps = torch.full((2,), start, dtype=torch.float64), 0
    bounds = [4 * (gap / (c * min(alpha * rho ** 2, G ** 2 / alpha)) + math.log(2 * gap / EPSILON))
              for c, gap in zip(scale.tolist(), (scale * valley(x)[0]).tolist(), strict=True)]
    optimizer = Sophia([x], lr=rho / 2, gamma=rho, **PLAIN)  # eta = 1/2
    while (scale * valley(x)[0]).sum() > EPSILON:
        _, first, second, _ = valley(x)
        optimizer.update_hessian([scale * second])
        x.grad = scale * first
        optimizer.step()
        steps += 1
    return steps, math.ceil(max(bounds))


def gradient_in_valleys(condition: float, limit: int, start: float = 4.0) -> int | None:
    """Returns the steps of gradient descent on the same; None: more than `limit`."""
    scale, x = torch.tensor([1.0, condition], dtype=torch.float64), torch.full(
        (2,), start, dtype=torch.float64)
    for steps in range(limit + 1):
        value, first, *_ = valley(x)
        if (scale * value).sum() <= EPSILON:
            return steps
        x -= scale * first * 0.95 * 2 / (1.5 * condition)
    return None


def measure(settings: TheorySettings) -> list[dict]:
    """Returns the steps of each method, a row per condition number."""
    rows = []
    for decade in range(settings.decades + 1):
        condition = 10.0 ** decade
        steps, bound = sign_descent(condition)
        valley_steps, valley_bound = sophia_in_valleys(condition)
        rows.append(dict(condition=condition, sign=steps, bound=bound,
                         newton=clipped_newton(condition),
                         diagonal=diagonal_newton(condition, settings.limit),
                         valleys=valley_steps, valley_bound=valley_bound,
                         valley_descent=gradient_in_valleys(condition, settings.limit)))
    return rows


def slope(rows: list[dict]) -> float:
    """Returns the slope of log SignGD steps over the log condition number, by least squares."""
    x = torch.tensor([math.log(r["condition"]) for r in rows], dtype=torch.float64)
    y = torch.tensor([math.log(r["sign"]) for r in rows], dtype=torch.float64)
    return ((x - x.mean()) @ (y - y.mean()) / ((x - x.mean()) @ (x - x.mean()))).item()


def table(rows: list[dict], limit: int) -> str:
    """Returns the report."""
    def text(steps: int | None) -> str:
        return f"> {limit:,}" if steps is None else f"{steps:,}"

    lines = ["| condition number | SignGD | G.12's lower bound | clipped Newton, eigenbasis | "
             "Sophia's diagonal, turned by 30 degrees |", "|---" * 5 + "|"]
    lines += [f"| {r['condition']:g} | {r['sign']:,} | {r['bound']:,.1f} | {r['newton']} | "
              f"{text(r['diagonal'])} |" for r in rows]
    lines += ["", f"Slope of log SignGD steps over the log condition number: {slope(rows):.3f} "
                  "(the theorem: 0.5).", "",
              "| condition number | Sophia on a non-convex sum | G.17's upper bound | "
              "gradient descent |", "|---" * 4 + "|"]
    lines += [f"| {r['condition']:g} | {r['valleys']:,} | {r['valley_bound']:,} | "
              f"{text(r['valley_descent'])} |" for r in rows]
    return "\n".join(lines)


def draw(rows: list[dict], file: Path) -> None:
    """Draws the steps over the condition number."""
    figure, axes = pyplot().subplots(figsize=(8.6, 3.8), layout="constrained")
    lines = (("sign", "SignGD", "-o"), ("bound", "lower bound of Theorem G.12", "--"),
             ("newton", "clipped Newton in the eigenbasis (F.3)", "-s"),
             ("diagonal", "Sophia's diagonal, turned by 30 degrees", "-.^"))
    for i, (key, label, style) in enumerate(lines):
        points = [(r["condition"], r[key]) for r in rows if r[key]]
        axes.loglog(*zip(*points, strict=True), style, color=COLOURS[i], label=label)
    axes.set_xlabel("condition number")
    axes.set_ylabel(f"steps to a loss of {EPSILON:g}")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    clear_frame(axes)
    save_figure(figure, file)


@command()
def main(argv: list[str]) -> None:
    """Runs the command."""
    settings, _ = load(TheorySettings, argv, "python -m experiments.theory [--key=value]")
    out = Path(settings.out_dir)
    rows = measure(settings)
    text = table(rows, settings.limit)
    write_text(out / "theory.md", text + "\n")
    draw(rows, out / "theory.svg")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])

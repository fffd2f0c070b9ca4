"""The paper's two rates, on quadratics: what its theorems say of the condition number.

    python -m experiments.theory --out_dir=out/theory

Theorem G.12: on L = mu a^2 / 2 + beta b^2 / 2 SignGD needs a number of steps that grows with
sqrt(beta / mu) to bring the loss from Delta to epsilon: its one learning rate must be small enough
for the steep direction, and the flat one is walked at that rate. Theorem F.3: clipped Newton
steps, theta -= eta V clip(V^T H^-1 grad, -rho, rho) with H = V D V^T, need a number that does not.
The last column is Sophia's diagonal update on the same quadratic turned by 30 degrees, where the
diagonal is not the curvature: the theorem is about the eigenbasis and promises nothing there.
Written to --out_dir: theory.svg, theory.md.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from experiments.plot import COLOURS, pyplot
from nanosophia.configurator import Settings, command, knob, load
from nanosophia.optimizers import Lion
from sophia import Sophia

DELTA, EPSILON = 1.0, 1e-3  # loss at the start (of each direction), and where it has to be


@dataclass(frozen=True, kw_only=True)
class TheorySettings(Settings):
    """The settings of this command."""

    out_dir: str = knob("out/theory", "folder for theory.svg and theory.md")
    decades: int = knob(6, "condition numbers from 1 to ten to this", low=1, high=8)
    limit: int = knob(100_000, "most steps of the diagonal update", unit="steps", low=10)


def sign_descent(condition: float) -> tuple[int, float]:
    """Steps of SignGD to EPSILON at the largest safe rate, and the theorem's lower bound on them.

    Safe is beta eta^2 / 2 <= EPSILON: a direction that jumps to and fro moves by eta. Both
    directions start with a loss of about DELTA, the steep one where it will jump evenly.
    """
    curvature = torch.tensor([1.0, condition], dtype=torch.float64)
    rate = math.sqrt(2 * EPSILON / condition)
    x = (2 * DELTA / curvature).sqrt()
    x[1] = (round(x[1].item() / rate) + 0.5) * rate
    steps = descend(x, lambda x: curvature * x, Lion([x], lr=rate, **NOTHING_ELSE), curvature)
    bound = (math.sqrt(DELTA / EPSILON) - math.sqrt(2)) * math.sqrt(condition) / 2
    return steps, bound


def clipped_newton(condition: float, eta: float = 0.5, rho: float = 0.25) -> int:
    """Steps of clipped Newton in the eigenbasis of a quadratic turned by 30 degrees."""
    eigenvalues, V = turned(condition)
    x, steps = V @ (2 * DELTA / eigenvalues).sqrt(), 0
    while value(x, V, eigenvalues) > EPSILON:
        gradient = V @ (eigenvalues * (V.T @ x))
        newton = V @ ((V.T @ gradient) / eigenvalues)
        x = x - eta * V @ (V.T @ newton).clamp(-rho, rho)
        steps += 1
    return steps


def diagonal_newton(condition: float, limit: int, eta: float = 0.5) -> int | None:
    """Steps of Sophia with the exact diagonal on the same quadratic; None: more than `limit`."""
    eigenvalues, V = turned(condition)
    hessian = V @ torch.diag(eigenvalues) @ V.T
    x = V @ (2 * DELTA / eigenvalues).sqrt()
    optimizer = Sophia([x], lr=eta, gamma=1.0, **NOTHING_ELSE)
    for steps in range(limit + 1):
        if value(x, V, eigenvalues) <= EPSILON:
            return steps
        optimizer.update_hessian([hessian.diagonal()])
        x.grad = hessian @ x
        optimizer.step()
    return None


NOTHING_ELSE = dict(betas=(0.0, 0.0), weight_decay=0.0)


def descend(x: Tensor, gradient, optimizer: torch.optim.Optimizer, curvature: Tensor) -> int:
    """Steps until sum(curvature x^2) / 2 is at most EPSILON."""
    steps = 0
    while 0.5 * (curvature * x ** 2).sum() > EPSILON:
        x.grad = gradient(x)
        optimizer.step()
        steps += 1
    return steps


def turned(condition: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues (2,) and eigenvectors (2, 2) of a quadratic turned by 30 degrees."""
    c, s = math.cos(math.pi / 6), math.sin(math.pi / 6)
    return (torch.tensor([1.0, condition], dtype=torch.float64),
            torch.tensor([[c, -s], [s, c]], dtype=torch.float64))


def value(x: Tensor, V: Tensor, eigenvalues: Tensor) -> float:
    """The quadratic's loss."""
    return 0.5 * (eigenvalues * (V.T @ x) ** 2).sum().item()


def measure(settings: TheorySettings) -> list[dict]:
    """One row per condition number."""
    rows = []
    for decade in range(settings.decades + 1):
        condition = 10.0 ** decade
        steps, bound = sign_descent(condition)
        rows.append(dict(condition=condition, sign=steps, bound=bound,
                         newton=clipped_newton(condition),
                         diagonal=diagonal_newton(condition, settings.limit)))
    return rows


def slope(rows: list[dict]) -> float:
    """Of log steps over log condition number, SignGD's, by least squares."""
    x = torch.tensor([math.log(r["condition"]) for r in rows], dtype=torch.float64)
    y = torch.tensor([math.log(r["sign"]) for r in rows], dtype=torch.float64)
    return ((x - x.mean()) @ (y - y.mean()) / ((x - x.mean()) @ (x - x.mean()))).item()


def table(rows: list[dict], limit: int) -> str:
    """The report."""
    lines = ["| condition number | SignGD | G.12's lower bound | clipped Newton, eigenbasis | "
             "Sophia's diagonal, turned by 30 degrees |", "|---" * 5 + "|"]
    for r in rows:
        diagonal = f"> {limit:,}" if r["diagonal"] is None else f"{r['diagonal']:,}"
        lines.append(f"| {r['condition']:g} | {r['sign']:,} | {r['bound']:,.1f} | {r['newton']} | "
                     f"{diagonal} |")
    return "\n".join([*lines, "", f"Slope of log SignGD steps over the log condition number: "
                                  f"{slope(rows):.3f} (the theorem: 0.5)."])


def draw(rows: list[dict], file: Path) -> None:
    """Steps over the condition number."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    lines = (("sign", "SignGD", "-o"), ("bound", "lower bound of Theorem G.12", "--"),
             ("newton", "clipped Newton in the eigenbasis (F.3)", "-s"),
             ("diagonal", "Sophia's diagonal, turned by 30 degrees", "-.^"))
    for i, (key, words, style) in enumerate(lines):
        points = [(r["condition"], r[key]) for r in rows if r[key]]
        axes.loglog(*zip(*points, strict=True), style, color=COLOURS[i], label=words)
    axes.set_xlabel("condition number")
    axes.set_ylabel(f"steps to a loss of {EPSILON:g}")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else None)
    plt.close(figure)


@command()
def main(argv: list[str]) -> None:
    """The command."""
    settings, _ = load(TheorySettings, argv, "python -m experiments.theory [--key=value]")
    out = Path(settings.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    rows = measure(settings)
    text = table(rows, settings.limit)
    (out / "theory.md").write_text(text + "\n")
    draw(rows, out / "theory.svg")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])

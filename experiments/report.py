"""Rewrites the tables in results/ from the JSON of the runs and timings behind them.

    python -m experiments.report            rewrites
    python -m experiments.report --verify   changes nothing; exits with 1 where a table differs

A table stands in a Markdown file between the comments <!-- NAME --> and <!-- end -->, and is made
from results/runs/NAME.json by the code that the experiment itself prints it with, so that figures
and prose cannot part from what was measured. The command that made the JSON is in it.
"""

if __name__ == "__main__":
    import nanosophia.startup  # noqa: F401

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from experiments import compare, figures, optimizer_steps, sampling, speed
from nanosophia.command import command
from nanosophia.configurator import ConfigError, Settings, UserError, load, option
from nanosophia.files import read_bytes, write_text

BLOCK = re.compile(r"<!-- ([\w.-]+) -->\n(.*?)<!-- end -->\n", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class ReportSettings(Settings):
    """Settings of `python -m experiments.report`."""

    results: str = option("results", "folder with the Markdown files and runs/*.json")
    verify: bool = option(False, "change nothing; exit with 1 where a table differs")


def _figure(data: dict) -> str:
    figure, runs = figures.remake(data)
    return f"{runs}\n\n{figures.table(figure)}"


EXPERIMENTS: dict[str, Callable[[dict], str]] = {
    "figures": _figure, "compare": compare.remake, "speed": speed.table,
    "optimizer_steps": optimizer_steps.table, "sampling": sampling.table}


def block(path: Path) -> str:
    """Returns the text that a file of results/runs stands for; raises ConfigError."""
    try:
        data = json.loads(read_bytes(path))
        made, remake = data["made"], EXPERIMENTS[data["experiment"]]
        head = (f"`{data['command']}`, {made['date']}, torch {made['torch']}, Python "
                f"{made['python']}, {made['machine']}; ")
        return head + remake(data)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not what an experiment wrote: {error!r}; run the experiment "
                          "again") from None


def rewrite(text: str, runs: Path, used: set[str]) -> str:
    """Returns a Markdown text with its tables made again, whose names are added to `used`."""
    def remade(found: re.Match) -> str:
        name = found[1]
        used.add(name)
        return f"<!-- {name} -->\n{block(runs / f'{name}.json')}\n<!-- end -->\n"

    return BLOCK.sub(remade, text)


@command()
def main(argv: list[str]) -> None:
    """Runs the command."""
    settings, _ = load(ReportSettings, argv, "python -m experiments.report [--key=value]")
    results, used, differing = Path(settings.results), set(), []
    for path in sorted(results.glob("*.md")):
        old = read_bytes(path).decode()
        if (new := rewrite(old, results / "runs", used)) != old:
            differing.append(path.name)
            if not settings.verify:
                write_text(path, new)
    there = {path.stem for path in (results / "runs").glob("*.json")}
    if there - used:
        raise ConfigError(f"no table in {results} is named {min(there - used)}, which is in "
                          f"{results / 'runs'}; write <!-- NAME --> and <!-- end --> there")
    if settings.verify and differing:
        raise UserError(f"{', '.join(differing)}: tables differ from what their runs give; run "
                        "python -m experiments.report")
    print(f"{len(used)} tables; {len(differing)} files "
          f"{'differ' if settings.verify else 'changed'}")


if __name__ == "__main__":
    main(sys.argv[1:])

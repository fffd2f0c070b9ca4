"""Rewrites the tables in results/ from the JSON of the runs and timings behind them.

    python -m experiments.report            rewrites
    python -m experiments.report --verify   changes nothing; exits with 1 where a table differs

A table that stands in a Markdown file between the lines <!-- NAME --> and <!-- end --> is made from
results/runs/NAME.json by the code that the experiment itself prints it with. Above it stand the
command, date and versions that the JSON names. Other tables and the prose are left as they are.
"""

if __name__ == "__main__":
    import nanosophia.startup  # noqa: F401

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from experiments import (
    compare,
    every_optimizer,
    exactness,
    figures,
    leaderboard,
    memory,
    optimizer_steps,
    preparation,
    sampling,
    shakespeare,
    speed,
    starting_values,
    study,
)
from nanosophia.command import command
from nanosophia.configurator import ConfigError, Settings, UserError, load, option
from nanosophia.files import read_bytes, write_text

# A line that names a table, what follows up to the next such line, and the line that ends it.
BLOCK = re.compile(r"^<!-- (?!end -->)([\w.-]+) -->\r?\n((?:(?!<!-- ).*\r?\n)*)<!-- end -->[ \t]*$",
                   re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class ReportSettings(Settings):
    """Settings of `python -m experiments.report`."""

    results: str = option("results", "folder with the Markdown files and runs/*.json")
    verify: bool = option(False, "change nothing; exit with 1 where a table differs")


def _figure(data: dict) -> str:
    figure, runs = figures.remake(data)
    return f"{runs}\n\n{figures.table(figure)}"


EXPERIMENTS: dict[str, Callable[[dict], str]] = {
    "figures": _figure, "compare": compare.remake, "every_optimizer": every_optimizer.remake,
    "exactness": exactness.table, "leaderboard": leaderboard.remake,
    "speed": speed.table, "memory": memory.table, "shakespeare": shakespeare.remake,
    "optimizer_steps": optimizer_steps.table, "preparation": preparation.table,
    "sampling": sampling.table, "study": study.remake,
    "starting_values": starting_values.remake}


def block(path: Path) -> str:
    """Returns the text that a file of results/runs stands for; raises ConfigError."""
    try:
        data = json.loads(read_bytes(path))
        made, remake = data["made"], EXPERIMENTS[data["experiment"]]
        head = (f"`{data['command']}`, {made['date']}, torch {made['torch']}, Python "
                f"{made['python']}, {made['machine']}; ")
        return head + remake(data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not what an experiment wrote: {error!r}; run the experiment "
                          "again") from None


def rewrite(text: str, runs: Path, used: set[str]) -> str:
    """Returns a Markdown text with its tables made again, whose names are added to `used`."""
    def remade(found: re.Match) -> str:
        name = found[1]
        used.add(name)
        return f"<!-- {name} -->\n{block(runs / f'{name}.json')}\n<!-- end -->"

    return BLOCK.sub(remade, text)


def pages(results: Path) -> dict[Path, str]:
    """Returns the Markdown files of a folder; raises ConfigError."""
    found = {}
    for path in sorted(results.glob("*.md")):
        try:
            found[path] = read_bytes(path).decode()
        except (OSError, UnicodeError) as error:
            raise ConfigError(f"{path} cannot be read: {error}", "results") from None
    if not found:
        raise ConfigError(f"{results} holds no Markdown files; give their folder as --results",
                          "results")
    return found


@command()
def main(argv: list[str]) -> None:
    """Runs the command."""
    settings, _ = load(ReportSettings, argv, "python -m experiments.report [--key=value]")
    results, used = Path(settings.results), set()
    old = pages(results)
    new = {path: rewrite(text, results / "runs", used) for path, text in old.items()}
    there = {path.stem for path in (results / "runs").glob("*.json")}
    if there - used:
        raise ConfigError(f"no table in {results} is named {min(there - used)}, which is in "
                          f"{results / 'runs'}; write <!-- NAME --> and <!-- end --> there, a line "
                          "each")
    differing = [path for path in old if new[path] != old[path]]
    if settings.verify and differing:
        raise UserError(f"{', '.join(path.name for path in differing)}: tables differ from what "
                        "their runs give; run python -m experiments.report")
    for path in differing:
        write_text(path, new[path])
    print(f"{len(used)} tables; {len(differing)} files "
          f"{'differ' if settings.verify else 'changed'}")


if __name__ == "__main__":
    main(sys.argv[1:])

"""Keeps the runs behind a table in one JSON file, from which the same code makes the table again.

An experiment asks its settings for runs (`settings.run_all`). `Remembering` settings note what they
gave; `archive` makes data of it, for results/runs/; `Replaying` settings give it back without
training, so that experiments.report rewrites the tables in results/.
"""

import platform
import shlex
import time
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path

import torch

from experiments.runs import Result, RunSettings, RunSpec, by_name, find_difference
from nanosophia.configurator import ConfigError
from nanosophia.options import Config

COLUMNS = ("train/loss", "val/loss", "tokens_per_second", "processor_seconds",
           "unclipped_fraction", "norm_clip_rate", "curvature_fraction")  # that tables use
NOT_FINITE = "not finite"  # where a record has null; a record without the number is null here
OUTPUTS = ("--out_dir", "--json", "--jobs")
INPUTS = ("--nanogpt",)
OWN_PLACE = ("out_dir", "init_from")  # settings that say where a run was, not what


class Remembering:
    """A command's settings, with the results of the runs that were asked of them."""

    def __init__(self, settings: RunSettings):
        self.settings = settings
        self.results: dict[str, Result] = {}

    def __getattr__(self, name: str):
        return getattr(self.settings, name)

    def run_all(self, specs: Iterable[RunSpec]) -> list[Result]:
        """Makes the runs, as the settings do, and notes their results."""
        results = self.settings.run_all(specs)
        self.results |= by_name(results)
        return results


class Replaying:
    """A command's settings, whose runs are those of an archive's group; nothing is trained."""

    def __init__(self, settings: RunSettings, data: dict, group: str):
        self.settings = settings
        self.command = data["command"]
        self.common = data["common"]
        self.runs = {run["name"]: run for run in data["groups"][group]}

    def __getattr__(self, name: str):
        return getattr(self.settings, name)

    def check_specs(self, specs: Iterable[RunSpec]) -> None:
        """Leaves the check to `run_all`."""

    def run_all(self, specs: Iterable[RunSpec]) -> list[Result]:
        """Returns the stored results; raises ConfigError where the runs are not those asked for."""
        return [self._result(spec) for spec in specs]

    def _result(self, spec: RunSpec) -> Result:
        if spec.name not in self.runs:
            raise ConfigError(f"the run {spec.name} is not stored; make the runs again: "
                              f"{self.command}")
        run = self.runs[spec.name]
        # An option that came later has the value that leaves things as they were.
        config = {f.name: f.default for f in fields(Config)} | self.common | run["config"]
        if difference := find_difference(asdict(spec.config()), config):
            key, stored, asked = difference
            raise ConfigError(f"the stored run {spec.name} has {key} = {stored!r}, and {asked!r} "
                              f"is asked for; make the runs again: {self.command}")
        result = Result(spec.name, Path(), run["diverged"])
        columns = run["records"]
        vars(result)["config"] = Config(**config)  # what it would read from its folder
        vars(result)["records"] = [
            {key: None if column[i] == NOT_FINITE else column[i] for key, column in columns.items()
             if column[i] is not None} for i in range(len(columns["step"]))]
        return result


def archive(command: str, groups: dict[str, Iterable[Result]], **more) -> dict:
    """Returns runs as data: how they were made, their settings, and their records by columns.

    `groups` names lists of runs, each with names of its own; `more` is added as it is.
    """
    groups = {name: list(results) for name, results in groups.items()}
    configs = {id(r): {key: value for key, value in asdict(r.config).items()
                       if key not in OWN_PLACE} for results in groups.values() for r in results}
    first = next(iter(configs.values()))
    common = {key: value for key, value in first.items()
              if all(config[key] == value for config in configs.values())}
    return dict(command=command, made=circumstances(), **more, common=common, groups={
        name: [dict(name=r.name, diverged=r.diverged, config={
            key: value for key, value in configs[id(r)].items() if key not in common},
            records=_columns(r.records)) for r in results] for name, results in groups.items()})


def _columns(records: list[dict]) -> dict[str, list]:
    columns = {"step": [r["step"] for r in records]}
    for key in COLUMNS:
        if any(key in r for r in records):
            digits = 9 if key == "val/loss" else 6
            columns[key] = [_number(r[key], digits) if key in r else None for r in records]
    return columns


def _number(value: float | None, digits: int) -> float | str:
    return NOT_FINITE if value is None else float(f"{value:.{digits}g}")


def circumstances() -> dict[str, str]:
    """Returns when, with what and on what kind of machine a result was made."""
    return dict(date=time.strftime("%Y-%m-%d"), torch=torch.__version__,
                python=platform.python_version(), machine=platform.machine())


def measured(experiment: str, argv: list[str]) -> dict:
    """Returns what experiments.report needs to know of measurements beside themselves."""
    return dict(experiment=experiment, command=command_line(f"experiments.{experiment}", argv),
                made=circumstances())


def command_line(module: str, argv: list[str]) -> str:
    """Returns the command that ran, as a line to paste; places of files are left to its user."""
    flags = []
    for arg in argv:
        key, _, _ = arg.partition("=")
        if key in INPUTS:
            flags.append(f"{key}=FOLDER")
        elif key not in OUTPUTS:
            flags.append(shlex.quote(arg))
    return " ".join(["python", "-m", module, *flags])

"""Optimizers of installed packages, by `package.module:Class`."""

import ast
import inspect
import random
from collections.abc import Callable
from importlib import import_module

import numpy
import torch

from nanosophia.configurator import ConfigError, UserError
from nanosophia.optimizer_state import averages


class OptimizerError(UserError):
    """An optimizer of a package does not work in this loop; the message says how it failed."""

    exit_code = 1


def is_of_package(name: str) -> bool:
    """Returns whether the name of an optimizer is that of a class in a package."""
    return ":" in name


def find_class(name: str) -> type[torch.optim.Optimizer]:
    """Returns the class that `package.module:Class` names; raises ConfigError."""
    module, _, cls = name.partition(":")
    try:
        found = getattr(import_module(module), cls)
    except (Exception, SystemExit) as error:  # importing runs any code
        raise ConfigError(f"optimizer = {name}: {type(error).__name__}: {_line(error)}; write "
                          "package.module:Class of an installed package", "optimizer") from None
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise ConfigError(f"optimizer = {name} is no class of torch.optim.Optimizer; name one that "
                          "is", "optimizer")
    closure = inspect.signature(found.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(f"optimizer = {name} needs a closure that computes the loss again, which "
                          "this loop does not give; use another", "optimizer")
    return found


def parse_arguments(text: str) -> dict[str, object]:
    """Returns the arguments that `lr_key='lr', betas=(0.9, 0.99)` gives; raises ConfigError."""
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args \
                or any(k.arg is None for k in call.keywords):
            raise ValueError("arguments have names")
        names = [keyword.arg for keyword in call.keywords]
        if len(set(names)) < len(names):
            raise ValueError("a name is given twice")
        return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        raise ConfigError(f"optimizer_args = {text[:200]!r} cannot be read: {_line(error)}; write "
                          'name=value, ... with plain values, e.g. "betas=(0.9, 0.99), eps=1e-8"',
                          "optimizer_args") from None


def build(name: str, arguments: str, groups: list[dict], learning_rate: float,
          ) -> tuple[torch.optim.Optimizer, str]:
    """Returns an optimizer on the groups, and the group entry that holds its learning rate.

    That is `lr`, or what the argument lr_key says. Raises ConfigError where the class refuses the
    groups or the arguments.
    """
    cls, options = find_class(name), parse_arguments(arguments)
    lr_key = options.pop("lr_key", "lr")
    if not isinstance(lr_key, str) or lr_key in options:
        raise ConfigError(f"optimizer_args: lr_key = {lr_key!r} must name the argument that takes "
                          "learning_rate, which is not given itself", "optimizer_args")
    if "weight_decay" in options:
        raise ConfigError("optimizer_args: weight_decay is train.py's own, which leaves vectors "
                          "alone; give --weight_decay", "optimizer_args")
    try:
        optimizer = cls(groups, **{lr_key: learning_rate}, **options)
        has_lr = all(lr_key in group for group in optimizer.param_groups)
        decays = "weight_decay" in optimizer.defaults
    except Exception as error:  # whatever the package raises
        raise ConfigError(f"optimizer = {name} does not take these parameters or arguments: "
                          f"{type(error).__name__}: {_line(error)}; correct optimizer_args, or use "
                          "another", "optimizer", "optimizer_args") from None
    if not has_lr:
        raise ConfigError(f"optimizer = {name} has no {lr_key!r} in its param groups, so no "
                          "schedule can set its learning rate; name the entry as lr_key in "
                          "optimizer_args", "optimizer_args")
    if not decays and any(g["weight_decay"] for g in groups):
        raise ConfigError(f"optimizer = {name} has no weight_decay; give --weight_decay=0",
                          "weight_decay", "optimizer")
    if averages(optimizer):
        optimizer.train()
    optimizer.step = _explained(optimizer.step, name)
    return optimizer, lr_key


def _explained(step: Callable, name: str) -> Callable:
    """Returns a step whose errors say that they are the package's."""
    def call(*args, **kwargs):
        try:
            return step(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise OptimizerError(
                f"optimizer = {name} failed in its step: {type(error).__name__}: {_line(error)}; "
                "an optimizer that needs a closure, second derivatives (create_graph) or a "
                "backward pass of its own cannot be used here") from error

    return call


def seed_draws(seed: int) -> None:
    """Seeds what an optimizer may draw from: alike on every rank, and in a resumed run."""
    torch.manual_seed(seed)
    numpy.random.seed(seed % 2**32)
    random.seed(seed)


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]

"""An optimizer's state as tensors and plain values, whatever it is made of, and back.

Tensors are named `<parameter number>.<name>`. What else the state holds (numbers, lists, tuples,
dictionaries, with tensors inside) and the entries of param groups that training changed are plain
values, as JSON has them. Settings that training did not change are left out: a resumed run has its
own.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from nanosophia.configurator import UserError
from nanosophia.distributed import is_sharded


class StateError(UserError):
    """An optimizer's state cannot be saved or restored; the message names what."""


@dataclass
class Beginning:
    """What an optimizer was before training: its settings, and other attributes."""

    groups: list[dict]  # the param groups without their params
    attributes: dict[str, object] | None  # None: they may change
    lr_key: str  # the entry of groups that holds the learning rate, which the loop sets

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, lr_key: str = "lr", *, attributes: bool = False,
           ) -> "Beginning":
        """Returns that of an optimizer; with `attributes` they must not change, or are refused."""
        groups = [{key: deepcopy(value) for key, value in group.items() if key != "params"}
                  for group in optimizer.param_groups]
        return cls(groups, _attributes(optimizer) if attributes else None, lr_key)


def _attributes(optimizer: torch.optim.Optimizer) -> dict[str, object]:
    """Returns copies of the plain values, tensors and containers of them that an object has beside
    its state and groups; torch's own private ones and lists of parameters are left out."""
    of_torch = type(optimizer).__module__.startswith("torch.")
    parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}
    found = {}
    for key, value in vars(optimizer).items():
        if key in ("state", "param_groups", "defaults", "found_inf") or (
                of_torch and key.startswith("_")):
            continue
        tensors: dict[str, Tensor] = {}
        if isinstance(value, deque | numpy.ndarray):
            value = list(value)
        try:
            _encode(value, key, tensors, "")
        except StateError:  # a function, a lock: nothing that training would change
            continue
        if not {id(x) for x in tensors.values()} & parameters:
            found[key] = deepcopy(value)
    return found


@contextmanager
def evaluation_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Has the parameters be those to evaluate and save, where training steps on others.

    Schedule-Free optimizers, whose methods `eval` and `train` go to and fro, evaluate an average.
    """
    if averages(optimizer):
        optimizer.eval()
    try:
        yield
    finally:
        if averages(optimizer):
            optimizer.train()


def averages(optimizer: torch.optim.Optimizer) -> bool:
    """Returns whether an optimizer evaluates other weights than it trains."""
    return hasattr(optimizer, "eval") and hasattr(optimizer, "train")


def flatten_state(optimizer: torch.optim.Optimizer, beginning: Beginning | None = None,
                  ) -> tuple[dict[str, Tensor], dict]:
    """Returns the state's tensors by name, not copied, and the rest as JSON holds it.

    Without its `beginning` no entry of param groups is kept. Raises StateError, which names it,
    where something is neither a tensor nor a plain value, or is kept outside state_dict.
    """
    whole, tensors, rest = optimizer.state_dict(), {}, {}
    name = type(optimizer).__name__
    if not {"state", "param_groups"} <= whole.keys():
        raise StateError(f"{name} has a state_dict of its own kind, {', '.join(map(str, whole))}; "
                         "use another optimizer")
    for number, values in whole["state"].items():
        if not isinstance(number, int) or not isinstance(values, dict):
            raise StateError(f"{name} keeps {number!r} in its state beside what belongs to "
                             "parameters, which a checkpoint does not hold; use another optimizer")
        for key, value in values.items():
            place = f"{number}.{key}"
            if not isinstance(key, str):
                raise StateError(f"{name} keeps {key!r} in its state, whose names must be text; "
                                 "use another optimizer")
            if isinstance(value, Tensor):
                tensors[place] = value
            else:
                found = _encode(value, place, tensors, f"{name}: state {key!r}")
                rest.setdefault("state", []).append([number, key, found])
    for index, group in enumerate(whole["param_groups"] if beginning else ()):
        for key, value in group.items():
            old = beginning.groups[index].get(key, _ABSENT)
            if key not in ("params", beginning.lr_key) and not _same(old, value):
                found = _encode(value, f"0.group{index}.{key}", tensors,
                                f"{name}: entry {key!r} of a param group, which training changed,")
                rest.setdefault("groups", []).append([index, key, found])
    for key, value in whole.items():
        if key not in ("state", "param_groups"):
            found = _encode(value, f"0.more.{key}", tensors, f"{name}: entry {key!r} of state_dict")
            rest.setdefault("more", []).append([key, found])
    if beginning and beginning.attributes is not None:
        for key, value in _attributes(optimizer).items():
            if not _same(beginning.attributes.get(key, _ABSENT), value):
                raise StateError(f"{name} keeps {key!r}, which training changes, outside its "
                                 "state_dict, so that a checkpoint would lose it; use another "
                                 "optimizer")
    # A product rounds by how its factors lie in memory, which files do not keep.
    rest |= {"strides": found} if (found := [
        [place, list(x.stride())] for place, x in tensors.items()
        if not is_sharded(x) and not x.is_contiguous()]) else {}
    return tensors, rest


def restore_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor],
                  rest: dict | None = None, *, converted: bool = False) -> None:
    """Loads what `flatten_state` returned; settings that training did not change stay as they are.

    The parameters are taken to be as `evaluation_weights` has them, and become training's. Raises
    ValueError, or what the optimizer raises, on the state of another optimizer or model. Tensors
    have the precision that they were saved in, or, where the parameters' is `converted`, the one
    that torch gives them.
    """
    tensors, rest = dict(tensors), rest or {}
    for place, strides in rest.get("strides", ()):
        x = tensors[place]
        tensors[place] = torch.empty_strided(x.shape, strides, dtype=x.dtype,
                                             device=x.device).copy_(x)
    others = [_decode(value, tensors) for *_, value in
              [*rest.get("state", ()), *rest.get("groups", ()), *rest.get("more", ())]]
    values = iter(others)
    state: dict[int, dict] = {}
    extra = [(number, key, next(values)) for number, key, _ in rest.get("state", ())]
    for place, tensor in tensors.items():  # those that are no part of another value
        number, _, key = place.partition(".")
        state.setdefault(int(number), {})[key] = tensor
    for number, key, value in extra:
        if key in state.setdefault(number, {}):
            raise ValueError(f"it has {key!r} of parameter {number} twice")
        state[number][key] = value
    whole = optimizer.state_dict()
    for index, key, _ in rest.get("groups", ()):
        if index >= len(whole["param_groups"]):
            raise ValueError(f"it has a param group number {index}")
        group, value = whole["param_groups"][index], next(values)
        if not _alike(group.get(key), value):
            raise ValueError(f"{key} of a param group is {value!r}, here {group[key]!r}")
        group[key] = value
    whole |= {key: next(values) for key, _ in rest.get("more", ())}
    order = [p for group in optimizer.param_groups for p in group["params"]]
    if state and max(state) >= len(order):
        raise ValueError(f"it has a parameter number {max(state)}")
    optimizer.load_state_dict(whole | dict(state=state))
    for number, saved in state.items():
        loaded = optimizer.state[order[number]]
        for key, value in saved.items():
            if key in loaded and not converted:
                loaded[key] = _as_saved(value, loaded[key])
    if averages(optimizer):
        optimizer.train()


def _as_saved(saved: object, loaded: object) -> object:
    """Returns a value as it was saved, on the device it was loaded on.

    torch's loader gives every tensor the parameter's precision, and breaks strings.
    """
    if isinstance(saved, Tensor):
        if isinstance(loaded, Tensor) and loaded.dtype == saved.dtype:
            return loaded
        return saved.to(loaded.device) if isinstance(loaded, Tensor) else saved
    if isinstance(saved, dict):
        return {key: _as_saved(value, loaded[key]) for key, value in saved.items()}
    if isinstance(saved, list | tuple):
        return type(saved)(map(_as_saved, saved, loaded))
    return saved


def _alike(here: object, saved: object) -> bool:
    """Returns whether a saved setting may stand where another is: numbers for numbers, and so on;
    anything for None."""
    number = bool | int | float | Tensor
    return here is None or isinstance(saved, type(here)) or (
        isinstance(here, number) and isinstance(saved, number))


_ABSENT = object()


def _same(old: object, new: object) -> bool:
    """Returns whether a setting is what it was; tensors are compared by value."""
    parts: list[dict[str, Tensor]] = [{}, {}]
    try:
        first, second = (_encode(x, "x", found, "") for x, found in zip((old, new), parts,
                                                                        strict=True))
    except StateError:
        return old is new or (type(old) is type(new) and old == new)
    return first == second and all(torch.equal(parts[0][k], parts[1][k]) for k in parts[0])


def _encode(value: object, place: str, tensors: dict[str, Tensor], what: str) -> object:
    """Returns a value as JSON holds it; tensors inside go to `tensors` and leave their names."""
    kind = type(value)
    if isinstance(value, Tensor):
        tensors[place] = value
        return dict(tensor=place)
    if value is None or kind in (bool, int, str):
        return value
    if isinstance(value, float):  # numpy's too
        return float(value) if math.isfinite(value) else dict(float=str(float(value)))
    if kind in (list, tuple):
        return {kind.__name__: [_encode(x, f"{place}.{i}", tensors, what)
                                for i, x in enumerate(value)]}
    if kind is dict:
        return dict(dict=[[_encode(k, f"{place}.{i}.key", tensors, what),
                           _encode(v, f"{place}.{i}", tensors, what)]
                          for i, (k, v) in enumerate(value.items())])
    raise StateError(f"{what} is or has a {kind.__name__}, which a checkpoint does not hold; use "
                     "another optimizer, or settings without it")


def _decode(value: object, tensors: dict[str, Tensor]) -> object:
    """Returns what `_encode` was given, and takes its tensors out of `tensors`."""
    if not isinstance(value, dict):
        return value
    (kind, content), = value.items()
    make: dict[str, Callable] = {
        "tensor": tensors.pop, "float": float,
        "list": lambda x: [_decode(v, tensors) for v in x],
        "tuple": lambda x: tuple(_decode(v, tensors) for v in x),
        "dict": lambda x: {_decode(k, tensors): _decode(v, tensors) for k, v in x}}
    return make[kind](content)

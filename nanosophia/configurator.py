"""Settings of commands: documented options with legal ranges, read from config files and flags.

A command's settings are a frozen dataclass whose fields are made by `option`. `load` fills it from
Python config files (assignments of literals and arithmetic, read with `ast`, never executed) and
from `--key=value` flags, which win. Every mistake is a ConfigError before anything is allocated:
it says what, which value, where it came from, and what to do. Does not import torch.
"""

import ast
import difflib
import math
import operator
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin


class UserError(ValueError):
    """A mistake that the user can mend: the message says what, which value, where, what to do.

    A command prints it as one line and ends with `exit_code`. Where `everywhere` is set, all ranks
    should raise it alike, and a machine's first one is given time to print it and end the others.
    """

    exit_code = 2
    prefix = "error: "
    everywhere = False


class Stopped(UserError):
    """A signal ended the command after its work was saved; without a message nothing is printed."""

    prefix = ""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


class ConfigError(UserError):
    """A mistake in the settings; `keys` names the options concerned."""

    everywhere = True

    def __init__(self, message: str, *keys: str):
        super().__init__(message)
        self.keys = keys


def option(default: Any, meaning: str, *, unit: str = "", low: float | None = None,
         above: float | None = None, high: float | None = None, below: float | None = None,
         section: str = "") -> Any:
    """Returns a dataclass field with its documentation and legal range.

    `low` and `high` are inclusive bounds, `above` and `below` exclusive ones. `section` opens a
    heading in `--help`.
    """
    metadata = dict(meaning=meaning, unit=unit, low=low, above=above, high=high, below=below,
                    section=section)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of every command's settings, which checks each field's type and range."""

    def __post_init__(self):
        for f in fields(self):
            _check_range(f, getattr(self, f.name))
        self.check()

    def check(self) -> None:
        """Checks rules between several fields; raises ConfigError."""

    @classmethod
    def translate(cls, key: str, value: object, given: dict[str, object]) -> dict[str, object]:
        """Returns what an unknown key means in keys that are known, beside those that are `given`.

        Raises ConfigError that says what to set instead, LookupError where nothing is known of it.
        """
        raise LookupError(key)


def load(cls: type, argv: list[str], usage: str) -> tuple[Any, dict[str, str]]:
    """Returns settings of class `cls` from config files and flags, and each given key's source.

    `argv` holds paths of config files and `--key=value` flags; flags win. `--help` prints `usage`
    and every key, and exits, unless there is no usage to print. Raises ConfigError.
    """
    if usage and any(a in ("-h", "--help") for a in argv):
        print(help_text(cls, usage), flush=True)
        sys.exit(0)
    by_name = {f.name: f for f in fields(cls)}
    values, sources, unknown = {}, {}, {}
    for path in (a for a in argv if not a.startswith("-")):
        for key, (value, line) in read_config_file(Path(path)).items():
            source = f"{path}:{line}"
            if key in by_name:
                values[key] = _typed(by_name[key], value, source)
                sources[key] = source
            else:
                unknown[key] = value, source
    for flag in (a for a in argv if a.startswith("-")):
        if by_name.get(flag[2:]) is not None and by_name[flag[2:]].type is bool:
            flag += "=True"  # a bare --switch
        key, text = _split_flag(flag)
        if key in by_name:
            values[key] = _typed(by_name[key], _literal(by_name[key], text), f"flag {flag}")
            sources[key] = f"flag {flag}"
        else:
            unknown[key] = _literal(None, text), f"flag {flag}"
    for key, value, source in _translated(cls, unknown, values, by_name):
        values[key] = _typed(by_name[key], value, source)
        sources[key] = source
    try:
        return cls(**values), sources
    except ConfigError as error:
        raise with_sources(error, sources) from None


def _translated(cls: type, unknown: dict[str, tuple[object, str]], given: dict[str, object],
                by_name: dict) -> list[tuple[str, object, str]]:
    """Returns (key, value, source) of what unknown keys mean; raises one ConfigError of all that
    mean nothing, each with what to do."""
    found, errors = [], []
    for key, (value, source) in unknown.items():
        try:
            found += [(own, own_value, source) for own, own_value in
                      cls.translate(key, value, given).items()]
        except ConfigError as error:
            errors.append(f"unknown key {key} in {source}; {error}")
        except LookupError:
            hint = did_you_mean(key, by_name) or "--help lists every key"
            errors.append(f"unknown key {key} in {source}; {hint}")
    if errors:
        raise ConfigError(" | ".join(errors))
    return found


def with_sources(error: ConfigError, sources: dict[str, str]) -> ConfigError:
    """Returns the same error with the place where each of its keys was set, if any was."""
    if not sources.keys() & set(error.keys):
        return error
    origins = ", ".join(f"{k} from {sources.get(k, 'its default')}" for k in error.keys)
    return ConfigError(f"{error} ({origins})", *error.keys)


def read_config_file(path: Path) -> dict[str, tuple[Any, int]]:
    """Reads a config file: name -> (value, line). Names with a leading _ are local.

    Literals, arithmetic and earlier names only; nothing is executed. Raises ConfigError.
    """
    if path.suffix != ".py" or not path.is_file():
        known = sorted(p.stem for p in Path("config").glob("*.py"))
        hint = did_you_mean(path.stem, known, "config/{}.py") or "settings are given as --key=value"
        raise ConfigError(f"config file {path} not found; {hint}")
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None) or 1
        raise ConfigError(f"{path}:{line}: not a Python assignment: {error}") from None
    names: dict[str, tuple[Any, int]] = {}
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        where = f"{path}:{node.lineno}"
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1
                and isinstance(node.targets[0], ast.Name)):
            raise ConfigError(f"{where}: only assignments `key = value` are allowed in a "
                              "config file; nothing is executed")
        names[node.targets[0].id] = (_evaluate(node.value, names, where), node.lineno)
    return {k: v for k, v in names.items() if not k.startswith("_")}


LARGEST_NUMBER = 1e30
_BINARY = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
           ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
           ast.Pow: operator.pow}
_UNARY = {ast.USub: operator.neg, ast.UAdd: operator.pos}


def _evaluate(node: ast.expr, names: dict[str, tuple[Any, int]], where: str) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float | str):
        return node.value
    if isinstance(node, ast.Name):
        if node.id not in names:
            raise ConfigError(f"{where}: {node.id} is not assigned above")
        return names[node.id][0]
    try:
        if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
            return _UNARY[type(node.op)](_number(_evaluate(node.operand, names, where)))
        if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
            left = _number(_evaluate(node.left, names, where))
            right = _number(_evaluate(node.right, names, where))
            if isinstance(node.op, ast.Pow) and (abs(right) > 64 or abs(left) > 1e6):
                raise ArithmeticError("power out of bounds")
            value = _BINARY[type(node.op)](left, right)
            if abs(value) > LARGEST_NUMBER:  # repeated squaring would never end
                raise ArithmeticError(f"a number above {LARGEST_NUMBER:.0e}")
            return value
    except (ArithmeticError, TypeError) as error:
        raise ConfigError(f"{where}: {error}") from None
    raise ConfigError(f"{where}: `{ast.unparse(node)}` is not a literal, arithmetic or an earlier "
                      "name; nothing else is allowed in a config file")


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"arithmetic on {value!r}")
    return value


def _split_flag(flag: str) -> tuple[str, str]:
    key, equals, text = flag.partition("=")
    if not key.startswith("--") or not equals:
        raise ConfigError(f"flag {flag}: write it as --{key.lstrip('-')}=value")
    if not text:
        raise ConfigError(f"flag {flag}: the value is empty; write {key}=value")
    return key[2:], text


def did_you_mean(text: str, known: Iterable[str], shown: str = "{}") -> str:
    """Returns a question with the known word that is closest, put into `shown`, or nothing where
    none is close."""
    by_lower = {word.lower(): word for word in known}
    near = difflib.get_close_matches(text.lower(), by_lower, n=1)
    return f"did you mean {shown.format(by_lower[near[0]])}?" if near else ""


def _literal(f: Any, text: str) -> Any:
    """Returns a flag's text as a Python value; strings stay as they are typed.

    Where there is no field, it is what it reads like.
    """
    if (text in ("True", "False")) if f is None else f.type is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if f is None or f.type in (int, float):
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return text
    return text


def _typed(f: Any, value: Any, source: str) -> Any:
    if f.type is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            raise ConfigError(f"{f.name} is too large (from {source})", f.name) from None
    if f.type is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if get_origin(f.type) is Literal and {"on", "off"} <= set(get_args(f.type)):  # a switch
        value = {"True": "on", "False": "off"}.get(str(value), value)
    try:
        _check_range(f, value)
    except ConfigError as error:
        raise ConfigError(f"{error} (from {source})", f.name) from None
    return value


def _check_range(f: Any, value: Any) -> None:
    choices = get_args(f.type) if get_origin(f.type) is Literal else None
    if choices:
        if value not in choices:
            hint = did_you_mean(str(value), choices)
            raise ConfigError(f"{f.name} = {value!r} is none of {', '.join(choices)}"
                              + (f"; {hint}" if hint else ""), f.name)
        return
    if isinstance(value, str):
        _check_text(f.name, value)
    if type(value) is not f.type:
        raise ConfigError(f"{f.name} = {value!r} is not {_TYPE_WORDS[f.type]}", f.name)
    if f.type is float and not math.isfinite(value):
        raise ConfigError(f"{f.name} = {value} is not finite", f.name)
    for bound, holds, words in (("low", operator.ge, "at least"), ("above", operator.gt, "above"),
                                ("high", operator.le, "at most"), ("below", operator.lt, "below")):
        limit = f.metadata.get(bound)
        if bound == "high" and limit is None:
            limit = {int: 2**53, float: 3e38}.get(f.type)  # what numbers elsewhere can hold
        if limit is not None and not holds(value, limit):
            raise ConfigError(f"{f.name} = {value} must be {words} {limit}", f.name)


def _check_text(name: str, value: str) -> None:
    """Raises ConfigError on text that no file of ours could hold, or no system call take."""
    if "\0" in value:
        raise ConfigError(f"{name} = {value!r} holds a NUL character", name)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{name} = {value!r} is not valid UTF-8 at character {error.start}; give "
                          "it in UTF-8, in a locale that has it", name) from None


_TYPE_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}


def keys_in_section(cls: type, section: str) -> set[str]:
    """Returns the keys under one of the headings of `--help`."""
    found, current = set(), ""
    for f in fields(cls):
        current = f.metadata.get("section") or current
        if current == section:
            found.add(f.name)
    return found


def help_text(cls: type, usage: str) -> str:
    """Returns every key with type, default, unit and meaning, for `--help`."""
    lines = [f"usage: {usage}", ""]
    for f in fields(cls):
        meta = f.metadata
        if meta.get("section"):
            lines += ["", meta["section"]]
        choices = get_args(f.type) if get_origin(f.type) is Literal else ()
        kind = "|".join(choices) if choices else f.type.__name__
        notes = [f"default {f.default!r}", meta.get("unit"), _range_words(meta)]
        lines += [f"  --{f.name}={kind}",
                  f"      {meta['meaning']} ({', '.join(filter(None, notes))})"]
    return "\n".join(lines)


def _range_words(meta: dict) -> str:
    words = {"low": ">=", "above": ">", "high": "<=", "below": "<"}
    return " and ".join(f"{words[b]} {meta[b]:g}" for b in words if meta.get(b) is not None)

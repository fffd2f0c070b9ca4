"""Resolves flags, config files, a checkpoint or weights, and data into the start of a run.

Precedence, lowest first: an option's default, the optimizer's own default, on resuming the
checkpoint, a config file, a flag. Raises an error where they disagree.
"""

import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from nanosophia.checkpoint import (
    STATE,
    Checkpoint,
    CheckpointError,
    checkpoint_folders,
    load_best,
    load_latest,
    open_checkpoint,
)
from nanosophia.configurator import (
    ConfigError,
    UserError,
    keys_in_section,
    load,
    read_config_file,
    with_sources,
)
from nanosophia.dataloader import DataError, Dataset, open_dataset
from nanosophia.distributed import Ranks, on_main, world_size
from nanosophia.dry_run import choose_batch_size
from nanosophia.files import reason, write_text
from nanosophia.optimizers import check, require_effect, spec, with_own_defaults
from nanosophia.options import MODEL_KEYS, USAGE, Config, padded_vocab_size
from nanosophia.precision import (
    bfloat16_speed,
    computes_bfloat16,
    emulates_bfloat16,
    fastest_dtype,
)
from nanosophia.schemas import RunConfig, read
from nanosophia.tokenizer import TokenizerError, get_tokenizer
from nanosophia.weights import Weights, foreign_weights, saved_model_config

# What a resumed run must share with its checkpoint, so that it sees the same rows and state.
RUN_KEYS = {*MODEL_KEYS, "seed", "total_batch_size", "sampling", "optimizer",
            "optimizer_args", "metric_qkv", "metric_rest"}
# What belongs to the place of a run and is never taken from a checkpoint.
LOCAL_KEYS = {"out_dir", "init_from", "checkpoint", "reset_optimizer", "device", "dtype",
              "parallel", "shard_ranks", "activation_checkpointing", "loss_chunk", "compile",
              "compile_optimizer", "eval_only", "print_config", "dry_run", "dry_run_gpu",
              "dry_run_memory", "dry_run_mfu"}
BRANCH = re.compile(r"(.+)@(\d+)")  # init_from = RUN@STEP
# Model settings that a user may override when starting from foreign weights.
OVERRIDABLE_KEYS = {"activation", "dropout"}
TOKENIZER_PROBE = "The quick brown fox, naïve: def f(x):\n    return 3.14 # 日本語 don't\t\t12345"
# The settings that a config file chooses for its optimizer.
OPTIMIZER_KEYS = keys_in_section(Config, "optimizer") - {"optimizer"}


@dataclass(frozen=True)
class Start:
    """Holds what a run begins with."""

    config: Config  # fully resolved: no "auto", no 0 that means derived
    data: Dataset
    weights: Weights | None  # foreign weights to initialise from
    checkpoint: Checkpoint | None  # checkpoint to resume
    resets_optimizer: bool  # of it, the parameters and the step alone
    notes: list[str]  # notes to print
    chose_batch_size: bool  # by the free memory of a GPU


def load_config(argv: list[str]) -> tuple[Config, dict[str, str]]:
    """Returns train.py's settings and where each given key came from.

    The optimizer's own defaults apply where nothing was given; out_dir follows from the name of the
    config file. Raises ConfigError.
    """
    config, sources = load(Config, argv, USAGE)
    config = with_own_defaults(config, sources)
    if config.eval_only and "init_from" not in sources:
        config = replace(config, init_from="resume")
    files = [a for a in argv if not a.startswith("-")]
    if files and "out_dir" not in sources:
        name = Path(files[-1]).stem.removeprefix("train_").replace("_", "-")
        config = replace(config, out_dir=f"out/{name}")
    return config, sources


def describe_config(config: Config, sources: dict[str, str]) -> Iterator[str]:
    """Yields a line `key = value  # source` for every setting, as --print_config prints them."""
    own = spec(config.optimizer).defaults
    for f in fields(Config):
        value, source = getattr(config, f.name), "default"
        if f.name in sources:
            source = sources[f.name]
        elif f.name in own:
            source = f"default of optimizer = {config.optimizer}"
        elif f.name == "out_dir" and value != f.default:
            source = "derived from the config file's name"
        elif f.name == "init_from" and value != f.default:
            source = "derived from eval_only"
        if f.name != "print_config":
            yield f"{f.name} = {value!r}  # {source}"
    yield from (f"# note: {note}" for note in other_optimizers_settings(config, sources))


def other_optimizers_settings(config: Config, sources: dict[str, str]) -> list[str]:
    """Returns a note where a flag replaces a config file's optimizer, but not its settings."""
    if not sources.get("optimizer", "").startswith("flag"):
        return []
    files = {source.rpartition(":")[0] for source in sources.values()
             if not source.startswith("flag")}
    written_for = {read_config_file(Path(file)).get("optimizer", (Config().optimizer,))[0]
                   for file in files}
    kept = [key for key, source in sources.items()
            if key in OPTIMIZER_KEYS and not source.startswith("flag")]
    if not kept or written_for == {config.optimizer}:
        return []
    values = ", ".join(f"{key} = {getattr(config, key)}" for key in kept)
    return [f"optimizer = {config.optimizer} was given as a flag, and {', '.join(sorted(files))} "
            f"still sets {values}"]


def may_take_settings(config: Config) -> bool:
    """Returns whether a checkpoint may give settings that were not given."""
    return config.init_from in ("resume", "auto") or config.reset_optimizer \
        or _branch(config.init_from) is not None


def check_settings(config: Config, sources: dict[str, str],
                   checkpoint: Checkpoint | None = None) -> None:
    """Checks what the configurator cannot know: the ranks, and what the optimizer asks for.

    Raises ConfigError that says where each value came from.
    """
    try:
        config.check_world(world_size())
        check(config, world_size())
        require_effect(config, sources)
        if "cooldown_fraction" in sources and config.schedule != "wsd":
            raise ConfigError(f"cooldown_fraction = {config.cooldown_fraction} has no effect on "
                              f"schedule = {config.schedule}; leave it out, or set schedule = wsd",
                              "cooldown_fraction", "schedule")
    except ConfigError as error:
        if checkpoint:  # its values are in the config now
            saved = checkpoint.state["config"]
            sources = {key: str(checkpoint.folder) for key, value in asdict(config).items()
                       if saved.get(key) == value} | sources
        raise with_sources(error, sources) from None


def resolve(config: Config, sources: dict[str, str], ranks: Ranks) -> Start:
    """Returns what the run begins with; raises a UserError, on every rank, where parts disagree."""
    try:
        return _resolve(config, sources, ranks)
    except UserError as error:
        error.everywhere = True
        raise


def _resolve(config: Config, sources: dict[str, str], ranks: Ranks) -> Start:
    checkpoint = on_main(ranks, lambda: _find_checkpoint(config), ConfigError, CheckpointError)
    notes, resets = [], False
    if not checkpoint and config.init_from == "auto":
        config = original_init_from(config, notes)
    if not checkpoint and (config.reset_optimizer or _branch(config.init_from)):
        if config.init_from == "auto":
            raise ConfigError(f"{config.out_dir} has no checkpoint and was not begun from another "
                              "run; give --init_from=RUN with --reset_optimizer", "init_from")
        checkpoint = on_main(ranks, lambda: _other_run(config.init_from), CheckpointError)
        resets = config.reset_optimizer
    config, more = resolve_config(config, sources, checkpoint, ranks, resets_optimizer=resets)
    notes += more
    if not config.eval_only or spec(config.optimizer) is None:
        check_settings(config, sources, checkpoint)
    else:
        config.check_shards(ranks.world_size)
        config = replace(config, hessian_chunks=1)  # not checked, since no step is made
    notes += other_optimizers_settings(config, sources)
    data = open_dataset(config.dataset, config.block_size, config.bare_tokens)
    weights = None
    if checkpoint:
        _require_same_data(checkpoint, data, config)
        require_tokenizer(checkpoint.tokenizer, data, checkpoint.folder)
    elif config.init_from not in ("scratch", "auto"):
        weights = foreign_weights(config.init_from)
        config = adopt_weight_shape(config, sources, asdict(weights.config))
        require_tokenizer(weights.tokenizer, data, config.init_from)
    config = resolve_vocab_size(config, sources, data)
    _require_memory(config, ranks, weights)
    chosen = not config.batch_size and ranks.device.type == "cuda"
    config, more = choose_batch_size(config, ranks)
    notes += more
    if config.sample_tokens and not config.eval_only:
        data.encoding()  # a missing one fails now, not after training
    if config.parallel == "fsdp" and ranks.world_size > 1 and config.sample_tokens:
        notes.append("no sample is drawn from a sharded model at the end; use sample.py")
    if any(config.compiles(key, ranks.device.type) for key in ("compile", "compile_optimizer")):
        notes += _usable_compile_cache()
    return Start(config, data, weights, checkpoint, resets, [*notes, *filter(None, [data.note])],
                 chosen)


def _usable_compile_cache() -> list[str]:
    """Chooses another folder for what torch compiles where its own cannot be written."""
    folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", tempfile.gettempdir()))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return []
    except OSError as error:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="torchinductor_")
        return [f"compiled code cannot be kept in {folder} ({reason(error)}), so it is compiled "
                "anew"]


def resolve_fresh(config: Config, ranks: Ranks, data: Dataset) -> Config:
    """Returns the config of a run without a checkpoint, with all that is derived resolved."""
    config = resolve_vocab_size(resolve_config(config, {}, None, ranks)[0], {}, data)
    return choose_batch_size(config, ranks)[0]


def _find_checkpoint(config: Config) -> Checkpoint | None:
    """Returns the checkpoint to continue, None to start anew."""
    out_dir = Path(config.out_dir)
    if config.init_from not in ("resume", "auto"):
        if config.checkpoint == "best":
            raise ConfigError("checkpoint = best is for --eval_only of out_dir's own checkpoints; "
                              f"leave out --init_from={config.init_from}, or it", "checkpoint",
                              "init_from")
        if checkpoint_folders(out_dir) and not config.eval_only:
            raise ConfigError(f"{out_dir} already holds checkpoints; continue them with "
                              "--init_from=resume, or give another --out_dir", "out_dir")
        return None
    if config.checkpoint == "best":
        return load_best(out_dir)
    found = load_latest(out_dir, quarantine=not config.eval_only)
    if found is None and (config.init_from == "resume" or config.eval_only):
        raise CheckpointError(f"{out_dir} holds no checkpoint to resume; check --out_dir, or "
                              "start with --init_from=scratch")
    return found


def _branch(init_from: str) -> re.Match | None:
    """Returns the parts of RUN@STEP, None of any other value and of a path that is there."""
    return None if Path(init_from).exists() else BRANCH.fullmatch(init_from)


def _other_run(init_from: str) -> Checkpoint:
    """Returns the checkpoint of another run that RUN@STEP names, or RUN's newest one."""
    branch = _branch(init_from)
    run = Path(branch[1] if branch else init_from)
    if not branch:
        if (found := load_latest(run, quarantine=False)) is None:
            raise CheckpointError(f"init_from = {init_from} holds no checkpoint of a run, which "
                                  "reset_optimizer goes on from; give a run's folder")
        return found
    folders = {int(folder.name.removeprefix("step_")): folder for folder in checkpoint_folders(run)}
    if int(branch[2]) not in folders:
        steps = f"only of {', '.join(map(str, sorted(folders)))}" if folders else "at all"
        raise CheckpointError(f"{run} has no checkpoint of step {branch[2]}, {steps}; give a step "
                              "that was saved (--checkpoint_interval, --keep_checkpoints)")
    return open_checkpoint(folders[int(branch[2])])


def resolve_config(config: Config, sources: dict[str, str], checkpoint: Checkpoint | None,
                   ranks: Ranks, *, resets_optimizer: bool = False) -> tuple[Config, list[str]]:
    """Takes from the checkpoint what was not given, and resolves dtype; returns notes as well.

    With `resets_optimizer` the optimizer may be another, with settings of its own. Raises
    CheckpointError where a given key contradicts the checkpoint and must not.
    """
    values, notes, saved = {}, [], {}
    if checkpoint:
        saved = checkpoint.state["config"] | asdict(saved_model_config(checkpoint))
    another = resets_optimizer and "optimizer" in sources and \
        config.optimizer != saved["optimizer"]
    if another:
        notes.append(f"optimizer was {saved['optimizer']!r} until step "
                     f"{checkpoint.state['step']} and is {config.optimizer!r} from now on")
    own = OPTIMIZER_KEYS | {"optimizer"} | {
        key for name in (saved["optimizer"], config.optimizer) if spec(name)
        for key in spec(name).defaults} if another else set()
    for key in saved.keys() & asdict(config).keys() - LOCAL_KEYS - own:
        given = getattr(config, key)
        is_derived = key == "vocab_size" and given == 0
        if key not in sources or is_derived:
            values[key] = saved[key]
        elif given != saved[key] and key in (MODEL_KEYS if config.eval_only else RUN_KEYS):
            raise CheckpointError(
                f"{checkpoint.folder} has {key} = {saved[key]!r}, {sources[key]} asks for "
                f"{given!r}; leave it out, or start anew with another --out_dir")
        elif given != saved[key]:
            notes.append(f"{key} was {saved[key]!r} until step {checkpoint.state['step']} and is "
                         f"{given!r} from now on")
    if config.dtype == "auto":
        saved_dtype = saved.get("dtype") if ranks.device.type == "cpu" else None
        values["dtype"] = on_main(ranks, lambda: _choose_dtype(
            ranks.device, saved_dtype, values.get("n_embd", config.n_embd)))
    if values.get("dtype", config.dtype) == "bfloat16" and (
            note := on_main(ranks, lambda: _bfloat16_note(ranks.device))):
        notes.append(note)
    if checkpoint:
        now = dict(dtype=values.get("dtype", config.dtype), world_size=ranks.world_size)
        before = dict(dtype=saved.get("dtype", now["dtype"]),
                      world_size=checkpoint.state["world_size"])
        notes += [f"{key} was {before[key]} until step {checkpoint.state['step']} and is "
                  f"{now[key]} from now on, so losses round otherwise"
                  for key in now if now[key] != before[key]]
    try:
        return replace(config, **values), sorted(notes)
    except ConfigError as error:
        if checkpoint and set(error.keys) & values.keys():
            raise CheckpointError(f"{checkpoint.folder / STATE}: {error}") from None
        raise with_sources(error, sources) from None


def _choose_dtype(device: torch.device, saved: str | None, width: int) -> str:
    """Returns what dtype = auto is: a checkpoint's `saved`, so that a resumed run does not depend
    on a timing, unless it is one that this CPU emulates; otherwise the fastest."""
    if saved and not (saved == "bfloat16" and not computes_bfloat16()):
        return saved
    return fastest_dtype(device, width)


def _bfloat16_note(device: torch.device) -> str:
    """Returns what is known of bfloat16's speed on the device, nothing where it is the best."""
    if device.type == "cuda" and emulates_bfloat16(device):
        return f"{torch.cuda.get_device_name(device)} emulates bfloat16; --dtype=float16 is faster"
    if device.type != "cpu":
        return ""
    speed, emulated = bfloat16_speed(), not computes_bfloat16()
    return (f"this CPU multiplies {speed:.1f} times as fast in bfloat16 as in float32"
            + (", which it emulates; --dtype=float32 is faster" if emulated and speed < 1 else
               "; --dtype=float32 is more exact"))


def original_init_from(config: Config, notes: list[str]) -> Config:
    """With init_from=auto and no checkpoint yet, takes the weights that the run began from."""
    out_dir = Path(config.out_dir)
    try:
        recorded = read(out_dir / "config.json", RunConfig)
        original, resets = recorded["init_from"], recorded.get("reset_optimizer", False)
    except FileNotFoundError:
        return config
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{out_dir / 'config.json'} says what the run began from and cannot "
                              f"be read ({error}); mend it, or give --init_from") from error
    if original in ("scratch", "resume", "auto"):
        return config
    notes.append(f"{out_dir} has no checkpoint yet; beginning again from {original}")
    if resets is True and not config.reset_optimizer:
        raise ConfigError(f"{out_dir} has no checkpoint yet and goes on from {original} with a "
                          "fresh optimizer; give the whole command again, with --reset_optimizer",
                          "reset_optimizer")
    return replace(config, init_from=original)


def adopt_weight_shape(config: Config, sources: dict[str, str], shape: dict) -> Config:
    """Returns the config with the model of foreign weights; activation and context may differ."""
    for key, value in shape.items():
        given = getattr(config, key)
        is_shorter = key == "block_size" and given < value
        if key in sources and given != value and key not in OVERRIDABLE_KEYS and not is_shorter:
            raise with_sources(ConfigError(f"{config.init_from} has {key} = {value}, not {given}; "
                                           "leave it out", key), sources)
    given_keys = (OVERRIDABLE_KEYS | {"block_size"}) & sources.keys()
    return replace(config, **{k: v for k, v in shape.items() if k not in given_keys})


def resolve_vocab_size(config: Config, sources: dict[str, str], data: Dataset) -> Config:
    """Derives vocab_size from the data where it is 0; raises ConfigError where it is too small."""
    if config.vocab_size == 0:
        return replace(config, vocab_size=padded_vocab_size(data.vocab_size))
    if config.vocab_size < data.vocab_size:
        raise with_sources(ConfigError(
            f"vocab_size = {config.vocab_size} is less than the {data.vocab_size} classes of "
            f"{data.folder}; raise it or leave it out", "vocab_size"), sources)
    return config


def _require_same_data(checkpoint: Checkpoint, data: Dataset, config: Config) -> None:
    if checkpoint.state["data"] != data.fingerprint and not config.eval_only:
        raise DataError(f"{data.folder} is not the data that {checkpoint.folder} was trained on; "
                        "give the same --dataset, or another --out_dir to start anew")


def require_tokenizer(name: str, data: Dataset, model: object) -> None:
    """Raises DataError where `model` was made with another tokenizer than the data."""
    if name in ("", data.tokenizer):
        return
    try:
        of_model, of_data = (get_tokenizer(n).encode_ordinary(TOKENIZER_PROBE)
                             for n in (name, data.tokenizer))
    except TokenizerError as error:
        raise DataError(f"{model} was trained with tokenizer {name}, {data.folder} was tokenized "
                        f"with {data.tokenizer}, and these cannot be compared: {error}") from None
    if of_model != of_data:
        raise DataError(f"{model} was trained with tokenizer {name}, {data.folder} was tokenized "
                        f"with {data.tokenizer}: the same ids mean other text; prepare the data "
                        "with the model's tokenizer")


def _require_memory(config: Config, ranks: Ranks, weights: Weights | None) -> None:
    """Raises ConfigError where this machine cannot hold the parameters: its system would kill it.

    Parameters are made in host memory, also for a GPU; for several that share them, one tensor at a
    time, unless they are read as `weights`.
    """
    if config.parallel == "fsdp" and ranks.world_size > 1 and ranks.device.type == "cuda" \
            and weights is None:
        return
    needed = 4 * config.n_embd * (config.vocab_size * (1 if config.tied_head else 2)
                                  + 12 * config.n_layer * config.n_embd)  # and a little more
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise ConfigError(f"the model's parameters take {needed / 2**30:,.0f} GiB, this machine "
                          f"has {there / 2**30:,.0f} GiB; lower n_layer, n_embd or vocab_size",
                          "n_layer", "n_embd", "vocab_size")


def write_config(config: Config) -> None:
    """Writes config.json to the run's folder; raises CheckpointError where that is impossible."""
    path = Path(config.out_dir) / "config.json"
    try:
        if path.exists():
            read(path, RunConfig)  # of an earlier start of this run
        write_text(path, json.dumps(asdict(config), indent=1) + "\n")
    except ValueError as error:
        raise CheckpointError(f"{path} is not of a run and would be replaced ({error}); give "
                              "another --out_dir") from error
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {reason(error)}; mend that, or give another "
                              "--out_dir") from error

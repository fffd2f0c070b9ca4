"""Trains a GPT on one or several ranks: the one loop for every optimizer.

    python train.py config/quickstart.py
    torchrun --nproc_per_node=8 train.py config/train_gpt2_medium_sophiag.py --batch_size=10

Settings come from config files and --key=value flags; --help lists them. The folder --out_dir
receives config.json, metrics.jsonl and checkpoints; --init_from=resume continues the newest one
with the losses that an uninterrupted run would have had.
"""

import json
import math
import platform
import signal
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from model import GPT, GPTConfig
from nanosophia import checkpoint as checkpoints
from nanosophia import dry_run
from nanosophia.checkpoint import Checkpoint, CheckpointError, RunLock, Saver
from nanosophia.chunked_loss import chunked_cross_entropy
from nanosophia.configurator import (
    ConfigError,
    Stopped,
    command,
    load,
    with_sources,
)
from nanosophia.dataloader import (
    DataError,
    Dataset,
    Prefetcher,
    TrainBatches,
    ValidationWindows,
    gather,
    inputs_and_targets,
    keyed_seed,
    open_dataset,
)
from nanosophia.distributed import (
    Ranks,
    StopSignals,
    full_tensor,
    gradient_sync,
    on_main,
    reshard,
    sharded_gradient,
    start_ranks,
    stop_ranks,
    sum_over_ranks,
    world_size,
    wrap,
)
from nanosophia.estimators import Estimator
from nanosophia.files import write_text
from nanosophia.generate import generate
from nanosophia.guard import Guard, TrainingError, require_finite_parameters, skip_if_nonfinite
from nanosophia.metrics import Health, Recorder, peak_flops
from nanosophia.optimizers import advice, build, check, with_own_defaults
from nanosophia.options import Config, padded_vocab_size
from nanosophia.tokenizer import TokenizerError, byte_lengths, get_tokenizer
from nanosophia.weights import foreign_weights, saved_model_config

MODEL_KEYS = tuple(f.name for f in fields(GPTConfig))
# What a resumed run must share with its checkpoint, so that it sees the same rows and state.
RUN_KEYS = (*MODEL_KEYS, "seed", "total_batch_size", "sampling", "optimizer")


# Of one chunk on a CPU: 24 MB, which malloc keeps (distributed.start_ranks).
LOSS_CHUNK_LOGITS = 6_000_000

# What belongs to the place of a run and is never taken from a checkpoint.
LOCAL_KEYS = {"out_dir", "init_from", "device", "dtype", "parallel", "activation_checkpointing",
              "loss_chunk", "compile", "compile_optimizer", "eval_only", "dry_run", "dry_run_gpu",
              "dry_run_mfu"}


@dataclass
class StepCounters:
    """Counts since the last record; saved, so that a resumed run records the same."""

    clipped: Tensor  # steps whose gradient norm was clipped
    steps: int = 0


@dataclass
class Run:
    """What one step needs."""

    config: Config
    ranks: Ranks
    model: GPT
    wrapped: nn.Module  # the model, averaging gradients over ranks
    optimizer: torch.optim.Optimizer
    estimator: Estimator | None
    batches: Prefetcher
    counters: StepCounters
    guard: Guard
    sharded: bool  # parameters are split over ranks

    def autocast(self):
        """The context of every forward pass."""
        if self.config.dtype != "bfloat16":
            return nullcontext()
        return torch.autocast(self.ranks.device.type, torch.bfloat16)


@command(cleanup=stop_ranks)
def main(argv: list[str]) -> None:
    """The command; exits with 2 and one line after a user's mistake."""
    config, sources = load(Config, argv, "train.py [config/FILE.py] [--key=value]")
    config = with_own_defaults(config, sources)
    if config.eval_only and "init_from" not in sources:
        config = replace(config, init_from="resume")
    if config.dry_run:
        _check(config, sources, found=None)
        print(dry_run.report(config))
    else:
        train(config, sources)


def train(config: Config, sources: dict[str, str] | None = None) -> None:
    """Trains to config.max_iters; `sources` says where each explicitly given key came from."""
    sources = sources or {}
    if config.init_from not in ("resume", "auto"):  # a checkpoint may bring other numbers
        _check(config, sources, found=None)
    ranks = start_ranks(config.device)
    out_dir = Path(config.out_dir)
    with RunLock(out_dir) as lock:
        # A new folder is not made before all is known to fit.
        if out_dir.is_dir() and not config.eval_only:
            on_main(ranks, lock.take, CheckpointError)
        _train_alone(config, sources, ranks, out_dir, lock)


def _train_alone(config: Config, sources: dict[str, str], ranks: Ranks, out_dir: Path,
                 lock: RunLock) -> None:
    found = on_main(ranks, lambda: _find_checkpoint(config, out_dir), ConfigError, CheckpointError)
    config, notes = _settle(config, sources, found, ranks)
    if not found and config.init_from == "auto":
        config = _as_begun(config, out_dir, notes)
    if not config.eval_only:
        _check(config, sources, found)
    data = open_dataset(config.dataset, config.block_size)
    if found and found.state["data"] != data.fingerprint and not config.eval_only:
        raise DataError(f"{data.folder} is not the data that {found.folder} was trained on; give "
                        "the same --dataset, or another --out_dir to start anew")
    weights = None
    if found:
        _require_tokenizer(found.state["tokenizer"], data, found.folder)
    if config.init_from not in ("scratch", "resume", "auto"):
        found_weights = foreign_weights(config.init_from)
        weights = found_weights.tensors
        config = _fit_weights(config, sources, asdict(found_weights.config))
        _require_tokenizer(found_weights.tokenizer, data, config.init_from)
    config = _fit_vocabulary(config, sources, data)
    run = build_run(config, ranks, data, weights)
    first_step = _restore(run, found) if found else 0
    if ranks.is_main:
        if run.sharded and config.sample_tokens:
            notes.append("no sample is drawn from a sharded model at the end; use sample.py")
        _announce(run, data, [*notes, data.note, *advice(config)])
    if config.eval_only:
        _report_loss(run, data, first_step)
        return
    if first_step >= config.max_iters:
        if ranks.is_main:
            print(f"{found.folder} has all of max_iters = {config.max_iters} steps: nothing to "
                  "train; raise --max_iters to go on")
        return
    if config.sample_tokens and not run.sharded:
        get_tokenizer(data.tokenizer)  # better missed now than after training
    on_main(ranks, lock.take, CheckpointError)
    on_main(ranks, lambda: _write_config(config, out_dir), CheckpointError)
    saver = Saver(out_dir, ranks, keep=config.keep_checkpoints, keep_best=config.keep_best,
                  sharded=run.sharded)
    recorder = Recorder(out_dir, first_step=first_step, max_iters=config.max_iters,
                        active=ranks.is_main, wandb=_wandb_settings(config),
                        health=_health(run))
    try:
        _loop(run, data, saver, recorder, first_step)
    finally:
        recorder.close()
        saver.close()
    if ranks.is_main:
        _farewell(run, data, out_dir)


def settled(config: Config, ranks: Ranks, data: Dataset) -> Config:
    """A config for a fresh run with dtype and vocab_size resolved, as `build_run` takes it."""
    return _fit_vocabulary(_settle(config, {}, None, ranks)[0], {}, data)


def build_run(config: Config, ranks: Ranks, data: Dataset,
              weights: dict[str, Tensor] | None = None) -> Run:
    """Model, optimizer and batches of a resolved config, freshly initialised or from `weights`."""
    torch.set_float32_matmul_precision("high")  # TF32 where autocast leaves float32
    # MKL otherwise takes fewer threads when the machine is busy, and rounds otherwise with them:
    # setting the number, even to what it is, makes torch switch that off.
    torch.set_num_threads(torch.get_num_threads())
    torch.manual_seed(config.seed)
    model = GPT(config.model)
    model.activation_checkpointing = config.activation_checkpointing
    if weights is not None:
        _load_weights(model, weights, config)
    if config.dtype == "float64":
        model.double()
    blocks = list(model.transformer.h)
    sharded = config.parallel == "fsdp" and ranks.world_size > 1
    compiles = config.compile == "on" or (config.compile == "auto"
                                          and ranks.device.type == "cuda")
    chunk = config.loss_chunk
    if not chunk and not compiles and ranks.device.type == "cpu":
        chunk = max(1, LOSS_CHUNK_LOGITS // config.vocab_size)
    if chunk:
        model.loss_fn = partial(chunked_cross_entropy, chunk=chunk)
    if compiles:
        for part in blocks if sharded else [model]:
            part.compile()
    wrapped = wrap(model, ranks, sharded=sharded, blocks=blocks,
                   low_precision=config.dtype == "bfloat16")
    optimizer, estimator = build(
        config, model, num_classes=data.vocab_size,
        all_reduce=sum_over_ranks if ranks.world_size > 1 else None,
        sharded_gradient=sharded_gradient(model, ranks) if sharded else None)

    def wanted(step: int) -> list[tuple[int, int]]:
        estimates = estimator is not None and step % config.hessian_interval == 0
        sizes = [config.total_batch_size] + [config.hessian_batch_size] * estimates
        return [ranks.share(size) for size in sizes]

    batches = Prefetcher(
        TrainBatches(data.train, block_size=config.block_size, seed=config.seed,
                     total_batch_size=config.total_batch_size, sampling=config.sampling,
                     vocab_size=data.vocab_size),
        wanted, ranks.device)
    return Run(config, ranks, model, wrapped, optimizer, estimator, batches,
               StepCounters(torch.zeros((), device=ranks.device)),
               Guard(config.max_skipped if config.on_nonfinite == "skip" else 0, ranks), sharded)


def cosine_lr(config: Config, step: int) -> float:
    """Returns the rate of a 0-based step: linear warm-up, then a cosine to min_lr_ratio of it."""
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / config.warmup_iters
    span = max(1, config.max_iters - config.warmup_iters)
    progress = min(1.0, (step - config.warmup_iters) / span)
    ratio = config.min_lr_ratio
    return config.learning_rate * (ratio + (1 - ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def train_step(run: Run, step: int) -> tuple[Tensor, Tensor]:
    """One optimizer step; (mean loss of this rank's rows, gradient norm) on the device, no sync."""
    config = run.config
    for group in run.optimizer.param_groups:
        group["lr"] = cosine_lr(config, step)
    if run.estimator is not None and step % config.hessian_interval == 0:
        update_curvature(run, step)
    first, last = run.ranks.share(config.total_batch_size)
    assert (last - first) % config.batch_size == 0, (first, last, config.batch_size)
    mean_loss = torch.zeros((), device=run.ranks.device)
    for row in range(first, last, config.batch_size):
        rows = run.batches.rows(step, row, row + config.batch_size)
        idx, targets = inputs_and_targets(rows, run.ranks.device)
        _seed_dropout(config, "dropout", step, row)
        with gradient_sync(run.wrapped, on=row + config.batch_size == last):
            with run.autocast():
                loss = run.wrapped(idx, targets) * (config.batch_size / (last - first))
            loss.backward()
        mean_loss += loss.detach()
    grad_norm = full_tensor(nn.utils.clip_grad_norm_(run.model.parameters(),
                                               config.grad_clip or math.inf))
    run.counters.steps += 1
    if config.grad_clip:
        run.counters.clipped += grad_norm > config.grad_clip
    skip_if_nonfinite(run.guard.check_step(step, mean_loss, grad_norm), run.optimizer,
                      run.optimizer.step)
    run.optimizer.zero_grad(set_to_none=True)
    return mean_loss, grad_norm


def update_curvature(run: Run, step: int) -> None:
    """Algorithm 3, lines 6-10: an estimate at the current parameters, on rows of this batch."""
    config = run.config
    first, last = run.ranks.share(config.hessian_batch_size)
    idx, targets = inputs_and_targets(run.batches.rows(step, first, last), run.ranks.device)
    bare = run.model.forward if run.estimator.second_derivatives else run.model
    row = first

    def forward(idx: Tensor, *more, **options) -> Tensor:
        """The model without gradient hooks, on the next rows."""
        nonlocal row
        _seed_dropout(config, "hessian_dropout", step, row)
        row += len(idx)
        with run.autocast():
            return bare(idx, *more, **options)

    estimate = run.estimator.estimate(forward, idx, targets, first,
                                      keyed_seed(config.seed, "hessian", step))
    skip_if_nonfinite(run.guard.check_estimate(step, estimate), run.optimizer,
                      lambda: run.optimizer.update_hessian(estimate))


@torch.no_grad()
def evaluate(run: Run, windows: ValidationWindows) -> float:
    """Mean loss in nats per token over the windows, shared over ranks (host sync)."""
    run.model.eval()
    first, last = run.ranks.share(len(windows))
    losses, sizes = [], []
    # As many forward passes on every rank: sharded models gather their parameters in step.
    for start in range(first, first + -(-len(windows) // run.ranks.world_size),
                       run.config.batch_size):
        stop = min(start + run.config.batch_size, last)
        rows = windows.rows(start, stop) if start < stop else windows.rows(0, 1)
        idx, targets = inputs_and_targets(rows, run.ranks.device)
        with run.autocast():
            losses.append(run.model(idx, targets))
        sizes.append(max(0, stop - start))
    reshard(run.model)
    run.model.train()
    total = sum(loss * n for loss, n in zip(torch.stack(losses).tolist(), sizes, strict=True))
    pair = torch.tensor([total, sum(sizes)], dtype=torch.float64)
    if run.ranks.world_size > 1:
        pair = pair.to(run.ranks.device)
        sum_over_ranks([pair])
    total, count = pair.tolist()
    return total / count


@torch.no_grad()
def evaluate_split(run: Run, data: Dataset) -> float:
    """Mean loss in nats over every token of the validation split but its first."""
    T, targets_in_all = run.config.block_size, len(data.val) - 1
    windows = ValidationWindows(data.val, block_size=T, limit=0, vocab_size=data.vocab_size)
    mean, rest = evaluate(run, windows), targets_in_all % T
    if rest == 0:
        return mean
    # The tokens that fill no window: the last ones of a window that reaches back.
    idx, targets = inputs_and_targets(
        gather(data.val, [targets_in_all - T], T, data.vocab_size), run.ranks.device)
    targets = targets.clone()  # of one row, both are views of the same ids
    targets[:, :T - rest] = -100
    run.model.eval()
    with run.autocast():
        tail = run.model(idx, targets).item()
    reshard(run.model)
    run.model.train()
    return (mean * (targets_in_all - rest) + tail * rest) / targets_in_all


def _report_loss(run: Run, data: Dataset, step: int) -> None:
    """Prints what --eval_only measures."""
    loss = evaluate_split(run, data)
    if not run.ranks.is_main:
        return
    ids, counts = np.unique(data.val[1:], return_counts=True)
    words = [f"step {step}: loss {loss:.5f} nats per token, perplexity {math.exp(loss):.2f}"]
    try:
        lengths = np.array(byte_lengths(get_tokenizer(data.tokenizer)))
        size = int((lengths[ids] * counts).sum())
        words.append(f"{loss / math.log(2) * (len(data.val) - 1) / size:.5f} bits per byte, over "
                     f"{size:,} bytes")
    except TokenizerError as error:
        words.append(f"bits per byte are not known: {error}")
    print(f"{', '.join(words)} in {len(data.val) - 1:,} tokens of {data.folder}", flush=True)


def _loop(run: Run, data: Dataset, saver: Saver, recorder: Recorder, first_step: int) -> None:
    config = run.config
    windows = ValidationWindows(data.val, block_size=config.block_size, limit=config.eval_windows,
                                vocab_size=data.vocab_size)
    clock = _Clock(first_step)
    with StopSignals(run.ranks) as signals:
        for step in range(first_step, config.max_iters):
            signals.ask()
            loss, grad_norm = train_step(run, step)
            stop = signals.granted()
            done, last = step + 1, step + 1 == config.max_iters
            record = {}
            if step % config.log_interval == 0 or last:
                record |= _measure(run, step, loss, grad_norm, clock)
            with clock.paused():
                evaluates = done % config.eval_interval == 0 or last
                saves = done % config.checkpoint_interval == 0 or last or stop
                if evaluates or saves:
                    run.guard.raise_if_tripped(run.guard.report.tolist())  # sync
                if evaluates:
                    record["val/loss"] = evaluate(run, windows)
                if record:
                    recorder.record({"step": step, **record})
                _refuse_non_finite(step, record)
                if saves:
                    _save(run, data, saver, done, record.get("val/loss"))
            if stop and not last:
                saver.wait()
                raise Stopped(
                    f"stopped by {signal.Signals(stop).name} after {done} steps, saved in "
                    f"{config.out_dir}; the same command with --init_from=auto resumes"
                    if run.ranks.is_main else "", stop)
        saver.wait()


class _Clock:
    """Steps and seconds of training in this process: time in `paused()` is left out."""

    def __init__(self, done: int):
        self.start, self.done = time.perf_counter(), done

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.start += time.perf_counter() - began

    def read(self, done: int) -> tuple[int, float]:
        """Steps and seconds since the last reading, when `done` steps are done."""
        now = time.perf_counter()
        found = done - self.done, now - self.start
        self.start, self.done = now, done
        return found


def _measure(run: Run, step: int, loss: Tensor, grad_norm: Tensor, clock: _Clock) -> dict:
    """The numbers of a logging step: the loop's one host sync."""
    if run.ranks.world_size > 1:
        sum_over_ranks([loss])
    measured = {"train/loss": loss / run.ranks.world_size, "grad_norm": grad_norm,
                "norm_clip_rate": run.counters.clipped / run.counters.steps}
    if hasattr(run.optimizer, "statistics"):
        measured |= {k: full_tensor(x) for k, x in run.optimizer.statistics().items()}
    values = torch.cat([torch.stack([value.double() for value in measured.values()]),
                        run.guard.report.double()]).tolist()  # sync
    record, report = dict(zip(measured, values, strict=False)), values[len(measured):]
    run.guard.raise_if_tripped(report)
    if report[0]:
        record["refused"] = int(report[0])
    run.counters.clipped.zero_()
    run.counters.steps = 0
    steps, seconds = clock.read(step + 1)
    record["data_wait_fraction"] = run.batches.seconds_waited / seconds
    run.batches.seconds_waited = 0.0
    record["lr"] = cosine_lr(run.config, step)
    record["tokens"] = (step + 1) * run.config.tokens_per_step
    record["tokens_per_second"] = steps * run.config.tokens_per_step / seconds
    device = run.ranks.device
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if peak:
        record["mfu"] = (record["tokens_per_second"] * run.model.flops_per_token()
                         / (peak * run.ranks.world_size))
    return record


def _seed_dropout(config: Config, purpose: str, step: int, row: int) -> None:
    """Keys dropout by the first row, so that it is the same for any number of ranks."""
    if config.dropout:
        torch.manual_seed(keyed_seed(config.seed, purpose, step * config.total_batch_size + row))


def _refuse_non_finite(step: int, record: dict) -> None:
    if not math.isfinite(record.get("val/loss", 0)):
        raise TrainingError(f"step {step}: val/loss is not finite ({record['val/loss']}); continue "
                            "the newest checkpoint with a lower learning_rate, or longer warm-up")


def _check(config: Config, sources: dict[str, str], found: Checkpoint | None) -> None:
    """What the configurator cannot know: the ranks, and what the optimizer asks for."""
    try:
        config.check_world(world_size())
        check(config, world_size())
    except ConfigError as error:
        if found:  # its values are in the config now
            sources = {key: str(found.folder) for key in asdict(config)} | sources
        raise with_sources(error, sources) from None


def _find_checkpoint(config: Config, out_dir: Path) -> Checkpoint | None:
    """The checkpoint to continue, None to start anew."""
    found = None
    if config.init_from not in ("resume", "auto"):
        if checkpoints.checkpoint_folders(out_dir):
            raise ConfigError(f"{out_dir} already holds checkpoints; continue them with "
                              "--init_from=resume, or give another --out_dir", "out_dir")
    else:
        found = checkpoints.load_latest(out_dir, quarantine=not config.eval_only)
        if found is None and config.init_from == "resume":
            raise CheckpointError(f"{out_dir} holds no checkpoint to resume; check --out_dir, or "
                                  "start with --init_from=scratch")
    return found


def _settle(config: Config, sources: dict[str, str], found: Checkpoint | None,
            ranks: Ranks) -> tuple[Config, list[str]]:
    """The config with "auto" resolved and what was not given taken from the checkpoint; notes.

    Raises CheckpointError where a given key contradicts the checkpoint and must not.
    """
    values, notes = {}, []
    saved = found.state["config"] | asdict(saved_model_config(found)) if found else {}
    for key in saved.keys() & asdict(config).keys() - LOCAL_KEYS:
        given = getattr(config, key)
        derived = key == "vocab_size" and given == 0
        if key not in sources or derived:
            values[key] = saved[key]
        elif given != saved[key] and key in RUN_KEYS:
            raise CheckpointError(
                f"{found.folder} has {key} = {saved[key]!r}, {sources[key]} asks for {given!r}; "
                "leave it out, or start anew with another --out_dir")
        elif given != saved[key]:
            notes.append(f"{key} was {saved[key]!r} until step {found.state['step']} and is "
                         f"{given!r} from now on")
    if config.dtype == "auto":
        values["dtype"] = "bfloat16" if ranks.device.type == "cuda" else "float32"
    try:
        return replace(config, **values), sorted(notes)
    except ConfigError as error:
        raise with_sources(error, sources) from None


FREE_KEYS = {"activation", "dropout"}  # of a model's settings: not written in its weights


def _fit_weights(config: Config, sources: dict[str, str], shape: dict) -> Config:
    """The config with the model of foreign weights; activation and context may differ."""
    for key, value in shape.items():
        given = getattr(config, key)
        shorter = key == "block_size" and given < value
        if key in sources and given != value and key not in FREE_KEYS and not shorter:
            raise with_sources(ConfigError(f"{config.init_from} has {key} = {value}, not {given}; "
                                           "leave it out", key), sources)
    free = (FREE_KEYS | {"block_size"}) & sources.keys()
    return replace(config, **{k: v for k, v in shape.items() if k not in free})


def _load_weights(model: GPT, weights: dict[str, Tensor], config: Config) -> None:
    try:
        wpe = weights["transformer.wpe.weight"][:config.block_size]
        model.load_state_dict(weights | {"transformer.wpe.weight": wpe})
    except (KeyError, RuntimeError) as error:
        words = " ".join(str(error).split())
        raise CheckpointError(f"{config.init_from} does not hold such a model: {words}") from error


def _fit_vocabulary(config: Config, sources: dict[str, str], data: Dataset) -> Config:
    if config.vocab_size == 0:
        return replace(config, vocab_size=padded_vocab_size(data.vocab_size))
    if config.vocab_size < data.vocab_size:
        raise with_sources(ConfigError(
            f"vocab_size = {config.vocab_size} is less than the {data.vocab_size} classes of "
            f"{data.folder}; raise it or leave it out", "vocab_size"), sources)
    return config


def _restore(run: Run, found: Checkpoint) -> int:
    """Loads parameters and optimizer state; the number of steps done."""
    found.restore(run.model, run.optimizer)
    run.counters.steps = found.state["tally"]["steps"]
    run.counters.clipped.fill_(found.state["tally"]["clipped"])
    if guard := found.state.get("guard"):
        run.guard.restore(guard)
    return found.state["step"]


def _save(run: Run, data: Dataset, saver: Saver, done: int, val_loss: float | None) -> None:
    """Starts to save, on every rank; raises on every rank when the parameters are not finite."""
    require_finite_parameters(run.model.parameters(), done - 1)
    saver.save(run.model.state_dict(), checkpoints.flatten_state(run.optimizer), dict(
        format=1, step=done, val_loss=val_loss,
        tally=dict(steps=run.counters.steps, clipped=run.counters.clipped.item()),
        guard=run.guard.state(),
        config=asdict(run.config), model=asdict(run.model.config), data=data.fingerprint,
        tokenizer=data.tokenizer, num_classes=data.vocab_size, world_size=run.ranks.world_size,
        versions=dict(python=platform.python_version(), torch=torch.__version__,
                      numpy=np.__version__)))


def _as_begun(config: Config, out_dir: Path, notes: list[str]) -> Config:
    """With init_from=auto and no checkpoint yet: the weights that the run began from, if any."""
    try:
        begun = json.loads((out_dir / "config.json").read_text())["init_from"]
    except (OSError, ValueError, KeyError, TypeError):
        return config
    if begun in ("scratch", "resume", "auto"):
        return config
    notes.append(f"{out_dir} has no checkpoint yet; beginning again from {begun}")
    return replace(config, init_from=begun)


def _require_tokenizer(name: str, data: Dataset, whose: object) -> None:
    """Raises DataError when weights were made with another tokenizer than the data."""
    if name in ("", data.tokenizer):
        return
    try:
        theirs, ours = (get_tokenizer(n).encode_ordinary(PROBE) for n in (name, data.tokenizer))
    except TokenizerError:
        return  # one of them is not at hand, so it cannot be known
    if theirs != ours:
        raise DataError(f"{whose} speaks {name}, {data.folder} is written in {data.tokenizer}: "
                        "the same ids mean other text; prepare the data with the model's tokenizer")


PROBE = "The quick brown fox, naïve: def f(x):\n    return 3.14159 # 日本語 don't\t\t12345"


def _write_config(config: Config, out_dir: Path) -> None:
    try:
        write_text(out_dir / "config.json", json.dumps(asdict(config), indent=1) + "\n")
    except OSError as error:
        raise CheckpointError(f"cannot write to --out_dir={out_dir}: {error.strerror}; give "
                              "another one") from error


def _announce(run: Run, data: Dataset, notes: list[str]) -> None:
    """Prints the resolved settings, what they make, and what the user should know."""
    config, ranks = run.config, run.ranks
    listed = ", ".join(f"{k}={v}" for k, v in asdict(config).items())
    print(textwrap.fill(f"config: {listed}", 100, subsequent_indent="  ", break_long_words=False))
    name = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else ranks.device
    print(f"model: {run.model.num_params(non_embedding=False):,} parameters, "
          f"{run.model.flops_per_token() / 1e6:,.1f} MFLOP per token")
    epoch = config.total_batch_size / run.batches.batches.windows
    print(f"run: {config.tokens_per_step:,} tokens per step, {config.max_iters:,} steps = "
          f"{config.max_iters * epoch:,.2f} epochs of {data.folder}, {ranks.world_size} x {name}, "
          f"{config.dtype}", flush=True)
    for note in filter(None, notes):
        print(f"note: {note}")


def _health(run: Run) -> Health | None:
    if run.estimator is None:
        return None
    return Health(run.config.warmup_iters, run.config.hessian_interval,
                  fixed_gamma=not run.config.gamma_target)


def _wandb_settings(config: Config) -> dict | None:
    if not config.wandb_log:
        return None
    return dict(project=config.wandb_project, config=asdict(config),
                name=config.wandb_run_name or Path(config.out_dir).name)


def _farewell(run: Run, data: Dataset, out_dir: Path) -> None:
    """A short sample and the commands to try next."""
    if run.config.sample_tokens and not run.sharded:
        tokenizer = get_tokenizer(data.tokenizer)
        start = torch.tensor([[tokenizer.eot_token]], device=run.ranks.device)
        generator = torch.Generator(run.ranks.device).manual_seed(run.config.seed)
        ids = generate(run.model, start, run.config.sample_tokens, temperature=0.8, top_k=200,
                                 num_classes=data.vocab_size, generator=generator)
        print(f"a sample:\n{tokenizer.decode(ids[0, 1:].tolist())}\n")
    print(f"saved in {out_dir}; next:\n"
          f"  python sample.py --out_dir={out_dir}\n"
          f"  python -m experiments.plot --runs={out_dir}\n"
          "  python train.py --help", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Trains a GPT on one or several ranks, with one loop for every optimizer.

    python train.py config/quickstart.py
    torchrun --nproc_per_node=8 train.py config/train_gpt2_medium_sophiag.py --batch_size=10

Settings come from config files and --key=value flags; --help lists them. The folder --out_dir
receives config.json, metrics.jsonl and checkpoints; --init_from=resume continues the newest one
with the losses that an uninterrupted run would have had.
"""

if __name__ == "__main__":
    from nanosophia.startup import check_arguments
    check_arguments()

import math
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from copy import copy
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from model import GPT
from nanosophia import dry_run
from nanosophia.checkpoint import (
    Checkpoint,
    CheckpointError,
    run_state,
)
from nanosophia.chunked_loss import chunked_cross_entropy
from nanosophia.command import command
from nanosophia.configurator import Stopped
from nanosophia.dataloader import (
    Dataset,
    Prefetcher,
    TrainBatches,
    ValidationWindows,
    inputs_and_targets,
    keyed_seed,
)
from nanosophia.distributed import (
    Ranks,
    StopSignals,
    full_tensor,
    gradient_sync,
    on_main,
    sharded_gradient,
    start_ranks,
    stop_ranks,
    sum_over_ranks,
    wrap,
)
from nanosophia.estimators import Estimator, row_range
from nanosophia.evaluation import describe_loss, evaluate, evaluate_split
from nanosophia.fitting import OutOfMemory, build_that_fits
from nanosophia.folder_lock import FolderLock, LockError
from nanosophia.guard import (
    Guard,
    require_finite,
    require_finite_parameters,
    skip_if_nonfinite,
)
from nanosophia.hellaswag import during_training
from nanosophia.loss_scale import LossScale
from nanosophia.memory import largest_estimate_rows
from nanosophia.metrics import Clock, Health, Recorder, measure
from nanosophia.optimizer_state import Beginning, evaluation_weights, flatten_state
from nanosophia.optimizers import build, settings_warnings
from nanosophia.options import Config
from nanosophia.packages import seed_draws
from nanosophia.precision import autocast_dtype
from nanosophia.resume import (
    check_settings,
    describe_config,
    load_config,
    may_take_settings,
    resolve,
    write_config,
)
from nanosophia.saver import Saver
from nanosophia.sharded_init import InitialValues
from nanosophia.summary import print_next_steps, print_sample, print_summary
from nanosophia.trackers import asked_for
from nanosophia.weights import Weights

CPU_CHUNK_BYTES = 24_000_000  # of logits, which malloc keeps (distributed._keep_freed_memory)


@dataclass
class StepCounters:
    """Counts since the last record; saved, so that a resumed run records the same."""

    clipped: Tensor  # steps whose gradient norm was clipped
    steps: int = 0


@dataclass
class Run:
    """Holds what a training step needs."""

    config: Config
    ranks: Ranks
    model: GPT
    wrapped: nn.Module  # the model, averaging gradients over ranks
    optimizer: torch.optim.Optimizer
    beginning: Beginning  # of the optimizer
    estimator: Estimator | None
    estimates: Callable[[int], bool]  # whether a step begins with a curvature estimate
    batches: Prefetcher
    micro_batches: list[slice]  # this rank's rows of a step
    chunks: list[list[slice]]  # and of an estimate
    counters: StepCounters
    guard: Guard
    loss_scale: LossScale
    sharded: bool  # parameters are split over ranks

    def autocast(self):
        """Returns the context of every forward pass."""
        dtype = autocast_dtype(self.config.dtype)
        return torch.autocast(self.ranks.device.type, dtype) if dtype else nullcontext()


def build_run(config: Config, ranks: Ranks, data: Dataset, weights: Weights | None = None,
              fresh_from: int = 0) -> Run:
    """Builds model, optimizer and batches of a resolved config, initialised or from `weights`.

    The optimizer begins without state at step `fresh_from`, whose batch gives a curvature estimate.
    """
    torch.set_float32_matmul_precision("high")  # TF32 where autocast leaves float32
    # By default MKL uses fewer threads on a busy machine, which changes rounding; setting the
    # number, even to its current value, disables that.
    torch.set_num_threads(torch.get_num_threads())
    torch.manual_seed(config.seed)
    shards = config.shards(ranks.world_size)
    sharded = shards > 1
    with torch.device("meta") if sharded and weights is None else nullcontext():
        model = build_model(config, ranks, weights)
    values = InitialValues(model) if sharded and weights is None else None
    blocks = list(model.transformer.h)
    if config.compiles("compile", ranks.device.type):
        for part in blocks if sharded else [model]:
            part.compile()
    wrapped = wrap(model, ranks, shards=shards, blocks=blocks,
                   precision=autocast_dtype(config.dtype))
    if values:
        torch.manual_seed(config.seed)  # as where the model is built whole
        values.fill(model, ranks)
    optimizer, estimator, beginning = build(
        config, model, num_classes=data.vocab_size,
        all_reduce=sum_over_ranks if ranks.world_size > 1 else None,
        sharded_gradient=sharded_gradient(model, ranks) if sharded else None)

    estimate_rows = largest_estimate_rows(
        config, model.num_params(non_embedding=False),
        estimator is not None and estimator.second_derivatives)
    chunks = ranks.chunks(config.hessian_batch_size, config.hessian_chunks, estimate_rows,
                          shared=sharded)

    def estimates(step: int) -> bool:
        return estimator is not None and (step % config.hessian_interval == 0 or step == fresh_from)

    def row_ranges(step: int) -> list[tuple[int, int]]:
        ranges = [ranks.share(config.total_batch_size)]
        return [*ranges, row_range(chunks)] if estimates(step) else ranges

    batches = Prefetcher(
        TrainBatches(data.train, block_size=config.block_size, seed=config.seed,
                     total_batch_size=config.total_batch_size, sampling=config.sampling,
                     vocab_size=data.vocab_size), row_ranges, ranks.device)
    return Run(config, ranks, model, wrapped, optimizer, beginning, estimator, estimates, batches,
               ranks.micro_batches(config.total_batch_size, config.batch_size), chunks,
               StepCounters(torch.zeros((), device=ranks.device)),
               Guard(config.max_skipped if config.on_nonfinite == "skip" else 0, ranks),
               LossScale(ranks.device, dynamic=config.dtype == "float16"), sharded)


def differentiate_largest_micro_batch(run: Run) -> None:
    """Makes the passes of a training step on as many rows as the largest micro-batch has."""
    rows = max((part.stop - part.start for part in run.micro_batches), default=0)
    ids = torch.zeros(rows, run.config.block_size, dtype=torch.int64, device=run.ranks.device)
    with gradient_sync(run.wrapped, on=False), run.autocast():
        run.wrapped(ids, ids).backward()


def build_model(config: Config, ranks: Ranks, weights: Weights | None) -> GPT:
    """Returns the model, initialised or from `weights`, with the loss that suits the device."""
    model = GPT(config.model)
    model.activation_checkpointing = config.activation_checkpointing
    if weights is not None:
        weights.load_into(model)
    if config.dtype == "float64":
        model.double()
    chunk, kind = config.loss_chunk, ranks.device.type
    if not chunk and kind == "cpu" and not config.compiles("compile", kind):
        bytes_per_logit = 2 if autocast_dtype(config.dtype) else 4
        chunk = max(1, CPU_CHUNK_BYTES // (config.vocab_size * bytes_per_logit))
    if chunk:
        model.loss_fn = partial(chunked_cross_entropy, chunk=chunk)
    return model


def restore(run: Run, checkpoint: Checkpoint, *, weights_only: bool = False) -> int:
    """Loads parameters, optimizer state and counters; returns the number of steps done."""
    checkpoint.restore(run.model, None if weights_only else run.optimizer)
    if weights_only:
        return checkpoint.state["step"]
    counters = checkpoint.state["tally"]
    run.counters.steps = counters["steps"]
    run.counters.clipped.fill_(counters["clipped"])
    if guard := checkpoint.state.get("guard"):
        run.guard.restore(guard)
    if scale := checkpoint.state.get("loss_scale"):
        run.loss_scale.restore(scale)
    return checkpoint.state["step"]


def learning_rate(config: Config, step: int) -> float:
    """Returns the rate of a 0-based step: linear warm-up, then the schedule's fall to min_lr_ratio.

    With p in [0, 1] the progress of the fall, the rest of it is (1 + cos(pi p)) / 2 (cosine), 1 - p
    (linear) or 1 - sqrt(p) (wsd), where p counts from the end of the warm-up, or in wsd from the
    beginning of the cooldown.
    """
    c = config
    if step < c.warmup_iters:
        return c.learning_rate * (step + 1) / c.warmup_iters
    start = c.warmup_iters
    if c.schedule == "wsd":
        start = max(start, round((1 - c.cooldown_fraction) * c.max_iters))
    p = min(1.0, max(0.0, (step - start) / max(1, c.max_iters - start)))
    rest = dict(cosine=0.5 * (1 + math.cos(math.pi * p)), linear=1 - p, wsd=1 - math.sqrt(p))
    return c.learning_rate * (c.min_lr_ratio + (1 - c.min_lr_ratio) * rest[c.schedule])


def train_step(run: Run, step: int) -> tuple[Tensor, Tensor]:
    """Makes one optimizer step; returns a loss and the gradient norm, as tensors.

    The mean of that loss over ranks is that of the batch.
    Syncs with the host only for optimizers that cannot read found_inf on the device.
    """
    config = run.config
    for group in run.optimizer.param_groups:
        group[run.beginning.lr_key] = learning_rate(config, step)
    if run.estimates(step):
        update_curvature(run, step)
    mean_loss = torch.zeros((), device=run.ranks.device)
    for part in run.micro_batches:
        rows = run.batches.rows(step, part.start, part.stop)
        idx, targets = inputs_and_targets(rows, run.ranks.device)
        seed_dropout(config, "dropout", step, part.start)
        # Gradients are averaged over ranks, of which some may have fewer rows.
        weight = len(rows) * run.ranks.world_size / config.total_batch_size
        with gradient_sync(run.wrapped, on=part is run.micro_batches[-1]):
            with run.autocast():
                loss = run.wrapped(idx, targets) * weight
            run.loss_scale.scaled(loss).backward()
        mean_loss += loss.detach()
    run.loss_scale.unscale_(p.grad for p in run.model.parameters())
    grad_norm = full_tensor(nn.utils.clip_grad_norm_(run.model.parameters(),
                                                     config.grad_clip or math.inf))
    run.counters.steps += 1
    if config.grad_clip:
        run.counters.clipped += grad_norm > config.grad_clip
    seed_draws(keyed_seed(config.seed, "optimizer", step))
    refused = run.guard.check_step(step, mean_loss, grad_norm, run.loss_scale.may_fall())
    skip_if_nonfinite(refused, run.optimizer, run.optimizer.step)
    run.loss_scale.update(refused, grows=True)
    run.optimizer.zero_grad(set_to_none=True)
    return mean_loss, grad_norm


def update_curvature(run: Run, step: int) -> None:
    """Updates h (Algorithm 3, lines 7-9) from an estimate at the current parameters."""
    config = run.config
    start, stop = row_range(run.chunks)
    idx, targets = inputs_and_targets(run.batches.rows(step, start, stop), run.ranks.device)
    forward_fn = run.model
    if run.estimator.second_derivatives:  # which recomputation in the backward pass would not save
        model = copy(run.model)  # of the same parameters
        model.activation_checkpointing = False
        forward_fn = model.forward
    parts = chain(*run.chunks)

    def forward(idx: Tensor, *args, **kwargs) -> Tensor:
        """Calls the model without gradient hooks on the next micro-batch."""
        seed_dropout(config, "hessian_dropout", step, next(parts).start)
        with run.autocast():
            return forward_fn(idx, *args, **kwargs)

    count = config.hessian_batch_size * config.block_size
    if run.estimator.second_derivatives:  # larger as the sum over all parameters is, of random sign
        count *= math.isqrt(run.model.num_params())
    estimate = run.estimator.estimate(forward, idx, targets, run.chunks,
                                      keyed_seed(config.seed, "hessian", step),
                                      run.loss_scale.of_sum(count))
    refused = run.guard.check_estimate(step, estimate, run.loss_scale.may_fall())
    skip_if_nonfinite(refused, run.optimizer, lambda: run.optimizer.update_hessian(estimate))
    run.loss_scale.update(refused, grows=False)


def seed_dropout(config: Config, purpose: str, step: int, row: int) -> None:
    """Keys dropout by the micro-batch's first row, so that it does not depend on the ranks."""
    if config.dropout:
        torch.manual_seed(keyed_seed(config.seed, purpose, step * config.total_batch_size + row))


def loop(run: Run, data: Dataset, saver: Saver, recorder: Recorder, first_step: int) -> None:
    """Trains from `first_step` to max_iters; records, evaluates and saves on the way."""
    config, clock = run.config, Clock(first_step)
    windows = ValidationWindows(data.val, block_size=config.block_size, limit=config.eval_windows,
                                vocab_size=data.vocab_size)
    score_on_tasks = during_training(config, data, run.ranks)
    with StopSignals(run.ranks) as signals:
        for step in range(first_step, config.max_iters):
            signals.start_poll()
            loss, grad_norm = train_step(run, step)
            stop = signals.poll()
            done, is_last = step + 1, step + 1 == config.max_iters
            record = {}
            if step % config.log_interval == 0 or is_last:
                record |= measure(run, step, learning_rate(config, step), loss, grad_norm, clock)
            if step == first_step:
                flatten_state(run.optimizer, run.beginning)  # raises where no save could hold it
            evaluates = done % config.eval_interval == 0 or is_last
            saves = done % config.checkpoint_interval == 0 or is_last or stop
            scores = score_on_tasks and (done % config.eval_tasks_interval == 0 or is_last)
            pauses = evaluates or saves or scores
            with clock.paused(), evaluation_weights(run.optimizer) if pauses else nullcontext():
                if pauses:
                    run.guard.raise_if_tripped(run.guard.report.tolist())  # sync
                if evaluates:
                    record["val/loss"] = evaluate(run.model, windows, run.ranks,
                                                  config.batch_size, run.autocast)
                if scores:
                    record |= score_on_tasks(run.model, run.autocast)
                if record:
                    recorder.record({"step": step, **record})
                require_finite("val/loss", record.get("val/loss", 0.0), step)
                if saves:
                    save(run, data, saver, done, record.get("val/loss"))
            if stop and not is_last:
                saver.finish()
                raise Stopped(
                    f"stopped by {signal.Signals(stop).name} after {done} steps, saved in "
                    f"{config.out_dir}; the same command with --init_from=auto resumes"
                    if run.ranks.is_main else "", stop)
        saver.finish()


def save(run: Run, data: Dataset, saver: Saver, done: int, val_loss: float | None) -> None:
    """Starts to save, on every rank; raises on every rank when parameters are not finite."""
    require_finite_parameters(run.model.parameters(), done - 1)
    tensors, rest = flatten_state(run.optimizer, run.beginning)
    saver.save(run.model.state_dict(), tensors, run_state(
        step=done, optimizer=rest, val_loss=val_loss, config=asdict(run.config),
        model=asdict(run.model.config),
        counters=dict(steps=run.counters.steps, clipped=run.counters.clipped.item()),
        guard=run.guard.state(), loss_scale=run.loss_scale.state(), data=data.fingerprint,
        tokenizer=data.tokenizer, num_classes=data.vocab_size, world_size=run.ranks.world_size))


def train(config: Config, sources: dict[str, str] | None = None) -> None:
    """Trains to config.max_iters; `sources` says where each explicitly given key came from."""
    sources, out_dir = sources or {}, Path(config.out_dir)
    if not may_take_settings(config):
        check_settings(config, sources)
    ranks = start_ranks(config.device)
    with FolderLock(out_dir) as lock:
        # Where there is no out_dir, it is made after settings, data and weights were checked.
        if out_dir.is_dir() and not config.eval_only:
            on_main(ranks, lock.take, LockError)
        start = resolve(config, sources, ranks)
        step, data = start.checkpoint.state["step"] if start.resets_optimizer else 0, start.data
        run, notes = build_that_fits(
            lambda config: build_run(config, ranks, data, start.weights, fresh_from=step),
            differentiate_largest_micro_batch, start, ranks)
        config = run.config
        first_step = restore(run, start.checkpoint, weights_only=start.resets_optimizer
                             or config.eval_only) if start.checkpoint else 0
        if not config.eval_only and first_step < config.max_iters:
            on_main(ranks, lock.take, LockError)
        if ranks.is_main:
            print_summary(config, run.model, ranks, data, run.batches.batches.windows,
                          [*start.notes, *notes, *settings_warnings(config)])
        if config.eval_only:
            loss = evaluate_split(run.model, data, ranks, config.block_size, config.batch_size,
                                  run.autocast)
            if ranks.is_main:
                print(f"step {first_step}: {describe_loss(loss, data)}", flush=True)
        elif first_step >= config.max_iters:
            if ranks.is_main:
                print(f"{start.checkpoint.folder} is already at max_iters = {config.max_iters}: "
                      "nothing to train; raise --max_iters to go on")
        else:
            try:
                run_loop(run, data, out_dir, first_step)
            except torch.OutOfMemoryError:
                raise OutOfMemory(config, ranks) from None


def run_loop(run: Run, data: Dataset, out_dir: Path, first_step: int) -> None:
    """Opens saver and recorder, runs the loop, and closes them; the lock is held."""
    config, ranks = run.config, run.ranks
    on_main(ranks, lambda: write_config(config), CheckpointError)
    saver = Saver(out_dir, ranks, keep=config.keep_checkpoints, keep_best=config.keep_best,
                  sharded=run.sharded)
    health = Health(config.warmup_iters, config.hessian_interval,
                    fixed_gamma=not config.gamma_target) if run.estimator else None
    trackers = {name: partial(tracker, config, run.model.num_params(non_embedding=False),
                              first_step) for name, tracker in asked_for(config).items()}
    recorder = Recorder(out_dir, first_step=first_step, max_iters=config.max_iters,
                        active=ranks.is_main, trackers=trackers, health=health)
    try:
        loop(run, data, saver, recorder, first_step)
    finally:
        recorder.close()
        saver.close()
    if ranks.is_main:
        if config.sample_tokens and not run.sharded:
            with evaluation_weights(run.optimizer):
                print_sample(config, run.model, data, ranks.device)
        print_next_steps(out_dir)


@command(cleanup=stop_ranks)
def main(argv: list[str]) -> None:
    """Runs the command; exits with 2 and one line after a user's mistake."""
    config, sources = load_config(argv)
    if config.print_config or config.dry_run:
        check_settings(config, sources)
        print("\n".join(describe_config(config, sources)) if config.print_config
              else dry_run.report(config))
    else:
        train(config, sources)


if __name__ == "__main__":
    main(sys.argv[1:])

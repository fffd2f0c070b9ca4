"""Whether a micro-batch fits a device's memory, and what to do where it does not."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch

from nanosophia import dry_run
from nanosophia.configurator import UserError
from nanosophia.distributed import Ranks, sum_over_ranks
from nanosophia.options import Config
from nanosophia.resume import Start

Run = TypeVar("Run")


class OutOfMemory(UserError):
    """A device has too little memory; the message says what to lower."""

    exit_code = 1

    def __init__(self, config: Config, ranks: Ranks):
        lower = [f"--batch_size={config.batch_size // 2}"] if config.batch_size > 1 else []
        lower += [] if config.loss_chunk else ["--loss_chunk=1024"]
        lower += [] if config.activation_checkpointing else ["--activation_checkpointing"]
        sharded = replace(config, parallel="fsdp")
        if ranks.world_size > 1 and config.parallel != "fsdp" and \
                not dry_run.refusal(sharded, ranks.world_size):
            lower.append("--parallel=fsdp")
        super().__init__(
            f"{ranks.device} is out of memory with micro-batches of {config.batch_size} sequences; "
            f"{'give ' + ' or '.join(lower) if lower else 'take a smaller model or more GPUs'} "
            "(--dry_run counts what each takes; none changes what is trained). The newest "
            "checkpoint is whole: the same command with --init_from=auto continues it")


def fits(micro_batch: Callable[[], None], reserved: int, ranks: Ranks) -> bool:
    """Returns, alike on all ranks, whether a training pass fits beside so many reserved bytes.

    What is reserved is for that which a first pass does not yet need: the optimizer's state.
    """
    failed = torch.zeros((), device=ranks.device)
    try:
        held = torch.empty(reserved, dtype=torch.uint8, device=ranks.device)
        micro_batch()
        del held
    except torch.OutOfMemoryError:
        failed += 1
    if ranks.world_size > 1:
        sum_over_ranks([failed])
    return not failed.item()


def build_that_fits(build: Callable[[Config], Run], micro_batch: Callable[[Run], None],
                    start: Start, ranks: Ranks) -> tuple[Run, list[str]]:
    """Returns the run that `build` makes of the start's config, and notes.

    A batch_size that was chosen by a GPU's free memory is tried by `micro_batch`, the passes of the
    largest one, and halved once where it does not fit. Not where parameters are sharded: a rank
    that ran out would leave the others waiting.
    """
    config = start.config
    run = build(config)
    if not start.chose_batch_size or run.sharded or config.batch_size == 1:
        return run, []
    reserved = dry_run.bytes_beside_training(config, ranks.world_size)
    fitted = fits(partial(micro_batch, run), reserved, ranks)
    run.model.zero_grad(set_to_none=True)
    if fitted:
        return run, []
    del run
    torch.cuda.empty_cache()
    smaller = replace(config, batch_size=config.batch_size // 2)
    return build(smaller), [f"micro-batches of {config.batch_size} ran out of memory, so "
                            f"batch_size = {smaller.batch_size}"]

"""Whether a micro-batch fits a device's memory, and what to do where it does not."""

from collections.abc import Callable

import torch

from nanosophia.configurator import UserError
from nanosophia.distributed import Ranks, sum_over_ranks
from nanosophia.options import Config


class OutOfMemory(UserError):
    """A device has too little memory; the message says what to lower."""

    exit_code = 1

    def __init__(self, config: Config, ranks: Ranks, *, may_shard: bool):
        lower = [f"--batch_size={config.batch_size // 2}"] if config.batch_size > 1 else []
        lower += [] if config.loss_chunk else ["--loss_chunk=1024"]
        lower += [] if config.activation_checkpointing else ["--activation_checkpointing"]
        if may_shard:
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

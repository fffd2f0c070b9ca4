"""Keeps losses, gradients and estimates that are not finite out of the state, on every rank."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nanosophia.configurator import UserError
from nanosophia.distributed import Ranks, sum_over_ranks, to_local
from sophia import Sophia


class TrainingError(UserError):
    """Training cannot go on; the message names the step."""

    exit_code = 1


class Guard:
    """Flags what is not finite, on all ranks alike and without a host sync.

    A step is skipped when some rank's loss or the gradient norm is not finite, an estimate when it
    is not. More than `limit` of either in a row end the run: every step is skipped from then on,
    until `raise_if_tripped` tells the host.
    """

    KINDS = ("loss", "gradient norm", "curvature estimate")

    def __init__(self, limit: int, ranks: Ranks):
        self.limit, self.ranks = limit, ranks
        self.in_a_row = torch.zeros(2, dtype=torch.int64, device=ranks.device)
        # Steps and estimates skipped; then of the end: whether it has come, step, index in KINDS,
        # number of bad ranks, sum of their numbers.
        self.report = torch.zeros(6, dtype=torch.int64, device=ranks.device)

    def check_step(self, step: int, loss: Tensor, grad_norm: Tensor, may_fall: Tensor) -> Tensor:
        """Returns 1.0 where the step must change nothing, else 0.0.

        Where the loss scale `may_fall` (bool), a norm that is not finite is taken for an overflow,
        which ends no run.
        """
        return self._check(step, torch.stack([loss.detach(), grad_norm]), self.in_a_row[0], 0,
                           torch.stack([torch.zeros_like(may_fall), may_fall]))

    def check_estimate(self, step: int, estimate: list[Tensor], may_fall: Tensor) -> Tensor:
        """Returns 1.0 where the estimate must change nothing, else 0.0; `may_fall` as there."""
        norms = torch.stack(torch._foreach_norm([to_local(x) for x in estimate]))
        return self._check(step, norms.sum().unsqueeze(0), self.in_a_row[1], 2,
                           may_fall.unsqueeze(0))

    def _check(self, step: int, values: Tensor, in_a_row: Tensor, first_kind: int,
               forgiven: Tensor) -> Tensor:
        bad_here = (~torch.isfinite(values)).long()
        counts_and_ranks = torch.stack([bad_here, bad_here * self.ranks.rank])
        if self.ranks.world_size > 1:
            sum_over_ranks([counts_and_ranks])
        bad = counts_and_ranks[0].any().long()
        counted = (counts_and_ranks[0].bool() & ~forgiven).any().long()
        in_a_row.mul_(counted).add_(counted)
        self.report[0] += bad
        kind = counts_and_ranks[0].ne(0).int().argmax()
        end = torch.stack([torch.ones_like(bad), torch.full_like(bad, step), kind + first_kind,
                           *counts_and_ranks.index_select(1, kind.unsqueeze(0)).flatten()])
        ends = (in_a_row > self.limit) & (self.report[1] == 0)
        self.report[1:] = torch.where(ends, end, self.report[1:])
        return (bad | self.report[1]).float()

    def raise_if_tripped(self, report: list[float]) -> None:
        """Raises TrainingError when `report`, read from the device, says that the run has ended."""
        _, ended, step, kind, bad_ranks, rank = map(int, report)
        if ended:
            where = f" on rank {rank}" if bad_ranks == 1 < self.ranks.world_size else ""
            times = f", {self.limit + 1} times in a row" if self.limit else ""
            raise TrainingError(
                f"step {step}: the {self.KINDS[kind]} is not finite{where}{times}; nothing was "
                "updated. Continue the newest checkpoint with a lower learning_rate, longer "
                "warm-up, or --on_nonfinite=skip")

    def state(self) -> dict:
        """Returns what a resumed run needs to go on alike."""
        return dict(in_a_row=self.in_a_row.tolist(), refused=int(self.report[0]))

    def restore(self, state: dict) -> None:
        """Restores `state()`."""
        self.in_a_row.copy_(torch.tensor(state["in_a_row"]))
        self.report[0] = state["refused"]


def skip_if_nonfinite(found_inf: Tensor, optimizer: torch.optim.Optimizer,
                      action: Callable[[], object]) -> None:
    """Runs `action`, a step or an `update_hessian`, which changes nothing where found_inf is not 0.

    `found_inf` is a 0-dim float32 tensor on the device. Optimizers that can (Sophia, fused AdamW)
    read it there; for others the host does, once per call.
    """
    if isinstance(optimizer, Sophia) or optimizer.defaults.get("fused"):
        optimizer.found_inf = found_inf
        try:
            action()
        finally:
            optimizer.found_inf = None
    elif not found_inf.item():  # host sync
        action()


def require_finite(name: str, value: float, step: int) -> None:
    """Raises TrainingError when a recorded value is not finite."""
    if not math.isfinite(value):
        raise TrainingError(f"step {step}: {name} is not finite ({value}); continue the newest "
                            "checkpoint with a lower learning_rate, or longer warm-up")


def require_finite_parameters(parameters, step: int) -> None:
    """Raises TrainingError on every rank when some parameter of some rank is not finite."""
    norms = torch._foreach_norm([to_local(p) for p in parameters])
    bad = (~torch.isfinite(torch.stack(norms))).any().int()
    sum_over_ranks([bad])
    if bad.item():  # sync
        raise TrainingError(f"step {step}: parameters are not finite, so no checkpoint is written; "
                            "continue the newest one with a lower learning_rate")

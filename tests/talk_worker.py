"""Run by test_train.py under torchrun: counts how often the ranks talk, and about how much."""

import sys

import torch.distributed as dist
import torch.nn as nn

import train
from nanosophia import distributed

sums: list[int] = []  # elements of each all_reduce that the project itself makes
backwards: list[bool] = []  # whether each backward's gradients are synchronised

if __name__ == "__main__":
    original, original_sync = dist.all_reduce, distributed.gradient_sync

    def all_reduce(tensor, *args, **kwargs):
        sums.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    def gradient_sync(model: nn.Module, on: bool):
        backwards.append(on)
        return original_sync(model, on)

    dist.all_reduce = all_reduce
    train.gradient_sync = gradient_sync
    per_step = []
    original_step = train.train_step

    def train_step(run, step):
        sums.clear()
        backwards.clear()
        found = original_step(run, step)
        per_step.append((list(sums), list(backwards),
                         sum(p.numel() for p in run.model.parameters())))
        for p in run.model.parameters():  # the same on every rank, to the last bit
            first = p.detach().clone()
            dist.broadcast(first, 0)
            assert first.equal(p.detach())
        return found

    train.train_step = train_step
    train.main(sys.argv[1:])
    for step, (numbers, synced, size) in enumerate(per_step):
        assert synced == [False, False, False, True], (step, synced)  # 4 micro-batches
        # The flags of the step (2 x 2); at an estimate all gradients, their count, its flag.
        expected = sorted([size, 1, 2, 4]) if step % 2 == 0 else [4]
        assert sorted(numbers) == expected, (step, numbers)
    print("all talk is accounted for")

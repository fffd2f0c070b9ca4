"""Run by test_loss_scale.py under torchrun: train.py with a loss scale that overflows at first."""

import sys

import train
from nanosophia import loss_scale

loss_scale.MOST, loss_scale.INITIAL = 2.0**40, 2.0**28
made = []


class Remembered(loss_scale.LossScale):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        made.append(self)


train.LossScale = Remembered
train.main(sys.argv[1:])
print(f"scale {made[0].value.item()}", flush=True)

"""Run by test_loss_scale.py under torchrun: train.py with a loss scale that overflows at first.

`python -m tests.overflow_worker FOLDER SETTINGS...` writes each rank's last scale to FOLDER/RANK.
"""

import os
import sys
from pathlib import Path

import train
from nanosophia import loss_scale

loss_scale.MOST, loss_scale.INITIAL = 2.0**40, 2.0**28
made = []


class Remembered(loss_scale.LossScale):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        made.append(self)


train.LossScale = Remembered
train.main(sys.argv[2:])
Path(sys.argv[1], os.environ["RANK"]).write_text(str(made[0].value.item()))

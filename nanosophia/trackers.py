"""Records sent to Weights & Biases and to TensorBoard, behind one interface.

Neither package is needed; the recorder warns once where one that is asked for is missing or fails.
"""

import math
import uuid
from pathlib import Path
from typing import Protocol

from nanosophia.files import write_text
from nanosophia.options import Config


class Tracker(Protocol):
    """Takes the records of a run, whose numbers are by name, with their `step`."""

    def log(self, record: dict) -> None:
        """Takes one record."""

    def close(self) -> None:
        """Sends what is left."""


class Wandb:
    """Weights & Biases: the run's settings and parameter count, its lowest validation loss."""

    def __init__(self, config: Config, parameters: int, first_step: int):
        """Starts the run, or continues the one whose id the run's folder holds."""
        import wandb
        out_dir = Path(config.out_dir)
        if not (out_dir / "wandb_id").exists():
            write_text(out_dir / "wandb_id", uuid.uuid4().hex)
        self.run = wandb.init(id=(out_dir / "wandb_id").read_text(), resume="allow",
                              project=config.wandb_project, dir=str(out_dir),
                              name=config.wandb_run_name or out_dir.name,
                              config=vars(config) | dict(parameters=parameters))
        self.best = math.inf

    def log(self, record: dict) -> None:
        """Takes one record."""
        self.run.log(record, step=record["step"])
        if record.get("val/loss", math.inf) < self.best:
            self.best = record["val/loss"]
            stored = self.run.summary.get("best_val_loss")
            if stored is None or self.best < stored:  # of an earlier part of the run
                self.run.summary["best_val_loss"] = self.best

    def close(self) -> None:
        """Sends what is left."""
        self.run.finish()


class TensorBoard:
    """TensorBoard: event files in the folder `tensorboard` of the run."""

    def __init__(self, config: Config, parameters: int, first_step: int):
        """Goes on in the run's folder; records from `first_step` on that it holds are hidden."""
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(str(Path(config.out_dir) / "tensorboard"),
                                    purge_step=first_step or None)
        self.writer.add_text("parameters", f"{parameters:,}")
        self.writer.add_text("config", "\n\n".join(f"{k} = {v}" for k, v in vars(config).items()))

    def log(self, record: dict) -> None:
        """Takes one record."""
        for key, value in record.items():
            if key != "step":
                self.writer.add_scalar(key, value, record["step"])

    def close(self) -> None:
        """Sends what is left."""
        self.writer.close()


def asked_for(config: Config) -> dict[str, type]:
    """Returns the trackers that the settings ask for, by name."""
    return ({"wandb": Wandb} if config.wandb_log else {}) | (
        {"tensorboard": TensorBoard} if config.tensorboard_log else {})

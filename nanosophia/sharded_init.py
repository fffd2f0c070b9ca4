"""Initial values of a model whose parameters are split over ranks, without ever having it whole.

The model is built on the meta device, where tensors have shapes and no memory. Each rank then draws
one tensor after the other, as building the model on the CPU does, and keeps its part: the same
numbers as in one process, in the memory of the largest tensor and of the rank's parts.
"""

from collections.abc import Iterator
from copy import deepcopy

import torch
from torch import Tensor

from model import GPT
from nanosophia.distributed import Ranks, is_sharded, to_local


class InitialValues:
    """Remembers what building a model draws, from one on the meta device, before it is split."""

    def __init__(self, model: GPT):
        self.init_weight = model.init_weight
        self.layers = [deepcopy(m).float() for m in model.modules()  # as before a cast to float64
                       if hasattr(m, "reset_parameters")]
        self.shapes = {name: p.shape for name, p in model.named_parameters()}

    def draw(self) -> Iterator[tuple[str, Tensor]]:
        """Yields each parameter's name and its values, in float32."""
        for layer in self.layers:  # torch's own initial values, which are drawn first
            deepcopy(layer).to_empty(device="cpu").reset_parameters()
        for name, shape in self.shapes.items():
            value = torch.ones(shape)  # as norms keep it
            self.init_weight(name, value)
            yield name, value

    @torch.no_grad()
    def fill(self, model: GPT, ranks: Ranks) -> None:
        """Gives the split model memory on its device, and its values."""
        model.to_empty(device=ranks.device)
        for name, value in self.draw():
            p = model.get_parameter(name)
            parts, own = (value,), 0
            if is_sharded(p):  # in its mesh's last dimension, by rows, as torch.chunk splits them
                last = p.device_mesh.ndim - 1
                parts = value.chunk(p.device_mesh.size(last))
                own = p.device_mesh.get_local_rank(last)
            if own < len(parts):
                to_local(p).copy_(parts[own])

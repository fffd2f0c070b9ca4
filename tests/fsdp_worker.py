"""Run by test_sophia.py under torchrun: Sophia on FSDP2 shards against the whole parameters."""

import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from model import GPT, GPTConfig
from nanosophia.controlled_gamma import ControlledSophia
from nanosophia.distributed import Ranks, wrap
from nanosophia.update_rules import compiled_update, sliced_update
from sophia import Sophia, sophia_update

MAKE = {  # name: optimizer class, its options, its rule
    "plain": (Sophia, {}, sophia_update), "sliced": (Sophia, {}, sliced_update),
    "compiled": (Sophia, {}, compiled_update),
    "tensors": (ControlledSophia, dict(gamma_target=0.9), sliced_update),
    "rows": (ControlledSophia, dict(gamma_target=0.9, gamma_rows=True), sliced_update)}


def trained(sharded: bool, name: str) -> list[torch.Tensor]:
    """Parameters, m and h after four steps, in full."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=33))
    if sharded:
        for block in model.transformer.h:
            fully_shard(block)
        fully_shard(model)
    cls, options, rule = MAKE[name]
    optimizer = cls(model.parameters(), lr=1e-2, gamma=1.0, **options)
    optimizer.rule = rule
    idx = torch.randint(33, (4, 8), generator=torch.Generator().manual_seed(1))
    for step in range(4):
        model(idx, idx).backward()
        if step % 2 == 0:
            optimizer.update_hessian([32 * p.grad * p.grad for p in optimizer.parameters()])
        optimizer.step()
        optimizer.zero_grad()
    tensors = [x for p in optimizer.parameters()
               for x in (p, optimizer.state[p]["exp_avg"], optimizer.state[p]["hessian"])]
    return [x.full_tensor() if hasattr(x, "full_tensor") else x for x in tensors]


def uniforms_arrive_unrounded() -> None:
    """In a sharded bfloat16 model, whose blocks round what they are given."""
    model = wrap(GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=33)),
                 Ranks(dist.get_rank(), 2, torch.device("cpu")), shards=2,
                 precision=torch.bfloat16)
    uniforms = torch.rand(4, 8)

    def label(p: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        assert torch.equal(given, uniforms.flatten())
        return given.new_zeros(len(given), dtype=torch.long)

    with torch.autocast("cpu", torch.bfloat16):
        model(torch.zeros(4, 8, dtype=torch.long), uniforms,
              sample_labels_fn=label).backward()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    uniforms_arrive_unrounded()
    for name in sys.argv[1:]:
        for a, b in zip(trained(True, name), trained(False, name), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    dist.destroy_process_group()

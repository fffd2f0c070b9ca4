"""A model that is split over ranks begins with the values of a whole one, and is never whole."""

from dataclasses import replace

import pytest
import torch

from experiments.memory import Allocated
from model import GPT, GPTConfig
from nanosophia.distributed import Ranks
from nanosophia.sharded_init import InitialValues

CONFIG = GPTConfig(n_layer=3, n_head=2, n_embd=16, block_size=8, vocab_size=33)


def on_meta(config):
    with torch.device("meta"):
        return GPT(config)


@pytest.mark.parametrize("config", [
    CONFIG, replace(CONFIG, bias=True),
    replace(CONFIG, bias=True, rotary_fraction=0.25, parallel_residual=True, tied_head=False)])
@pytest.mark.parametrize("double", [False, True])
def test_the_values_are_those_of_a_model_built_whole(config, double):
    torch.manual_seed(3)
    whole = GPT(config)
    model = on_meta(config).double() if double else on_meta(config)
    values = InitialValues(model)
    torch.manual_seed(3)
    drawn = dict(values.draw())
    assert drawn.keys() == dict(whole.named_parameters()).keys()
    assert all(torch.equal(x, drawn[name]) for name, x in whole.named_parameters())
    torch.manual_seed(3)
    values.fill(model, Ranks(0, 1, torch.device("cpu")))
    assert all(torch.equal(p, drawn[name].to(p.dtype)) for name, p in model.named_parameters())


def test_beside_the_result_one_tensor_exists_at_a_time():
    config = GPTConfig(n_layer=12, n_head=4, n_embd=64, block_size=16, vocab_size=64)
    model = on_meta(config)
    values = InitialValues(model)
    largest = max(4 * shape.numel() for shape in values.shapes.values())
    with Allocated() as allocated:
        for _name, _value in values.draw():
            pass
    assert allocated.most <= 2 * largest < 4 * model.num_params() / 10

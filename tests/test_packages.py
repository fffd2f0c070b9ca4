"""Optimizers of installed packages: trained with, saved, resumed, and refused by name."""

import json
import math
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import train
from model import GPT
from nanosophia.checkpoint import load_latest
from nanosophia.configurator import ConfigError
from nanosophia.dataloader import ValidationWindows, open_dataset
from nanosophia.distributed import Ranks
from nanosophia.evaluation import evaluate
from nanosophia.optimizer_state import Beginning, StateError, flatten_state, restore_state
from nanosophia.packages import build, parse_arguments
from nanosophia.resume import load_config
from tests.conftest import run_train

MINE = '''
import torch

class Plain(torch.optim.Optimizer):
    """SGD with whatever a test adds to its state."""
    def __init__(self, params, rate=1.0, weight_decay=0.0, add="nothing"):
        super().__init__(params, dict(rate=rate, weight_decay=weight_decay, add=add))
        self.calls, self.seen, self.clip = 0, [], lambda x: x

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["rate"])
                if group["add"] == "generator":
                    self.state[p]["source"] = torch.Generator()
        if self.param_groups[0]["add"] == "call":
            self.calls += 1
        if self.param_groups[0]["add"] == "list":
            self.seen.append(1.0)
        if self.param_groups[0]["add"] == "key":
            self.state[self.param_groups[0]["params"][0]][3] = 1.0
        if self.param_groups[0]["add"] == "group":
            self.param_groups[0]["when"] = slice(0, 1)
        if self.param_groups[0]["add"] == "error":
            raise RuntimeError("of its own\\nin two lines")

class NoDecay(Plain):
    def __init__(self, params, lr):
        super().__init__(params, lr)
        del self.defaults["weight_decay"]
        for group in self.param_groups:
            group["lr"] = lr

class OwnState(Plain):
    def state_dict(self):
        return {"mine": 1}

class NeedsClosure(Plain):
    def step(self, closure):
        closure()

def factory(params, lr):
    return Plain(params, lr)
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "mine_for_tests.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)


# With lists of tensors, numbers and tensors in the groups, a second set of weights.
@pytest.mark.parametrize("name, arguments", [
    ("pytorch_optimizer:SOAP", "precondition_frequency=3"), ("pytorch_optimizer:Prodigy", ""),
    ("pytorch_optimizer:ScheduleFreeAdamW", "betas=(0.9, 0.99)"), ("torch.optim:NAdam", ""),
    ("torch.optim:SGD", "momentum=0.9, fused=True")])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_optimizer_of_a_package_resumes_bit_identically(tiny, tmp_path, name, arguments, dtype):
    pytest.importorskip(name.partition(":")[0])
    flags = (f"--optimizer={name}", "--max_iters=20", "--checkpoint_interval=9",
             "--eval_interval=4", "--learning_rate=1e-2", "--dropout=0.1", f"--dtype={dtype}",
             *([f"--optimizer_args={arguments}"] if arguments else []))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_train(*tiny(*flags, out_dir=whole))
    run_train(*tiny(*flags, out_dir=parts), "--keep_checkpoints=3")
    for step in (18, 20):
        for path in (parts / f"step_{step:08d}").iterdir():
            path.unlink()
        (parts / f"step_{step:08d}").rmdir()
    assert load_latest(parts).state["step"] == 9
    run_train(*tiny(*flags, "--init_from=resume", out_dir=parts))
    for file in ("model.safetensors", "optimizer.safetensors"):
        one, two = (load_file(load_latest(run).folder / file) for run in (whole, parts))
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    states = [load_latest(run).state.get("optimizer", {}) for run in (whole, parts)]
    one, two = ({key: sorted(map(str, entries)) for key, entries in state.items()}
                for state in states)
    assert one == two
    losses = [json.loads(line)["train/loss"] for line in
              (whole / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] != losses[0]


def test_the_schedule_sets_the_entry_that_lr_key_names(tiny, tmp_path, mine):
    rates = []
    original = train.train_step

    def noting(run, step):
        found = original(run, step)
        rates.append({group["rate"] for group in run.optimizer.param_groups})
        return found

    train.train_step = noting
    try:
        run_train(*tiny("--optimizer=mine_for_tests:Plain", "--optimizer_args=lr_key='rate'",
                        "--learning_rate=0.5", "--warmup_iters=2", "--max_iters=3"))
    finally:
        train.train_step = original
    assert rates == [{0.25}, {0.5}, {0.5}]


@pytest.mark.parametrize("flags, words", [
    (["--optimizer=nowhere_at_all:Class"], "No module named 'nowhere_at_all'"),
    (["--optimizer=torch.optim:Adamm"], "has no attribute 'Adamm'"),
    (["--optimizer=torch.nn:Linear"], "is no class of torch.optim.Optimizer"),
    (["--optimizer=mine_for_tests:factory"], "is no class of torch.optim.Optimizer"),
    (["--optimizer=torch.optim:LBFGS"], "needs a closure"),
    (["--optimizer=mine_for_tests:NeedsClosure"], "needs a closure"),
    (["--optimizer=torch.optim:NAdam", "--optimizer_args=betas=3"], "does not take these"),
    (["--optimizer=torch.optim:NAdam", "--optimizer_args=beta=3"], "unexpected keyword"),
    (["--optimizer=torch.optim:NAdam", "--optimizer_args=eps=open('x')"], "cannot be read"),
    (["--optimizer=torch.optim:NAdam", "--optimizer_args=3"], "arguments have names"),
    (["--optimizer=torch.optim:NAdam", "--optimizer_args=eps=1,eps=1"], "cannot be read"),
    (["--optimizer=torch.optim:NAdam", "--optimizer_args=**{}"], "arguments have names"),
    (["--optimizer=torch.optim:NAdam", "--optimizer_args=betas={[1]:2}"], "cannot be read"),
    (["--optimizer=torch.optim:NAdam", "--optimizer_args=eps=7)(eps=1"], "arguments have names"),
    (["--optimizer=torch.optim:NAdam", "--optimizer_args=weight_decay=7"], "train.py's own"),
    (["--optimizer=mine_for_tests:OwnState", "--optimizer_args=lr_key='rate'"],
     "has a state_dict of its own kind, mine"),
    (["--optimizer=torch.optim:NAdam", "--optimizer_args=lr=3"], "lr_key = 'lr' must name"),
    (["--optimizer=mine_for_tests:Plain"], "unexpected keyword argument 'lr'"),
    (["--optimizer=mine_for_tests:NoDecay"], "has no weight_decay; give --weight_decay=0"),
    (["--optimizer=adamw", "--optimizer_args=eps=1"], "not for adamw; leave them out"),
    (["--optimizer=torch.optim:NAdam:x"], "has no attribute 'NAdam:x'"),
    (["--optimizer=:"], "ValueError: Empty module name"),
    (["--optimizer=torch.optim:NAdam", "--beta1=0.8"], "beta1 has no effect on optimizer = torch"),
    (["--optimizer=adamw", "--metric_power=0.5"], "metric_power is a setting of metric_muon and"),
    (["--optimizer=muon", "--mars_gamma=0.5"], "mars_gamma is a setting of mars and has no effect"),
])
def test_what_cannot_be_an_optimizer_is_refused_in_one_line(tiny, mine, refused, flags, words):
    assert words in refused(train.main, tiny(*flags))


def test_no_decay_is_taken_where_none_is_asked_for(tiny, tmp_path, mine):
    run_train(*tiny("--optimizer=mine_for_tests:NoDecay", "--weight_decay=0", "--max_iters=2"))
    assert load_latest(tmp_path / "run").state["step"] == 2


@pytest.mark.parametrize("add, words", [
    ("generator", "state 'source' is or has a Generator"),
    ("group", "entry 'when' of a param group, which training changed, is or has a slice"),
    ("call", "keeps 'calls', which training changes, outside its state_dict"),
    ("list", "keeps 'seen', which training changes, outside its state_dict"),
    ("key", "keeps 3 in its state, whose names must be text"),
    ("error", "failed in its step: RuntimeError: of its own; an optimizer that needs a closure")])
def test_what_no_checkpoint_can_hold_is_refused_after_the_first_step(tiny, tmp_path, mine, capsys,
                                                                     add, words):
    with pytest.raises(SystemExit) as stopped:
        run_train(*tiny("--optimizer=mine_for_tests:Plain",
                        f"--optimizer_args=lr_key='rate', add='{add}'"))
    line, = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert words in line and stopped.value.code == (1 if add == "error" else 2)
    assert load_latest(tmp_path / "run") is None


def test_every_plain_value_comes_back_with_its_type_and_precision():
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))

    def make():
        optimizer = torch.optim.SGD([p], lr=0.1)
        return optimizer, Beginning.of(optimizer)

    first, beginning = make()
    values = dict(number=3, share=0.1, huge=10**30, none=None, yes=True, text="ä", inf=math.inf,
                  pair=(1, [2.0, (torch.ones(2, dtype=torch.int16),)]),
                  table={1: "a", "b": {2: torch.ones(1, dtype=torch.float16)}},
                  quarter=torch.ones(3, dtype=torch.uint8), exact=torch.ones(3, dtype=torch.int64),
                  empty=[], low=torch.ones(3, dtype=torch.bfloat16), turned=torch.rand(3, 4).mT,
                  wide=torch.ones(3, dtype=torch.float64))
    first.state[p].update(values)
    first.param_groups[0]["counter"] = (5, torch.tensor(2.5))
    first.param_groups[0]["lr"] = 9.0
    tensors, rest = flatten_state(first, beginning)
    second, _ = make()
    restore_state(second, {k: v.clone() for k, v in tensors.items()},
                  json.loads(json.dumps(rest, allow_nan=False)))
    found = second.state[p]
    assert found.keys() == values.keys()
    assert second.param_groups[0]["lr"] == 0.1  # the schedule's
    assert second.param_groups[0]["counter"][0] == 5
    for key in ("number", "share", "huge", "none", "yes", "text", "inf", "empty"):
        assert found[key] == values[key] and type(found[key]) is type(values[key]), key
    for one, two in ((found["pair"][1][1][0], values["pair"][1][1][0]),
                     (found["table"]["b"][2], values["table"]["b"][2]),
                     *((found[k], values[k]) for k in ("quarter", "exact", "low"))):
        assert one.dtype == two.dtype and torch.equal(one, two)
    assert found["turned"].stride() == (1, 4)  # products of it round as before
    assert torch.equal(found["turned"], values["turned"])
    assert found["wide"].dtype == torch.float64
    assert isinstance(found["pair"], tuple) and found["table"].keys() == {1, "b"}


def test_a_setting_that_training_leaves_alone_is_the_new_runs():
    p = torch.nn.Parameter(torch.zeros(3))
    first, second = (torch.optim.SGD([p], lr=0.1, momentum=m) for m in (0.5, 0.7))
    tensors, rest = flatten_state(first, Beginning.of(first))
    assert not rest
    restore_state(second, tensors, rest)
    assert second.param_groups[0]["momentum"] == 0.7


def test_state_beside_the_parameters_is_refused():
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([p], lr=0.1)
    optimizer.state["all"] = 3
    with pytest.raises(StateError, match="keeps 'all' in its state beside"):
        flatten_state(optimizer)


def test_arguments_are_literals_alone():
    assert parse_arguments("betas=(0.9, 0.99), name='a,b', on=True, n=None, x=[1, -2e3]") == dict(
        betas=(0.9, 0.99), name="a,b", on=True, n=None, x=[1, -2e3])
    assert parse_arguments("") == {}
    with pytest.raises(ConfigError, match="lr_key = 3 must name the argument that takes"):
        build("torch.optim:SGD", "lr_key=3", [], 0.1)


def test_a_saved_setting_of_another_kind_and_a_value_twice_are_refused():
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.5)
    for rest, words in ((dict(groups=[[0, "momentum", "x"]]), "momentum of a param group is 'x'"),
                        (dict(groups=[[7, "momentum", 1]]), "it has a param group number 7"),
                        (dict(state=[[0, "a", 1]]), "it has 'a' of parameter 0 twice"),
                        (dict(state=[[9, "b", 1]]), "it has a parameter number 9")):
        with pytest.raises(ValueError, match=words):
            restore_state(optimizer, {"0.a": torch.zeros(3)}, rest)


def test_training_evaluates_and_saves_the_average_and_steps_on_the_others(tiny, tmp_path):
    """Of Schedule-Free: what is measured and saved is x; the state has the y that comes next."""
    run_train(*tiny("--optimizer=schedule_free", "--max_iters=6", "--eval_interval=6",
                    "--learning_rate=1e-2"))
    folder = load_latest(tmp_path / "run").folder
    saved, state = load_file(folder / "model.safetensors"), load_file(
        folder / "optimizer.safetensors")
    embedding = saved["transformer.wte.weight"]
    z, y = state["0.z"], state["0.y"]
    torch.testing.assert_close(embedding, y.lerp(z, 1 - 1 / 0.9))
    assert (embedding - y).abs().max() > 1e-4
    recorded = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    run_train(*tiny("--eval_only", "--eval_windows=6"))
    config = load_config(tiny("--optimizer=schedule_free"))[0]
    model = GPT(replace(config, vocab_size=320).model)
    model.load_state_dict(saved)
    data = open_dataset(config.dataset, config.block_size)
    windows = ValidationWindows(data.val, block_size=16, limit=6, vocab_size=data.vocab_size)
    ranks = Ranks(0, 1, torch.device("cpu"))
    assert evaluate(model, windows, ranks, 2, nullcontext) == pytest.approx(recorded["val/loss"])


def test_a_run_is_evaluated_without_its_package(tiny, tmp_path, mine, capsys):
    run_train(*tiny("--optimizer=mine_for_tests:Plain", "--optimizer_args=lr_key='rate'"))
    (tmp_path / "mine_for_tests.py").unlink()
    sys.modules.pop("mine_for_tests")
    run_train(*tiny("--eval_only"))
    assert "step 6: " in capsys.readouterr().out

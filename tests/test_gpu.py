"""What only a GPU can show; `python -m experiments.gpu` runs these, elsewhere they are skipped."""

import json

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import train
from nanosophia.checkpoint import load_latest
from tests.conftest import run_train
from tests.test_compile import build

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(),
                                                  reason="needs a CUDA device")]
OPTIMIZERS = ["adamw", "sophiag", "sophiah"]


def flags(tiny, optimizer, *more):
    own = ["--gamma=0.1"] if optimizer == "sophiah" else []
    return tiny("--device=cuda", f"--optimizer={optimizer}", "--hessian_interval=3",
                "--max_iters=9", "--vocab_size=320", *own, *more)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_host_waits_for_nothing_between_two_records(tiny, optimizer, dtype):
    run, _ = build(flags(tiny, optimizer, f"--dtype={dtype}", "--compile=on"), "cuda")
    for step in range(6):  # compiles and allocates
        train.train_step(run, step)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(6, 9):
            train.train_step(run, step)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_rows_are_pinned(tiny):
    run, _ = build(flags(tiny, "adamw"), "cuda")
    assert run.batches.rows(0, 0, 8).is_pinned()


@pytest.fixture
def one_rank():
    """A process group of one rank over nccl."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1,
                            device_id=torch.device("cuda", 0))
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("optimizer", ["adamw", "sophiag"])
def test_ddp_over_nccl_trains_one_rank_as_none(tiny, one_rank, optimizer):
    losses = []
    for wraps in (False, True):
        run, _ = build(flags(tiny, optimizer, "--dtype=float32", "--compile=off",
                             "--compile_optimizer=off"), "cuda")
        if wraps:
            run.wrapped = DistributedDataParallel(run.model, device_ids=[0],
                                                  gradient_as_bucket_view=True)
        losses.append([train.train_step(run, step)[0].item() for step in range(4)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_fsdp2_over_nccl_computes_one_ranks_gradients(tiny, one_rank, dtype):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    run, _ = build(flags(tiny, "adamw", "--dtype=float32", "--compile=off"), "cuda")
    ids = torch.arange(32, device="cuda").view(2, 16)
    loss = run.model(ids, ids)
    loss.backward()
    gradients = [p.grad.clone() for p in run.model.parameters()]
    run.model.zero_grad()
    mesh, policy = init_device_mesh("cuda", (1,)), MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32)
    for part in (*run.model.transformer.h, run.model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    again = run.model(ids, ids)
    again.backward()
    tolerance = 1e-5 if dtype is None else 5e-2
    assert again.item() == pytest.approx(loss.item(), abs=tolerance)
    for p, g in zip(run.model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), g, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_saving_while_training_changes_nothing(tiny, tmp_path, optimizer):
    last = []
    for interval in (1, 9):
        out = tmp_path / str(interval)
        run_train(*flags(tiny, optimizer, f"--checkpoint_interval={interval}",
                         f"--out_dir={out}"))
        last.append((load_latest(out).model_tensors(), json.loads(
            (out / "metrics.jsonl").read_text().splitlines()[-1])["train/loss"]))
    assert last[0][1] == last[1][1]
    assert all(torch.equal(x, last[1][0][name]) for name, x in last[0][0].items())

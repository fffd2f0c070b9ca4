"""Ranks: joining, wrapping, leaving."""

from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import pytest
import torch
import torch.distributed as dist

from nanosophia import distributed
from nanosophia.distributed import Ranks, _attempt_store
from tests.conftest import torchrun


@pytest.fixture
def torchrun_store(monkeypatch):
    """The store that torchrun keeps over restarts, in the environment of two ranks."""
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for name, value in dict(MASTER_ADDR="localhost", MASTER_PORT=server.port, RANK=0, WORLD_SIZE=2,
                            TORCHELASTIC_USE_AGENT_STORE=True).items():
        monkeypatch.setenv(name, str(value))
    return server


def test_restarted_ranks_do_not_read_what_killed_ones_wrote(torchrun_store):
    torchrun_store.set("attempt", "killed")  # by a rank 0 that was killed before rank 1 came
    torchrun_store.set("killed/address", "of a killed rank")
    with ThreadPoolExecutor(2) as pool:
        for address in (b"of the first restart", b"of the second"):
            earlier = torchrun_store.get("attempt").decode()
            torchrun_store.delete_key(f"{earlier}/1")
            late = pool.submit(_attempt_store, 1)
            torchrun_store.wait([f"{earlier}/1"])  # rank 1 has asked the killed rank 0
            of_rank_0, of_rank_1 = _attempt_store(0), late.result(60)
            assert not of_rank_1.check(["address"])
            of_rank_0.set("address", address)
            assert of_rank_1.get("address") == address


def test_without_torchruns_store_rank_0_opens_one(torchrun_store, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("MASTER_PORT", "0")
    store = _attempt_store(0)
    store.set("a", "b")
    assert store.get("a") == b"b" and not torchrun_store.check(["a"])


def test_leaving_the_group_ends_its_threads(tiny):
    result = torchrun(2, "tests/exit_worker.py", *tiny("--max_iters=2"))
    assert result.returncode == 0, result.stderr
    assert "no thread is left" in result.stdout


@pytest.mark.parametrize("total, largest, world, sizes", [
    (480, 15, 8, [15] * 4), (480, 10, 10, [8] * 6), (480, 15, 64, [7]), (8, 3, 1, [2] * 4),
    (479, 10, 1, [10] * 47 + [9]), (8, 4, 3, [2]), (7, 9, 1, [7]), (3, 2, 4, [])])
def test_micro_batches_are_alike_where_that_costs_little(total, largest, world, sizes):
    first = Ranks(0, world, torch.device("cpu")).micro_batches(total, largest)
    assert sorted((part.stop - part.start for part in first), reverse=True) == sizes


@pytest.mark.parametrize("total, largest, world, count", [
    (480, 10, 7, 1), (32, 10, 10, 1), (240, 4, 64, 1), (5, 1, 3, 1), (240, 7, 10, 12),
    (240, 20, 8, 3)])
def test_every_row_is_one_ranks_whatever_divides(total, largest, world, count):
    rows, numbers, together = [], [], [[] for _ in range(count)]
    for rank in range(world):
        chunks = Ranks(rank, world, torch.device("cpu")).chunks(total, count, largest)
        parts = [part for chunk in chunks for part in chunk]
        assert all(0 < part.stop - part.start <= largest for part in parts)
        rows += [row for part in parts for row in range(part.start, part.stop)]
        numbers.append(len(parts))
        for chunk in chunks if count > 1 else []:  # a chunk is not divided between ranks
            assert chunk[-1].stop - chunk[0].start == total // count
        shared = Ranks(rank, world, torch.device("cpu")).chunks(total, count, largest, shared=True)
        together = [[*chunk, *part] for chunk, part in zip(together, shared, strict=True)]
    for c, chunk in enumerate(together):  # ranks take rows of every chunk, whatever their number
        assert [row for part in chunk for row in range(part.start, part.stop)] == list(
            range(c * total // count, (c + 1) * total // count))
    assert rows == list(range(total))
    if count == 1 and total // world >= -(-total // (world * largest)):
        assert len(set(numbers)) == 1  # they run in step


def test_small_tensors_are_reduced_together_and_each_once(monkeypatch):
    monkeypatch.setattr(distributed, "BUCKET", 100)
    tensors = [torch.empty(n, dtype=dtype, device="meta") for n, dtype in (
        (30, torch.float32), (1, torch.int64), (60, torch.float32), (500, torch.float32),
        (20, torch.float32), (0, torch.float32), (2, torch.int64))]
    buckets = distributed._buckets(tensors)
    assert sorted(map(id, chain(*buckets))) == sorted(map(id, tensors))
    sizes = [[t.numel() for t in bucket] for bucket in buckets]
    assert sizes == [[30, 60], [500], [20, 0], [1, 2]]
    assert all(len({t.dtype for t in bucket}) == 1 for bucket in buckets)

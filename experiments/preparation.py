"""Measures data preparation beside nanoGPT's recipe, on one parquet file.

    python -m experiments.preparation --input=books.parquet

Both run in a process of their own and tokenise every document of the file with GPT-2's BPE, with
one and with two worker processes: data/openwebtext/prepare.py, and nanoGPT's recipe (datasets.map
to lists of ids in an Arrow cache, then a memory-mapped file written shard by shard). The table has
processor seconds of the process and its children, wall seconds, the largest resident memory of any
one process, and the most disk space used beyond the result.
"""

if __name__ == "__main__":
    import nanosophia.startup  # noqa: F401

import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench import publish
from experiments.archive import measured
from nanosophia.command import command
from nanosophia.configurator import ConfigError, Settings, load, option

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class PreparationSettings(Settings):
    """Settings of `python -m experiments.preparation`."""

    input: str = option("", "parquet file with a column `text`")
    json: str = option("", "file that receives the measurements; empty = none")
    recipe_dir: str = option("", "set by the command itself: run nanoGPT's recipe into this folder")
    num_proc: int = option(1, "set by the command itself: worker processes of that recipe", low=1)


def run_nanogpt_recipe(source: str, out_dir: Path, num_proc: int) -> None:
    """Prepares a file as nanoGPT does: splits it, maps documents to lists of ids with their
    lengths, and concatenates these in a memory-mapped file."""
    import tiktoken
    from datasets import load_dataset
    encoding = tiktoken.get_encoding("gpt2")
    rows = load_dataset("parquet", data_files=source, split="train")
    splits = rows.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    splits["val"] = splits.pop("test")

    def tokenise(example):
        ids = encoding.encode_ordinary(example["text"])
        ids.append(encoding.eot_token)
        return {"ids": ids, "len": len(ids)}

    tokenised = splits.map(tokenise, remove_columns=["text"], num_proc=num_proc)
    for split, dataset in tokenised.items():
        total = np.sum(dataset["len"], dtype=np.uint64)
        ids = np.memmap(out_dir / f"{split}.bin", dtype=np.uint16, mode="w+", shape=(int(total),))
        offset, shards = 0, min(1024, len(dataset))
        for index in range(shards):
            batch = dataset.shard(num_shards=shards, index=index,
                                  contiguous=True).with_format("numpy")
            block = np.concatenate(batch["ids"])
            ids[offset:offset + len(block)] = block
            offset += len(block)
        ids.flush()


def measure(command: list[str], folder: Path) -> dict:
    """Runs a command that writes into `folder`; returns what it took of each resource."""
    disk_bytes, stop = [0], threading.Event()

    def watch():
        while not stop.wait(0.2):
            disk_bytes.append(_disk_bytes(folder))

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL, env=os.environ | {
                       "HF_HOME": str(folder / "cache"), "PYTHONPATH": str(ROOT)})
    wall = time.perf_counter() - start
    stop.set()
    watcher.join()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    size = sum(path.stat().st_size for path in folder.glob("out/*.bin"))
    return dict(cpu_s=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
                wall_s=wall, tokens=size // 2,
                extra_disk=max(*disk_bytes, _disk_bytes(folder)) / size - 1,
                max_rss_mb=after.ru_maxrss / 1024)


def _disk_bytes(folder: Path) -> int:
    """Returns the bytes that the files in a folder occupy."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_blocks * 512 if path.is_file() else 0
        except OSError:  # removed since it was listed
            continue
    return total


def table(report: dict) -> str:
    """Returns the report as a Markdown table."""
    lines = [f"{report['rows'][0]['tokens']:,} tokens", "",
             "| way | processes | tokens per CPU s | tokens per s | CPU s | wall s | RSS, MB | "
             "extra disk |", "|---" * 8 + "|"]
    for row in report["rows"]:
        lines.append(f"| {row['way']} | {row['processes']} | {row['tokens'] / row['cpu_s']:,.0f} | "
                     f"{row['tokens'] / row['wall_s']:,.0f} | {row['cpu_s']:.1f} | "
                     f"{row['wall_s']:.1f} | {row['max_rss_mb']:.0f} | {row['extra_disk']:.2f} x |")
    return "\n".join(lines)


@command()
def main(argv: list[str]) -> None:
    """Runs the command."""
    settings, _ = load(PreparationSettings, argv, "python -m experiments.preparation --input=FILE")
    if not Path(settings.input).is_file():
        raise ConfigError(f"--input={settings.input} is no file; give a parquet file", "input")
    if settings.recipe_dir:
        run_nanogpt_recipe(settings.input, Path(settings.recipe_dir), settings.num_proc)
        return
    source = str(Path(settings.input).resolve())
    # The system reports the memory of the largest child so far, so the smaller, ours, runs first.
    ways = [("ours", n) for n in (1, 2)] + [("nanoGPT's recipe", n) for n in (1, 2)]
    rows = []
    for name, n in ways:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            (folder / "out").mkdir()
            command = [sys.executable, "data/openwebtext/prepare.py", f"--input={source}",
                       f"--out_dir={folder / 'out'}", f"--num_proc={n}"]
            if name != "ours":
                command = [sys.executable, "-m", "experiments.preparation", f"--input={source}",
                           f"--recipe_dir={folder / 'out'}", f"--num_proc={n}"]
            rows.append(dict(way=name, processes=n, **measure(command, folder)))
    report = dict(rows=rows) | measured("preparation", argv)
    publish(report, table(report), settings.json)


if __name__ == "__main__":
    main(sys.argv[1:])

"""The options of train.py, with unit, default, legal range and meaning.

The model's options are inherited from `model.GPTConfig`: a field added there is a flag, a line of
`--help`, and part of every checkpoint.
"""

import ast
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from nanosophia.configurator import ConfigError, Settings, option

USAGE = "train.py [config/FILE.py] [--key=value]"


def _model_options() -> type:
    """Returns `model.GPTConfig` without torch, which the rest of model.py needs.

    Importing torch takes more than a second, in which --help and a wrong key are answered.
    """
    path = Path(__file__).parents[1] / "model.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body
                 if getattr(node, "name", "") in ("option", "GPTConfig")
                 or (isinstance(node, ast.Import | ast.ImportFrom)
                     and not ast.unparse(node).partition(" ")[2].startswith("torch"))]
    names = {"__name__": "model"}
    exec(compile(tree, path, "exec"), names)
    return names["GPTConfig"]


GPTOptions = _model_options()


# What users of nanoGPT and of the authors' code look for, and where it is here.
RENAMED = {
    "eval_iters": "set eval_windows, which counts windows of block_size where eval_iters counts "
                  "batches: eval_iters x batch_size",
    "always_save_checkpoint": "set checkpoint_interval and keep_best",
    "rho": "the paper's gamma: set gamma",
    "interval": "set hessian_interval",
    "hess_interval": "set hessian_interval",
    "bs": "it is counted from the labels used",
    "backend": "it follows from device",
    "optimizer_name": "set optimizer",
    "hidden_size": "set n_embd", "num_layers": "set n_layer", "num_heads": "set n_head",
}


@dataclass(frozen=True, kw_only=True)
class Config(Settings, GPTOptions):
    """The settings of train.py: the model's (`model.GPTConfig`) and all others.

    Names are nanoGPT's, values GPT-2's and the Sophia paper's.
    """

    vocab_size: int = option(0, "rows of the embedding; 0 = the data's vocabulary rounded up to a "
                                "multiple of 64 (GPT-2: 50304)", low=0, high=1 << 20)

    out_dir: str = option("out", "folder for checkpoints and metrics.jsonl; with a config file by "
                                 "default out/NAME, after the file's name", section="run")
    init_from: str = option(
        "scratch", "scratch: start anew; resume: continue the newest checkpoint of out_dir; auto: "
                   "resume if there is one, else start anew; RUN@STEP: branch off another run's "
                   "saved step, with all that it was in; or weights that a new run starts from: a "
                   "ckpt.pt of nanoGPT or the authors, a GPT-2 folder of transformers or a name "
                   "on its hub")
    reset_optimizer: bool = option(
        False, "with init_from = another run's folder, or RUN@STEP: go on from its newest step, or "
               "that, with its data order and schedule, but with a fresh optimizer, which may be "
               "another or have other settings")
    seed: int = option(1337, "seed of initialisation, data order, sampled labels, dropout", low=0,
                       high=2**63 - 1)
    eval_interval: int = option(1000, "between evaluations (the last step is always one)",
                                unit="steps", low=1)
    eval_windows: int = option(2000, "validation windows evaluated, evenly spaced; 0 = every one",
                               unit="windows of block_size", low=0)
    eval_only: bool = option(False, "measure the newest checkpoint (or init_from's weights) on the "
                                    "whole validation split, without training")
    checkpoint: Literal["newest", "best"] = option(
        "newest", "with eval_only: the newest checkpoint, or the one with the lowest val/loss")
    eval_tasks: Literal["none", "hellaswag"] = option(
        "none", "score the model on HellaSwag while it trains (python -m nanosophia.hellaswag)")
    eval_tasks_interval: int = option(1000, "between such scores (the last step is always one)",
                                      unit="steps", low=1)
    eval_tasks_limit: int = option(0, "questions, the first ones; 0 = all", low=0)
    hellaswag_file: str = option("", "its jsonl file; empty = downloaded through datasets")
    log_interval: int = option(10, "between records (and host syncs)", unit="steps", low=1)
    checkpoint_interval: int = option(1000, "between checkpoints (the last step always saves)",
                                      unit="steps", low=1)
    keep_checkpoints: int = option(2, "newest checkpoints kept", low=2)
    keep_best: bool = option(
        True, "also keep the checkpoint with the lowest val/loss of those that were saved on an "
              "evaluation's step")
    on_nonfinite: Literal["stop", "skip"] = option(
        "stop", "when a loss, gradient or estimate is not finite, nothing is updated; then stop "
                "the run, or skip that step")
    max_skipped: int = option(10, "with on_nonfinite=skip: most in a row before the run ends",
                              unit="steps", low=1)
    sample_tokens: int = option(0, "length of the text sampled when training ends; 0 = none",
                                unit="tokens", low=0)
    wandb_log: bool = option(False, "also record to Weights & Biases")
    wandb_project: str = option("nanosophia", "its project")
    wandb_run_name: str = option("", "its run name; empty = the name of out_dir")
    tensorboard_log: bool = option(False, "also record to TensorBoard, in out_dir/tensorboard")

    dataset: str = option(
        "openwebtext", "folder under data/, or a path, with train.bin and val.bin", section="data")
    bare_tokens: Literal["none", "gpt2"] = option(
        "none", "what the ids are where no meta.json says it; gpt2 for .bin files of nanoGPT")
    sampling: Literal["epochs", "random"] = option(
        "epochs", "every window once before any again, or nanoGPT's random places")
    batch_size: int = option(
        0, "most sequences per micro-batch and rank, whose rows are divided evenly; 0 = as many as "
           "fit the GPU's memory by the dry run's count, elsewhere 15", low=0, high=1 << 20)
    total_batch_size: int = option(
        480, "sequences per step over all ranks and micro-batches", low=1, high=1 << 20)

    optimizer: str = option(
        "sophiag", "sophiag, sophiah, adamw, lion, adahessian; muon, metric_muon, metric_muon_gnb, "
                   "soap, kron (hidden matrices; AdamW for the rest); ademamix, mars, "
                   "schedule_free; of the paper's Fig. 7 clip, normalize, ef_clip, ah_clip, "
                   "gnb_unclipped; or package.module:Class of an installed torch optimizer",
        section="optimizer")
    optimizer_args: str = option(
        "", "arguments of a package's optimizer: name=value, ...; learning_rate and weight_decay "
            "are given to it beside them, the former as lr or as lr_key says")
    learning_rate: float = option(6e-4, "peak learning rate", above=0)
    beta1: float = option(0.96, "decay of the gradient's moving average", low=0, below=1)
    beta2: float = option(0.99, "decay of the curvature's (AdamW: of the squared gradient's)",
                          low=0, below=1)
    eps: float = option(1e-12, "Sophia: floor of gamma*h; AdamW: added to the root", above=0)
    muon_momentum: float = option(0.95, "Muon: decay of the momentum of hidden matrices", low=0,
                                  below=1)
    metric_power: float = option(0.25, "metric_muon: power of the row and column ratios; 0: Muon",
                                 low=0, high=1)
    metric_sides: Literal["both", "rows", "columns"] = option(
        "both", "metric_muon: the sides that have a metric")
    metric_qkv: Literal["together", "apart"] = option(
        "together", "metric_muon: orthogonalise q, k and v as one matrix, or each apart")
    metric_rest: Literal["adamw", "sophia"] = option(
        "adamw", "metric_muon_gnb: what updates embeddings and vectors; sophia: with gamma_target "
                 "0.9, by rows for embeddings")
    precondition_frequency: int = option(10, "soap: between new bases", unit="steps", low=1)
    slow_beta: float = option(0.9999, "ademamix: decay of the slow momentum", low=0, below=1)
    slow_weight: float = option(5.0, "ademamix: final weight of the slow momentum", low=0)
    mars_gamma: float = option(0.025, "mars: strength of the gradient's correction", low=0)
    gamma: float = option(0.05, "Sophia: a coordinate is unclipped where |m| < gamma*h", above=0)
    hessian_bias_correction: bool = option(
        False, "beyond the paper: divide h by 1 - beta2^(number of estimates)")
    gamma_target: float = option(
        0.0, "beyond the paper: fraction of coordinates that each tensor's own, controlled gamma "
             "keeps unclipped; 0 = the fixed gamma", low=0, below=1)
    gamma_rows: Literal["none", "embedding", "matrices"] = option(
        "none", "with gamma_target, which parameters have one gamma per row instead of per tensor")
    weight_decay: float = option(
        0.2, "decoupled decay of matrices and embeddings; biases and norms do not decay", low=0)
    grad_clip: float = option(1.0, "global gradient norm limit; 0 = none", low=0)
    hessian_interval: int = option(10, "k: between curvature estimates", unit="steps", low=1)
    hessian_batch_size: int = option(240, "first sequences of the batch that the estimate uses",
                                     low=1)
    hessian_chunks: int = option(
        1, "equal parts of these, squared separately and averaged; 1: the paper", low=1)

    max_iters: int = option(100_000, "length of the run and of the schedule", unit="steps", low=1,
                            section="schedule")
    schedule: Literal["cosine", "linear", "wsd"] = option(
        "cosine", "fall of the learning rate after the warm-up; wsd: constant, then a cooldown as "
                  "1 - sqrt (Hägele et al. 2024, arXiv:2405.18392)")
    cooldown_fraction: float = option(0.2, "part of the run in which wsd cools down", above=0,
                                      high=1)
    warmup_iters: int = option(2000, "linear warm-up", unit="steps", low=0)
    min_lr_ratio: float = option(0.05, "final learning rate over the peak", low=0, high=1)

    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps", section="system")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = option(
        "auto", "autocast; auto = bfloat16 on GPUs and, for widths of 128 and more, on CPUs that "
                "compute it, float16 on older GPUs, else float32; float64 = everything, for "
                "exactness checks")
    parallel: Literal["ddp", "fsdp"] = option(
        "ddp", "with several ranks: each holds the whole model, or a share of it (FSDP2; for "
               "models that one device cannot hold)")
    shard_ranks: int = option(
        0, "with fsdp: neighbouring ranks that share one copy of the model, as many as a machine "
           "has; others hold copies (hybrid sharding); 0 = all ranks", low=0)
    activation_checkpointing: bool = option(
        False, "recompute each block in the backward pass: less memory, about a third more compute")
    loss_chunk: int = option(
        0, "compute the loss's logits this many positions at a time, to save memory; 0 = all at "
           "once, or on a CPU without compile 24 MB of them",
        unit="tokens", low=0)
    compile: Literal["auto", "on", "off"] = option(
        "auto", "torch.compile the model; auto = on CUDA only")
    compile_optimizer: Literal["auto", "on", "off"] = option(
        "auto", "torch.compile Sophia's update; auto = on CUDA only")

    print_config: bool = option(False, "print every setting with its source and exit",
                                section="without training")
    dry_run: bool = option(False, "print memory and time estimates for 1 to 256 GPUs and exit")
    dry_run_gpu: Literal[
        "B200", "H200", "H100", "A100", "L40S", "A6000", "A5000", "A10", "L4", "RTX 4090",
        "RTX 3090", "V100", "T4"] = option("H100", "GPU whose peak the days assume")
    dry_run_memory: float = option(80.0, "memory of such a GPU, into which batch_size = 0 must fit",
                                   unit="GiB", above=0)
    dry_run_mfu: float = option(0.4, "fraction of that peak that training reaches", above=0, high=1)

    @property
    def model(self):
        """Returns the model's part of these settings, a `model.GPTConfig`."""
        from model import GPTConfig
        return GPTConfig(**{f.name: getattr(self, f.name) for f in fields(GPTConfig)})

    def compiles(self, key: str, device_type: str) -> bool:
        """Returns whether the switch `key`, compile or compile_optimizer, is on for a device."""
        return getattr(self, key) == "on" or (getattr(self, key) == "auto"
                                              and device_type == "cuda")

    @property
    def tokens_per_step(self) -> int:
        """Returns the tokens of one optimizer step over all ranks."""
        return self.total_batch_size * self.block_size

    def check(self) -> None:
        if self.n_embd % self.n_head:
            raise ConfigError(f"n_embd = {self.n_embd} does not divide into n_head = "
                              f"{self.n_head} heads; choose n_embd a multiple of n_head",
                              "n_embd", "n_head")
        if self.reset_optimizer and (self.init_from in ("scratch", "resume") or self.eval_only):
            raise ConfigError("reset_optimizer goes on from another run into a new out_dir; give "
                              "--init_from=RUN or RUN@STEP, and no eval_only",
                              "reset_optimizer", "init_from")
        if self.checkpoint == "best" and not self.eval_only:
            raise ConfigError("checkpoint = best is for --eval_only; leave it out, or give that",
                              "checkpoint", "eval_only")
        if self.rotary_fraction and (self.rotary_channels < 2 or self.rotary_channels % 2):
            raise ConfigError(f"rotary_fraction = {self.rotary_fraction} turns "
                              f"{self.rotary_channels} of the {self.n_embd // self.n_head} "
                              "channels of a head, which must be an even number above 0; choose "
                              "another", "rotary_fraction", "n_embd", "n_head")

    @classmethod
    def translate(cls, key: str, value: object, given: dict[str, object]) -> dict[str, object]:
        """Returns what a key of nanoGPT means here, where it means the same."""
        def other(name: str, why: str) -> float:
            if name not in given:
                raise ConfigError(f"it needs {name} beside it, {why}")
            return given[name]

        if key in RENAMED:
            raise ConfigError(RENAMED[key])
        if not isinstance(value, int | float):
            raise LookupError(key)
        if key == "gradient_accumulation_steps":
            rows = other("batch_size", "which it multiplies; or set total_batch_size")
            return dict(total_batch_size=value * rows)
        if key == "min_lr":
            peak = other("learning_rate", "of which min_lr_ratio is the share")
            return dict(min_lr_ratio=value / peak)
        if key == "lr_decay_iters":
            if other("max_iters", "at which the schedule ends") != value:
                raise ConfigError("the schedule ends at max_iters, which is another; leave it out")
            return {}
        if key == "decay_lr":
            return {} if value else dict(min_lr_ratio=1.0)
        raise LookupError(key)

    def shards(self, world_size: int) -> int:
        """Returns how many of so many ranks share one copy of the model; a single rank has its own.
        """
        return min(self.shard_ranks or world_size, world_size) if self.parallel == "fsdp" else 1

    def check_shards(self, world_size: int) -> None:
        """Raises ConfigError unless `world_size` ranks make whole copies of the model."""
        if self.shard_ranks and self.parallel != "fsdp":
            raise ConfigError(f"shard_ranks = {self.shard_ranks} has no effect with parallel = "
                              f"{self.parallel}; leave it out, or give --parallel=fsdp",
                              "shard_ranks", "parallel")
        if self.shard_ranks == 1:
            raise ConfigError("shard_ranks = 1 shares nothing; give --parallel=ddp instead",
                              "shard_ranks")
        if self.shard_ranks and world_size > 1 and world_size % self.shard_ranks:
            raise ConfigError(f"shard_ranks = {self.shard_ranks} does not divide the {world_size} "
                              "ranks; choose a divisor, as many as a machine has", "shard_ranks")

    def check_world(self, world_size: int) -> None:
        """Raises ConfigError unless every one of `world_size` ranks gets a row of the batch, and
        they make whole copies of the model."""
        self.check_shards(world_size)
        if self.total_batch_size < world_size:
            raise ConfigError(f"total_batch_size = {self.total_batch_size} is less than the "
                              f"{world_size} ranks, which each need a row; raise it, or start "
                              "fewer ranks", "total_batch_size")


def padded_vocab_size(classes: int) -> int:
    """Returns the rows of an embedding for so many classes: a multiple of 64, for fast kernels."""
    return -(-classes // 64) * 64


MODEL_KEYS = tuple(f.name for f in fields(GPTOptions))

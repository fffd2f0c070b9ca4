"""Optimizers by name: how each is built, what feeds it curvature, its own default settings.

Adding one is a class, an entry in OPTIMIZERS, and a config; train.py stays as it is.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from nanosophia import packages
from nanosophia.adam_family import MARS, AdEMAMix, ScheduleFreeAdamW
from nanosophia.baselines import (
    AdaHessian,
    AdaHessianClip,
    Chained,
    Lion,
    Normalize,
    SophiaUnclipped,
)
from nanosophia.configurator import ConfigError, did_you_mean
from nanosophia.controlled_gamma import ControlledSophia
from nanosophia.estimators import (
    Estimator,
    ShardedGradient,
    empirical_fisher_estimator,
    gnb_estimator,
    hutchinson_estimator,
)
from nanosophia.matrix_optimizers import SOAP, Kron, MetricMuon, orthogonalise
from nanosophia.optimizer_state import Beginning
from nanosophia.options import Config
from nanosophia.update_rules import compiled_update, sliced_update
from sophia import AllReduce, Sophia


class OptimizerAndEstimator(NamedTuple):
    """Holds an optimizer, the estimator that feeds it curvature, and how it began."""

    optimizer: torch.optim.Optimizer
    estimator: Estimator | None  # None: the optimizer takes no curvature
    beginning: Beginning


def build(config: Config, model: nn.Module, *, num_classes: int, all_reduce: AllReduce = None,
          sharded_gradient: ShardedGradient = None) -> OptimizerAndEstimator:
    """Builds the optimizer that `config.optimizer` names, on the model's parameters.

    Its estimator draws labels among `num_classes` classes. `all_reduce` sums tensors over ranks in
    place; `sharded_gradient` computes gradients of parameters that are split over ranks. Raises
    ConfigError where the precision, once it is known, does not suit the optimizer.
    """
    _do_not_load_compiler()
    groups = parameter_groups(model, config)
    if config.metric_qkv == "apart":
        groups = _with_qkv_apart(groups, model)
    if config.eval_only:  # nothing steps
        optimizer = torch.optim.SGD(groups)
        return OptimizerAndEstimator(optimizer, None, Beginning.of(optimizer))
    if packages.is_of_package(config.optimizer):
        optimizer, lr_key = packages.build(config.optimizer, config.optimizer_args, groups,
                                           config.learning_rate)
        return OptimizerAndEstimator(optimizer, None,
                                     Beginning.of(optimizer, lr_key, attributes=True))
    entry = OPTIMIZERS[config.optimizer]
    if config.dtype == "float16" and config.optimizer in UNCLIPPED:
        raise ConfigError(f"optimizer = {config.optimizer} with dtype = float16: while an estimate "
                          "overflows, it would step without curvature and without a clip; give "
                          "--dtype=float32, or bfloat16 where the device computes it", "dtype",
                          "optimizer")
    optimizer = entry.build(config, groups)
    estimator = None if entry.estimator is None else entry.estimator(
        config, optimizer.parameters(), num_classes, all_reduce, sharded_gradient)
    return OptimizerAndEstimator(optimizer, estimator, Beginning.of(optimizer))


def _do_not_load_compiler() -> None:
    """Spares the second that torch's optimizers take to import its compiler.

    They import it to be left out of what it compiles (torch/_compile.py, which keeps the result as
    `__dynamo_disable`). Until it is imported nothing is compiled, and later no optimizer is.
    """
    if "torch._dynamo" not in sys.modules:
        for name in ("add_param_group", "load_state_dict", "state_dict", "zero_grad"):
            method = getattr(torch.optim.Optimizer, name)
            if plain := getattr(method, "__wrapped__", None):
                plain.__dynamo_disable = plain


def check(config: Config, world_size: int) -> None:
    """Raises ConfigError unless the optimizer is known and its settings fit it and the ranks."""
    entry = spec(config.optimizer)
    if entry is None:
        hint = did_you_mean(config.optimizer, OPTIMIZERS)
        raise ConfigError(f"optimizer = {config.optimizer!r} is none of {', '.join(OPTIMIZERS)}, "
                          "and no package.module:Class" + (f"; {hint}" if hint else ""),
                          "optimizer")
    if packages.is_of_package(config.optimizer):
        packages.find_class(config.optimizer)
        packages.parse_arguments(config.optimizer_args)
    elif config.optimizer_args:
        raise ConfigError(f"optimizer_args = {config.optimizer_args!r} are for an optimizer of a "
                          f"package, not for {config.optimizer}; leave them out", "optimizer_args",
                          "optimizer")
    for key, set_, has in (
            ("gamma_target", config.gamma_target > 0, entry.is_sophia),
            ("hessian_bias_correction", config.hessian_bias_correction, entry.is_sophia),
            ("compile_optimizer", config.compile_optimizer == "on", entry.compiles)):
        if set_ and not has:
            raise ConfigError(f"{key} = {getattr(config, key)} has no effect on optimizer = "
                              f"{config.optimizer}; leave it out", key, "optimizer")
    if config.gamma_rows != "none" and not config.gamma_target:
        raise ConfigError(f"gamma_rows = {config.gamma_rows} has no effect without gamma_target; "
                          "set both or none", "gamma_rows")
    if entry.estimator is not None:
        _check_rows(config)
    if config.parallel == "fsdp":
        _check_sharding(config, entry, world_size)


def _check_rows(config: Config) -> None:
    """Raises ConfigError where an estimate's rows are not of the batch, or make no equal chunks."""
    rows, chunks = config.hessian_batch_size, config.hessian_chunks
    if rows > config.total_batch_size:
        raise ConfigError(f"hessian_batch_size = {rows} is more than total_batch_size = "
                          f"{config.total_batch_size}: the estimate uses rows of the same batch; "
                          "lower it", "hessian_batch_size", "total_batch_size")
    if rows % chunks:
        raise ConfigError(f"hessian_batch_size = {rows} does not divide into hessian_chunks = "
                          f"{chunks}; choose a divisor", "hessian_chunks", "hessian_batch_size")


def require_effect(config: Config, sources: dict[str, str]) -> None:
    """Raises ConfigError where a setting was given that the optimizer does not have.

    What a config file sets for its own optimizer, which a flag has replaced, is left alone.
    """
    replaced = sources.get("optimizer", "").startswith("flag")
    for key, names in OWN_SETTINGS.items():
        given = key in sources and (sources[key].startswith("flag") or not replaced)
        if given and config.optimizer not in names:
            raise ConfigError(f"{key} is a setting of {' and '.join(names)} and has no effect on "
                              f"optimizer = {config.optimizer}; leave it out", key, "optimizer")
    if packages.is_of_package(config.optimizer):
        for key in ("beta1", "beta2", "eps"):
            if sources.get(key, "").startswith("flag"):
                raise ConfigError(f"{key} has no effect on optimizer = {config.optimizer}; give it "
                                  "the class's own argument in optimizer_args", key, "optimizer")


def _check_sharding(config: Config, entry: "OptimizerSpec", world_size: int) -> None:
    """Raises ConfigError where shards cannot serve: each rank must take as many micro-batches."""
    if entry.fsdp_refusal:
        raise ConfigError(f"parallel = fsdp cannot serve optimizer = {config.optimizer}: "
                          f"{entry.fsdp_refusal}; use --parallel=ddp", "parallel", "optimizer")
    parts = dict(total_batch_size=1) | (dict(hessian_batch_size=config.hessian_chunks)
                                        if entry.estimator else {})
    for key, count in parts.items():
        rows = getattr(config, key) // count
        if rows // world_size < -(-rows // (world_size * (config.batch_size or rows))):
            chunk = f" in hessian_chunks = {count}, of which every rank takes rows," \
                if count > 1 else ""
            fewer = ", fewer chunks" if count > 1 else ""
            raise ConfigError(f"{key} = {rows * count}{chunk} gives some of {world_size} ranks "
                              "fewer micro-batches than others, and parallel = fsdp needs them to "
                              f"run in step; choose a multiple of {world_size * count}{fewer}, or "
                              "--parallel=ddp", key, "parallel")


def with_own_defaults(config: Config, sources: dict[str, str]) -> Config:
    """Returns the config with the optimizer's own value of each setting that was not given."""
    entry = spec(config.optimizer)
    own = entry.defaults if entry else {}
    return replace(config, **{key: value for key, value in own.items() if key not in sources})


UNCLIPPED = ("adahessian", "gnb_unclipped")  # divide by a curvature that must be there
SMALL_BATCH = 1 << 16  # tokens per step, up to which 0.8 was measured: results/starting_values.md


def settings_warnings(config: Config) -> list[str]:
    """Returns warnings for settings that are valid but harmful."""
    if config.warmup_iters >= config.max_iters:
        return [f"warmup_iters = {config.warmup_iters} is not shorter than max_iters = "
                f"{config.max_iters}: the learning rate only rises"]
    if (spec(config.optimizer).estimator is not None and config.warmup_iters < 2000
            and config.tokens_per_step >= 480 * 1024):
        return [f"warmup_iters = {config.warmup_iters} is shorter than the 2000 steps that Sophia "
                "needs at the paper's batch size"]
    if spec(config.optimizer).is_sophia and config.beta1 > 0.9 and \
            config.tokens_per_step <= SMALL_BATCH:
        return [f"beta1 = {config.beta1} is for the paper's 100,000 steps of 491,520 tokens; in "
                f"hundreds of steps of {config.tokens_per_step:,} tokens 0.8 is the value to try "
                "(docs/optimizer.md)"]
    return []


def parameter_groups(model: nn.Module, config: Config) -> list[dict]:
    """Groups parameters by kind: embeddings and a head of its own, which have a row per token or
    position, matrices, and vectors, which do not decay."""
    embeddings = {id(m.weight) for name, m in model.named_modules()
                  if isinstance(m, nn.Embedding) or name == "lm_head"}
    kinds: dict[str, list[Tensor]] = dict(embedding=[], matrix=[], vector=[])
    for p in model.parameters():
        if p.requires_grad:
            kinds["embedding" if id(p) in embeddings else "matrix" if p.dim() >= 2
                  else "vector"].append(p)
    return [dict(params=params, kind=kind,
                 weight_decay=0.0 if kind == "vector" else config.weight_decay)
            for kind, params in kinds.items()]


def _with_qkv_apart(groups: list[dict], model: nn.Module) -> list[dict]:
    """Moves the matrices that stack q, k and v to a last group, of matrices in three parts."""
    stacked = [m.weight for name, m in model.named_modules() if name.endswith("c_attn")]
    ids = {id(p) for p in stacked}
    groups = [group | dict(params=[p for p in group["params"] if id(p) not in ids])
              for group in groups]
    return [*groups, *(group | dict(params=stacked, parts=3) for group in groups
                       if group["kind"] == "matrix")]


def _adamw(config: Config, groups: list[dict]) -> torch.optim.Optimizer:
    device = groups[0]["params"][0].device.type
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2),
                             eps=config.eps, fused=device in ("cuda", "cpu"))


def _lion(config: Config, groups: list[dict]) -> torch.optim.Optimizer:
    return Lion(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2))


def _matrices(make: Callable[[Config, list[dict]], torch.optim.Optimizer],
              ) -> Callable[[Config, list[dict]], torch.optim.Optimizer]:
    """Returns what builds an optimizer of the hidden matrices, with AdamW for the rest."""
    def build_both(config: Config, groups: list[dict]) -> torch.optim.Optimizer:
        hidden = [group for group in groups if group["kind"] == "matrix"]
        rest = [group for group in groups if group["kind"] != "matrix"]
        return Chained([make(config, hidden), _adamw(config, rest)])

    return build_both


def _muon(config: Config, groups: list[dict]) -> torch.optim.Optimizer:
    if not hasattr(torch.optim, "Muon"):
        raise ConfigError(f"optimizer = muon is not in torch {torch.__version__}; use torch 2.9 "
                          "or newer", "optimizer")
    # Scaled so that its updates are as large as AdamW's, and one learning rate serves both.
    return torch.optim.Muon(groups, lr=config.learning_rate, adjust_lr_fn="match_rms_adamw",
                            momentum=config.muon_momentum, weight_decay=config.weight_decay)


def _metric_muon(config: Config, groups: list[dict], *, from_estimates: bool = False,
                 ) -> MetricMuon:
    optimizer = MetricMuon(
        groups, lr=config.learning_rate, betas=(config.muon_momentum, config.beta2),
        power=config.metric_power, sides=config.metric_sides, from_estimates=from_estimates,
        precision=torch.bfloat16 if config.dtype == "bfloat16" else None)
    if config.compiles("compile_optimizer", groups[0]["params"][0].device.type):
        optimizer.orthogonalise = torch.compile(orthogonalise)
    return optimizer


def _metric_muon_gnb(config: Config, groups: list[dict]) -> torch.optim.Optimizer:
    hidden = [group for group in groups if group["kind"] == "matrix"]
    rest = [group for group in groups if group["kind"] != "matrix"]
    for group in rest:
        group["gamma_rows"] = group["kind"] == "embedding"
    other = _adamw(config, rest) if config.metric_rest == "adamw" else ControlledSophia(
        rest, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.eps,
        gamma_target=0.9)
    return Chained([_metric_muon(config, hidden, from_estimates=True), other])


def _soap(config: Config, groups: list[dict]) -> torch.optim.Optimizer:
    return SOAP(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2),
                eps=config.eps, frequency=config.precondition_frequency)


def _kron(config: Config, groups: list[dict]) -> torch.optim.Optimizer:
    # Its updates have a root mean square of up to 1.1; so scaled, one rate serves AdamW as well.
    return Kron(groups, lr=config.learning_rate, momentum=config.beta1, scale=0.2)


def _ademamix(config: Config, groups: list[dict]) -> torch.optim.Optimizer:
    return AdEMAMix(groups, lr=config.learning_rate, eps=config.eps, alpha=config.slow_weight,
                    betas=(config.beta1, config.beta2, config.slow_beta), warmup=config.max_iters)


def _mars(config: Config, groups: list[dict]) -> torch.optim.Optimizer:
    return MARS(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2),
                eps=config.eps, gamma=config.mars_gamma)


def _schedule_free(config: Config, groups: list[dict]) -> torch.optim.Optimizer:
    return ScheduleFreeAdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2),
                             eps=config.eps)


def _normalize(config: Config, groups: list[dict]) -> torch.optim.Optimizer:
    return Normalize(groups, lr=config.learning_rate, beta1=config.beta1)


def _adahessian(config: Config, groups: list[dict]) -> torch.optim.Optimizer:
    return AdaHessian(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2),
                      eps=config.eps)


def _sophia(cls: type[Sophia]) -> Callable[[Config, list[dict]], torch.optim.Optimizer]:
    """Returns the function that builds a Sophia of class `cls`, controlled where config says so."""
    kinds_by_rows = dict(none=(), embedding=("embedding",), matrices=("embedding", "matrix"))

    def make(config: Config, groups: list[dict]) -> Sophia:
        settings = dict(lr=config.learning_rate, betas=(config.beta1, config.beta2),
                        gamma=config.gamma, eps=config.eps)
        if config.gamma_target or config.hessian_bias_correction:
            for group in groups:
                group["gamma_rows"] = group["kind"] in kinds_by_rows[config.gamma_rows]
            optimizer = ControlledSophia(groups, **settings, gamma_target=config.gamma_target,
                                         bias_correction=config.hessian_bias_correction)
        else:
            optimizer = cls(groups, **settings)
        compiled = config.compiles("compile_optimizer", groups[1]["params"][0].device.type)
        optimizer.rule = compiled_update if compiled else sliced_update
        return optimizer

    return make


class OptimizerSpec(NamedTuple):
    """How an optimizer is built, the estimator that feeds it (None: it takes no curvature), and
    its own values of settings whose defaults are Sophia-G's."""

    build: Callable[[Config, list[dict]], torch.optim.Optimizer] | None
    estimator: Callable[[Config, list[Tensor], int, AllReduce, ShardedGradient],
                        Estimator] | None = None
    defaults: dict[str, float] = {}  # noqa: RUF012 (never written)
    is_sophia: bool = False  # knows gamma_target and bias correction
    compiles: bool = False  # knows compile_optimizer
    fsdp_refusal: str = ""  # why parallel = fsdp is refused; "" allows it


_SECOND_DERIVATIVES = "Hutchinson's estimate differentiates twice, which FSDP2 does not"
_ADAMW = dict(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
_HUTCHINSON = dict(gamma=0.01, hessian_batch_size=32)

OPTIMIZERS: dict[str, OptimizerSpec] = {
    "adamw": OptimizerSpec(_adamw, None, _ADAMW),
    "lion": OptimizerSpec(_lion, None, dict(learning_rate=1.5e-4, beta1=0.95, beta2=0.98)),
    "muon": OptimizerSpec(_matrices(_muon), None, _ADAMW,
                          fsdp_refusal="torch.optim.Muon takes whole matrices; on shards "
                                       "--optimizer=metric_muon --metric_power=0 is its update"),
    "metric_muon": OptimizerSpec(_matrices(_metric_muon), None, _ADAMW, compiles=True),
    "metric_muon_gnb": OptimizerSpec(_metric_muon_gnb, gnb_estimator, _ADAMW, compiles=True),
    "soap": OptimizerSpec(_matrices(_soap), None, _ADAMW | dict(beta1=0.95),
                          fsdp_refusal="every rank would hold its bases of whole matrices"),
    "kron": OptimizerSpec(_matrices(_kron), None, _ADAMW,
                          fsdp_refusal="every rank would hold its factors of whole matrices"),
    "ademamix": OptimizerSpec(_ademamix, None, _ADAMW | dict(beta2=0.999)),
    "mars": OptimizerSpec(_mars, None, _ADAMW | dict(beta1=0.95, beta2=0.99)),
    # The rate stays constant after its warm-up.
    "schedule_free": OptimizerSpec(_schedule_free, None, _ADAMW | dict(min_lr_ratio=1.0)),
    "adahessian": OptimizerSpec(
        _adahessian, hutchinson_estimator,
        dict(beta1=0.92, eps=1e-8, weight_decay=0.1, hessian_batch_size=32, hessian_interval=1),
        fsdp_refusal=_SECOND_DERIVATIVES),
    "sophiag": OptimizerSpec(_sophia(Sophia), gnb_estimator, is_sophia=True, compiles=True),
    "sophiah": OptimizerSpec(_sophia(Sophia), hutchinson_estimator, _HUTCHINSON, is_sophia=True,
                             compiles=True, fsdp_refusal=_SECOND_DERIVATIVES),
    # Fig. 7 of the paper
    "clip": OptimizerSpec(_sophia(Sophia)),  # without an estimate h stays 0: sign momentum
    "normalize": OptimizerSpec(_normalize),
    "ef_clip": OptimizerSpec(_sophia(Sophia), empirical_fisher_estimator, is_sophia=True,
                             compiles=True),
    "ah_clip": OptimizerSpec(_sophia(AdaHessianClip), hutchinson_estimator, _HUTCHINSON,
                             fsdp_refusal=_SECOND_DERIVATIVES),
    "gnb_unclipped": OptimizerSpec(_sophia(SophiaUnclipped), gnb_estimator,
                                   dict(gamma=1.0, eps=1e-6, hessian_interval=2)),
}
# Settings that only some optimizers have.
OWN_SETTINGS = {
    "muon_momentum": ("muon", "metric_muon", "metric_muon_gnb"),
    "metric_power": ("metric_muon", "metric_muon_gnb"),
    "metric_sides": ("metric_muon", "metric_muon_gnb"),
    "metric_qkv": ("metric_muon", "metric_muon_gnb"), "metric_rest": ("metric_muon_gnb",),
    "precondition_frequency": ("soap",), "slow_beta": ("ademamix",), "slow_weight": ("ademamix",),
    "mars_gamma": ("mars",)}
_OF_PACKAGES = OptimizerSpec(None, None, dict(weight_decay=0.1),
                             fsdp_refusal="whether it can step on shards is not known")


def spec(name: str) -> OptimizerSpec | None:
    """Returns what is known of the optimizer of this name, None where none can have it."""
    return _OF_PACKAGES if packages.is_of_package(name) else OPTIMIZERS.get(name)

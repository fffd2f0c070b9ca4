"""transformers' GPT-2 and GPT-NeoX: their settings and parameters as model.py has them, and back.

A model with rotary positions is GPT-NeoX's there, any other GPT-2's. Knows no files.
"""

from dataclasses import fields

import torch
from torch import Tensor

from model import GPTConfig
from nanosophia.checkpoint import CheckpointError

# The tanh ones are one function; the first of them is computed as model.py does, to the last bit.
ACTIVATIONS = dict(gelu_pytorch_tanh="gelu_tanh", gelu_new="gelu_tanh", gelu_fast="gelu_tanh",
                   gelu="gelu")
# transformers' Conv1D, in GPT-2, keeps these as (in, out).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# GPT-2 has model.py's names. GPT-NeoX: ours, theirs, replaced in this order.
NEOX_NAMES = (
    ("transformer.wte.", "gpt_neox.embed_in."), ("transformer.ln_f.", "gpt_neox.final_layer_norm."),
    ("lm_head.", "embed_out."), ("transformer.h.", "gpt_neox.layers."),
    (".ln_1.", ".input_layernorm."), (".ln_2.", ".post_attention_layernorm."),
    (".attn.c_attn.", ".attention.query_key_value."), (".attn.c_proj.", ".attention.dense."),
    (".mlp.c_fc.", ".mlp.dense_h_to_4h."), (".mlp.c_proj.", ".mlp.dense_4h_to_h."))
# Causal masks and tables that are computed.
BUFFERS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias",
           ".rotary_emb.inv_freq")
SHARED_FIELDS = {"block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias",
                 "activation"}
EXPORTED_FIELDS = {
    "GPT-2": SHARED_FIELDS | {"scale_attn_by_inverse_layer_idx"},
    "GPT-NeoX": SHARED_FIELDS | {"rotary_fraction", "parallel_residual", "tied_head"}}


def family_of(config: GPTConfig) -> str:
    """Returns which of transformers' models has this model's positions."""
    return "GPT-NeoX" if config.rotary_channels else "GPT-2"


def our_settings(config: dict, where: str) -> dict:
    """Returns GPTConfig's fields of a config.json that fits `schemas.TransformersConfig`.

    Raises CheckpointError, which names the file `where`, on what model.py does not compute.
    """
    return (_gpt2_settings if config["model_type"] == "gpt2" else _neox_settings)(config, where)


def _gpt2_settings(config: dict, where: str) -> dict:
    width = config["n_embd"]
    _require(config, where, n_inner=(None, 4 * width), layer_norm_epsilon=(1e-5,),
             scale_attn_weights=(True,), tie_word_embeddings=(True,),
             activation_function=("gelu_new", *ACTIVATIONS))
    return dict(
        n_layer=config["n_layer"], n_head=config["n_head"], n_embd=width,
        block_size=config["n_positions"], vocab_size=config["vocab_size"],
        bias=config.get("nanosophia_bias", True),
        activation=ACTIVATIONS[config.get("activation_function", "gelu_new")],
        scale_attn_by_inverse_layer_idx=config.get("scale_attn_by_inverse_layer_idx", False))


def _neox_settings(config: dict, where: str) -> dict:
    width = config["hidden_size"]
    _require(config, where, intermediate_size=(4 * width,), layer_norm_eps=(1e-5,),
             attention_bias=(True,), hidden_act=("gelu", *ACTIVATIONS), rope_scaling=(None,))
    rotary = dict(rope_theta=config.get("rotary_emb_base", 10_000),  # transformers completes so
                  partial_rotary_factor=config.get("rotary_pct", 0.25)) \
        | (config.get("rope_parameters") or {})
    _require(rotary, f"{where}, rope_parameters", rope_type=("default",), rope_theta=(10_000,))
    fraction = rotary["partial_rotary_factor"]
    if fraction == 0:
        raise CheckpointError(f"{where}: partial_rotary_factor = 0 leaves the model no positions")
    return dict(
        n_layer=config["num_hidden_layers"], n_head=config["num_attention_heads"], n_embd=width,
        block_size=config["max_position_embeddings"], vocab_size=config["vocab_size"],
        bias=config.get("nanosophia_bias", True),
        activation=ACTIVATIONS[config.get("hidden_act", "gelu")],
        rotary_fraction=float(fraction) if type(fraction) is int else fraction,
        parallel_residual=config.get("use_parallel_residual", True),
        tied_head=config.get("tie_word_embeddings", False))


def _require(config: dict, where: str, **supported: tuple) -> None:
    for key, values in supported.items():
        if (given := config.get(key, values[0])) not in values:
            raise CheckpointError(f"{where}: {key} = {given!r} is not what model.py computes "
                                  f"({values[0]!r})")


def our_tensors(tensors: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Returns transformers' parameters under model.py's names and in its layout."""
    found, neox = {}, config.rotary_channels > 0
    for name, x in tensors.items():
        if neox:
            for ours, theirs in NEOX_NAMES:
                name = name.replace(theirs, ours)
        elif name != "lm_head.weight":
            name = "transformer." + name.removeprefix("transformer.")
        if name.endswith(BUFFERS) or (name.endswith("bias") and not config.bias) or \
                (name == "lm_head.weight" and config.tied_head):
            continue
        if neox and ".c_attn." in name:
            x = _heads_inside(x, config)
        elif not neox and name.endswith(TRANSPOSED) and x.dim() == 2:
            x = x.mT
        found[name] = x
    return found


def _heads_inside(x: Tensor, config: GPTConfig) -> Tensor:
    """Turns rows in the order (head, q k v, channel), GPT-NeoX's, into (q k v, head, channel)."""
    if x.dim() == 0 or x.size(0) != 3 * config.n_embd:
        return x  # refused where shapes are compared
    return x.unflatten(0, (config.n_head, 3, -1)).transpose(0, 1).flatten(0, 2)


def _heads_outside(x: Tensor, config: GPTConfig) -> Tensor:
    return x.unflatten(0, (3, config.n_head, -1)).transpose(0, 1).flatten(0, 2)


def check_exportable(config: GPTConfig, name: str) -> None:
    """Raises CheckpointError when transformers cannot compute the model called `name`."""
    family = family_of(config)
    for f in fields(config):
        value = getattr(config, f.name)
        if f.name not in EXPORTED_FIELDS[family] and value != f.default:
            raise CheckpointError(f"{name} has {f.name} = {value!r}, which transformers' {family} "
                                  "cannot compute; the export would be another model")


def their_tensors(tensors: dict[str, Tensor], config: GPTConfig,
                  num_classes: int) -> dict[str, Tensor]:
    """Returns parameters under transformers' names, without padding, absent biases as zeros."""
    found, neox = {}, config.rotary_channels > 0
    for name, x in tensors.items():
        if name in ("transformer.wte.weight", "lm_head.weight"):
            x = x[:num_classes]
        elif neox and ".c_attn." in name:
            x = _heads_outside(x, config)
        elif not neox and name.endswith(TRANSPOSED):
            x = x.t()
        found[name] = x.contiguous()
    sizes = dict(c_attn=3 * config.n_embd, c_fc=4 * config.n_embd)
    for name in list(found):
        if name.endswith("weight") and name.split(".")[-2] not in ("wte", "wpe", "lm_head"):
            found.setdefault(name.removesuffix("weight") + "bias",
                             torch.zeros(sizes.get(name.split(".")[-2], config.n_embd)))
    if not neox:
        return found
    renamed = {}
    for name, x in found.items():
        for ours, theirs in NEOX_NAMES:
            name = name.replace(ours, theirs)
        renamed[name] = x
    return renamed


def their_config(config: GPTConfig, num_classes: int, eot: int | None) -> dict:
    """Returns config.json of the model."""
    activation = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation)
    shared = dict(dtype="float32", vocab_size=num_classes, bos_token_id=eot, eos_token_id=eot,
                  tie_word_embeddings=config.tied_head, nanosophia_bias=config.bias)
    if config.rotary_channels:
        return shared | dict(
            architectures=["GPTNeoXForCausalLM"], model_type="gpt_neox",
            num_hidden_layers=config.n_layer, num_attention_heads=config.n_head,
            hidden_size=config.n_embd, intermediate_size=4 * config.n_embd,
            max_position_embeddings=config.block_size, layer_norm_eps=1e-5, hidden_act=activation,
            use_parallel_residual=config.parallel_residual, attention_bias=True,
            attention_dropout=config.dropout, hidden_dropout=config.dropout,
            rotary_pct=config.rotary_fraction, rotary_emb_base=10_000,  # of older versions
            rope_parameters=dict(rope_type="default", rope_theta=10_000.0,
                                 partial_rotary_factor=config.rotary_fraction))
    return shared | dict(
        architectures=["GPT2LMHeadModel"], model_type="gpt2", n_layer=config.n_layer,
        n_head=config.n_head, n_embd=config.n_embd, n_positions=config.block_size,
        n_ctx=config.block_size, n_inner=None, layer_norm_epsilon=1e-5,
        activation_function=activation, scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=config.scale_attn_by_inverse_layer_idx,
        reorder_and_upcast_attn=False, attn_pdrop=config.dropout, embd_pdrop=config.dropout,
        resid_pdrop=config.dropout)

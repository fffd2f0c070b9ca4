"""Reads weights of a run, of nanoGPT, of transformers' GPT-2 and GPT-NeoX.

Nothing in a file is executed. Does not depend on training.
"""

from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from model import GPT, GPTConfig
from nanosophia.checkpoint import (
    STATE,
    Checkpoint,
    CheckpointError,
    checkpoint_folders,
    load_best,
    load_latest,
)
from nanosophia.configurator import ConfigError
from nanosophia.files import open_file, reason
from nanosophia.options import Config
from nanosophia.schemas import (
    NanoGPTArgs,
    NanoGPTCheckpoint,
    TransformersConfig,
    check,
    read,
)
from nanosophia.tokenizer import FILE_NAME, GPT2_CLASSES
from nanosophia.transformers_models import our_settings, our_tensors


class Weights(NamedTuple):
    """A model to use: parameters under this project's names, settings, tokenizer."""

    source: str  # for messages
    tensors: dict[str, Tensor]
    config: GPTConfig
    tokenizer: str  # as tokenizer.get_tokenizer takes it
    num_classes: int  # real ids; the rest of the vocabulary is padding
    state: dict  # what state.json says; empty for weights from elsewhere

    def build(self) -> GPT:
        """Returns the model with these parameters; raises CheckpointError where they do not fit."""
        return self.load_into(GPT(self.config))

    def load_into(self, model: GPT) -> GPT:
        """Loads these parameters into a model, whose context may be shorter, and returns it."""
        try:
            model.load_state_dict({
                name: x[:model.config.block_size] if name == "transformer.wpe.weight" else x
                for name, x in self.tensors.items()})
        except RuntimeError as error:
            raise CheckpointError(f"the weights of {self.source} are not those of such a model: "
                                  f"{' '.join(str(error).split())}") from error
        return model


def run_weights(out_dir: Path, which: str = "newest") -> Weights | None:
    """Returns the model of a run's newest checkpoint, or of its best; None where there is none.

    Raises CheckpointError when it is damaged, or no checkpoint is the best.
    """
    found = load_best(out_dir) if which == "best" else load_latest(out_dir)
    if found is None:
        return None
    return Weights(str(found.folder), found.model_tensors(), saved_model_config(found),
                   found.tokenizer, found.state["num_classes"], found.state)


def saved_model_config(found: Checkpoint) -> GPTConfig:
    """Returns the model's settings that a checkpoint was trained with.

    Raises CheckpointError where it has one that this code does not know, since the model could not
    be the same, where one is out of range, and where the tensors are not those of such a model.
    """
    saved, known = found.state["config"], {f.name for f in fields(GPTConfig)}
    recorded = found.state.get("model")
    if recorded is None:  # checkpoints of older code list the model's settings among all others
        unknown = saved.keys() - {f.name for f in fields(Config)}
        recorded = {key: value for key, value in saved.items() if key in known}
    else:
        unknown = recorded.keys() - known
    if unknown:
        named = ", ".join(f"{key} = {(saved | recorded)[key]!r}" for key in sorted(unknown))
        raise CheckpointError(f"{found.folder} was trained with {named}, which this code does not "
                              "know; use the code that trained it")
    config = _model_config(str(found.folder / STATE), recorded)
    if found.state["num_classes"] > config.vocab_size:
        raise CheckpointError(f"{found.folder / STATE}: num_classes = {found.state['num_classes']} "
                              f"is more than vocab_size = {config.vocab_size}")
    _check_shapes(str(found.folder), config, found.model_shapes())
    return config


def _model_config(source: str, settings: dict) -> GPTConfig:
    """Returns settings read from a file; raises CheckpointError where one is out of range."""
    try:
        return Config(**settings, init_from="resume").model
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from None


def _check_shapes(source: str, config: GPTConfig, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises CheckpointError unless a model's parameters have these shapes; allocates nothing."""
    with torch.device("meta"):
        needed = {name: x.shape for name, x in GPT(config).state_dict().items()}
    for name in sorted(needed.keys() | shapes):
        here, there = needed.get(name), shapes.get(name)
        if here != there:
            words = ["absent" if s is None else f"of shape {tuple(s)}" for s in (there, here)]
            raise CheckpointError(f"{source} holds other weights than its settings say: {name} is "
                                  f"{words[0]}, for such a model it is {words[1]}")


def foreign_weights(source: str) -> Weights:
    """Reads weights made elsewhere: a ckpt.pt of nanoGPT or of the authors' code
    (github.com/Liuhong99/Sophia), another run's folder, a folder of GPT-2 or GPT-NeoX that
    transformers wrote, or a name on its hub.

    Nothing in the files is executed. nanoGPT's models are assumed to have the exact GELU (its code
    since June 2023) unless the file says otherwise, the authors' the tanh one and the switch for
    inverse-layer scaling. Raises CheckpointError on anything else.
    """
    path = Path(source)
    if checkpoint_folders(path):
        return run_weights(path)
    if path.suffix == ".pt":
        weights = _nanogpt_weights(path)
    else:
        weights = _transformers_weights(path if path.is_dir() else _download(source))
    _check_shapes(weights.source, weights.config,
                  {name: x.shape for name, x in weights.tensors.items()})
    return weights


def _nanogpt_weights(path: Path) -> Weights:
    try:
        with open_file(path) as file:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {reason(error)}") from error
    except Exception as error:  # whatever a malformed or malicious file makes torch raise
        raise CheckpointError(f"{path} is refused: it does not load as plain weights "
                              f"({type(error).__name__}); nothing in it was executed") from error
    try:
        content = check(content, NanoGPTCheckpoint)
    except ValueError as error:
        raise CheckpointError(f"{path} is not a checkpoint of nanoGPT or of the authors' code: "
                              f"{error}") from error
    tensors = {name.removeprefix("_orig_mod."): x for name, x in content["model"].items()}
    given = content["model_args"]
    sizes = {key: given[key] for key in NanoGPTArgs.__required_keys__}
    authors = "scale_attn_by_inverse_layer_idx" in given
    config = _model_config(str(path), sizes | dict(
        activation=_activation(content, authors),
        scale_attn_by_inverse_layer_idx=bool(
            authors and given["scale_attn_by_inverse_layer_idx"])))
    # The head is tied to wte; older files also hold the causal mask of each layer.
    kept = {name: _numbers(str(path), name, x) for name, x in tensors.items()
            if name != "lm_head.weight"
            and not (name.endswith(".attn.bias") and isinstance(x, Tensor) and x.dim() == 4)}
    return Weights(str(path), kept, config, _gpt2_if_large(config.vocab_size),
                   min(GPT2_CLASSES, config.vocab_size), {})


def _activation(content: dict, authors: bool) -> str:
    """Returns which GELU a ckpt.pt was trained with: this project's exports say it."""
    said = content.get("config")
    said = said.get("activation") if isinstance(said, dict) else None
    return said if said in ("gelu", "gelu_tanh") else "gelu_tanh" if authors else "gelu"


def _transformers_weights(folder: Path) -> Weights:
    file = folder / "config.json"
    files = sorted(folder.glob("*.safetensors"))
    try:
        config = read(file, TransformersConfig) if files else None
    except FileNotFoundError:
        config = None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {reason(error)}") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is not of transformers' GPT-2 or GPT-NeoX: {error}") \
            from error
    if config is None:
        raise CheckpointError(
            f"{folder} holds no GPT-2 or GPT-NeoX in transformers' format (config.json of that "
            "model_type and *.safetensors), and no checkpoint of this project; check the path")
    ours = _model_config(str(file), our_settings(config, str(file)))
    found = {}
    try:
        for file in files:
            open_file(file).close()  # refuses what would be waited for
            found |= load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    tensors = {name: _numbers(str(folder), name, x)
               for name, x in our_tensors(found, ours).items()}
    file = folder / FILE_NAME
    if config["model_type"] == "gpt_neox" and not file.exists():
        tokenizer = ""  # of GPT-NeoX's own, which has about as many ids as GPT-2's
    elif config["vocab_size"] == GPT2_CLASSES or not file.exists():
        tokenizer = _gpt2_if_large(config["vocab_size"])
    else:
        tokenizer = str(file)
    return Weights(str(folder), tensors, ours, tokenizer, config["vocab_size"], {})


def _numbers(source: str, name: str, x: object) -> Tensor:
    """Returns weights in float32; raises CheckpointError on anything but dense real numbers."""
    if not isinstance(x, Tensor) or x.layout != torch.strided or not x.is_floating_point():
        raise CheckpointError(f"{source}: {name} is no dense tensor of real numbers")
    return x.float().contiguous()


def _gpt2_if_large(vocab_size: int) -> str:
    """Returns the tokenizer of a model that names none: not known where GPT-2's has more ids."""
    return "gpt2" if vocab_size >= GPT2_CLASSES else ""


def _download(name: str) -> Path:
    """Returns the folder of a local copy of a model on the hub, with settings and tokenizer."""
    try:
        from huggingface_hub import snapshot_download
        return Path(snapshot_download(name, allow_patterns=["config.json", "*.safetensors",
                                                            "tokenizer.json"]))
    except Exception as error:  # no such name, no network, no package: each its own type
        raise CheckpointError(
            f"{name} is neither a ckpt.pt, nor a folder, nor could it be fetched from the hub "
            f"({type(error).__name__}); check the name, or give a local folder") from error

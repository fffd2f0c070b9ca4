"""What the project's JSON files hold: one schema each, checked whenever a file is read.

A file may be of another version, of another program, or changed by hand. What passes has the right
types and ranges; keys that a schema does not name are kept and ignored. The settings of models and
runs have their own limits, in `model.GPTConfig` and `options.Config`.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from nanosophia.files import read_bytes

_KEEP_OTHERS = ConfigDict(extra="allow", allow_inf_nan=False)
Count = Annotated[int, Field(ge=0, lt=2**63)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
PlainName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=200)]
Value = bool | int | float | str | None
META, PROGRESS = "meta.json", "progress.json"


class FileDigest(TypedDict):
    """A file's size in bytes and its checksum."""

    size: Count
    sha256: Sha256


Manifest = dict[PlainName, FileDigest]  # manifest.json: the files of a checkpoint


class Counters(TypedDict):
    """The loop's counts since the last record."""

    steps: Count
    clipped: Annotated[float, Field(ge=0, lt=2**53)]


class GuardCounts(TypedDict):
    """The counts of values that were not finite."""

    in_a_row: Annotated[list[Count], Field(min_length=2, max_length=2)]
    refused: Count


class LossScaleState(TypedDict):
    """float16's factor on the loss, and the good steps since it changed."""

    value: Annotated[float, Field(ge=1, le=2**24)]
    good: Count


class OptimizerRest(TypedDict):
    """What of an optimizer's state are no tensors (`optimizer_state.flatten_state`)."""

    state: NotRequired[list[tuple[Count, str, Any]]]
    groups: NotRequired[list[tuple[Count, str, Any]]]
    more: NotRequired[list[tuple[str, Any]]]
    strides: NotRequired[list[tuple[str, list[Count]]]]


class State(TypedDict):
    """state.json: all that a run needs beside its tensors to go on alike."""

    __pydantic_config__ = _KEEP_OTHERS
    format: Literal[1]
    step: Annotated[int, Field(ge=0, lt=10**12)]
    val_loss: NotRequired[float | None]
    tally: Counters
    guard: NotRequired[GuardCounts]
    loss_scale: NotRequired[LossScaleState]
    config: dict[str, Value]
    model: NotRequired[dict[str, Value]]
    data: dict[str, str]
    tokenizer: str
    optimizer: NotRequired[OptimizerRest]
    num_classes: Annotated[int, Field(ge=1, lt=2**31)]
    world_size: Annotated[int, Field(ge=1)]
    versions: NotRequired[dict[str, str]]


class RunConfig(TypedDict):
    """config.json of a run: the settings that it was last started with."""

    __pydantic_config__ = _KEEP_OTHERS
    init_from: str
    total_batch_size: Annotated[int, Field(ge=1, lt=2**53)]
    block_size: Annotated[int, Field(ge=1, lt=2**53)]


class Split(TypedDict):
    """One .bin file of a prepared folder."""

    __pydantic_config__ = _KEEP_OTHERS
    file: PlainName
    tokens: Annotated[int, Field(ge=1, lt=2**62)]
    documents: Count
    sha256: Sha256


class Splits(TypedDict):
    """The files of a prepared folder."""

    train: Split
    val: Split


class Meta(TypedDict):
    """meta.json: what the .bin files beside it are."""

    __pydantic_config__ = _KEEP_OTHERS
    format: Literal[1]
    dtype: Literal["uint16"]
    tokenizer: Annotated[str, Field(min_length=1)]
    tokenizer_sha256: Sha256
    vocab_size: Annotated[int, Field(ge=1, le=1 << 16)]
    eot_token: Count
    splits: Splits


class SplitProgress(TypedDict):
    """What is on the disk of a .bin file; its documents without those that were left out."""

    tokens: Count
    documents: Count
    left_out: NotRequired[Count]
    sha256: Sha256


class Progress(TypedDict):
    """progress.json: unfinished work. With `meta` the files are complete and await their names."""

    task: dict[str, str]
    splits: dict[Literal["train", "val"], SplitProgress]
    meta: NotRequired[Meta]


class TransformersGPT2(TypedDict):
    """config.json of transformers' GPT-2, of which other keys are checked where they are used."""

    __pydantic_config__ = _KEEP_OTHERS
    model_type: Literal["gpt2"]
    n_layer: int
    n_head: int
    n_embd: int
    n_positions: int
    vocab_size: int
    nanosophia_bias: NotRequired[bool]
    scale_attn_by_inverse_layer_idx: NotRequired[bool]
    activation_function: NotRequired[str]


class TransformersNeoX(TypedDict):
    """config.json of transformers' GPT-NeoX; the rotary settings moved with its version 5."""

    __pydantic_config__ = _KEEP_OTHERS
    model_type: Literal["gpt_neox"]
    num_hidden_layers: int
    num_attention_heads: int
    hidden_size: int
    max_position_embeddings: int
    vocab_size: int
    nanosophia_bias: NotRequired[bool]
    hidden_act: NotRequired[str]
    use_parallel_residual: NotRequired[bool]
    tie_word_embeddings: NotRequired[bool]
    rotary_pct: NotRequired[float]
    rope_parameters: NotRequired[dict[str, Value] | None]


TransformersConfig = Annotated[TransformersGPT2 | TransformersNeoX,
                               Field(discriminator="model_type")]


class NanoGPTArgs(TypedDict):
    """The model's settings in a ckpt.pt of nanoGPT."""

    __pydantic_config__ = _KEEP_OTHERS
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    bias: bool


class NanoGPTCheckpoint(TypedDict):
    """ckpt.pt of nanoGPT or of the authors' code, unpickled."""

    __pydantic_config__ = _KEEP_OTHERS
    model: dict[str, Any]
    model_args: NanoGPTArgs


Number = (Annotated[int, Field(gt=-2**63, lt=2**63)]
          | Annotated[float, Field(allow_inf_nan=False)] | None)


def _with_step(record: dict[str, Number]) -> dict[str, Number]:
    if not isinstance(step := record.get("step"), int) or step < 0:
        raise ValueError("its step is no count")
    return record


Record = Annotated[dict[str, Number], AfterValidator(_with_step)]  # a line of metrics.jsonl


_adapter = cache(TypeAdapter)  # making one takes about a millisecond


def parse(content: bytes, schema: Any) -> Any:
    """Returns the JSON value that the bytes spell; raises ValueError, in one line, on another."""
    return _checked(content, _adapter(schema).validate_json)


def check(value: object, schema: Any) -> Any:
    """Returns a value that is of the schema; raises ValueError, in one line, on another."""
    return _checked(value, _adapter(schema).validate_python)


def _checked(value: Any, validate: Callable) -> Any:
    try:
        return validate(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError((f"{where}: " if where else "") + first["msg"]) from None


def read(path: Path, schema: Any) -> Any:
    """Returns what a JSON file holds.

    Raises OSError when it cannot be read, ValueError when it was read and is not such a file.
    """
    return parse(read_bytes(path), schema)

"""Every setting of the package: frozen dataclasses, composed from YAML files, validated as a whole.

A field's docstring says what it is, its unit, and the published value where one is known
("recipe" is arXiv 2509.22261, "ancestor" is Open-Qwen2VL, arXiv 2504.00595).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from infimed_jax.errors import UserError

T = TypeVar("T")


class ConfigError(UserError):
    """A setting that does not exist or cannot be; the message names it and the mend."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True)
class Vision:
    """SigLIP's vision tower. The defaults are so400m-patch14-384."""

    image_size: int = 384
    """Side of the square input image, pixels."""
    patch_size: int = 14
    """Side of a patch, pixels; a remainder at the image's edge is not seen (384 = 27 * 14 + 6)."""
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_layers: int = 27
    """Blocks of the source model; the tower holds only those that `feature_layer` needs."""
    num_heads: int = 16
    feature_layer: int = -2
    """The feature is Hugging Face's `hidden_states[feature_layer]`: 0 is the embeddings, -1 the last block's output."""
    activation: Literal["gelu_tanh", "gelu"] = "gelu_tanh"
    """Hugging Face's SigLIP has the tanh approximation; the ancestor's vision library has exact GELU."""
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        _require(self.hidden_size % self.num_heads == 0, "vision.hidden_size must be a multiple of vision.num_heads")
        _require(self.image_size >= self.patch_size, "vision.image_size must hold at least one patch")
        _require(
            -self.num_layers - 1 <= self.feature_layer <= self.num_layers,
            f"vision.feature_layer must lie in [-{self.num_layers + 1}, {self.num_layers}]",
        )

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid**2

    @property
    def num_blocks(self) -> int:
        """Blocks that run, so blocks that the tower holds."""
        return self.feature_layer if self.feature_layer >= 0 else self.num_layers + 1 + self.feature_layer


@dataclass(frozen=True)
class Projector:
    """Adaptive average pooling and the two-layer MLP (Linear, exact GELU, Linear)."""

    visual_tokens: int = 729
    """Tokens of one image after pooling, a square number. Recipe: 144 in pretraining, 729 (no pooling) in SFT."""

    def __post_init__(self) -> None:
        _require(
            math.isqrt(self.visual_tokens) ** 2 == self.visual_tokens and self.visual_tokens > 0,
            f"projector.visual_tokens must be a square number, not {self.visual_tokens}",
        )

    @property
    def grid(self) -> int:
        return math.isqrt(self.visual_tokens)


@dataclass(frozen=True)
class Text:
    """Qwen3, dense. The defaults are Qwen3-4B."""

    vocab_size: int = 151_936
    """Rows of the embedding; at least the tokenizer's length (Qwen3 keeps 267 free rows)."""
    hidden_size: int = 2560
    intermediate_size: int = 9728
    num_layers: int = 36
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    rope_theta: float = 1_000_000.0
    """5e6 in Qwen3-4B-Instruct-2507."""
    norm_eps: float = 1e-6
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        _require(self.num_heads % self.num_kv_heads == 0, "text.num_heads must be a multiple of text.num_kv_heads")
        _require(self.head_dim % 2 == 0, "text.head_dim must be even (rotary embedding)")


@dataclass(frozen=True)
class Model:
    vision: Vision = field(default_factory=Vision)
    projector: Projector = field(default_factory=Projector)
    text: Text = field(default_factory=Text)

    def __post_init__(self) -> None:
        _require(
            self.projector.grid <= self.vision.grid,
            f"projector.visual_tokens ({self.projector.visual_tokens}) exceeds the patches ({self.vision.num_patches})",
        )


@dataclass(frozen=True)
class Data:
    """From a prepared dataset to global batches."""

    dataset: str = ""
    """Folder of a prepared (ArrayRecord) dataset, as `data ingest` or `data mix` writes it."""
    tokenizer: str = ""
    """Folder of a Qwen3 tokenizer (tokenizer.json, tokenizer_config.json, chat template)."""
    context: int = 4096
    """Tokens of a row, visual tokens included."""
    images_per_row: int = 24
    """Images of a row at most; with `context`, the packer's second budget."""
    packing: Literal["first_fit_decreasing", "minimum_bin_slack", "none"] = "first_fit_decreasing"
    """The paper's First-Fit-Decreasing; `minimum_bin_slack`, which fills rows of similar samples better; `none`: one
    sample a row, rows grouped into length buckets."""
    buckets: int = 4
    """Distinct row shapes (tokens, images) at most, so distinct compilations; packed data needs one."""
    mask_segments: bool = True
    """False: the ancestor's unmasked packing, one causal sequence with running positions."""
    prefetch: int = 4
    """Batches that reader threads keep ready."""
    threads: int = 2
    """Reader threads of this process."""
    max_bad_records: float = 0.01
    """Share of unreadable records above which the run ends."""

    def __post_init__(self) -> None:
        _require(self.context >= 8, "data.context must be at least 8 tokens")
        _require(self.images_per_row >= 0, "data.images_per_row must not be negative")
        _require(1 <= self.buckets <= 4, "data.buckets must be between 1 and 4")
        _require(min(self.prefetch, self.threads) >= 0, "data.prefetch and data.threads must not be negative")
        _require(0 <= self.max_bad_records <= 1, "data.max_bad_records is a share between 0 and 1")


@dataclass(frozen=True)
class Optimizer:
    """AdamW with linear warm-up and a cosine to `final_fraction` of the peak."""

    learning_rate: float = 2e-5
    """Peak. Recipe: 5e-5 in pretraining, 2e-5 in SFT."""
    warmup_fraction: float = 0.03
    """Share of all steps."""
    schedule: Literal["cosine", "constant"] = "cosine"
    final_fraction: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Not applied to biases and 1-D parameters. Recipe: 0.01 in pretraining; SFT 0.1 (text) or 0.01 (table)."""
    clip_norm: float = 1.0
    """Global gradient norm; not stated in the recipe, 1.0 in the ancestor."""

    def __post_init__(self) -> None:
        _require(self.learning_rate >= 0, "optimizer.learning_rate must not be negative")
        _require(0 <= self.warmup_fraction <= 1, "optimizer.warmup_fraction is a share between 0 and 1")
        _require(self.clip_norm > 0, "optimizer.clip_norm must be positive")


@dataclass(frozen=True)
class Mesh:
    """Devices along each axis; -1 takes what the others leave. All three axes always exist."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor)
        _require(all(s == -1 or s > 0 for s in sizes), "mesh sizes must be positive, or -1 for the rest")
        _require(sizes.count(-1) <= 1, "only one of mesh.data, mesh.fsdp, mesh.tensor may be -1")


@dataclass(frozen=True)
class Train:
    """One stage's training run."""

    stage: str = "sft"
    """Name shown in logs and reports."""
    global_batch: int = 128
    """Rows a step over all devices. Recipe: 256 in pretraining, 128 in SFT."""
    epochs: int = 1
    """Passes over the data; ignored where `steps` is set."""
    steps: int = 0
    """Steps in all; 0 follows from `epochs`."""
    micro_batches: int = 1
    """Gradient accumulation: pieces of a global batch run one after the other."""
    train: tuple[Literal["vision", "projector", "text"], ...] = ("projector", "text")
    """Parts that learn; the rest is frozen (no gradient, no moments). Recipe: vision always frozen."""
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of activations and matmuls; master parameters and moments are float32."""
    remat: Literal["none", "dots", "full"] = "full"
    """Activation checkpointing: keep all, keep matmul outputs, keep only block inputs."""
    logit_chunk: int = 512
    """Positions of a row whose logits exist at once in the loss; must divide the row."""
    attention: Literal["auto", "xla", "splash"] = "auto"
    """Attention kernel; `auto` chooses by platform and logs the choice."""
    checkpoint_every: int = 500
    """Steps."""
    keep_checkpoints: int = 2
    log_every: int = 10
    """Steps."""
    max_skipped_updates: int = 5
    """Consecutive non-finite updates that end the run."""
    seed: int = 0
    output: str = ""
    """The run's folder."""
    init_from: str = ""
    """A finished run (or checkpoint) whose parameters this stage starts from."""

    def __post_init__(self) -> None:
        _require(self.global_batch > 0, "train.global_batch must be positive")
        _require(self.micro_batches > 0, "train.micro_batches must be positive")
        _require(
            self.global_batch % self.micro_batches == 0,
            f"train.global_batch {self.global_batch} must be a multiple of train.micro_batches {self.micro_batches}",
        )
        _require(bool(self.train), "train.train names no part: nothing would learn")


@dataclass(frozen=True)
class Sampling:
    """Decoding, for `generate`, evaluation and rollouts."""

    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all."""
    repetition_penalty: float = 1.0
    max_tokens: int = 512
    """New tokens at most."""
    slots: int = 64
    """Sequences decoded at once, a static shape."""
    burst: int = 16
    """Tokens decoded on the device before the host refills finished slots."""

    def __post_init__(self) -> None:
        _require(self.temperature >= 0, "sampling.temperature must not be negative")
        _require(0 < self.top_p <= 1, "sampling.top_p must lie in (0, 1]")
        _require(self.top_k >= 0, "sampling.top_k must not be negative")
        _require(self.repetition_penalty > 0, "sampling.repetition_penalty must be positive")
        _require(
            min(self.max_tokens, self.slots, self.burst) > 0, "sampling.max_tokens, slots and burst must be positive"
        )


@dataclass(frozen=True)
class Grpo:
    """Group relative policy optimisation with verifiable rewards; the defaults are those of InfiMed-RL's framework."""

    steps: int = 100
    """Rollouts; each serves `prompts / update_prompts` updates."""
    prompts: int = 512
    """Prompts a rollout."""
    group_size: int = 8
    """Completions a prompt."""
    update_prompts: int = 128
    """Prompts an update."""
    temperature: float = 1.0
    top_p: float = 1.0
    max_prompt: int = 2048
    """Tokens, visual ones included; longer prompts are dropped and counted."""
    max_response: int = 2048
    """Tokens."""
    kl_coefficient: float = 0.01
    """Of the k3 estimator against the frozen reference, inside the loss; 0 keeps no reference."""
    clip_low: float = 0.2
    clip_high: float = 0.3
    dual_clip: float = 3.0
    """Bound of the ratio where the advantage is negative; 0 turns it off."""
    accuracy_weight: float = 0.9
    format_weight: float = 0.1
    normalize_std: bool = True
    """Divide a group's advantages by its standard deviation."""
    reward: Literal["verifiable", "constant"] = "verifiable"
    """`constant` is the control: every completion earns 1, so nothing can be learnt."""

    def __post_init__(self) -> None:
        _require(self.group_size > 1, "grpo.group_size must be at least 2: one completion has no group to compare with")
        _require(
            self.prompts % self.update_prompts == 0,
            f"grpo.prompts {self.prompts} must be a multiple of grpo.update_prompts {self.update_prompts}",
        )


@dataclass(frozen=True)
class Config:
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    mesh: Mesh = field(default_factory=Mesh)
    train: Train = field(default_factory=Train)
    sampling: Sampling = field(default_factory=Sampling)
    grpo: Grpo = field(default_factory=Grpo)


def from_dict(kind: type[T], values: dict[str, Any], path: str = "") -> T:
    """Build the dataclass `kind` from nested plain values; unknown keys and wrong types raise ConfigError."""
    hints = typing.get_type_hints(kind)
    known = {f.name for f in dataclasses.fields(kind)}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {path}{near[0]}?" if near else f"; known here: {', '.join(sorted(known))}"
            raise ConfigError(f"unknown setting {path}{key}{hint}")
    return kind(**{key: _typed(hints[key], value, f"{path}{key}") for key, value in values.items()})


def _typed(hint: Any, value: Any, path: str) -> Any:
    """`value` as the annotated type, or a ConfigError that names the field; never a lossy conversion."""
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        _require(isinstance(value, dict), f"{path} must be a group of settings, not {value!r}")
        return from_dict(hint, value, path + ".")
    if origin is Literal:
        allowed = typing.get_args(hint)
        if value not in allowed:
            near = difflib.get_close_matches(str(value), [str(a) for a in allowed], n=1)
            hint_text = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{path} must be one of {', '.join(map(str, allowed))}, not {value!r}{hint_text}")
        return value
    if origin is tuple:
        if isinstance(value, str):
            value = [part.strip() for part in value.strip("[]()").split(",") if part.strip()]
        _require(isinstance(value, (list, tuple)), f"{path} must be a list, not {value!r}")
        return tuple(_typed(typing.get_args(hint)[0], item, path) for item in value)
    if origin in (typing.Union, types.UnionType):
        raise ConfigError(f"{path}: optional settings are not used here")
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 1e-5 as a string
        except ValueError:
            pass
    _require(type(value) is hint, f"{path} must be {hint.__name__}, not {value!r}")
    return value


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values that `from_dict` reads back to an equal config."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with `over`'s leaves laid on top, nested groups merged."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def load(files: typing.Sequence[str | Path], overrides: typing.Sequence[str] = ()) -> Config:
    """Compose YAML files, later over earlier, then dotted overrides such as `train.steps=20`."""
    values: dict[str, Any] = {}
    for file in files:
        try:
            loaded = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read config {file}: {error.strerror or error}") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"config {file} is not valid YAML: {' '.join(str(error).split())}") from error
        _require(isinstance(loaded or {}, dict), f"config {file} must hold groups of settings")
        values = merge(values, loaded or {})
    return from_dict(Config, with_overrides(values, overrides))


def with_overrides(values: dict[str, Any], overrides: typing.Sequence[str]) -> dict[str, Any]:
    """Nested plain values with dotted overrides such as `train.steps=20` laid on top."""
    for override in overrides:
        dotted, equals, text = override.partition("=")
        _require(bool(equals) and bool(dotted), f"override {override!r} must look like train.steps=20")
        try:
            nested: Any = yaml.safe_load(text) if text else ""
        except yaml.YAMLError as error:
            raise ConfigError(f"override {override!r} is not valid YAML: {' '.join(str(error).split())}") from error
        for key in reversed(dotted.split(".")):
            nested = {key: nested}
        values = merge(values, nested)
    return values

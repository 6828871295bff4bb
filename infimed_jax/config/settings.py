"""Every setting of the package, as frozen dataclasses that refuse what cannot be.

A field's docstring says what it is, its unit, and the published value where one is known
("recipe" is arXiv 2509.22261, "ancestor" is Open-Qwen2VL, arXiv 2504.00595).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from infimed_jax.errors import UserError


class ConfigError(UserError):
    """A setting that does not exist or cannot be; the message names it and the mend."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _at_least(least: int, group: str, settings: object, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        require(value >= least, f"{group}.{name}={value} must be at least {least}")


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
        sizes = ("image_size", "patch_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")
        _at_least(1, "model.vision", self, *sizes)
        require(self.hidden_size % self.num_heads == 0, "vision.hidden_size must be a multiple of vision.num_heads")
        require(self.image_size >= self.patch_size, "vision.image_size must hold at least one patch")
        require(
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
        require(
            self.visual_tokens > 0 and math.isqrt(self.visual_tokens) ** 2 == self.visual_tokens,
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
        _at_least(1, "model.text", self, "vocab_size", "hidden_size", "intermediate_size", "num_layers")
        _at_least(1, "model.text", self, "num_heads", "num_kv_heads", "head_dim")
        require(self.num_heads % self.num_kv_heads == 0, "text.num_heads must be a multiple of text.num_kv_heads")
        require(self.head_dim % 2 == 0, "text.head_dim must be even (rotary embedding)")


@dataclass(frozen=True)
class Model:
    vision: Vision = field(default_factory=Vision)
    projector: Projector = field(default_factory=Projector)
    text: Text = field(default_factory=Text)

    def __post_init__(self) -> None:
        require(
            self.projector.grid <= self.vision.grid,
            f"model.projector.visual_tokens={self.projector.visual_tokens} exceeds the {self.vision.num_patches} "
            "patches of an image: set a square number up to that",
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
    """Share of unreadable records, of all that were read on all hosts, above which the run ends."""

    def __post_init__(self) -> None:
        require(self.context >= 8, "data.context must be at least 8 tokens")
        _at_least(0, "data", self, "images_per_row", "prefetch", "threads")
        require(1 <= self.buckets <= 4, "data.buckets must be between 1 and 4")
        require(0 <= self.max_bad_records <= 1, "data.max_bad_records is a share between 0 and 1")


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
    moments_dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 halves Adam's memory, 8 bytes a parameter to 4; both are then rounded stochastically."""

    def __post_init__(self) -> None:
        _at_least(0, "optimizer", self, "learning_rate", "eps", "weight_decay")
        for name in ("warmup_fraction", "final_fraction"):
            require(0 <= getattr(self, name) <= 1, f"optimizer.{name} is a share between 0 and 1")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optimizer.{name} must lie in [0, 1)")
        require(self.clip_norm > 0, "optimizer.clip_norm must be positive")


@dataclass(frozen=True)
class Mesh:
    """Devices along each axis; -1 takes what the others leave. All three axes always exist."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 0
    """0: 1, or where the global batch has too few rows for the devices, the least that lets it split over the rest."""

    def __post_init__(self) -> None:
        sizes = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}
        for axis, size in sizes.items():
            or_zero = ", or 0 to have it chosen" if axis == "tensor" else ""
            right = size == -1 or size > 0 or (axis == "tensor" and size == 0)
            require(right, f"mesh.{axis}={size} must count devices, or be -1 for what the others leave{or_zero}")
        taking = [f"mesh.{axis}" for axis, size in sizes.items() if size == -1]
        require(len(taking) <= 1, f"{' and '.join(taking)} are -1, only one may be: give the others a number")


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (arXiv 2106.09685) on the text model's linears, which then stay frozen in the compute dtype."""

    rank: int = 0
    """0 turns adapters off."""
    alpha: float = 16.0
    """The adapters' output is scaled by alpha / rank."""
    targets: tuple[Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    """The linears that get one, in every layer."""

    def __post_init__(self) -> None:
        require(self.rank >= 0, "train.lora.rank must not be negative")
        require(self.alpha > 0, "train.lora.alpha must be positive")
        require(bool(self.targets) or not self.rank, "train.lora.targets names no linear: nothing would learn")


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
    rows_per_device: int = 0
    """Rows that a device computes at once, at most; `micro_batches` then follows from the mesh. 0: off."""
    train: tuple[Literal["vision", "projector", "text"], ...] = ("projector", "text")
    """Parts that learn; the rest is frozen (no gradient, no moments). Recipe: vision always frozen."""
    lora: Lora = field(default_factory=Lora)
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of activations and matmuls; master parameters are float32."""
    remat: Literal["auto", "none", "dots", "full"] = "auto"
    """Activation checkpointing: `none` keeps all, `dots` the matmuls' outputs, `full` only the blocks' inputs. `auto`
    is `dots` where an estimate of the memory allows it, else `full`; in GRPO `full`: the sampler needs the memory."""
    logit_chunk: int = 512
    """Positions of a row whose logits exist at once in the loss."""
    attention: Literal["auto", "xla", "splash"] = "auto"
    """Attention kernel; `auto` chooses by platform and logs the choice."""
    checkpoint_every: int = 500
    """Steps."""
    keep_checkpoints: int = 2
    log_every: int = 10
    """Steps."""
    wandb: str = ""
    """Weights & Biases project that gets the metrics too; needs the `wandb` package."""
    step_timeout: float = 600.0
    """Seconds after which a step that has not ended is called hung, with the host's name; 0: never."""
    max_skipped_updates: int = 5
    """Consecutive non-finite updates that end the run; 0: none do."""
    seed: int = 0
    output: str = ""
    """The run's folder."""
    init_from: str = ""
    """A finished run (or checkpoint) whose parameters this stage starts from."""

    def __post_init__(self) -> None:
        _at_least(1, "train", self, "global_batch", "micro_batches", "epochs", "logit_chunk", "log_every")
        _at_least(1, "train", self, "checkpoint_every", "keep_checkpoints")
        _at_least(0, "train", self, "steps", "rows_per_device", "step_timeout", "max_skipped_updates", "seed")
        require(self.seed < 2**32, f"train.seed={self.seed} must be below 2**32")
        require(
            self.global_batch % self.micro_batches == 0,
            f"train.global_batch {self.global_batch} must be a multiple of train.micro_batches {self.micro_batches}",
        )
        require(bool(self.train), "train.train names no part: nothing would learn")
        require(
            not self.lora.rank or "text" in self.train,
            "train.lora.rank is set but train.train does not name text, whose linears the adapters are for",
        )
        require(
            not self.rows_per_device or self.micro_batches == 1,
            f"train.micro_batches={self.micro_batches} and train.rows_per_device={self.rows_per_device} are both set: "
            "set one, and the other to its default (1 or 0)",
        )


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
        # Beyond these bounds float32 logits overflow, and a distribution of NaN would be read as token 0.
        require(
            self.temperature == 0 or 1e-6 <= self.temperature <= 1e6,
            "sampling.temperature must be 0 (greedy) or lie in [1e-6, 1e6]",
        )
        require(0 < self.top_p <= 1, "sampling.top_p must lie in (0, 1]")
        _at_least(0, "sampling", self, "top_k")
        _at_least(1, "sampling", self, "max_tokens", "slots", "burst")
        require(1e-6 <= self.repetition_penalty <= 1e6, "sampling.repetition_penalty must lie in [1e-6, 1e6]")


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
    share_prompts: bool = True
    """In updates, compute a prompt once for all its completions in a row. Splash attention cannot: there each
    completion brings its own, which is logged."""
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
        _at_least(1, "grpo", self, "steps", "prompts", "update_prompts", "max_prompt", "max_response")
        weights = ("kl_coefficient", "clip_low", "clip_high", "dual_clip", "accuracy_weight", "format_weight")
        _at_least(0, "grpo", self, *weights)
        require(1e-6 <= self.temperature <= 1e6, "grpo.temperature must lie in [1e-6, 1e6]: greedy replies are all one")
        require(0 < self.top_p <= 1, "grpo.top_p must lie in (0, 1]")
        require(self.group_size > 1, "grpo.group_size must be at least 2: one completion has no group to compare with")
        require(
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

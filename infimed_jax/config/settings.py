"""Every setting of the package, as frozen dataclasses that refuse impossible values.

A field is declared once: its type, default and limits are the check, and they and its docstring are the help
(`launch/run.py settings`). The docstring states what the setting is, its unit, and the published value where one is
known ("recipe" is arXiv 2509.22261, "ancestor" is Open-Qwen2VL, arXiv 2504.00595).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from infimed_jax.config.fields import (
    AtLeast,
    Count,
    CountOrZero,
    Decay,
    Group,
    Limit,
    Member,
    NotNegative,
    Positive,
    Probability,
    Share,
    nearest,
    require,
)
from infimed_jax.config.model import Model, model_class

Context = Annotated[int, Limit(lambda tokens: tokens >= 8, "must be at least 8 tokens")]
Buckets = Annotated[int, Limit(lambda shapes: 1 <= shapes <= 4, "must be between 1 and 4")]
Rank = Annotated[int, Limit(lambda rank: rank >= 0, "must not be negative")]
Seed = Annotated[int, AtLeast(0), Limit(lambda seed: seed < 2**32, "must be below 2**32", show_value=True)]
GroupSize = Annotated[int, Limit(lambda n: n > 1, "must be at least 2: one completion has no group to compare with")]

_SIZES = "must count devices, or be -1 for what the others leave"
Devices = Annotated[int, Limit(lambda size: size == -1 or size > 0, _SIZES, show_value=True)]
DevicesOrChosen = Annotated[int, Limit(lambda n: n >= -1, f"{_SIZES}, or 0 to have it chosen", show_value=True)]


def _scales_logits(value: float) -> bool:
    """Beyond these bounds float32 logits overflow, and a distribution of NaN would be read as token 0."""
    return 1e-6 <= value <= 1e6


Scale = Annotated[float, Limit(_scales_logits, "must lie in [1e-6, 1e6]")]
Temperature = Annotated[
    float, Limit(lambda value: value == 0 or _scales_logits(value), "must be 0 (greedy) or lie in [1e-6, 1e6]")
]
Penalty = Annotated[float, Limit(lambda penalty: -2 <= penalty <= 2, "must lie in [-2, 2]")]
Exploration = Annotated[float, Limit(_scales_logits, "must lie in [1e-6, 1e6]: greedy replies are all one")]


@dataclass(frozen=True)
class Data(Group, path="data"):
    """From a prepared dataset to global batches."""

    dataset: str = ""
    """Folder of a prepared (ArrayRecord) dataset, as `data ingest` or `data mix` writes it."""
    tokenizer: str = ""
    """Folder of a Qwen3 tokenizer (tokenizer.json, tokenizer_config.json, chat template)."""
    context: Context = 4096
    """Tokens of a row, visual tokens included."""
    images_per_row: CountOrZero = 24
    """Maximum images of a row; beside `context` the packer's second budget."""
    packing: Literal["first_fit_decreasing", "minimum_bin_slack", "none"] = "first_fit_decreasing"
    """`first_fit_decreasing` is the paper's; `minimum_bin_slack` fills rows of similar samples better; `none` puts one
    sample in a row and groups rows into length buckets."""
    buckets: Buckets = 4
    """Maximum number of row shapes (tokens, images), each of which is compiled; packed data needs one."""
    mask_segments: bool = True
    """Whether a sample attends only to itself. False: the ancestor's packing, one causal sequence with running
    positions."""
    prefetch: CountOrZero = 4
    """Batches that reader threads keep ready."""
    threads: CountOrZero = 2
    """Reader threads of this process."""
    max_bad_records: Share = 0.01
    """Share of the records read on all hosts that may be unreadable; above it the run ends."""

    def __post_init__(self) -> None:
        super().__post_init__()


@dataclass(frozen=True)
class Optimizer(Group, path="optimizer"):
    """AdamW with linear warm-up and a cosine to `final_fraction` of the peak."""

    learning_rate: NotNegative = 2e-5
    """Peak value. Recipe: 5e-5 in pretraining, 2e-5 in SFT."""
    warmup_fraction: Share = 0.03
    """Share of all steps in which the learning rate rises linearly."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up."""
    final_fraction: Share = 0.0
    """Share of the peak learning rate that the cosine ends at."""
    beta1: Decay = 0.9
    """Decay of the first moment."""
    beta2: Decay = 0.999
    """Decay of the second moment."""
    eps: NotNegative = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NotNegative = 0.1
    """Not applied to biases and 1-D parameters. Recipe: 0.01 in pretraining; SFT 0.1 (text) or 0.01 (table)."""
    clip_norm: Positive = 1.0
    """Maximum norm of the whole gradient; not stated in the recipe, 1.0 in the ancestor."""
    moments_dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 halves the moments' memory from 8 bytes a parameter to 4; both are then rounded stochastically."""

    def __post_init__(self) -> None:
        super().__post_init__()


@dataclass(frozen=True)
class Mesh(Group, path="mesh"):
    """Devices along each axis; -1 takes what the others leave. All three axes always exist."""

    data: Devices = 1
    """Groups of devices that hold a whole copy of the parameters."""
    fsdp: Devices = -1
    """Devices that share one copy of the parameters and optimizer state, and split the batch."""
    tensor: DevicesOrChosen = 0
    """Devices that split each matrix product. 0 means 1; if the global batch has too few rows for the devices, 0 means
    the smallest number that lets the batch split over the rest."""

    def __post_init__(self) -> None:
        super().__post_init__()
        taking = [f"mesh.{axis}" for axis, size in vars(self).items() if size == -1]
        require(len(taking) <= 1, f"{' and '.join(taking)} are -1, only one may be: give the others a number")


LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Lora(Group, path="train.lora"):
    """Low-rank adapters (arXiv 2106.09685) on the text model's linear layers, which are then frozen."""

    rank: Rank = 0
    """Rank of an adapter; 0 turns adapters off."""
    alpha: Positive = 16.0
    """The adapters' output is scaled by alpha / rank."""
    targets: tuple[str, ...] = LINEARS
    """Linear layers that get an adapter, in every block, by the names that the model's family gives them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.targets) or not self.rank, "train.lora.targets names no linear: nothing would learn")


@dataclass(frozen=True)
class Train(Group, path="train"):
    """One stage's training run."""

    stage: str = "sft"
    """Name shown in logs and reports."""
    global_batch: Count = 128
    """Rows of a step over all devices. Recipe: 256 in pretraining, 128 in SFT."""
    epochs: Count = 1
    """Passes over the data; ignored if `steps` is set."""
    steps: CountOrZero = 0
    """Total steps; 0 takes the number that `epochs` needs."""
    micro_batches: Count = 1
    """Gradient accumulation: number of pieces of a global batch that are computed one after the other."""
    rows_per_device: CountOrZero = 0
    """Maximum rows that a device computes at once, from which `micro_batches` then follows; 0: off."""
    train: tuple[str, ...] = ("projector", "text")
    """Parts that learn; the rest is frozen (no gradient, no moments). Recipe: vision always frozen."""
    lora: Lora = field(default_factory=Lora)
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of activations and matrix products; master parameters are float32."""
    remat: Literal["auto", "none", "dots", "full"] = "auto"
    """Activation checkpointing: `none` keeps all activations, `dots` the outputs of matrix products, `full` only the
    inputs of blocks. `auto` is `dots` if an estimate says that they fit in memory, otherwise `full`; in GRPO it is
    `full`, since the sampler needs the memory."""
    logit_chunk: Count = 512
    """Positions of a row whose logits are in memory at once in the loss."""
    attention: Annotated[str, Member("infimed_jax.ops.attention.backends", others=("auto",))] = "auto"
    """Attention kernel; `auto` chooses by platform and logs the choice. A module of your own defines a `BACKEND`."""
    checkpoint_every: Count = 500
    """Steps between two checkpoints."""
    keep_checkpoints: Count = 2
    """Checkpoints that are kept, the latest ones."""
    log_every: Count = 10
    """Steps between two lines of metrics."""
    wandb: str = ""
    """Weights & Biases project that also receives the metrics; needs the `wandb` package."""
    step_timeout: NotNegative = 600.0
    """Seconds after which a step that has not ended is reported as hung, with the host's name; 0: never."""
    image_check: bool = True
    """Measure by how much the loss of held rows rises when each image is replaced by another's, at about 1 % of the
    run's computation, and warn where it does not."""
    max_skipped_updates: CountOrZero = 5
    """Consecutive non-finite updates that end the run; 0: no number does."""
    seed: Seed = 0
    """Seed of initial values, data order and sampling."""
    output: str = ""
    """The run's folder."""
    init_from: str = ""
    """A finished run (or checkpoint) whose parameters this stage starts from."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.global_batch % self.micro_batches == 0,
            f"train.global_batch {self.global_batch} must be a multiple of train.micro_batches {self.micro_batches}",
        )
        require(bool(self.train), "train.train names no part: nothing would learn")
        require(
            not self.rows_per_device or self.micro_batches == 1,
            f"train.micro_batches={self.micro_batches} and train.rows_per_device={self.rows_per_device} are both set: "
            "set one, and the other to its default (1 or 0)",
        )


@dataclass(frozen=True)
class Sampling(Group, path="sampling"):
    """Decoding, for `generate`, evaluation and rollouts."""

    temperature: Temperature = 0.0
    """Divides the logits; 0 is greedy."""
    top_p: Probability = 1.0
    """Sample from the most likely tokens whose probabilities sum to this."""
    top_k: CountOrZero = 0
    """Sample from this many most likely tokens; 0: from all."""
    repetition_penalty: Scale = 1.0
    """Divides positive logits of tokens that occurred already in prompt or reply, multiplies negative ones; 1: off.
    The published evaluation used 1.1."""
    presence_penalty: Penalty = 0.0
    """Subtracted from the logit of every token that the reply holds already; 0: off. The published evaluation used
    2.0."""
    frequency_penalty: Penalty = 0.0
    """Subtracted from a token's logit for each time that the reply holds it; 0: off."""
    max_tokens: Count = 512
    """Maximum number of new tokens."""
    slots: Count = 64
    """Sequences decoded at once, a static shape."""
    share_images: bool = True
    """Compute an image, and what stands before it, once for all prompts that begin so. An attention kernel that cannot
    do so computes every prompt, which is logged."""
    burst: Count = 16
    """Tokens decoded on the device before the host refills finished slots."""

    def __post_init__(self) -> None:
        super().__post_init__()


@dataclass(frozen=True)
class Grpo(Group, path="grpo"):
    """Group relative policy optimisation with verifiable rewards; the defaults are those of InfiMed-RL's framework."""

    steps: Count = 100
    """Rollouts; each is used for `prompts / update_prompts` updates."""
    prompts: Count = 512
    """Prompts of a rollout."""
    group_size: GroupSize = 8
    """Completions of a prompt."""
    update_prompts: Count = 128
    """Prompts of an update."""
    temperature: Exploration = 1.0
    """Temperature of the rollout's sampling."""
    top_p: Probability = 1.0
    """As sampling.top_p, in the rollout."""
    max_prompt: Count = 2048
    """Maximum tokens of a prompt, visual ones included; longer prompts are dropped and counted."""
    max_response: Count = 2048
    """Maximum tokens of a completion."""
    share_prompts: bool = True
    """In updates, compute a prompt once for all its completions in a row. An attention kernel that cannot do so
    repeats the prompt for each completion, which is logged."""
    kl_coefficient: NotNegative = 0.01
    """Weight of the KL divergence from the frozen reference (k3 estimator) in the loss; 0 keeps no reference."""
    clip_low: NotNegative = 0.2
    """The probability ratio is clipped below 1 - clip_low."""
    clip_high: NotNegative = 0.3
    """The probability ratio is clipped above 1 + clip_high."""
    dual_clip: NotNegative = 3.0
    """Upper bound of the ratio if the advantage is negative; 0 turns it off."""
    accuracy_weight: NotNegative = 0.9
    """Weight of a right answer in the reward."""
    format_weight: NotNegative = 0.1
    """Weight of the required format in the reward."""
    normalize_std: bool = True
    """Divide a group's advantages by its standard deviation."""
    reward: Annotated[str, Member("infimed_jax.rl.rewards")] = "verifiable"
    """What a completion earns. `constant` is the control: every completion earns 1, so nothing can be learned. A module
    of your own defines `reward(attempts, grpo)`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.prompts % self.update_prompts == 0,
            f"grpo.prompts {self.prompts} must be a multiple of grpo.update_prompts {self.update_prompts}",
        )


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    model: Model = field(default_factory=lambda: model_class("infimed")())
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    mesh: Mesh = field(default_factory=Mesh)
    train: Train = field(default_factory=Train)
    sampling: Sampling = field(default_factory=Sampling)
    grpo: Grpo = field(default_factory=Grpo)

    def __post_init__(self) -> None:
        parts = self.model.PARTS
        for part in self.train.train:
            hint = nearest(part, parts, repr)
            require(part in parts, f"train.train must be one of {', '.join(parts)}, not {part!r}{hint}")
        require(
            not self.train.lora.rank or parts[-1] in self.train.train,
            f"train.lora.rank is set but train.train does not name {parts[-1]}, whose linears the adapters are for",
        )

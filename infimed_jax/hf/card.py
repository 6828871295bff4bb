"""The exported model's card: what it is, what it was made from, under which licences, and what it is not for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from infimed_jax.config import Lora, Model
from infimed_jax.models.family import family_of

LIMITS = (
    "For research only. It is no medical device, and no one has cleared it for clinical use: its output must not be "
    "used for diagnosis, triage or treatment, and may be wrong in ways that read convincingly."
)


@dataclass(frozen=True)
class DataSource:
    """One dataset that a stage learnt from."""

    name: str
    licence: str
    commercial_use: bool


@dataclass(frozen=True)
class Card:
    """What only the caller knows; everything else is read off the model and the export."""

    title: str = "InfiMed model"
    base_models: tuple[str, ...] = ()
    """What the weights started from, each with its licence, as it should be printed."""
    closed_bases: tuple[str, ...] = ()
    """Names of those whose licence is not known to allow commercial use."""
    stages: tuple[str, ...] = ()
    """One line a training stage, in order."""
    sources: tuple[DataSource, ...] = ()
    results: dict[str, str] = field(default_factory=dict)
    """Benchmark → score with its interval, as measured by us; empty prints that none was measured."""


def licence(card: Card) -> str:
    """What the training data and the base models leave of the weights' licence, in a sentence."""
    data = sorted({source.name for source in card.sources if not source.commercial_use})
    closed = {"training data": data, "base models": sorted(set(card.closed_bases))}
    because = [f"the {what}: {', '.join(names)}" for what, names in closed.items() if names]
    if because:
        return f"Not for commercial use, because of {'; and of '.join(because)}."
    if not card.sources:
        return "The training data was not declared: treat the weights as licensed for research only."
    return "Every training set allows commercial use under its own licence, given above; attribution is owed."


def render_card(
    card: Card, model: Model, *, dtype: str, parameters: int, made_up: Sequence[str], adapter: Lora | None = None
) -> str:
    """README.md: front matter and text. `made_up` names exported tensors that were initialised, not trained;
    `adapter` stands beside the weights, not in them."""
    hf = family_of(model).hugging_face
    first, *others = hf.describe(model)
    exported = hf.exported(model).visual_tokens
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: image-text-to-text",
        "license: other",  # derived below, from the data
        "tags: [medical, research-only, llava]",
        "---",
        f"# {card.title}",
        "",
        f"**{LIMITS}**",
        "",
        "## Model",
        f"- `{hf.architecture}`, {parameters:,} parameters in {dtype}: {first}",
        *(f"- {line}" for line in others),
        "- One image stands before the question; of several, each follows a text part with its number, `<image_1>: `.",
        "- In a user's text, transformers and serving engines read `<|im_end|>` and other control tokens as tokens; "
        "training read them as plain text. Remove them from untrusted text before it is rendered.",
    ]
    if model.visual_tokens != exported:
        lines.append(
            f"- Trained with {model.visual_tokens} pooled visual tokens, exported with {exported}: "
            "plain LLaVA has no pooling, so its outputs are not those of the trained model."
        )
    if made_up:
        lines.append(
            "- Initialised, not trained, and not used at this hidden state; written because the format asks for them: "
            + ", ".join(f"`{name}`" for name in made_up)
            + "."
        )
    if adapter:
        lines.append(
            f"- The last stage's LoRA adapters (rank {adapter.rank}, alpha {adapter.alpha:g}) are in `adapter/`, in "
            "PEFT's layout, and not in these weights: "
            "`PeftModel.from_pretrained(model, 'adapter')` gives the trained model."
        )
    lines += ["", "## Origin", *_bullets(card.base_models, "The base models were not declared.")]
    lines += ["", "## Training", *_bullets(card.stages, "The stages were not declared.")]
    lines += ["", "## Data", *_data(card.sources), licence(card)]
    results = [f"{name}: {score}" for name, score in card.results.items()]
    lines += ["", "## Results", *_bullets(results, "None was measured for this export.")]
    return "\n".join(lines) + "\n"


def _bullets(items: Sequence[str], otherwise: str) -> list[str]:
    return [f"- {item}" for item in items] or [otherwise]


def _data(sources: Sequence[DataSource]) -> list[str]:
    if not sources:
        return []
    rows = [f"| {s.name} | {s.licence} | {'yes' if s.commercial_use else 'no'} |" for s in sources]
    return ["| source | licence | commercial use |", "|---|---|---|", *rows, ""]

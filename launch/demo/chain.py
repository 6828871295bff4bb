"""One run of the demo: its folder, its configuration of each stage, and what its finished steps left.

A finished step leaves `steps/NAME.json`; `--resume` reads it instead of running the step again.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from infimed_jax import config as configuration
from infimed_jax.data.chat import load_tokenizer
from infimed_jax.files import write_json
from launch.cli.progress import ChainProgress

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
STAGES = {
    "warmup": "Warm-up",
    "pretrain": "Continual pretraining",
    "sft_general": "General SFT",
    "sft_medical": "Medical SFT",
    "sft_cross_distribution": "Cross-distribution SFT",
    "sft_reflective": "Reflective CoT SFT",
}
LAST_DIRECT, LAST_SUPERVISED = "sft_cross_distribution", "sft_reflective"
"""The last stages that answer directly, and after reasoning."""
REINFORCED = {"grpo": "GRPO", "control": "GRPO control"}
REASONING = (LAST_SUPERVISED, *REINFORCED)
"""Stages whose questions ask for reasoning, as in their training."""
SAMPLED = "_sampled"
"""Ends the name of an evaluation of sampled replies, which is what GRPO improves; the others are greedy."""
BLIND = "blind"
"""The evaluation of LAST_DIRECT without images."""
PUBLISHED = {"warmup": "pretrain"}
"""The published stage whose settings a stage of the demo's own starts from."""


def _steps() -> dict[str, tuple[str, float]]:
    seconds = dict(zip(STAGES, (60.0, 22.0, 22.0, 80.0, 16.0, 35.0), strict=True)) | {"grpo": 144.0, "control": 69.0}
    steps = {"data": ("Data", 25.0)}
    for name, title in STAGES.items():
        steps |= {name: (title, seconds[name]), f"evaluation_{name}": (f"Evaluation: {title}", 5.0)}
    steps[f"evaluation_{BLIND}"] = ("Evaluation without images", 4.0)
    steps[f"evaluation_{LAST_SUPERVISED}{SAMPLED}"] = (f"Sampled replies: {STAGES[LAST_SUPERVISED]}", 4.0)
    for name, title in REINFORCED.items():
        steps[name] = (f"{title} (constant reward)" if name == "control" else title, seconds[name])
        steps[f"evaluation_{name}"] = (f"Evaluation: {title}", 4.0)
        steps[f"evaluation_{name}{SAMPLED}"] = (f"Sampled replies: {title}", 4.0)
    return steps | {"export": ("Hugging Face export", 15.0), "report": ("Report", 4.0)}


STEPS = _steps()
"""Name of each step, in order -> its title and its usual seconds on two cores, the shares of the time-left estimate."""


class Outcome(Protocol):
    """What a step returns: a dataclass of JSON values, and one line on it."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def line(self) -> str: ...


T = TypeVar("T", bound=Outcome)


@dataclass(frozen=True)
class Options:
    """What the user chooses."""

    output: Path
    source: str = "phantom"
    """Phantom (embedded) or vqa_rad."""
    input: Path | None = None
    """The source's folder; the embedded phantoms need none."""
    tokenizer: Path | None = None
    """A Qwen3 tokenizer folder; by default a small one is made from the data."""
    seed: int = 0
    """Seed of data and training."""
    resume: bool = False
    """Continue the run that is in the folder."""
    overwrite: bool = False
    """Delete the run that is in the folder."""
    settings: tuple[str, ...] = ()
    """Dotted overrides of every stage's configuration."""

    def __post_init__(self) -> None:
        configuration.Train(seed=self.seed)  # a seed out of its range is refused before any work


@dataclass(frozen=True)
class Chain:
    """Where the run lives and how its steps are reported."""

    options: Options
    plan: Mapping[str, Any]
    """The source's YAML file."""
    progress: ChainProgress
    costs: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Step -> its seconds and the peak memory of its process in bytes, also of steps that an earlier process ran."""

    @property
    def folder(self) -> Path:
        return self.options.output

    def step(self, name: str, kind: type[T], work: Callable[[], T]) -> T:
        """What `work` returns, or what a finished step of this name left."""
        file = self.folder / "steps" / f"{name}.json"
        self.progress.begin(STEPS[name][0])
        if kept := file.exists():
            values = json.loads(file.read_text(encoding="utf-8"))
            result = kind(**values["result"])
        else:
            started = time.monotonic()
            result = work()
            values = {"wall_seconds": time.monotonic() - started, "peak_memory_bytes": peak_memory()}
            write_json(file, {"result": asdict(result), **values})
        self.costs[name] = values["wall_seconds"], values["peak_memory_bytes"]
        self.progress.end(result.line + "  [kept]" * kept, spared=kept)
        return result

    def report(self, done: int, total: int, note: str) -> None:
        """Progress of the current step."""
        self.progress.update(done / total, note)

    def stage_config(self, stage: str) -> configuration.Config:
        """The published stage's settings with the demo's over them."""
        files = [
            CONFIGS / "models/tiny.yaml",
            CONFIGS / f"stages/{PUBLISHED.get(stage, stage)}.yaml",
            CONFIGS / f"runs/quickstart/{stage}.yaml",
        ]
        steps = self.plan.get("steps", {})
        own = [*self.plan.get("settings", ()), *([f"train.steps={steps[stage]}"] if stage in steps else [])]
        config = configuration.load(files, [*own, *self.options.settings])
        dataset = str(self.folder / "data/mixtures" / stage)
        data = replace(config.data, dataset=dataset, tokenizer=str(self.tokenizer_folder))
        train = replace(config.train, seed=self.options.seed, output=str(self.run_folder(stage)))
        text = replace(config.model.text, vocab_size=max(config.model.vocab_size, self.vocabulary))
        return replace(config, data=data, train=train, model=replace(config.model, text=text))

    def run_folder(self, stage: str) -> Path:
        return self.folder / "stages" / stage

    @property
    def tokenizer_folder(self) -> Path:
        return self.options.tokenizer or self.folder / "tokenizer"

    @cached_property
    def vocabulary(self) -> int:
        """Rows of the embedding that the tokenizer needs, rounded up as Qwen3 does, so that a mesh can split them."""
        return -(-len(load_tokenizer(self.tokenizer_folder)) // 128) * 128


def peak_memory() -> int:
    """Largest resident size of this process so far, bytes (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

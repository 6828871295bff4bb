"""The whole recipe on one small machine: data, a warm-up, five training stages, GRPO, evaluation, report, export.

Every step is the command of the same name at small size, run in one process so that stages share compiled programs.
A finished step leaves `steps/NAME.json`; `--resume` reads it instead of running the step again.
"""

from __future__ import annotations

import json
import logging
import resource
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from infimed_jax import config as configuration
from infimed_jax.data.chat import load_tokenizer
from infimed_jax.errors import Interrupted, UserError, describe
from infimed_jax.files import make_folder, write_json
from launch.progress import ChainProgress

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
STAGES = {
    "warmup": "Warm-up",
    "pretrain": "Continual pretraining",
    "sft_general": "General SFT",
    "sft_medical": "Medical SFT",
    "sft_cross_distribution": "Cross-distribution SFT",
    "sft_reflective": "Reflective CoT SFT",
}
LAST_SUPERVISED = "sft_reflective"
SAMPLED = "_sampled"
"""Ends the name of an evaluation of drawn replies, which is what GRPO improves; the others are greedy."""
PUBLISHED = {"warmup": "pretrain"}
"""Whose published settings a stage of the demo's own starts from."""
REASONING = ("sft_reflective", "grpo", "control")
"""Stages whose questions are put in the reasoning wording, as they were trained."""


@dataclass(frozen=True)
class Options:
    output: Path
    source: str = "phantom"
    input: Path | None = None
    tokenizer: Path | None = None
    seed: int = 0
    resume: bool = False
    overwrite: bool = False
    settings: tuple[str, ...] = ()
    """Dotted overrides of every stage's configuration."""


@dataclass(frozen=True)
class Chain:
    """Where the run lives and how its steps are reported."""

    options: Options
    plan: Mapping[str, Any]
    """The source's YAML file."""
    progress: ChainProgress

    @property
    def folder(self) -> Path:
        return self.options.output

    def step(self, name: str, title: str, work: Callable[[], tuple[dict[str, Any], str]]) -> dict[str, Any]:
        """`work` returns (result, one line); both are kept in `steps/NAME.json`, and taken from there on resume."""
        done = self.folder / "steps" / f"{name}.json"
        self.progress.begin(title)
        if done.exists():
            kept = json.loads(done.read_text(encoding="utf-8"))
            self.progress.end(f"{kept['line']}  [kept]", spared=True)
            return kept["result"]
        started = time.monotonic()
        result, line = work()
        result = {**result, "wall_seconds": time.monotonic() - started, "peak_memory_bytes": peak_memory()}
        write_json(done, {"result": result, "line": line})
        self.progress.end(line)
        return result

    def stage_config(self, stage: str) -> configuration.Config:
        """The published stage's settings with the quickstart's over them."""
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
        text = replace(config.model.text, vocab_size=max(config.model.text.vocab_size, self.vocabulary))
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


def quickstart(options: Options) -> dict[str, Any]:
    """Run the chain and return what `summary.json` holds. Raises UserError for a folder that holds another run."""
    plan = load_plan(options)
    if options.tokenizer is not None:
        load_tokenizer(options.tokenizer)  # refuses what is no Qwen3 tokenizer, before there is a folder
    prepare_folder(options)
    log_to(options.output / "run.log")
    # Imported only now, so that a mistake in the arguments is answered at once.
    from launch import quickstart_report, quickstart_stages

    started = time.monotonic()
    try:
        with ChainProgress(planned_steps()) as progress:
            chain = Chain(options, plan, progress)
            progress.say(f"{plan['title']}, seed {options.seed}, in {options.output}")
            results = quickstart_stages.run(chain)
            summary = quickstart_report.finish(chain, results, time.monotonic() - started)
    except (Interrupted, KeyboardInterrupt) as stop:
        raise Interrupted(f"Stopped. Give --resume to continue the run in {options.output}.") from stop
    except (UserError, OSError) as error:
        raise UserError(f"{describe(error)}; --resume continues the run in {options.output}") from error
    print(f"Report:  {options.output / 'report.html'}")
    print(f"Export:  {summary['export']['path']}")
    print(f"Outputs: {options.output}/summary.json")
    return summary


def log_to(file: Path) -> None:
    """The stages' own lines go to a file: five runs' worth of them would bury the chain's progress."""
    root = logging.getLogger()
    for handler in root.handlers[:]:
        root.removeHandler(handler)
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    root.addHandler(handler)
    root.setLevel(logging.INFO)


def load_plan(options: Options) -> dict[str, Any]:
    file = CONFIGS / f"runs/quickstart/{options.source}.yaml"
    if not file.is_file():
        known = sorted(p.stem for p in (CONFIGS / "runs/quickstart").glob("*.yaml") if p.stem not in (*STAGES, "grpo"))
        raise UserError(f"no quickstart for source {options.source!r}: choose one of {', '.join(known)}")
    if options.source != "phantom" and options.input is None:
        raise UserError(f"source {options.source} is read from a folder: give --input DIR")
    for name, folder in (("--input", options.input), ("--tokenizer", options.tokenizer)):
        if folder is not None and not folder.is_dir():
            raise UserError(f"{name} {folder} is no folder")
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def prepare_folder(options: Options) -> None:
    """A run's folder is new, resumed or overwritten, and which of them is said by the user."""
    identity = {key: str(getattr(options, key)) for key in ("source", "input", "tokenizer", "seed", "settings")}
    file = options.output / "quickstart.json"
    if options.overwrite and file.exists():
        shutil.rmtree(options.output)
    if options.output.is_dir() and any(options.output.iterdir()) and not file.exists():
        raise UserError(f"{options.output} holds something that is no quickstart run: choose another --output")
    if file.exists():
        if not options.resume:
            raise UserError(f"{options.output} holds a run: give --resume to continue it or --overwrite to delete it")
        before = json.loads(file.read_text(encoding="utf-8"))
        changed = [
            f"{key} was {before.get(key)}, is {value}" for key, value in identity.items() if before.get(key) != value
        ]
        if changed:
            raise UserError(
                f"cannot resume {options.output}: {'; '.join(changed)}; use the first arguments or --overwrite"
            )
    make_folder(options.output / "steps")
    write_json(file, identity)


def planned_steps() -> dict[str, float]:
    """Title of each step -> its usual seconds on two cores, the shares of the time-left estimate."""
    seconds = (60.0, 22.0, 22.0, 80.0, 16.0, 35.0)
    steps = {"Data": 25.0}
    for title, share in zip(STAGES.values(), seconds, strict=True):
        steps |= {title: share, f"Evaluation: {title}": 5.0}
    steps |= {"Evaluation without images": 4.0}
    steps |= {f"Sampled replies: {STAGES[LAST_SUPERVISED]}": 4.0, "GRPO": 144.0}
    steps |= {"Evaluation: GRPO": 4.0, "Sampled replies: GRPO": 4.0}
    steps |= {"GRPO control (constant reward)": 69.0, "Evaluation: GRPO control": 4.0}
    steps |= {"Sampled replies: GRPO control": 4.0}
    return steps | {"Hugging Face export": 15.0, "Report": 4.0}


def peak_memory() -> int:
    """Largest resident size of this process so far, bytes (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

"""What `proof.py` runs in a process that imports one of the two checkouts: `proof_worker.py NAME ANSWER ARGUMENTS`.

Module names are those of the newer checkout first, then those of the older one.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any


def _commands(*commands: list[str]) -> None:
    from launch import run

    for command in commands:
        if code := run.main(command):
            sys.exit(code)


def _raw(folder: str, drawn: dict[str, dict[str, int]]) -> None:
    for source, splits in drawn.items():
        write = getattr(importlib.import_module(f"data_prep.sources.{source}"), f"write_{source}")
        write(Path(folder) / source, 0, splits)


def _renamed(source: str, folder: str, name: str) -> None:
    """A copy of a dataset whose samples have ids of their own."""
    from infimed_jax.data.storage import open_samples, write_samples

    samples = open_samples(source)
    Path(folder).parent.mkdir(parents=True, exist_ok=True)
    named = (replace(samples[n], id=f"{name}/{samples[n].id}") for n in range(len(samples)))
    write_samples(folder, named, name="named")


def _sample_ids(folder: str) -> list[str]:
    from infimed_jax.data.storage import open_samples

    samples = open_samples(folder)
    return [samples[number].id for number in range(len(samples))]


def _rows(model: str, stage: str, size: str, dataset: str, inputs: str) -> list[list[Any]]:
    """The packed rows of a dataset, in order: (sample id, length) of each place."""
    from infimed_jax.config import load
    from infimed_jax.data.chat import load_tokenizer
    from infimed_jax.data.packing import build_index
    from infimed_jax.data.storage import open_samples

    cfg, samples = load([Path(model), Path(stage), Path(size)], []), open_samples(dataset)
    index = build_index(
        samples, load_tokenizer(Path(inputs) / "tokenizer"), cfg.data, cfg.model, Path(dataset) / "index"
    )
    rows = [zip(*(part.tolist() for part in index.row(number)), strict=True) for number in range(index.rows)]
    return [[(samples[number].id, length) for number, length in row] for row in rows]


def _demo(folder: str, tokenizer: str, dataset: str) -> None:
    import jax

    from infimed_jax.data.storage import open_samples
    from infimed_jax.sharding import make_mesh

    new = (Path("launch") / "demo").is_dir()
    stages = importlib.import_module("launch.demo.stages" if new else "launch.quickstart_stages")
    chain = importlib.import_module("launch.demo.chain" if new else "launch.quickstart")
    progress = importlib.import_module("launch.cli.progress" if new else "launch.progress").ChainProgress({})
    progress.begin = progress.end = progress.update = lambda *_, **__: None
    settings = ("sampling.slots=16",)
    options = chain.Options(output=Path(folder), tokenizer=Path(tokenizer), settings=settings)
    made = chain.Chain(options, {}, progress)
    (Path(folder) / "steps").mkdir()
    samples = open_samples(dataset)
    asked = [samples[number] for number in range(40)]
    stage = "sft_cross_distribution"
    with jax.set_mesh(make_mesh(made.stage_config(stage).mesh)):
        if new:
            stages._score(made, stage, stage, asked)
            stages._score(made, chain.BLIND, stage, asked)
        else:
            stages._evaluation(made, stage, "", asked)
            stages._evaluation(made, stage, "", asked, image=False)


def _hlo() -> dict[str, list[str]]:
    import jax

    from infimed_jax import sharding
    from infimed_jax.config import load
    from infimed_jax.plan.program import train_program

    tiny = ("model.projector.visual_tokens=9", "train.attention=xla")
    heads = ("model.text.num_kv_heads=2", "model.text.num_heads=4", "train.remat=full")
    cases: dict[str, tuple[tuple[str, ...], tuple[str, ...], dict[str, int]]] = {
        "tiny, 2x2": (("tiny", "pretrain"), (*tiny, *heads), {"fsdp": 2, "tensor": 2}),
        "tiny, vision": (
            ("tiny", "sft_medical"),
            (*tiny, "train.remat=dots", "train.train=[vision,projector,text]"),
            {},
        ),
        "tiny, LoRA": (("tiny", "sft_medical"), (*tiny, "train.remat=none", "train.lora.rank=4"), {}),
        "tiny, GRPO": (("tiny", "grpo"), (*tiny, "train.remat=full"), {}),
        "4B, TPU": (("foundation_4b", "pretrain"), ("train.remat=full", "train.attention=splash"), {"fsdp": 32}),
        "4B, tensor": (("foundation_4b", "sft_medical"), ("train.remat=full", "train.attention=xla"), {"tensor": 4}),
    }
    texts = {}
    for name, ((model, stage), settings, axes) in cases.items():
        cfg = load([Path(f"configs/models/{model}.yaml"), Path(f"configs/stages/{stage}.yaml")], settings)
        mesh = sharding.abstract_mesh(**axes)
        with jax.sharding.use_abstract_mesh(mesh):
            program = train_program(cfg, mesh)
            traced = jax.jit(program.step, donate_argnums=0).trace(*program.arguments)
            lowered = traced.lower(lowering_platforms=("tpu" if "TPU" in name else "cpu",)).as_text()
        texts[name] = list(_canonical(lowered))
    return texts


def _canonical(text: str) -> Iterator[str]:
    """Lines without locations; functions are numbered, since their names are those of Python's functions."""
    numbers: dict[str, str] = {}
    for line in re.sub(r"\s*loc\(.*?\)|#loc.*", "", text).splitlines():
        yield re.sub(r"@\w+", lambda match: numbers.setdefault(match[0], f"@f{len(numbers)}"), line)


WORKERS: dict[str, Callable[..., Any]] = {
    "commands": _commands,
    "raw": _raw,
    "renamed": _renamed,
    "sample_ids": _sample_ids,
    "rows": _rows,
    "demo": _demo,
    "hlo": _hlo,
}

if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(WORKERS[sys.argv[1]](*json.loads(sys.argv[3]))), encoding="utf-8")

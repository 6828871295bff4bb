"""`quickstart`: the whole chain in one process, so that stages share compiled programs; a new run, or one resumed."""

from __future__ import annotations

import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import yaml

from infimed_jax.data.chat import load_tokenizer
from infimed_jax.errors import Interrupted, UserError, describe
from infimed_jax.files import make_folder, write_json
from launch.cli.progress import ChainProgress
from launch.demo import chain as chains
from launch.demo.chain import STAGES, STEPS, Chain, Options


def quickstart(options: Options) -> dict[str, Any]:
    """Run the chain and return what `summary.json` holds. Raises UserError for a folder that holds another run."""
    plan = load_plan(options)
    if options.tokenizer is not None:
        load_tokenizer(options.tokenizer)  # refuses a folder without a Qwen3 tokenizer before a run's folder exists
    prepare_folder(options)
    log_to(options.output / "run.log")
    # Imported only now, so that a mistake in the arguments is answered at once.
    from launch.demo import report, stages

    started = time.monotonic()
    try:
        with ChainProgress(dict(STEPS.values())) as progress:
            chain = Chain(options, plan, progress)
            progress.say(f"{plan['title']}, seed {options.seed}, in {options.output}")
            results = stages.run(chain)
            summary = report.finish(chain, results, time.monotonic() - started)
    except (Interrupted, KeyboardInterrupt) as stop:
        raise Interrupted(f"Stopped. Give --resume to continue the run in {options.output}.") from stop
    except (UserError, OSError) as error:
        raise UserError(f"{describe(error)}; --resume continues the run in {options.output}") from error
    print(f"Report:  {options.output / 'report.html'}")
    print(f"Export:  {summary['export']['path']}")
    print(f"Outputs: {options.output}/summary.json")
    return summary


def log_to(file: Path) -> None:
    """The stages' own lines go to a file: those of eight runs would bury the chain's progress."""
    root = logging.getLogger()
    for handler in root.handlers[:]:
        root.removeHandler(handler)
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    root.addHandler(handler)
    root.setLevel(logging.INFO)


def load_plan(options: Options) -> dict[str, Any]:
    folder = chains.CONFIGS / "runs/quickstart"
    file = folder / f"{options.source}.yaml"
    if not file.is_file():
        known = sorted(path.stem for path in folder.glob("*.yaml") if path.stem not in (*STAGES, "grpo"))
        raise UserError(f"no quickstart for source {options.source!r}: choose one of {', '.join(known)}")
    if options.source != "phantom" and options.input is None:
        raise UserError(f"source {options.source} is read from a folder: give --input DIR")
    for name, given in (("--input", options.input), ("--tokenizer", options.tokenizer)):
        if given is not None and not given.is_dir():
            raise UserError(f"{name} {given} is no folder")
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def prepare_folder(options: Options) -> None:
    """A run's folder is new, resumed or overwritten, as the user says."""
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
        changed = [f"{key} was {before.get(key)}, is {now}" for key, now in identity.items() if before.get(key) != now]
        if changed:
            raise UserError(
                f"cannot resume {options.output}: {'; '.join(changed)}; use the first arguments or --overwrite"
            )
    make_folder(options.output / "steps")
    write_json(file, identity)

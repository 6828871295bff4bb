"""Compare what two checkouts of this repository compute, and print one table: equal, or the differences.

    python benchmarks/proof.py OLD NEW [--only ROW …] [--work DIR]

Each checkout runs in processes of its own, in float32 on the CPU, from the same imported parameters and the same
procedural images, through the command line where there is one. With `--work` the inputs, and what OLD computed, are
kept there for the next comparison. Exit code 1 where anything differs. Needs torch and transformers beside the package.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPLITS = {
    "phantom": {"pretrain": 80, "alignment": 30, "train": 80, "reflective": 40, "rl": 30, "test": 20},
    "shapes": {"pretrain": 40, "train": 40, "reflective": 40},
}
"""Images drawn of each split."""
WORKER = Path(__file__).with_name("proof_worker.py")
TINY = "configs/models/tiny.yaml"
STAGES = ("pretrain", "sft_general", "sft_medical", "sft_cross_distribution")
LOGPROB_TOLERANCE = 1e-6
SHOWN = 5  # differences of a row that are printed
_OF_LOGPROBS = re.compile(r"logprob|entropy")
"""Log-probabilities, and means of them."""
_CLOCK = re.compile(r"second|time|mfu|memory|wait|flops")
"""Figures of metrics.jsonl that depend on the machine's load."""
_DATED = re.compile(r"\d{4}-\d\d-\d\d|version|infimed_jax|transformers|commit", re.IGNORECASE)
"""Lines of a model card that may differ."""


@dataclass(frozen=True)
class Tree:
    """One checkout, and the folder of what it computes."""

    code: Path
    folder: Path
    inputs: Path

    def commands(self, *commands: Sequence[Any]) -> None:
        """Run commands of `launch/run.py` one after the other in one process."""
        self.worker("commands", *([str(word) for word in command] for command in commands))

    def worker(self, name: str, *arguments: Any) -> Any:
        """The JSON value of `proof_worker.WORKERS[name](*arguments)`, run in a process that imports this checkout."""
        self.folder.mkdir(parents=True, exist_ok=True)
        answer = self.folder / "answer.json"
        command = [sys.executable, str(WORKER), name, str(answer), json.dumps(arguments, default=str)]
        ours = {"PYTHONPATH": str(self.code), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
        cache = {"JAX_COMPILATION_CACHE_DIR": str(self.inputs.parent / "compiled")}
        done = subprocess.run(command, cwd=self.code, env=cache | os.environ | ours, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{self.code}: {name} failed\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}")
        return json.loads(answer.read_text(encoding="utf-8"))

    def config(self, stage: str, *settings: str) -> list[str]:
        """Options of a stage of the demo's size."""
        files = [TINY, f"configs/stages/{stage}.yaml", f"configs/runs/quickstart/{stage}.yaml"]
        tokenizer = f"data.tokenizer={self.inputs / 'tokenizer'}"
        return [word for file in files for word in ("--config", file)] + [tokenizer, *settings]

    @functools.cached_property
    def prepared(self) -> Path:
        """The procedural sources as prepared datasets, `SOURCE/SPLIT`."""
        folder = self.folder / "prepared"
        sources = [name for name in SPLITS if not (folder / name).exists()]
        self.commands(
            *(["data", "ingest", "--source", s, "--input", self.inputs / s, "--output", folder / s] for s in sources)
        )
        return folder

    @functools.cached_property
    def imported(self) -> Path:
        """The checkpoint of the common parameters."""
        checkpoint = self.folder / "imported"
        if not checkpoint.exists():
            options = ["--visual-tokens", 36, "--dtype", "float32", "--output", checkpoint]
            self.commands(["convert", "from-hf", "--llava", self.inputs / "llava", *options])
        return checkpoint

    @functools.cached_property
    def trained(self) -> Path:
        """A short supervised run from the common parameters."""
        run = self.folder / "trained"
        if not run.exists():
            self.commands(self._train("sft_medical", run, "phantom/train", "train.steps=8"))
        return run

    def _train(self, stage: str, run: Path, dataset: str, *settings: str) -> list[Any]:
        command = "grpo" if stage == "grpo" else "train"
        own = (f"data.dataset={self.prepared / dataset}", f"train.output={run}", "train.log_every=1", *settings)
        return [command, *self.config(stage, *own), "--init-from", self.imported]

    def losses(self, stage: str, dataset: str, *settings: str) -> Any:
        """The lines of metrics.jsonl of a run from the common parameters, without the clock's figures."""
        run = Path(tempfile.mkdtemp(dir=self.folder)) / "run"
        self.commands(self._train(stage, run, dataset, *settings))
        return _metrics(run)


# Rows: what of a tree is compared, as JSON values by name.


def evaluate(tree: Tree) -> dict[str, Any]:
    results = {}
    commands = []
    for name, options in {"direct": [], "blind": ["--blind"], "reasoning": ["--reasoning"]}.items():
        results[name] = folder = tree.folder / "evaluation" / name
        files = ["--checkpoint", tree.imported, "--dataset", tree.prepared / "phantom/test", "--output", folder]
        settings = ["train.compute_dtype=float32", "sampling.max_tokens=24", "sampling.slots=16"]
        commands.append(["evaluate", *files, *options, "--limit", 48, *settings])
    penalty = results["penalty"] = tree.folder / "evaluation/penalty"
    commands.append(
        [*commands[0][:5], "--output", penalty, "--limit", 16, *settings, "sampling.repetition_penalty=1.3"]
    )
    tree.commands(*commands)
    return {name: _lines(folder / "replies.jsonl") for name, folder in results.items()}


def generate(tree: Tree) -> dict[str, Any]:
    images = sorted((tree.inputs / "phantom").rglob("*.png"))[:3]
    asked = {"text": ("What is shown?", ()), "image": ("Is the heart enlarged?", images[:1])}
    asked["images"] = ("Which image is brighter?", images[1:])
    commands, files = [], {}
    for name, (prompt, pictures) in asked.items():
        for kind, option, model in (
            ("checkpoint", "--checkpoint", tree.imported),
            ("hf", "--hf", tree.inputs / "llava"),
        ):
            files[f"{name}, {kind}"] = file = tree.folder / f"{name}-{kind}.json"
            shown = [word for picture in pictures for word in ("--image", picture)]
            # An export names no pooling: a LLaVA folder's images have all 36 patches, as the checkpoint's.
            commands.append(["generate", option, model, "--prompt", prompt, *shown, "--output", file])
            commands[-1] += ["sampling.max_tokens=24", "train.compute_dtype=float32"]
    tree.commands(*commands)
    replies = {name: json.loads(file.read_text()) for name, file in files.items()}
    keys = ("tokens", "logprobs", "reply", "finish")
    return {name: {key: reply[key] for key in keys} for name, reply in replies.items()}


def difficulty(tree: Tree) -> dict[str, Any]:
    """At a temperature so low that every draw is the greedy reply: all or none are right."""
    output = Path(tempfile.mkdtemp(dir=tree.folder)) / "difficulty"
    files = ["--checkpoint", tree.imported, "--input", tree.prepared / "phantom/rl", "--output", output]
    plan = ["--draws", 2, "--low", 1, "--high", 1, "--extreme", 0.5]
    settings = ["train.compute_dtype=float32", "sampling.slots=32", "grpo.temperature=1e-6", "grpo.max_response=24"]
    tree.commands(["data", "difficulty", *files, *plan, *settings, "grpo.max_prompt=160", "data.context=384"])
    report = json.loads(output.with_name("difficulty.json").read_text())
    keys = ("questions", "mean_right", "histogram", "samples", "left_out", "right")
    kept = {key: report[key] for key in keys if key in report}
    return {"report": kept, "kept": tree.worker("sample_ids", output)}


def demo(tree: Tree) -> dict[str, Any]:
    """The demo's own evaluation of a stage: direct and blind."""
    folder = tree.folder / "demo"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "stages").mkdir(parents=True)
    (folder / "stages/sft_cross_distribution").symlink_to(tree.trained)
    tree.worker("demo", folder, tree.inputs / "tokenizer", tree.prepared / "phantom/test")
    found = sorted((folder / "evaluation").glob("*/replies.jsonl"))
    return {file.parent.name: _lines(file) for file in found}


def train(tree: Tree) -> dict[str, Any]:
    return {
        "sft_medical": _metrics(tree.trained),
        "pretrain, packed": tree.losses(
            "pretrain", "phantom/pretrain", "train.steps=4", "train.train=[projector,text]"
        ),
        "micro-batches": tree.losses("sft_medical", "phantom/train", "train.steps=3", "train.rows_per_device=4"),
        "lora": tree.losses("sft_medical", "phantom/train", "train.steps=3", "train.train=[text]", "train.lora.rank=4"),
    }


_ROLLOUT = ("grpo.steps=2", "grpo.prompts=8", "grpo.update_prompts=4", "grpo.group_size=4", "sampling.slots=16")


def grpo(tree: Tree) -> dict[str, Any]:
    return {"sampled": tree.losses("grpo", "phantom/rl", *_ROLLOUT, "grpo.max_prompt=160", "grpo.kl_coefficient=0.01")}


def rollout(tree: Tree) -> dict[str, Any]:
    """GRPO at a temperature so low that its replies are greedy: rewards and lengths of the replies."""
    settings = (
        *_ROLLOUT,
        "grpo.steps=1",
        "grpo.max_prompt=160",
        "grpo.temperature=1e-6",
        "train.max_skipped_updates=0",
    )
    return {"greedy": tree.losses("grpo", "phantom/rl", *settings)}


def hlo(tree: Tree) -> dict[str, Any]:
    return tree.worker("hlo")


def mixtures(tree: Tree) -> dict[str, Any]:
    """The published mixtures over small datasets of the published names, packed as each stage packs."""
    data = tree.folder / "named"
    named: list[tuple[str, str]] = []
    text = {stage: (tree.code / f"configs/mixtures/{stage}.yaml").read_text() for stage in STAGES}
    pool = [f"{source}/{split}" for source, splits in SPLITS.items() for split in splits if split != "test"]
    for stage in STAGES:
        for dataset in re.findall(r"dataset: ([\w/]+)", text[stage]):
            if dataset not in dict(named):
                named.append((dataset, pool[len(named) % len(pool)]))
    for dataset, source in named:
        if not (data / dataset).exists():
            tree.worker("renamed", tree.prepared / source, data / dataset, dataset)
    folder = Path(tempfile.mkdtemp(dir=tree.folder))
    mix = ["data", "mix", "--data", data, "--seed", 3]
    tree.commands(*([*mix, "--mixture", f"configs/mixtures/{s}.yaml", "--output", folder / s] for s in STAGES))
    return {stage: tree.worker("rows", *tree.config(stage)[1:6:2], folder / stage, tree.inputs) for stage in STAGES}


def export(tree: Tree) -> dict[str, Any]:
    """Files of exports, merged and beside PEFT adapters: digests of what is binary, lines of what is text."""
    lora = tree.folder / "lora"
    if not lora.exists():
        settings = ("train.steps=2", "train.train=[text]", "train.lora.rank=4")
        tree.commands(tree._train("sft_medical", lora, "phantom/train", *settings))
    folder = Path(tempfile.mkdtemp(dir=tree.folder))
    to_hf = ["convert", "to-hf", "--checkpoint"]
    tree.commands(
        [*to_hf, tree.imported, "--output", folder / "bfloat16"],
        [*to_hf, tree.trained, "--output", folder / "trained", "--dtype", "float32"],
        [*to_hf, lora, "--output", folder / "peft", "--lora", "peft"],
    )
    return {
        str(file.relative_to(folder)): _content(file, (folder, tree.folder))
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def plan(tree: Tree) -> dict[str, Any]:
    files, commands = {}, []
    for model in ("foundation_1p7b", "foundation_4b"):
        for stage in (*STAGES[:1], "sft_medical", "sft_cross_distribution", "grpo"):
            files[f"{model}, {stage}"] = file = tree.folder / f"plan-{model}-{stage}.json"
            config = ["--config", f"configs/models/{model}.yaml", "--config", f"configs/stages/{stage}.yaml"]
            machines = ["--topology", "h100x32", "--topology", "v5p:4x4x4", "--mesh", "fsdp=-1"]
            commands.append(["plan", *config, *machines, "--mesh", "fsdp=-1,tensor=4", "--no-compile", "--json", file])
    tree.commands(*commands)
    return {name: json.loads(file.read_text())["cells"] for name, file in files.items()}


ROWS: dict[str, tuple[str, Callable[[Tree], dict[str, Any]]]] = {
    "evaluate": ("greedy replies of `evaluate`", evaluate),
    "generate": ("greedy token ids and log-probabilities of `generate`", generate),
    "difficulty": ("greedy answers of `data difficulty`", difficulty),
    "demo": ("greedy replies in the demo's evaluation", demo),
    "rollout": ("greedy replies of a GRPO rollout", rollout),
    "train": ("losses and gradient norms of training", train),
    "grpo": ("rewards and losses of GRPO", grpo),
    "hlo": ("StableHLO of the train step", hlo),
    "mixtures": ("packed rows of every mixture: sample ids, lengths", mixtures),
    "export": ("exported files", export),
    "plan": ("figures of `plan`", plan),
}


# Comparison


def differences(a: Any, b: Any, place: str = "") -> Iterator[str]:
    """Each place where two JSON values differ, with both values."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            yield f"{place}: only in OLD {sorted(a.keys() - b.keys())}, only in NEW {sorted(b.keys() - a.keys())}"
        for key in a.keys() & b.keys():
            yield from differences(a[key], b[key], f"{place}.{key}" if place else key)
    elif isinstance(a, list) and isinstance(b, list):
        if len(a) != len(b):
            yield f"{place}.length: {len(a)} / {len(b)}"
        for number, both in enumerate(zip(a, b, strict=False)):
            yield from differences(*both, f"{place}[{number}]")
    elif a != b and not (_OF_LOGPROBS.search(place) and abs(a - b) <= LOGPROB_TOLERANCE):
        yield f"{place}: {str(a)[:150]} / {str(b)[:150]}"


def size(value: Any) -> int:
    """Values that were compared."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 1 if parts is None else sum(map(size, parts))


def _lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _metrics(run: Path) -> list[Any]:
    return [{k: v for k, v in row.items() if not _CLOCK.search(k)} for row in _lines(run / "metrics.jsonl")]


def _content(file: Path, folders: Sequence[Path]) -> Any:
    data = file.read_bytes()
    if file.suffix in (".md", ".json"):
        data = functools.reduce(lambda text, folder: text.replace(str(folder).encode(), b""), folders, data)
    if file.suffix == ".md":
        return [line for line in data.decode().splitlines() if not _DATED.search(line)]
    return f"{len(data):,} bytes, sha256 {hashlib.sha256(data).hexdigest()}"


def make_inputs(old: Tree) -> None:
    """Images, tokenizer, and a LLaVA folder: random Qwen3 and SigLIP of the demo's size, trained shortly by OLD."""
    inputs = old.inputs
    if (inputs / "llava").exists():
        return
    inputs.mkdir(parents=True, exist_ok=True)
    old.worker("raw", inputs, SPLITS)
    tokenizer = [sys.executable, "-m", "data_prep.tokenizer", "--output", str(inputs / "tokenizer")]
    subprocess.run(tokenizer, cwd=old.code, env=os.environ | {"PYTHONPATH": str(old.code)}, check=True)
    _random_models(inputs)
    start, run = inputs / "start", inputs / "run"
    parts = ["--text", inputs / "qwen3", "--vision", inputs / "siglip", "--tokenizer", inputs / "tokenizer"]
    settings = (f"data.dataset={old.prepared / 'phantom/train'}", f"train.output={run}", "train.steps=120")
    old.commands(
        ["convert", "from-hf", *parts, "--visual-tokens", 36, "--dtype", "float32", "--output", start],
        ["train", *old.config("sft_medical", *settings), "--init-from", start],
        ["convert", "to-hf", "--checkpoint", run, "--dtype", "float32", "--output", inputs / "llava"],
    )


def _random_models(folder: Path) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM, SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    text = Qwen3Config(
        vocab_size=1024, hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=3,
        num_key_value_heads=1, head_dim=32, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True, max_position_embeddings=4096,
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4, image_size=48, patch_size=8
    )
    Qwen3ForCausalLM(text).save_pretrained(folder / "qwen3")
    SiglipVisionModel(vision).save_pretrained(folder / "siglip")


def compare(old: Tree, new: Tree, names: Sequence[str]) -> bool:
    """Print the table; whether everything is equal. What OLD computed is kept in its folder."""
    print(f"{'row':<11}{'compared':<56}{'values':>9}{'seconds':>9}  result", flush=True)
    equal = True
    for name in names:
        what, collect = ROWS[name]
        began, kept = time.monotonic(), old.folder / f"row-{name}.json"
        try:
            if not kept.exists():
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text(json.dumps(collect(old)), encoding="utf-8")
            before, after = json.loads(kept.read_text(encoding="utf-8")), json.loads(json.dumps(collect(new)))
            count, found = f"{size(before):,}", list(differences(before, after))
        except (RuntimeError, OSError, KeyError) as error:
            count, found = "-", [f"no comparison: {error}"]
        equal = equal and not found
        result = f"{len(found)} differ" if found else "equal"
        print(f"{name:<11}{what:<56}{count:>9}{time.monotonic() - began:>9.0f}  {result}", flush=True)
        for line in [*found[:SHOWN], *(["…"] if len(found) > SHOWN else [])]:
            print(f"    {line}", flush=True)
    return equal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, metavar="OLD", help="a checkout")
    parser.add_argument("new", type=Path, metavar="NEW", help="the checkout to compare with it")
    parser.add_argument(
        "--only", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW", help=", ".join(ROWS)
    )
    parser.add_argument("--work", type=Path, metavar="DIR", help="folder that keeps inputs and OLD's results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = (args.work or Path(scratch)).absolute()
        shutil.rmtree(work / "new", ignore_errors=True)
        inputs = work / "inputs"
        old, new = Tree(args.old.absolute(), work / "old", inputs), Tree(args.new.absolute(), work / "new", inputs)
        make_inputs(old)
        sys.exit(not compare(old, new, args.only))


if __name__ == "__main__":
    main()

"""Conversion at the published sizes: random weights of the true shapes, to a checkpoint and back, and the proof.

    python benchmarks/convert.py --config configs/models/foundation_4b.yaml --tokenizer QWEN3 --work /tmp/convert --keep
    python benchmarks/convert.py --config configs/models/foundation_1p7b.yaml --tokenizer QWEN3 --work /tmp/c --verify

Each command runs in a process of its own; its seconds and its peak of resident memory, with that of the processes that
it starts, go to `convert.json` in --work.
The rest of that folder (about 28 GB at 4B) is deleted, unless --keep.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from infimed_jax import config
from infimed_jax.data.chat import TOKENIZER_FILES
from infimed_jax.files import to_json, write_json
from infimed_jax.hf import names
from infimed_jax.hf.weights import SHARD_BYTES, write_weights
from infimed_jax.models.hugging_face import SpecialTokens
from infimed_jax.models.infimed.hf import HUGGING_FACE, TEXT

ROOT = Path(__file__).resolve().parents[1]
POOL = np.random.default_rng(0).standard_normal(4_194_301, np.float32)  # a prime: rows of a matrix do not repeat
STEPS = ("from-hf", "to-hf", "verify")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="of a model, such as configs/models/*.yaml")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a Qwen3 tokenizer folder")
    parser.add_argument("--work", type=Path, required=True, help="a new folder, on a disk with room")
    parser.add_argument("--verify", action="store_true", help="run the proof too")
    parser.add_argument("--keep", action="store_true", help="keep the weights")
    args = parser.parse_args()
    model = config.load([args.config]).model
    args.work.mkdir(parents=True)
    text, vision, checkpoint, export = (args.work / name for name in ("text", "vision", "checkpoint", "export"))
    write_sources(model, args.tokenizer, text, vision)
    commands = {
        "from-hf": ["--text", text, "--vision", vision, "--output", checkpoint, "--visual-tokens", "729"],
        "to-hf": ["--checkpoint", checkpoint, "--output", export, "--vision", vision],
        "verify": ["--checkpoint", checkpoint, "--hf", export],
    }
    result: dict[str, dict[str, float]] = {}
    for step in STEPS if args.verify else STEPS[:2]:
        result[step] = measure([sys.executable, ROOT / "launch/run.py", "convert", step, *commands[step]])
        write_json(args.work / "convert.json", result)
        print(step, to_json(result[step]), flush=True)
        if result[step]["exit_code"]:
            sys.exit(1)
    if args.verify:
        shutil.copy(export / "verify.json", args.work)
    if not args.keep:
        for folder in (text, vision, checkpoint, export):
            shutil.rmtree(folder)
    print(f"Outputs: {args.work}/convert.json")


def measure(command: list[object]) -> dict[str, float]:
    """Run it to its end: seconds, CPU seconds, peak resident gigabytes of it and its children together, exit code."""
    began, peak = time.monotonic(), 0
    process = subprocess.Popen([str(part) for part in command], env=os.environ | {"JAX_PLATFORMS": "cpu"})
    while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
        peak = max(peak, resident(process.pid))
        time.sleep(0.1)
    _, status, usage = ended
    return {
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_gb": round(max(peak, usage.ru_maxrss * 1024) / 1e9, 2),
        "exit_code": os.waitstatus_to_exitcode(status),
    }


def resident(pid: int) -> int:
    """Bytes of a process and its descendants now; pages of a file that is mapped count too."""
    folder = Path(f"/proc/{pid}")
    try:
        pages = int((folder / "statm").read_text().split()[1])
        children = [child for task in folder.glob("task/*/children") for child in task.read_text().split()]
    except OSError:  # it has ended
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(resident(int(child)) for child in children)


def write_sources(model: config.Model, tokenizer: Path, text: Path, vision: Path) -> None:
    """A bfloat16 Qwen3 folder with the tokenizer, and a float32 SigLIP folder, as they are published."""
    values = HUGGING_FACE.to_hf(model, SpecialTokens(0, 0, 0), "bfloat16", 40_960)
    shapes: dict[str, dict[str, tuple[int, ...]]] = {"text": {}, "vision": {}}
    for tensor in names.tensors(model):
        part = tensor.leaf.partition(".")[0]
        if part in shapes:
            shapes[part][tensor.key] = tensor.key_shape
    shapes["vision"] |= {tensor.key: tensor.shape for tensor in HUGGING_FACE.unused(model)}
    for folder, part, architecture, dtype in (
        (text, "text", TEXT, "bfloat16"),
        (vision, "vision", "SiglipVisionModel", "float32"),
    ):
        folder.mkdir()
        spelled = {
            names.to_file_key(key, HUGGING_FACE.spellings[architecture]): shape for key, shape in shapes[part].items()
        }
        write_weights(folder, draw(spelled), spelled, dtype, SHARD_BYTES)
        written = values[f"{part}_config"] | {"architectures": [architecture], "dtype": dtype}
        (folder / "config.json").write_text(to_json(written))
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copy(tokenizer / name, text / name)


def draw(shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, np.ndarray]]:
    """Numbers under which every layer matters: norms near one, biases small, matrices of deviation 1/sqrt(inputs)."""
    for number, (key, shape) in enumerate(shapes.items()):
        values = np.resize(np.roll(POOL, 7_919 * number), shape)
        if len(shape) > 1:
            values *= np.prod(shape[1:]) ** -0.5
        else:
            values = values * np.float32(0.05) + np.float32("norm" in key and key.endswith("weight"))
        yield key, values


if __name__ == "__main__":
    main()

"""Proof of an export: the same prompts through our model and through transformers, compared step by step."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding
from PIL import Image

from infimed_jax import config, sharding
from infimed_jax.data.batch import Batch, Segment, build_row, stack_rows
from infimed_jax.data.chat import load_tokenizer, render_prompt
from infimed_jax.data.images import decode_image
from infimed_jax.data.sample import Sample, Turn
from infimed_jax.hf.weights import read_json
from infimed_jax.models import infimed
from infimed_jax.models.compute import Compute
from infimed_jax.models.siglip import SiglipTower

log = logging.getLogger(__name__)

COMPUTE = Compute("float32", "none", "xla", 1)
"""Both sides compute in float32: rounding of activations would hide an error of the conversion."""
PIXEL_TOLERANCE = 1e-6
"""Pixels are the same uint8 values normalised in float32 in another order, in [-1, 1]."""


def verify(
    params: Mapping[str, Any],
    model: config.Model,
    hf_folder: str | Path,
    tokenizer_folder: str | Path,
    samples: Sequence[Sample] = (),
    *,
    tolerance: float = 1e-4,
) -> dict[str, Any]:
    """Compare `params` with the export of them in `hf_folder`; run under the model's mesh.

    For each prompt (those of `samples`; by default one without, one with one and one with three images): tokens and
    pixels of our renderer against the exported processor, then vision features, projector output and logits, with the
    parameters rounded to the export's dtype on both sides. A difference may be `tolerance` times the larger of 1 and
    the largest reference value. `rounding` says what the export's dtype itself costs, and is not judged.

    The result (`status` is `passed`, `failed` with `failures`, or `skipped` with a `reason`) is written to
    `hf_folder/verify.json` as well.
    """
    folder = Path(hf_folder)
    try:
        import torch
        import transformers
    except ModuleNotFoundError as error:
        return _finish(folder, {"status": "skipped", "reason": f"{error.name} is not installed"})
    model = dataclasses.replace(model, projector=config.Projector(visual_tokens=model.vision.num_patches))
    dtype = str(read_json(folder / "config.json").get("dtype"))
    theirs = _Theirs(folder)
    ours = _Ours(_rounded(params, dtype), model, tokenizer_folder)
    exact = _Ours(params, model, tokenizer_folder) if dtype != "float32" else None
    cases = [_compare(sample, ours, exact, theirs) for sample in samples or builtin_samples()]
    failures = [*theirs.loading_faults, *(fault for case in cases for fault in _faults(case, tolerance))]
    return _finish(
        folder,
        {
            "status": "failed" if failures else "passed",
            "failures": failures,
            "dtype": dtype,
            "tolerance": tolerance,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "cases": cases,
        },
    )


def builtin_samples() -> tuple[Sample, ...]:
    """Prompts with 0, 1 and 3 images of fixed noise, sized so that resizing matters."""
    rng = np.random.default_rng(0)
    images = []
    for shape in ((70, 90, 3), (61, 40, 3), (128, 128, 3)):
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(stream, format="PNG")
        images.append(stream.getvalue())

    def sample(name: str, number: int, question: str) -> Sample:
        user = Turn("user", (*range(number), f"\n{question}" if number else question))
        return Sample(
            f"verify/{name}", "verify", "test", "open", tuple(images[:number]), (user, Turn("assistant", ("Yes.",)))
        )

    return (
        sample("text", 0, "Which organ makes insulin?"),
        sample("image", 1, "Is the heart enlarged?"),
        sample("images", 3, "Which of these images shows a fracture?"),
    )


def hf_messages(sample: Sample) -> list[dict[str, Any]]:
    """The turns before the last answer as a processor takes them: lists of image and text parts."""
    return [{"role": turn.role, **_content(turn)} for turn in _prompt_turns(sample)]


def _prompt_turns(sample: Sample) -> tuple[Turn, ...]:
    answers = [number for number, turn in enumerate(sample.turns) if turn.role == "assistant"]
    return sample.turns[: answers[-1]] if answers else sample.turns


def _content(turn: Turn) -> dict[str, Any]:
    if turn.role != "user":
        text = "".join(piece for piece in turn.content if isinstance(piece, str))
        return {"content": text} | ({"reasoning_content": turn.reasoning} if turn.reasoning else {})
    parts = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in turn.content]
    return {"content": parts}


class _Ours:
    """Our side: prompts → arrays on the host."""

    def __init__(self, params: Mapping[str, Any], model: config.Model, tokenizer_folder: str | Path):
        self.model = model
        self.mesh = jax.sharding.get_mesh()
        self.tokenizer = load_tokenizer(tokenizer_folder)
        self.params = jax.tree.map(
            lambda leaf, like: jax.device_put(leaf, NamedSharding(self.mesh, like.sharding.spec)),
            dict(params),
            infimed.abstract_params(model),
        )

    def prompt(self, sample: Sample) -> Segment:
        pixels = tuple(decode_image(data, self.model.vision.image_size) for data in sample.images)
        return render_prompt(sample, self.tokenizer, self.model.projector.visual_tokens, pixels)

    def run(self, segment: Segment) -> dict[str, np.ndarray]:
        """vision [M,P,E], projector [M,P,D] and logits [T,V] of one prompt."""
        row = build_row(
            [segment],
            context=len(segment),
            images=len({id(image) for image in segment.pixels}),
            visual_tokens=self.model.projector.visual_tokens,
            image_size=self.model.vision.image_size,
        )
        rows = self.mesh.shape["data"] * self.mesh.shape["fsdp"]  # the same row on each shard; one is read
        batch = sharding.place_batch(stack_rows([row] * rows), self.mesh)
        return {name: np.asarray(value)[0] for name, value in _forward(self.params, batch, self.model).items()}


@functools.partial(jax.jit, static_argnames="model")
def _forward(params: infimed.Params, batch: Batch, model: config.Model) -> dict[str, jax.Array]:
    hidden = infimed.hidden_states(params, batch, model, COMPUTE)
    result = {"logits": infimed.logits(params, hidden, model, COMPUTE)}
    rows, images = batch.pixels.shape[:2]
    if images == 0:
        return result
    flat = sharding.reshape_rows(batch.pixels, rows * images, *batch.pixels.shape[2:])
    features = SiglipTower(model.vision, COMPUTE).apply({"params": params["vision"]}, flat)
    visual = infimed.encode_images(params, batch.pixels, model, COMPUTE)
    patches = model.vision.num_patches
    return result | {
        "vision": sharding.reshape_rows(features, rows, images, patches, model.vision.hidden_size),
        "projector": sharding.reshape_rows(visual, rows, images, patches, model.text.hidden_size),
    }


class _Theirs:
    """transformers' side: the exported processor and model, in float32 on the CPU."""

    def __init__(self, folder: Path):
        import torch
        from transformers import AutoProcessor, LlavaForConditionalGeneration

        self.processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        self.model, loading = LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        self.model.eval()
        self.loading_faults = [f"transformers reports {what}: {keys}" for what, keys in loading.items() if keys]

    def prompt(self, sample: Sample) -> dict[str, Any]:
        """input_ids [1,T] and, with images, pixel_values [M,3,S,S] as torch tensors."""
        text = self.processor.apply_chat_template(
            hf_messages(sample), add_generation_prompt=True, enable_thinking=False, tokenize=False
        )
        order = [piece for turn in _prompt_turns(sample) for piece in turn.content if not isinstance(piece, str)]
        images = [Image.open(io.BytesIO(sample.images[number])) for number in order]
        return dict(self.processor(images=images or None, text=[text], return_tensors="pt"))

    def run(self, inputs: dict[str, Any]) -> dict[str, np.ndarray]:
        """As `_Ours.run`."""
        import torch

        with torch.no_grad():
            result = {"logits": self.model(**inputs).logits[0].numpy()}
            if "pixel_values" not in inputs:
                return result
            tower = self.model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
            features = tower.hidden_states[self.model.config.vision_feature_layer]
            projected = self.model.model.multi_modal_projector(features)
        return result | {"vision": features.numpy(), "projector": projected.numpy()}


def _compare(sample: Sample, ours: _Ours, exact: _Ours | None, theirs: _Theirs) -> dict[str, Any]:
    segment = ours.prompt(sample)
    inputs = theirs.prompt(sample)
    case: dict[str, Any] = {"id": sample.id, "images": len(segment.pixels), "tokens": len(segment)}
    case["tokens_equal"] = inputs["input_ids"][0].tolist() == segment.tokens.tolist()
    if segment.pixels:
        pixels = np.stack(segment.pixels).astype(np.float32) / 127.5 - 1
        case["pixels"] = _difference(pixels.transpose(0, 3, 1, 2), inputs["pixel_values"].numpy())
    if not case["tokens_equal"]:
        return case  # logits of other tokens say nothing
    mine, reference = ours.run(segment), theirs.run(inputs)
    for name in ("vision", "projector"):
        if name in reference:
            # images of a row that repeat share a slot of ours, and are encoded again by theirs
            case[name] = _difference(mine[name], reference[name][_first_uses(segment.pixels)])
    case["logits"] = _difference(mine["logits"], reference["logits"]) | _distributions(
        mine["logits"], reference["logits"]
    )
    if exact:
        case["rounding"] = _distributions(exact.run(segment)["logits"], mine["logits"])
    return case


def _first_uses(pixels: Sequence[np.ndarray]) -> list[int]:
    seen: dict[int, int] = {}
    for number, image in enumerate(pixels):
        seen.setdefault(id(image), number)
    return list(seen.values())


def _difference(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    gap = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
    return {"max_abs": float(gap.max()), "mean_abs": float(gap.mean()), "scale": float(np.abs(theirs).max())}


def _distributions(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """KL(theirs ‖ ours) in nats a position, and the share of positions with the same most likely token."""
    mine, reference = _log_softmax(ours), _log_softmax(theirs)
    kl = (np.exp(reference) * (reference - mine)).sum(-1)
    agreement = (ours.argmax(-1) == theirs.argmax(-1)).mean()
    return {"kl_mean": float(kl.mean()), "kl_max": float(kl.max()), "top1_agreement": float(agreement)}


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _faults(case: Mapping[str, Any], tolerance: float) -> Iterator[str]:
    """What in a case is not as it must be; a NaN is never within a tolerance."""
    if not case["tokens_equal"]:
        yield f"{case['id']}: the exported processor gives other tokens than our renderer"
    for name in ("pixels", "vision", "projector", "logits"):
        if name in case:
            limit = PIXEL_TOLERANCE if name == "pixels" else tolerance * max(1.0, case[name]["scale"])
            if not case[name]["max_abs"] <= limit:
                yield f"{case['id']}: {name} differ by {case[name]['max_abs']:.3g}, more than {limit:.3g}"


def _rounded(params: Mapping[str, Any], dtype: str) -> Mapping[str, Any]:
    """The parameters as the export holds them, again in float32."""
    if dtype == "float32":
        return params
    return jax.tree.map(lambda leaf: np.asarray(leaf).astype(ml_dtypes.bfloat16).astype(np.float32), dict(params))


def _finish(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    (folder / "verify.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    log.info("export %s: %s", folder, result.get("reason") or result["status"])
    return result

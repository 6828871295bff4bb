"""Proof of an export: the same prompts through our model and through transformers, compared step by step."""

from __future__ import annotations

import dataclasses
import functools
import gc
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding
from PIL import Image

from infimed_jax import config, sharding
from infimed_jax.data.batch import Batch, Segment, build_row, stack_rows
from infimed_jax.data.chat import Tokenizer, load_tokenizer, render_prompt
from infimed_jax.data.images import decode_image
from infimed_jax.data.sample import Sample, Turn
from infimed_jax.errors import UserError
from infimed_jax.files import write_json
from infimed_jax.hf.configuration import LLAVA, llava_from_hf, read_architecture
from infimed_jax.hf.weights import DTYPES
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
    """Compare `params` (arrays, or `open_params`' leaves) with the export of them; run under the model's mesh.

    For each prompt (those of `samples`; by default one without, one with one and one with three images): tokens and
    pixels of our renderer against the exported processor, then vision features, projector output and logits, with the
    parameters rounded to the export's dtype on both sides. A difference may be `tolerance` times the larger of 1 and
    the largest reference value. `rounding` says what the export's dtype itself costs, and is not judged. One model is
    in memory at a time: theirs in float32, then ours in the stored dtype.

    The result (`status` is `passed`, `failed` with `failures`, or `skipped` with a `reason`) is written to
    `hf_folder/verify.json` as well. UserError where the folder is no LLaVA export.
    """
    folder = Path(hf_folder)
    _, values = read_architecture(folder, (LLAVA,))
    exported = llava_from_hf(values, f"{folder}/config.json")
    try:
        import torch
        import transformers
    except ModuleNotFoundError as error:
        return _finish(folder, {"status": "skipped", "reason": f"{error.name} is not installed"})
    dtype = str(values.get("dtype") or values.get("torch_dtype"))
    if dtype not in DTYPES:
        raise UserError(f"{folder}/config.json: dtype {dtype} is not {' or '.join(DTYPES)}")
    model = dataclasses.replace(model, projector=config.Projector(visual_tokens=model.vision.num_patches))
    result: dict[str, Any] = {
        "status": "failed",
        "failures": _config_faults(model, exported),
        "dtype": dtype,
        "tolerance": tolerance,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "cases": [],
    }
    if result["failures"]:
        return _finish(folder, result)
    samples = samples or builtin_samples()
    tokenizer = load_tokenizer(tokenizer_folder)
    segments = [_segment(sample, model, tokenizer) for sample in samples]
    references, loading_faults = _references(folder, samples, segments)
    rounds = dtype == "bfloat16" and any(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    ours = _Ours(_rounded(params, dtype), model)
    kept: list[np.ndarray | None] = []
    for sample, segment in zip(samples, segments, strict=True):
        case, logits = _compare(sample, segment, ours, references.pop(0))  # what is compared is dropped
        result["cases"].append(case)
        kept.append(logits if rounds else None)
    if rounds:
        del ours
        exact = _Ours(params, model)
        for segment, case, logits in zip(segments, result["cases"], kept, strict=True):
            if logits is not None:
                case["rounding"] = _distributions(exact.run(segment)["logits"], logits)
    result["failures"] = [*loading_faults, *(fault for case in result["cases"] for fault in _faults(case, tolerance))]
    return _finish(folder, result | {"status": "failed" if result["failures"] else "passed"})


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


def _segment(sample: Sample, model: config.Model, tokenizer: Tokenizer) -> Segment:
    pixels = tuple(decode_image(data, model.vision.image_size) for data in sample.images)
    return render_prompt(sample, tokenizer, model.projector.visual_tokens, pixels)


class _Ours:
    """Our side: prompts → arrays on the host."""

    def __init__(self, params: Mapping[str, Any], model: config.Model):
        self.model = model
        self.mesh = jax.sharding.get_mesh()
        self.params = jax.tree.map(
            lambda leaf, like: jax.device_put(np.asarray(leaf), NamedSharding(self.mesh, like.sharding.spec)),
            dict(params),
            infimed.abstract_params(model),
        )

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


class _Reference(NamedTuple):
    """What transformers made of one prompt, on the host."""

    tokens: list[int]
    pixels: np.ndarray | None
    """f32[M,3,S,S]"""
    outputs: dict[str, np.ndarray]
    """Empty where the tokens are not ours: their numbers would say nothing."""


def _references(
    folder: Path, samples: Sequence[Sample], segments: Sequence[Segment]
) -> tuple[list[_Reference], list[str]]:
    """Each sample's reference, and what was wrong with loading; the model is gone when this returns."""
    theirs = _Theirs(folder)
    references = []
    for sample, segment in zip(samples, segments, strict=True):
        inputs = theirs.prompt(sample)
        tokens = inputs["input_ids"][0].tolist()
        pixels = inputs["pixel_values"].numpy() if "pixel_values" in inputs else None
        outputs = theirs.run(inputs) if tokens == segment.tokens.tolist() else {}
        references.append(_Reference(tokens, pixels, outputs))
    faults = theirs.loading_faults
    del theirs
    gc.collect()
    return references, faults


def _compare(
    sample: Sample, segment: Segment, ours: _Ours, reference: _Reference
) -> tuple[dict[str, Any], np.ndarray | None]:
    """(the case, our logits f32[T,V] where the tokens are equal)."""
    case: dict[str, Any] = {"id": sample.id, "images": len(segment.pixels), "tokens": len(segment)}
    case["tokens_equal"] = reference.tokens == segment.tokens.tolist()
    if segment.pixels and reference.pixels is not None:
        pixels = np.stack(segment.pixels).astype(np.float32) / 127.5 - 1
        case["pixels"] = _difference(pixels.transpose(0, 3, 1, 2), reference.pixels)
    if not case["tokens_equal"]:
        return case, None
    mine = ours.run(segment)
    for name in ("vision", "projector"):
        if name in reference.outputs:
            # images of a row that repeat share a slot of ours, and are encoded again by theirs
            case[name] = _difference(mine[name], reference.outputs[name][_first_uses(segment.pixels)])
    logits, their_logits = mine["logits"], reference.outputs["logits"]
    case["logits"] = _difference(logits, their_logits) | _distributions(logits, their_logits)
    return case, logits


def _first_uses(pixels: Sequence[np.ndarray]) -> list[int]:
    seen: dict[int, int] = {}
    for number, image in enumerate(pixels):
        seen.setdefault(id(image), number)
    return list(seen.values())


def _difference(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    largest = total = scale = 0.0
    for mine, reference in _slabs(ours, theirs):
        gap = np.abs(mine.astype(np.float64) - reference)
        largest = np.maximum(largest, gap.max())  # unlike max(), a NaN stays
        total += gap.sum()
        scale = np.maximum(scale, np.abs(reference).max())
    return {"max_abs": float(largest), "mean_abs": float(total / ours.size), "scale": float(scale)}


def _distributions(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """KL(theirs ‖ ours) in nats a position, and the share of positions with the same most likely token."""
    kl, agrees = [], []
    for mine, reference in _slabs(ours, theirs):
        p, q = _log_softmax(reference), _log_softmax(mine)
        kl.append((np.exp(p) * (p - q)).sum(-1))
        agrees.append(mine.argmax(-1) == reference.argmax(-1))
    divergence = np.concatenate(kl)
    agreement = float(np.concatenate(agrees).mean())
    return {"kl_mean": float(divergence.mean()), "kl_max": float(divergence.max()), "top1_agreement": agreement}


def _slabs(ours: np.ndarray, theirs: np.ndarray, rows: int = 64) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Both, a few rows at a time: 2,000 positions of 152k logits are 2.4 GB in float64."""
    for start in range(0, len(ours), rows):
        yield ours[start : start + rows], theirs[start : start + rows]


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


def _config_faults(model: config.Model, exported: config.Model) -> list[str]:
    """Settings in which the export's config.json differs from the checkpoint's model."""
    ours, theirs = (dataclasses.asdict(m) for m in (model, exported))
    return [
        f"the checkpoint's {part}.{name} is {value}, config.json says {theirs[part][name]}"
        for part, values in ours.items()
        for name, value in values.items()
        if value != theirs[part][name]
    ]


def _rounded(params: Mapping[str, Any], dtype: str) -> Mapping[str, Any]:
    """The parameters as the export holds them; the computation widens each as it uses it."""
    if dtype == "float32":
        return params
    return jax.tree.map(lambda leaf: np.asarray(leaf).astype(ml_dtypes.bfloat16), dict(params))


def _finish(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    write_json(folder / "verify.json", result)
    log.info("export %s: %s", folder, result.get("reason") or result["status"])
    return result

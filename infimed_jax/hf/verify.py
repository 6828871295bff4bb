"""Proof of an export: the same prompts through our model and through transformers, compared step by step.

Theirs runs first, in a process of its own (`reference`); ours runs a layer at a time, each layer's weights widened to
float32 as it comes up. So the peak is near the size of the stored weights, and never two models.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import io
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from infimed_jax import config, sharding
from infimed_jax.data.batch import Batch, Segment, build_row, stack_rows
from infimed_jax.data.chat import Tokenizer, before_answer, load_tokenizer, render_prompt
from infimed_jax.data.images import prepare_image, visual_tokens
from infimed_jax.data.prompts import as_turns
from infimed_jax.data.sample import Chat, Sample, Turn
from infimed_jax.errors import UserError
from infimed_jax.files import write_json
from infimed_jax.hf import reference
from infimed_jax.hf.configuration import read_architecture
from infimed_jax.hf.weights import ADAPTER, DTYPES
from infimed_jax.models import forward, lora
from infimed_jax.models.compute import Compute
from infimed_jax.models.family import family_of, head_path, table_path
from infimed_jax.models.layerwise import Outputs, layerwise, widen
from infimed_jax.models.params import Params
from infimed_jax.trees import at, flatten, nest

log = logging.getLogger(__name__)

PIXEL_TOLERANCE = 1e-6
"""Pixels are the same uint8 values normalised in float32 in another order, in [-1, 1]."""


def verify(
    params: Mapping[str, Any],
    model: config.Model,
    hf_folder: str | Path,
    tokenizer_folder: str | Path,
    samples: Sequence[Sample] = (),
    *,
    lora_scale: float = 0.0,
    tolerance: float = 1e-4,
) -> dict[str, Any]:
    """Compare `params` (arrays, or leaves of `open_params`) with the export of them, on one device.

    For each prompt (those of `samples`; by default one without, one with one and one with three images): tokens and
    pixels of our renderer against the exported processor, then vision features, projector output and logits, both
    sides in float32 with the parameters rounded to the export's dtype. A difference may be `tolerance` times the
    larger of 1 and the largest reference value. `rounding` says what the export's dtype itself costs, and is not
    judged. An export with its adapters apart is compared with `params` that have theirs (`open_stored`).

    The result (`status` is `passed`, `failed` with `failures`, or `skipped` with a `reason`) is written to
    `hf_folder/verify.json` as well. UserError where the folder is no export of the model's family, or the disk is full.
    """
    folder = Path(hf_folder)
    hf = family_of(model).hugging_face
    _, values = read_architecture(folder, (hf.architecture,))
    exported = dataclasses.replace(hf.from_hf(values, f"{folder}/config.json"), family=model.family)
    packages = ["torch", "transformers", *(["peft"] if (folder / ADAPTER).is_dir() else [])]
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    if absent:
        return _finish(folder, {"status": "skipped", "reason": f"{absent[0]} is not installed"})
    dtype = str(values.get("dtype") or values.get("torch_dtype"))
    if dtype not in DTYPES:
        raise UserError(f"{folder}/config.json: dtype {dtype} is not {' or '.join(DTYPES)}")
    model = hf.exported(model)
    result: dict[str, Any] = {
        "status": "failed",
        "failures": _config_faults(model, exported),
        "dtype": dtype,
        "tolerance": tolerance,
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "cases": [],
    }
    if result["failures"]:
        return _finish(folder, result)
    samples = samples or builtin_samples()
    tokenizer = load_tokenizer(tokenizer_folder)
    segments = [_segment(sample, model, tokenizer) for sample in samples]
    prompts = [
        reference.Prompt(hf_messages(sample), _images(sample), segment.tokens.tolist())
        for sample, segment in zip(samples, segments, strict=True)
    ]
    work = folder.resolve().with_name(f".{folder.resolve().name}.verify")
    shutil.rmtree(work, ignore_errors=True)  # of a proof that was killed
    work.mkdir()
    try:
        log.info("%d prompts through transformers, in a process of its own", len(prompts))
        try:
            theirs, faults = reference.in_own_process(
                reference.compute, folder, prompts, work, hf.features, model.family if hf.open_reference else ""
            )
        except reference.Unusable as error:
            return _finish(folder, result | {"failures": [str(error)]})
        log.info("the same through our model, a layer at a time")
        one_device = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
        with jax.set_mesh(one_device), jax.default_matmul_precision("highest"):  # a GPU would round products to TF32
            result["cases"] = _cases(params, model, dtype, lora_scale, samples, segments, theirs)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    result["failures"] = [*faults, *(fault for case in result["cases"] for fault in _faults(case, tolerance))]
    return _finish(folder, result | {"status": "failed" if result["failures"] else "passed"})


def builtin_samples() -> tuple[Sample, ...]:
    """Prompts with 0, 1 and 3 images of fixed noise, sized so that resizing matters."""
    rng = np.random.default_rng(0)
    images = []
    for shape in ((70, 90, 3), (61, 40, 3), (128, 128, 3)):
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(stream, format="PNG")
        images.append(stream.getvalue())

    def sample(name: str, number: int, question: str) -> Chat:
        user = Turn("user", (*range(number), f"\n{question}" if number else question))
        return Chat(f"verify/{name}", "verify", "test", tuple(images[:number]), (user, Turn("assistant", ("Yes.",))))

    return (
        sample("text", 0, "Which organ makes insulin?"),
        sample("image", 1, "Is the heart enlarged?"),
        sample("images", 3, "Which of these images shows a fracture?"),
    )


def hf_messages(sample: Sample) -> list[dict[str, Any]]:
    """The turns before the last answer as a processor takes them: lists of image and text parts."""
    return [{"role": turn.role, **_content(turn)} for turn in before_answer(as_turns(sample))]


def _content(turn: Turn) -> dict[str, Any]:
    if turn.role != "user":
        return {"content": turn.text} | ({"reasoning_content": turn.reasoning} if turn.reasoning else {})
    parts = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in turn.content]
    return {"content": parts}


def _images(sample: Sample) -> tuple[bytes, ...]:
    """In the order of the prompt, repeated where it repeats them."""
    pieces = (piece for turn in before_answer(as_turns(sample)) for piece in turn.content)
    return tuple(sample.images[piece] for piece in pieces if not isinstance(piece, str))


def _segment(sample: Sample, model: config.Model, tokenizer: Tokenizer) -> Segment:
    pixels = tuple(prepare_image(data, model) for data in sample.images)
    return render_prompt(sample, tokenizer, visual_tokens(sample.images, model), pixels)


def _cases(
    params: Mapping[str, Any],
    model: config.Model,
    dtype: str,
    lora_scale: float,
    samples: Sequence[Sample],
    segments: Sequence[Segment],
    theirs: Sequence[reference.Reference],
) -> list[dict[str, Any]]:
    compute, hf = Compute("float32", "none", "xla", 1, lora_scale), family_of(model).hugging_face
    same = [segment.tokens.tolist() == answer.tokens for segment, answer in zip(segments, theirs, strict=True)]
    batches = [_batch(segment, model) for segment, equal in zip(segments, same, strict=True) if equal]
    rounded, head = _run(params, batches, model, compute, dtype), _head(params, model, dtype)
    outputs = iter(rounded)
    cases = []
    for sample, segment, answer, equal in zip(samples, segments, theirs, same, strict=True):
        case: dict[str, Any] = {"id": sample.id, "images": len(segment.pixels), "tokens": len(segment)}
        case["tokens_equal"] = equal
        if segment.pixels:
            case["pixels"] = _difference(hf.pixels(segment.pixels), answer.array("pixels"))
        if equal:
            features, hidden = next(outputs)
            # images of a row that repeat share a slot of ours, and are encoded again by theirs
            first_uses = _first_uses(segment.pixels)
            case |= {name: _difference(ours, answer.array(name)[first_uses]) for name, ours in features.items()}
            pairs = zip(_logits(head, hidden, model), answer.logits(model.vocab_size), strict=True)
            case["logits"] = _summary([_difference(*pair) | _distributions(*pair) for pair in pairs], hidden)
        cases.append(case)
    if dtype == "bfloat16" and any(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params)):
        exact, exact_head = _run(params, batches, model, compute, "float32"), _head(params, model, "float32")
        compared = [case for case in cases if case["tokens_equal"]]
        for case, ours, before in zip(compared, rounded, exact, strict=True):
            pairs = zip(_logits(exact_head, before.hidden, model), _logits(head, ours.hidden, model), strict=True)
            case["rounding"] = _summary([_distributions(*pair) for pair in pairs], ours.hidden)
    return cases


def _batch(segment: Segment, model: config.Model) -> Batch:
    row = build_row([segment], context=len(segment), images=len(_first_uses(segment.pixels)), model=model)
    return stack_rows([row])


def _run(
    params: Mapping[str, Any], rows: Sequence[Batch], model: config.Model, compute: Compute, dtype: str
) -> list[Outputs]:
    """All prompts through our model, its parameters rounded to `dtype`."""
    return layerwise(lambda path: _rounded(at(params, path), dtype), rows, model, compute)


def _head(params: Params, model: config.Model, dtype: str) -> Params:
    path = head_path(model) or table_path(model)
    return widen(nest({path: _rounded(at(params, path), dtype)}))


def _logits(head: Params, hidden: jax.Array, model: config.Model) -> Iterator[np.ndarray]:
    """f32[at most POSITIONS, V], in order."""
    for start in range(0, len(hidden), reference.POSITIONS):
        yield np.asarray(_unembed(head, hidden[start : start + reference.POSITIONS], model))


def _rounded(tree: Any, dtype: str) -> Any:
    """Leaves on the host as the export holds them: adapters are never rounded."""

    def leaf(path: tuple[Any, ...], stored: Any) -> np.ndarray:
        array = np.asarray(stored)
        return array if path and path[-1].key in (lora.A, lora.B) else array.astype(DTYPES[dtype][1], copy=False)

    return jax.tree_util.tree_map_with_path(leaf, tree)


@functools.partial(jax.jit, static_argnames="model")
def _unembed(head: Params, hidden: jax.Array, model: config.Model) -> jax.Array:
    return forward.logits(head, hidden, model, Compute("float32"))


def _first_uses(pixels: Sequence[Any]) -> list[int]:
    """Numbers of the images that are not repeats of an earlier one."""
    seen: dict[int, int] = {}
    for number, image in enumerate(pixels):
        seen.setdefault(id(image), number)
    return list(seen.values())


def _difference(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    gap = np.abs(ours.astype(np.float64) - theirs)
    return {"max_abs": float(gap.max()), "mean_abs": float(gap.mean()), "scale": float(np.abs(theirs).max())}


def _distributions(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """KL(theirs ‖ ours) in nats a position, and the share of positions with the same most likely token."""
    p, q = _log_softmax(theirs), _log_softmax(ours)
    kl, agrees = (np.exp(p) * (p - q)).sum(-1), ours.argmax(-1) == theirs.argmax(-1)
    return {"kl_mean": float(kl.mean()), "kl_max": float(kl.max()), "top1_agreement": float(agrees.mean())}


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _summary(pieces: Sequence[Mapping[str, float]], hidden: jax.Array) -> dict[str, float]:
    """One reading of all positions of `hidden`; each piece is of POSITIONS of them, the last of what is left."""
    lengths = [min(reference.POSITIONS, len(hidden) - n * reference.POSITIONS) for n in range(len(pieces))]
    return {
        name: float(
            np.max([piece[name] for piece in pieces])  # unlike max(), a NaN stays
            if name in ("max_abs", "scale", "kl_max")
            else np.average([piece[name] for piece in pieces], weights=lengths)
        )
        for name in pieces[0]
    }


def _faults(case: Mapping[str, Any], tolerance: float) -> Iterator[str]:
    """What in a case is not as it must be; a NaN is never within a tolerance."""
    if not case["tokens_equal"]:
        yield f"{case['id']}: the exported processor gives other tokens than our renderer"
    for name, difference in case.items():
        if isinstance(difference, dict) and "max_abs" in difference:
            limit = PIXEL_TOLERANCE if name == "pixels" else tolerance * max(1.0, difference["scale"])
            if not difference["max_abs"] <= limit:
                yield f"{case['id']}: {name} differ by {difference['max_abs']:.3g}, more than {limit:.3g}"


def _config_faults(model: config.Model, exported: config.Model) -> list[str]:
    """Settings in which the export's config.json differs from the checkpoint's model."""
    ours, theirs = (flatten(dataclasses.asdict(m)) for m in (model, exported))
    return [
        f"the checkpoint's {name} is {value}, config.json says {theirs[name]}"
        for name, value in ours.items()
        if value != theirs[name]
    ]


def _finish(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    write_json(folder / "verify.json", result)
    log.info("export %s: %s", folder, result.get("reason") or result["status"])
    return result

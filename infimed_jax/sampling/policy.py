"""Whoever answers: a model on the mesh with its tokenizer, from a checkpoint, an export or a trainer's own parameters.

Evaluation, generation, difficulty, the demo and GRPO all ask through it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from infimed_jax import config
from infimed_jax.data.batch import Segment
from infimed_jax.data.chat import Tokenizer, load_tokenizer, render_prompt
from infimed_jax.data.images import ImageCache, ImageError, visual_tokens
from infimed_jax.data.prompts import Wording, question_text
from infimed_jax.data.sample import Chat, Sample
from infimed_jax.errors import UserError
from infimed_jax.hf.configuration import MAX_POSITIONS
from infimed_jax.hf.import_ import open_export
from infimed_jax.hf.names import check_leaves
from infimed_jax.hf.provenance import max_positions
from infimed_jax.hf.weights import read_json
from infimed_jax.models.compute import Compute
from infimed_jax.models.params import Params, abstract_params
from infimed_jax.progress import Report
from infimed_jax.runs.checkpoint import Metadata
from infimed_jax.runs.history import history_of
from infimed_jax.runs.parameters import open_params
from infimed_jax.sampling.engine import Completion, Delta, Engine, complete
from infimed_jax.sampling.sampler import penalizes
from infimed_jax.sampling.weights import Decoder, sampler_weights
from infimed_jax.sharding import make_mesh, on_mesh, place_params
from infimed_jax.trees import flatten

EXPORT_CONFIG = "config.json"
"""Whose presence tells an export's folder from a checkpoint's."""


@dataclass(frozen=True, eq=False)
class Policy:
    """A model that answers. Its methods run on `mesh`, whatever mesh is current."""

    config: config.Config
    """The checkpoint's own settings, under those of the caller."""
    decoder: Decoder
    tokenizer: Tokenizer
    mesh: jax.sharding.Mesh
    images: ImageCache = field(default_factory=ImageCache)
    metadata: Metadata = field(default_factory=dict)
    """The checkpoint's; empty for an export and for a trainer's parameters."""
    context: int = MAX_POSITIONS
    """Most tokens of a prompt and its reply."""
    fingerprint: str = ""
    """Digest of the stored parameters; empty for a trainer's own."""

    @classmethod
    def open(
        cls,
        folder: str | Path,
        settings: Sequence[str] = (),
        *,
        defaults: Mapping[str, Any] | None = None,
        tokenizer: str | Path | None = None,
        export: bool | None = None,
    ) -> Policy:
        """The model in `folder`: a run (its latest checkpoint), a checkpoint, or an export; `export` says which.

        Its own settings lie under `defaults`, and these under `settings` (`name=value`). The parameters are read and
        placed on the mesh a leaf at a time, and cast there. Raises UserError where there is no model, its parameters
        are not those that the settings describe, or the tokenizer is another model's.
        """
        folder = Path(folder)
        export = (folder / EXPORT_CONFIG).is_file() if export is None else export
        params, values, metadata, context = _open_export(folder, settings) if export else _open_checkpoint(folder)
        values = config.with_overrides(config.merge(values, defaults or {}), list(settings))
        cfg = config.from_dict(config.Config, values)
        # A setting such as model.text.num_layers must fit: a layer too many would be a copy of the last one.
        check_leaves(flatten(dict(params)), cfg.model)
        loaded = load_tokenizer(tokenizer or cfg.data.tokenizer)
        if len(loaded) > cfg.model.vocab_size:
            raise UserError(
                f"the tokenizer {loaded.folder} has {len(loaded)} tokens, the model's vocab_size is "
                f"{cfg.model.vocab_size}: name the model's own by data.tokenizer or --tokenizer"
            )
        mesh = make_mesh(cfg.mesh)
        with jax.set_mesh(mesh):
            placed = place_params(params, on_mesh(abstract_params(cfg.model)))
            del params
            sha256 = metadata["leaves_sha256"] if metadata else _digest(folder)
            return cls(cfg, _decoder(placed, cfg), loaded, mesh, metadata=metadata, context=context, fingerprint=sha256)

    @classmethod
    def of(cls, params: Params, cfg: config.Config, tokenizer: Tokenizer, images: ImageCache) -> Policy:
        """A trainer's parameters on the current mesh, adapters merged; `images` is the trainer's cache."""
        return cls(cfg, _decoder(params, cfg), tokenizer, jax.sharding.get_mesh(), images)

    def prompts(
        self,
        samples: Sequence[Sample],
        *,
        reasoning: bool,
        image: bool = True,
        pixels: bool = True,
        wording: Wording = question_text,
    ) -> list[Segment]:
        """What each sample asks, up to the place where the reply begins; equal images are one array.

        `reasoning` asks for thoughts and a boxed answer, `image=False` is the blind control of questions, which are
        put in `wording`; without `pixels` the prompts are good for their lengths only. UserError for an image that
        cannot be decoded.
        """
        decoded: dict[bytes, Any] = {}  # one array an image, so that sharing does not depend on the cache

        def render(sample: Sample) -> Segment:
            shown = sample.images if image or isinstance(sample, Chat) else ()
            arrays = [self._decode(sample, number, decoded) for number in range(len(shown))] if pixels else ()
            places = visual_tokens(shown, self.config.model)
            return render_prompt(
                sample, self.tokenizer, places, arrays, reasoning=reasoning, image=image, wording=wording
            )

        return [render(sample) for sample in samples]

    def _decode(self, sample: Sample, number: int, decoded: dict[bytes, Any]) -> Any:
        data = sample.images[number]
        if data not in decoded:
            try:
                decoded[data] = self.images.prepare(data, self.config.model)
            except ImageError as error:
                raise UserError(
                    f"sample {sample.id}: image {number + 1} is unreadable ({error.reason}): replace it"
                ) from error
        return decoded[data]

    def answer(
        self,
        prompts: Sequence[Segment],
        sampling: config.Sampling,
        key: jax.Array,
        *,
        longest: int = 0,
        numbers: Sequence[int] | None = None,
        on_progress: Report | None = None,
        on_delta: Callable[[Delta], None] | None = None,
    ) -> list[Completion]:
        """Complete every prompt; the replies come in the prompts' order.

        `longest` (tokens) keeps the cache's shape, so the compilation, from call to call; 0 takes the longest prompt's.
        For `numbers` and the callbacks see `engine.complete`. Raises UserError for prompts and settings that cannot be
        decoded, and where the model's logits are not finite.
        """
        if not prompts:
            return []
        with jax.set_mesh(self.mesh):
            engine = Engine(
                self.decoder,
                sampling,
                stops=self.tokenizer.stop_tokens,
                banned=self.tokenizer.unsampled(self.config.model.vocab_size),
                key=key,
                longest=longest or max(map(len, prompts)),
                penalties=penalizes(sampling),
            )
            return complete(engine, prompts, sampling, numbers, on_progress, on_delta)


def _decoder(params: Params, cfg: config.Config) -> Decoder:
    compute = Compute.of(cfg.train)
    return Decoder(sampler_weights(params, cfg.model, compute.dtype), cfg.model, compute)


def _digest(folder: Path) -> str:
    """SHA-256 of an export's parameters."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _open_checkpoint(folder: Path) -> tuple[Params, dict[str, Any], Metadata, int]:
    """(parameters on the disk, settings as stored, metadata, the context's tokens)."""
    params, metadata = open_params(folder)
    return params, metadata["config"], metadata, max_positions(history_of(metadata)) or MAX_POSITIONS


def _open_export(folder: Path, settings: Sequence[str]) -> tuple[Params, dict[str, Any], Metadata, int]:
    """The same of a folder that `convert to-hf` wrote, of the family that `settings` name."""
    family = config.with_overrides({"model": {}}, list(settings))["model"].get("family", "infimed")
    written = read_json(folder / EXPORT_CONFIG)
    narrow = "bfloat16" in (written.get("dtype"), written.get("torch_dtype"))
    opened = open_export(folder, dtype="bfloat16" if narrow else "float32", family=family)
    train = config.Train(train=opened.model.PARTS[1:])  # parts that the model has; nothing learns here
    cfg = config.Config(model=opened.model, data=config.Data(tokenizer=str(folder)), train=train)
    return opened.params(), config.to_dict(cfg), {}, opened.max_positions

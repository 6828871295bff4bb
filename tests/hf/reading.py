"""Imports as (parameters, Model), read whole, and exports in one call."""

from infimed_jax.hf.export import Export
from infimed_jax.hf.import_ import open_export, open_parts


def from_hf(*, text, vision, **options):
    opened = open_parts({"vision": vision, "text": text}, **options)
    return opened.params(), opened.model


def from_llava(folder, **options):
    opened = open_export(folder, **options)
    return opened.params(), opened.model


def to_hf(params, model, tokenizer_folder, output, *, source_vision=None, visual_tokens=None, lora=None, **options):
    export = Export(
        params, model, tokenizer_folder, source_vision=source_vision, visual_tokens=visual_tokens, lora=lora
    )
    return export.write(output, **options)

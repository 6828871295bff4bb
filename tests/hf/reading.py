"""Imports as (parameters, Model), read whole."""

from infimed_jax.hf.import_ import open_export, open_parts


def from_hf(*, text, vision, **options):
    opened = open_parts({"vision": vision, "text": text}, **options)
    return opened.params(), opened.model


def from_llava(folder, **options):
    opened = open_export(folder, **options)
    return opened.params(), opened.model

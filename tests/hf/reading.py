"""Imports as (parameters, Model), read whole."""

from infimed_jax.hf.import_ import open_llava, open_parts


def from_hf(**options):
    opened = open_parts(**options)
    return opened.params(), opened.model


def from_llava(folder, **options):
    opened = open_llava(folder, **options)
    return opened.params(), opened.model

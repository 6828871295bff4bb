"""Identifiers in text that a pattern can find, in English and Chinese: flagged or masked.

This is no anonymisation and promises none: names without a title, places, rare diseases, and whatever stands in the
images are not found. It is a net under data that was de-identified before, not a replacement for that.
"""

from __future__ import annotations

from data_prep.privacy.text import Finding, find, mask, scrub

__all__ = ["Finding", "find", "mask", "scrub"]

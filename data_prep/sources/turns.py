"""Conversations in the ways in which people write them (`from` and `value`, `role` and `content`) as turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from data_prep.reading.faults import (
    BAD_PART,
    BEGINS_WITH_REPLY,
    ENDS_WITH_USER,
    IMAGE_MARKS,
    LATE_SYSTEM,
    NO_ROLE,
    NO_TEXT,
    NO_TURNS,
    SAME_ROLE,
    VIDEO,
    Unusable,
)
from data_prep.reading.files import as_list
from data_prep.reading.rows import Row
from data_prep.reading.words import MARK, split_marks, split_thoughts
from data_prep.sources.source import answers, text
from infimed_jax.data.sample import Content, Turn

KEYS = ("conversations", "messages", "conversation", "conversatons")
"""Where a row has its turns; the misspelt key is in published LLaVA-Med copies."""
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "system": "system",
}


def turns_of(row: Row) -> tuple[list[tuple[str, list[str]]], list[Any]]:
    """Roles with the pieces of what they say, as `split_marks` gives them, and the images that parts of turns name.

    A `system` key of the row is the system turn, before what a system turn of its own says. Raises Unusable: no list
    of turns (the keys of the row are named), a role or a part that is unknown.
    """
    given = next((row[key] for key in KEYS if row.get(key)), None)
    if not isinstance(given, list) or not all(isinstance(turn, dict) for turn in given):
        raise Unusable(NO_TURNS, f"under {' or '.join(KEYS[:2])}; it has {', '.join(map(str, row))}"[:200])
    spoken: list[tuple[str, list[str]]] = []
    images: list[Any] = []
    for turn in given:
        name = text(turn.get("from") or turn.get("role"))
        role = _ROLES.get(name.lower())
        if role is None:
            raise Unusable(NO_ROLE, name[:40])
        pieces = _pieces(turn.get("value", turn.get("content")), images)
        if role == "assistant" and (thoughts := text(turn.get("reasoning_content") or turn.get("reasoning"))):
            pieces.insert(0, f"<think>{thoughts}</think>")
        spoken.append((role, pieces))
    if system := split_marks(text(row.get("system"))):
        own = spoken.pop(0)[1] if spoken[0][0] == "system" else []
        spoken.insert(0, ("system", [*system, *(["\n\n", *own] if own and own != system else [])]))
    return spoken, images


def _pieces(value: Any, images: list[Any]) -> list[str]:
    """What one turn says; the images that its parts name join `images`."""
    if isinstance(value, bool | int | float):
        value = "".join(answers(value))
    if isinstance(value, str):
        return split_marks(value)
    if not isinstance(value, list | dict):
        raise Unusable(NO_TEXT)
    pieces: list[str] = []
    for part in as_list(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, str) or kind == "text":
            words = part if isinstance(part, str) else part.get("text")
            pieces += split_marks(words if isinstance(words, str) else text(words))
        elif kind in ("image", "image_url"):
            pieces.append(MARK)
            image = next((part[key] for key in ("image", "image_url", "path", "url") if part.get(key)), None)
            if image is not None:
                images.append(image)
        else:
            raise Unusable(VIDEO if kind in ("video", "video_url") else BAD_PART, text(kind)[:40])
    return pieces


def conversation(spoken: Sequence[tuple[str, list[str]]], images: int) -> tuple[tuple[Turn, ...], int]:
    """The turns with so many images in their places, and how many marks stood where no image can be.

    Each mark in a user's turn becomes the next image. Marks elsewhere go; where user turns have too few without them,
    they mean images before the user's turn before them. Without any mark, the images come first. A reply's leading
    think block is its reasoning.

    Raises Unusable: the rule that the roles break, an empty turn, another number of marks than of images, or thoughts
    as `split_thoughts` refuses.
    """
    roles = [role for role, _ in spoken]
    _check_order(roles)
    counts = [pieces.count(MARK) for _, pieces in spoken]
    marks = sum(count for role, count in zip(roles, counts, strict=True) if role == "user")
    misplaced = sum(counts) - marks
    if marks == images or (not marks and not misplaced):
        moved = [0] * len(spoken)
    elif sum(counts) == images:
        moved = [counts[k + 1] if role == "user" else 0 for k, role in enumerate(roles)]
        moved[roles.index("user")] += counts[0] if roles[0] == "system" else 0
    else:
        raise Unusable(IMAGE_MARKS, f"{sum(counts)} marks, {images} images")
    if not marks and not misplaced:
        moved[roles.index("user")] = images
    made: list[Turn] = []
    number = 0
    for (role, pieces), before in zip(spoken, moved, strict=True):
        thoughts = ""
        if role == "assistant":
            thoughts, reply = split_thoughts("".join(piece for piece in pieces if piece != MARK))
            pieces = [reply.strip() if MARK in pieces else reply]
        elif role == "system":
            pieces = ["".join(piece for piece in pieces if piece != MARK)]
        if not "".join(piece for piece in pieces if piece != MARK).strip():
            raise Unusable(NO_TEXT)
        if before:  # as marks on a line of their own
            pieces = [*[MARK] * before, *(pieces if pieces[0].startswith("\n") else ["\n" + pieces[0], *pieces[1:]])]
        content: list[str | int] = []
        for piece in pieces:
            content.append(number if piece == MARK else piece)
            number += piece == MARK
        made.append(Turn(role, _joined(content), thoughts))  # type: ignore[arg-type]
    return tuple(made), misplaced


def _joined(content: list[str | int]) -> Content:
    """Neighbouring texts as one."""
    pieces: list[str | int] = []
    for piece in content:
        if isinstance(piece, str) and pieces and isinstance(pieces[-1], str):
            pieces[-1] += piece
        else:
            pieces.append(piece)
    return tuple(pieces)


def _check_order(roles: Sequence[str]) -> None:
    """Raises Unusable with the rule that is broken: after a system turn if any, user and assistant in turn."""
    talk = roles[1:] if roles[0] == "system" else roles
    if not talk:
        raise Unusable(NO_TURNS, "nothing but a system turn")
    if "system" in talk:
        raise Unusable(LATE_SYSTEM)
    if talk[0] != "user":
        raise Unusable(BEGINS_WITH_REPLY)
    for k in range(1, len(talk)):
        if talk[k] == talk[k - 1]:
            raise Unusable(SAME_ROLE, f"{talk[k]}, turns {k} and {k + 1}")
    if talk[-1] != "assistant":
        raise Unusable(ENDS_WITH_USER)

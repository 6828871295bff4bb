"""The Sample: one document or conversation with its images, as every source yields it and every stage reads it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["document", "chat", "yes_no", "choice", "closed", "open"]
"""`document`: pretraining text without a chat template. `chat`: a conversation without one gold answer.
The other four are questions with a gold answer, by the way in which they are asked and scored."""


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation, or one chunk of a document (role `document`)."""

    role: Literal["document", "system", "user", "assistant"]
    content: tuple[str | int, ...]
    """Pieces in order: text, or an index into the sample's images. No text is ever read as an image mark."""
    reasoning: str = ""
    """What stands inside `<think>`; assistant turns only."""

    @property
    def text(self) -> str:
        """The content's pieces of text, joined."""
        return "".join(piece for piece in self.content if isinstance(piece, str))


@dataclass(frozen=True)
class Sample:
    id: str
    """Unique in the whole mixture: `source/split/number`."""
    source: str
    split: str
    kind: Kind
    images: tuple[bytes, ...]
    """Encoded files (JPEG, PNG, …), in the order of the image indices."""
    turns: tuple[Turn, ...]
    question: str = ""
    """The bare question, before any prompt wording; empty for documents and chats."""
    options: tuple[str, ...] = ()
    """A choice's options, without letters, in order A, B, C, …"""
    answer: str = ""
    """Gold answer: `yes`/`no`, a choice's letter, or the text."""
    meta: dict[str, str] = field(default_factory=dict)
    """`modality`, `template` or `question_type`, `organ`, `language`, `image_id` (one per distinct image), …"""


@dataclass(frozen=True)
class Skipped:
    """A record that a source could not turn into a Sample; counted and listed by reason, never lost silently."""

    id: str
    reason: str
    """A short fixed phrase, so that reports can count it: `image missing`, `no answer`, …"""
    detail: str = ""
    records: int = 1
    """How many it stands for: those of a damaged block cannot be told apart."""

"""The Sample: a document, a chat or a question with its images, as every source yields it and every stage reads it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

QuestionKind = Literal["yes_no", "choice", "closed", "open"]
"""How a question is asked and scored."""
Kind = Literal["document", "chat", QuestionKind]
Content = tuple[str | int, ...]
"""Pieces in order: text, or an index into the sample's images. No text is ever read as an image mark."""


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation."""

    role: Literal["document", "system", "user", "assistant"]
    """`document` only where a document's chunks are shown as turns (`prompts.as_turns`)."""
    content: Content
    reasoning: str = ""
    """What stands inside `<think>`; assistant turns only."""

    @property
    def text(self) -> str:
        """The content's pieces of text, joined."""
        return "".join(piece for piece in self.content if isinstance(piece, str))


@dataclass(frozen=True)
class _Common:
    id: str
    """Unique in the whole mixture: `source/split/number`."""
    source: str
    split: str
    images: tuple[bytes, ...]
    """Encoded files (JPEG, PNG, …), in the order of the image indices."""
    meta: dict[str, str] = field(default_factory=dict, kw_only=True)
    """`modality`, `template` or `question_type`, `organ`, `language`, `image_id` (one per distinct image), …"""


@dataclass(frozen=True)
class Document(_Common):
    """Pretraining text without a chat template."""

    chunks: tuple[Content, ...]
    kind: ClassVar[Kind] = "document"


@dataclass(frozen=True)
class Chat(_Common):
    """A conversation without one gold answer."""

    turns: tuple[Turn, ...]
    kind: ClassVar[Kind] = "chat"


@dataclass(frozen=True)
class Question(_Common):
    """A question with a gold answer, without any wording: it is worded when it is rendered."""

    kind: QuestionKind
    question: str
    """The bare question."""
    answer: str
    """Gold answer: `yes`/`no`, a choice's letter, or the text."""
    options: tuple[str, ...] = ()
    """A choice's options, without letters, in order A, B, C, …"""
    reasoning: str = ""
    """Thoughts that lead to the answer; with them, training asks for a boxed answer."""
    system: str = ""
    """The system turn before the question, if any."""
    alternatives: tuple[str, ...] = ()
    """Other texts that are as right as the answer, which alone is trained on; of closed and open questions only."""


Sample = Document | Chat | Question


@dataclass(frozen=True)
class Skipped:
    """A record that a source could not turn into a Sample; counted and listed by reason, never lost silently."""

    id: str
    reason: str
    """A short fixed phrase, so that reports can count it: `image missing`, `no answer`, …"""
    detail: str = ""
    records: int = 1
    """How many it stands for: those of a damaged block cannot be told apart."""

"""The one grammar of a final answer, shared by rewards, chain-of-thought filters and evaluation.

Only what follows the think block is read. There, the first of these that is present decides, and nothing weaker is
tried when it cannot be read:
  1. the last `\\boxed{}`, unless it ends a bare list of different boxes;
  2. a single `<answer>…</answer>` tag;
  3. a declared answer ("the answer is …", "Answer: …", "B is the correct answer", "答案：…"); several must agree, final
     or short answers alone where any;
  4. the reply itself: all of it, else the one answer that its first or last line or sentence gives beside an
     explanation.
What was found must be ONE answer of the question's kind: a choice's letter or the exact text of one option, yes or no
as a word of its own, or any text. "A or B" is none; neither is a refusal, or an answer that is taken back. The gold
answer plays no part in reading a reply.

Text is compared after `normalize`. The value depends on the reply alone, so naming every answer earns nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from infimed_jax.data.prompts import QUESTION_KINDS
from infimed_jax.data.sample import Kind, Question
from infimed_jax.errors import UserError
from infimed_jax.evaluation.phrases import refuses
from infimed_jax.evaluation.readers import READERS, Reader, agreed, open_text
from infimed_jax.evaluation.text import normalize, one_space, plain, visible

Status = Literal["ok", "unparsed", "truncated"]


@dataclass(frozen=True)
class Parsed:
    """What a reply answers: `yes`/`no`, a letter, or normalised text; None unless `status` is `ok`."""

    value: str | None
    status: Status


UNPARSED = Parsed(None, "unparsed")
TRUNCATED = Parsed(None, "truncated")


def parse_answer(
    reply: str, kind: Kind, options: Sequence[str] = (), finished: bool = True, language: str = "en"
) -> Parsed:
    """Read the final answer out of `reply` to a question in `language`.

    `finished` is False for a reply that the token limit cut: then only a closed box or tag counts as an answer.
    A think block that is not closed is `truncated` however the reply ended. Raises UserError for documents and chats.
    """
    if kind not in QUESTION_KINDS:
        raise UserError(f"a {kind} has no gold answer to read a reply for; kinds are {', '.join(QUESTION_KINDS)}")
    text = after_thinking(reply)
    if text is None:
        return TRUNCATED
    text = one_space(visible(text))
    read = READERS[kind](tuple(options), language)
    missing = UNPARSED if finished else TRUNCATED
    if "\\boxed" in text:
        value = None if _lists_boxes(text) else read.exact(last_boxed(text) or "")
    elif "<answer>" in text or "</answer>" in text:
        value = read.exact(_only_tag(text) or "")
    elif not finished:
        return TRUNCATED
    elif refuses(text := plain(text)):
        value = None
    else:
        declared = _declarations(text, read)
        value = agreed([read.passage(line) for line in declared]) if declared else read.passage(text)
    return Parsed(value, "ok") if value is not None else missing


def answer_of(sample: Question, reply: str, finished: bool = True) -> Parsed:
    """`parse_answer` of a reply to the question."""
    return parse_answer(reply, sample.kind, sample.options, finished, sample.meta.get("language", "en"))


def matches(parsed: Parsed, sample: Question) -> bool:
    """Whether the reply answers as the gold answer does, or one of its alternatives."""
    if parsed.status != "ok":
        return False
    return parsed.value == gold_value(sample) or parsed.value in map(open_text, sample.alternatives)


def gold_value(sample: Question) -> str:
    """The sample's gold answer in the form that `parse_answer` gives."""
    return sample.answer if sample.kind in ("yes_no", "choice") else open_text(sample.answer)


def after_thinking(reply: str) -> str | None:
    """What follows the last think block; the whole reply where there is none; None where one is still open."""
    closed = reply.rfind("</think>")
    if reply.rfind("<think>") > closed:
        return None
    return reply if closed < 0 else reply[closed + len("</think>") :]


def last_boxed(text: str) -> str | None:
    """Content of the last `\\boxed{}`, braces balanced; None where there is none or the last one is not closed."""
    start = text.rfind("\\boxed")
    opening = re.compile(r"\\boxed\s*\{").match(text, start) if start >= 0 else None
    if opening is None:
        return None
    depth = 1
    for end in range(opening.end(), len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[opening.end() : end]
    return None


def _only_tag(text: str) -> str | None:
    """Content of the answer tag where there is exactly one."""
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    _, _, rest = text.partition("<answer>")
    content, closing, _ = rest.partition("</answer>")
    return content if closing else None


_BOX_LIST = re.compile(r"\\boxed\s?\{([^{}]*)\}(?:\s|[,;/、，.$]|\b(?:and|or)\b|和|或)*(?=\\boxed\s?\{([^{}]*)\})")


def _lists_boxes(text: str) -> bool:
    """Whether different boxes stand side by side, which is a list; a word between corrects the first."""
    return any(normalize(first) != normalize(second) for first, second in _BOX_LIST.findall(text))


_DECLARATION = re.compile(
    r"(?:\bthe\s)?(?P<label>\b(?:final|simple|short|brief|concise|direct|detailed|full|long|extended)\s)?"
    r"\b(?:answer|(?:(?:correct|right|best)\s)?(?:option|choice|letter)|(?:correct|right|best)\sanswer)"
    r"(?:\s(?:to|for)\s(?:the|this|that|your)\s(?:\w+\s)?question|\shere)?"
    r"\s?(?:\b(?:is|would\sbe|should\sbe|must\sbe)\b\s?:?|:|[–—-]\s)\s?"
    r"|\bi(?:\swould|'d|\swill|'ll)?\s(?:choose|pick|select|go\swith)\s"
    r"|^[#* ]*(?P<heading>final\s)?(?:answer|conclusion)[* ]*\n+"
    r"|(?P<zh_label>最终)?答案\s?(?:(?:应该?)?[是为选]\s?:?|:)\s?",
    re.IGNORECASE | re.MULTILINE,
)
_IN_DETAIL = ("detailed", "full", "long", "extended")


def _declarations(text: str, read: Reader) -> list[str]:
    """What stands after each declaration, to the end of its line or the next one; final or short answers alone where
    any, detailed ones nowhere. Without one, each statement by which the kind declares an answer."""
    found = list(_DECLARATION.finditer(text))
    ends = [match.start() for match in found[1:]] + [len(text)]
    labels = [(match["label"] or match["heading"] or match["zh_label"] or "").strip().lower() for match in found]
    final = any(label and label not in _IN_DETAIL for label in labels)
    declared = [
        text[match.end() : end].partition("\n")[0]
        for match, end, label in zip(found, ends, labels, strict=False)  # no declaration, no end
        if label not in _IN_DETAIL and (label or not final)
    ]
    return declared or read.statements(text)

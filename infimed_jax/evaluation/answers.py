"""The one grammar of a final answer, shared by rewards, chain-of-thought filters and evaluation.

Only what follows the think block is read. There, the first of these that is present decides, and nothing weaker is
tried when it cannot be read:
  1. the last `\\boxed{}`;
  2. a single `<answer>…</answer>` tag;
  3. a declared answer ("the answer is …", "Answer: …", "答案：…"); several must agree, final answers alone where any;
  4. the whole reply.
What was found must be ONE answer of the question's kind: a choice's letter or the exact text of one option, yes or no
as a word of its own, or any text. "A or B" is none. The gold answer plays no part in reading a reply.

Text is compared after `normalize`. The value depends on the reply alone, so naming every answer earns nothing.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from infimed_jax.data.prompts import LETTERS, QUESTION_KINDS
from infimed_jax.data.sample import Kind, Question
from infimed_jax.errors import UserError

Status = Literal["ok", "unparsed", "truncated"]


@dataclass(frozen=True)
class Parsed:
    """What a reply answers: `yes`/`no`, a letter, or normalised text; None unless `status` is `ok`."""

    value: str | None
    status: Status


UNPARSED = Parsed(None, "unparsed")
TRUNCATED = Parsed(None, "truncated")


def parse_answer(reply: str, kind: Kind, options: Sequence[str] = (), finished: bool = True) -> Parsed:
    """Read the final answer out of `reply`.

    `finished` is False for a reply that the token limit cut: then only a closed box or tag counts as an answer.
    A think block that is not closed is `truncated` however the reply ended. Raises UserError for documents and chats.
    """
    if kind not in QUESTION_KINDS:
        raise UserError(f"a {kind} has no gold answer to read a reply for; kinds are {', '.join(QUESTION_KINDS)}")
    text = after_thinking(reply)
    if text is None:
        return TRUNCATED
    text = _visible(text)
    missing = UNPARSED if finished else TRUNCATED
    if "\\boxed" in text:
        value = _resolve(last_boxed(text) or "", kind, options)
    elif "<answer>" in text or "</answer>" in text:
        value = _resolve(_only_tag(text) or "", kind, options)
    elif not finished:
        return TRUNCATED
    else:
        declared = _declarations(text)
        value = _agreed(declared, kind, options) if declared else _resolve(text, kind, options)
    return Parsed(value, "ok") if value is not None else missing


def matches(parsed: Parsed, sample: Question) -> bool:
    """Whether the reply answers as the gold answer does."""
    return parsed.status == "ok" and parsed.value == gold_value(sample)


def gold_value(sample: Question) -> str:
    """The sample's gold answer in the form that `parse_answer` gives."""
    return sample.answer if sample.kind in ("yes_no", "choice") else normalize(sample.answer)


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


_NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
)
_NUMBERS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS.split())}


def normalize(text: str) -> str:
    """Text as it is compared: exact match but for what carries no meaning in a short medical answer.

    Unicode NFKC and case; LaTeX and Markdown dress; punctuation as a blank, except where it changes the meaning
    (1.5, -5, 1/2, 80%, T2*, Crohn's); thousands commas; numbers up to twenty as digits; one article at the start
    (only there: "hepatitis A" is not "hepatitis"); runs of blanks.
    """
    text = _plain(_visible(text)).casefold()
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = "".join(char if _has_meaning(text, i) else " " for i, char in enumerate(text))
    words = [_NUMBERS.get(word, word) for word in text.split()]
    if len(words) > 1 and words[0] in ("a", "an", "the"):
        words = words[1:]
    return " ".join(words)


def _has_meaning(text: str, i: int) -> bool:
    """False for blanks, control characters, and punctuation that a short answer could do without."""
    char = text[i]
    if char in "%*" or not unicodedata.category(char).startswith(("P", "Z", "C")):
        return True
    before, after = text[max(i - 1, 0) : i], text[i + 1 : i + 2]
    if char == ".":
        return after.isdigit() and not before.isalpha()
    if char == "-":
        return after.isdigit() and not before.isalnum()
    if char == "/":
        return before.isdigit() and after.isdigit()
    return char == "'" and before.isalpha() and after.isalpha()


_SAME_SIGNS = str.maketrans({"‘": "'", "’": "'", "−": "-"})
_LATEX = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox)\s*\{([^{}]*)\}")
_NESTING = 3
"""How deep LaTeX is unwrapped; without a bound a hostile reply takes quadratic time."""
_MARKUP = re.compile(r"\\[()\[\]]|[$`]|\*\*")
_ITALIC = re.compile(r"(?<!\w)\*(?=\S)([^*\n]+)\*(?!\w)")


def _visible(text: str) -> str:
    """NFKC (full-width letters and brackets become plain), without zero-width and other format characters."""
    text = unicodedata.normalize("NFKC", text).translate(_SAME_SIGNS)
    return "".join(char for char in text if unicodedata.category(char) != "Cf")


def _plain(text: str) -> str:
    """Without the dress of LaTeX and Markdown: `\\text{A}`, `$A$`, `**A**` are A."""
    for _ in range(_NESTING):
        text = _LATEX.sub(r"\1", text)
    return _ITALIC.sub(r"\1", _MARKUP.sub("", text))


def _only_tag(text: str) -> str | None:
    """Content of the answer tag where there is exactly one."""
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    _, _, rest = text.partition("<answer>")
    content, closing, _ = rest.partition("</answer>")
    return content if closing else None


_DECLARATION = re.compile(
    r"(?:\bthe\s+)?(?P<final>\bfinal\s+)?"
    r"\b(?:answer|(?:correct|right|best)\s+(?:answer|option|choice))\s*(?:\bis\b\s*:?|:)\s*"
    r"|(?P<zh_final>最终)?答案\s*(?:[是为]\s*:?|:)\s*",
    re.IGNORECASE,
)


def _declarations(text: str) -> list[str]:
    """What stands after each declaration, to the end of its line or the next one; final answers alone where any."""
    text = _plain(text)
    found = list(_DECLARATION.finditer(text))
    ends = [match.start() for match in found[1:]] + [len(text)]
    final = any(match["final"] or match["zh_final"] for match in found)
    return [
        text[match.end() : end].partition("\n")[0]
        for match, end in zip(found, ends, strict=False)  # no declaration, no end
        if not final or match["final"] or match["zh_final"]
    ]


def _agreed(declared: list[str], kind: Kind, options: Sequence[str]) -> str | None:
    """The one value that all declarations have."""
    values = {_declared_value(line, kind, options) for line in set(declared)}
    return values.pop() if len(values) == 1 else None


def _declared_value(line: str, kind: Kind, options: Sequence[str]) -> str | None:
    """The whole line as an answer, else its first sentence, unless the rest of the line answers otherwise."""
    value = _resolve(line, kind, options)
    if value is not None:
        return value
    sentence, *rest = re.split(r"\.\s|。", line, maxsplit=1)
    value = _resolve(sentence, kind, options)
    return value if _resolve("".join(rest), kind, options) in (None, value) else None


def _resolve(text: str, kind: Kind, options: Sequence[str]) -> str | None:
    """`text` as one answer of the kind, or None."""
    text = _plain(text).strip()
    if kind == "choice":
        return _choice(text, options)
    if kind == "yes_no":
        return _yes_no(text)
    return normalize(text) or None


_LETTER = re.compile(
    r"(?:(?:option|choice|选项)\s*)?(?:\((?P<round>[a-z])\)|\[(?P<square>[a-z])\]|(?P<bare>[a-z]))"
    r"(?:\s*[.):,。、]\s*(?P<text>.*)|(?<=[)\]])\s*(?P<after>.*))?",
    re.IGNORECASE | re.DOTALL,
)


def _choice(text: str, options: Sequence[str]) -> str | None:
    """A letter, a letter with its own option's text, or the text of exactly one option."""
    letters = LETTERS[: len(options)]
    texts = [normalize(option) for option in options]
    match = _LETTER.fullmatch(text)
    letter = (match["round"] or match["square"] or match["bare"]).upper() if match else ""
    if match and letter in letters:
        rest = normalize(match["text"] or match["after"] or "")
        if not rest or rest == texts[letters.index(letter)]:
            return letter
    meant = normalize(text)
    named = [letter for letter, option in zip(letters, texts, strict=True) if option and option == meant]
    return named[0] if len(named) == 1 else None


_YES_NO = re.compile(
    r"(yes|no)\b(?:\s*$|\s*[.,;:!—–]+\s*|\s+-+\s+|\s+(?=(?:it|there|this|that|they)\b))", re.IGNORECASE
)
_CHINESE_YES_NO = {"是": "yes", "是的": "yes", "否": "no", "不是": "no"}


def _yes_no(text: str) -> str | None:
    """Yes or no as the first word, on its own or before an explanation that does not take it back.

    "No fracture is seen" is no answer: whether it means yes or no depends on the question.
    """
    text = text.strip(" \t\n\"'([{)]}.!。")
    if text in _CHINESE_YES_NO:
        return _CHINESE_YES_NO[text]
    match = _YES_NO.match(text)
    if match is None:
        return None
    value, rest = match[1].lower(), text[match.end() :]
    other = r"\byes\b" if value == "no" else r"^no\b|\bno\b(?=\s*(?:[.,;:!?]|$))"
    return None if re.search(other, rest, re.IGNORECASE) else value

"""How text is read as one answer of a question's kind."""

from __future__ import annotations

import re
from collections.abc import Iterable

from infimed_jax.data.prompts import LETTERS
from infimed_jax.data.sample import Kind
from infimed_jax.evaluation.phrases import bare, explains, hedges, without_lead, without_reason
from infimed_jax.evaluation.text import normalize, plain, visible


def agreed(values: Iterable[str | None]) -> str | None:
    """The one value that all have."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else None


class Reader:
    """Reads text as one answer of a kind."""

    def __init__(self, options: tuple[str, ...], language: str) -> None:
        self.options, self.language = options, language

    def exact(self, text: str) -> str | None:
        """All of the text as one answer, or None."""
        raise NotImplementedError

    def sentence(self, text: str) -> str | None:
        """A line or a sentence as one answer, or None: the phrases around the answer may be left out."""
        text = without_lead(text)
        value = self.exact(text)
        return value if value is not None else self.exact(without_reason(text))

    def statements(self, text: str) -> list[str]:
        """Answers that sentences of the text declare."""
        return []

    def passage(self, text: str) -> str | None:
        """The text as one answer, else the answer that its first or last sentence gives beside an explanation."""
        if (value := self.sentence(text)) is not None:
            return value
        if hedges(text):
            return None
        sentences = [
            piece
            for line in text.split("\n")
            for piece in ([line] if self.sentence(line) is not None else _sentences(line))
        ]
        values = [self.sentence(sentence) for sentence in sentences]
        if not sentences or (values[0] is None and values[-1] is None):
            return None
        rest = (sentence for sentence, value in zip(sentences, values, strict=True) if value is None)
        return agreed(value for value in values if value is not None) if all(map(_is_prose, rest)) else None


def _is_prose(sentence: str) -> bool:
    return len(sentence.split()) > 4 or explains(sentence)


def _sentences(text: str) -> list[str]:
    return [piece for piece in re.split(r"\n|(?<=[.!?])\s|(?<=[。！？])", text) if normalize(piece)]


class _TextReader(Reader):
    def exact(self, text: str) -> str | None:
        return open_text(text) or None

    def passage(self, text: str) -> str | None:
        """The first sentence where all others explain it; otherwise all of the text."""
        first, *rest = _sentences(text) or [""]
        return self.exact(without_reason(first) if rest and all(map(explains, rest)) else text)


def open_text(text: str) -> str:
    """An open answer as it is compared."""
    return normalize(bare(plain(visible(text)))) or normalize(text)


_LETTER = re.compile(
    r"(?:(?:option|choice|选项|[我应故]?选择?)\s?)?"
    r"(?:\((?P<round>[a-z])\)|\[(?P<square>[a-z])\]|(?P<bare>[a-z]))"
    r"(?:(?:\s?[.):,。、]| [–—-] )\s?(?P<text>.*)|(?<=[)\]])\s?(?P<after>.*))?",
    re.IGNORECASE | re.DOTALL,
)
_STATED_LETTER = re.compile(
    r"(?:^|(?<=[.!?:;,]\s)|(?<=\n)|\b(?i:so|thus|hence|therefore|option|choice)\s)"
    r"(?i:option\s|choice\s)?\(?(?P<letter>[A-Z])[.)]*(?:\s\(?(?P<text>[^.\n]{1,200}?)\)?)?\s(?:is|would be|seems)\s"
    r"(?:therefore\s|thus\s|clearly\s)?(?:the\s)?(?:single\s)?(?:most\s)?"
    r"(?:correct|right|best|likely|appropriate|accurate|suitable)(?:\s(?:answer|option|choice|one))?\b"
)
_PRESENTING = (
    "is are was were be shows show depicts depict demonstrates demonstrate displays suggests suggest indicates "
    "indicate reveals reveal represents represent supports support fits favors favours"
)
_PRESENTS = frozenset(_PRESENTING.split())
_PRESENTS_IN_TWO = ("consistent with", "compatible with", "diagnosis of", "suggestive of", "indicative of")
_DENYING = (
    "not no never neither nor unlikely without cannot wrong incorrect excludes exclude excluded except least false if "
    "whether could may might or than instead isn't aren't wasn't doesn't don't"
)
_DENIES = frozenset(_DENYING.split())


class _ChoiceReader(Reader):
    def __init__(self, options: tuple[str, ...], language: str) -> None:
        super().__init__(options, language)
        self.letters, self.texts = LETTERS[: len(options)], [normalize(option) for option in options]

    def exact(self, text: str) -> str | None:
        """A letter, a letter with its own option's text, or the text of exactly one option."""
        text = plain(text).strip(" \n\"'“”!")
        match = _LETTER.fullmatch(text)
        letter = (match["round"] or match["square"] or match["bare"]).upper() if match else ""
        if match and letter in self.letters:
            rest = normalize(match["text"] or match["after"] or "")
            if not rest or rest == self.texts[self.letters.index(letter)]:
                return letter
        return self._named(normalize(text))

    def _named(self, text: str) -> str | None:
        named = [letter for letter, option in zip(self.letters, self.texts, strict=True) if option and option == text]
        return named[0] if len(named) == 1 else None

    def sentence(self, text: str) -> str | None:
        """Also "The image shows X" and "the most likely cause is X", where X is one option's text."""
        value = super().sentence(text)
        return self._presented(normalize(text)) if value is None and len(_sentences(text)) == 1 else value

    def _presented(self, text: str) -> str | None:
        named = []
        for letter, option in zip(self.letters, self.texts, strict=True):
            before = text.removesuffix(f" {option}") if option else text
            for article in (" a", " an", " the"):
                before = before.removesuffix(article) if before != text else before
            *_, last = before.split() or [""]
            presented = last in _PRESENTS or before.endswith(_PRESENTS_IN_TWO)
            if before != text and presented and not _DENIES.intersection(before.split()):
                named.append(letter)
        return named[0] if len(named) == 1 else None

    def statements(self, text: str) -> list[str]:
        found = _STATED_LETTER.finditer(text)
        stated = [match["letter"] + (f". {match['text']}" if match["text"] else "") for match in found]
        return [answer for answer in stated if self.exact(answer)]  # "A lesion is most likely" states none


_YES_NO = re.compile(
    r"(yes|no)\b(?:\s*$|\s*[.,;:!—–]+\s*|\s+-+\s+|\s+(?=(?:it|there|this|that|they)\b))", re.IGNORECASE
)
_CHINESE_YES_NO = {"是": "yes", "是的": "yes", "否": "no", "不是": "no"}
_IN_CHINESE = _CHINESE_YES_NO | {
    "对": "yes", "对的": "yes", "有": "yes", "有的": "yes", "存在": "yes", "可以": "yes", "正确": "yes", "能": "yes",
    "不对": "no", "没有": "no", "无": "no", "不存在": "no", "不可以": "no", "不正确": "no", "不能": "no", "不": "no",
}  # fmt: skip
"""Words that answer a question in Chinese; in another language's question they are no answer of their own."""
_EXISTENCE = re.compile(
    r"there(?:'s| is| are)\s(?P<no>no\s|not\sany\s)?(?:\w+\s){0,2}?(?:evidence|signs?|indications?|suggestion)\sof\s"
    r"(?:this|that|it)\b(?P<rest>.*)",
    re.IGNORECASE | re.DOTALL,
)


class _YesNoReader(Reader):
    def exact(self, text: str) -> str | None:
        """Yes or no as the first word, on its own or before an explanation that does not take it back.

        "No fracture is seen" is no answer: whether it means yes or no depends on the question. "There is no evidence of
        this" is one, for "this" is what was asked about.
        """
        text = plain(text).strip(" \t\n\"'([{)]}.!。！")
        if hedges(text):
            return None
        if (chinese := self._chinese(text)) is not None:
            return chinese
        if existence := _EXISTENCE.fullmatch(text):
            return None if re.search(r"\b(?:yes|no|but)\b", existence["rest"]) else "no" if existence["no"] else "yes"
        match = _YES_NO.match(text)
        if match is None:
            return None
        value, rest = match[1].lower(), text[match.end() :]
        other = r"\byes\b" if value == "no" else r"^no\b|\bno\b(?=\s*(?:[.,;:!?]|$))"
        return None if re.search(other, rest, re.IGNORECASE) else value

    def _chinese(self, text: str) -> str | None:
        """The first clause as one of the words, where no later one begins with the other."""
        words = _IN_CHINESE if self.language == "zh" else _CHINESE_YES_NO
        first, *rest = re.split(r"[,，。;；:：!！\s]+", text)
        if (value := words.get(first)) is None:
            return None
        other = ("没", "无", "未", "不", "否") if value == "yes" else ("有", "是", "存在")
        return None if any(clause.startswith(other) for clause in rest) else value


READERS: dict[Kind, type[Reader]] = {
    "choice": _ChoiceReader,
    "yes_no": _YesNoReader,
    "closed": _TextReader,
    "open": _TextReader,
}

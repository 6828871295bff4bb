"""Leaving out what should not be learnt: poor sources, refusals, empty or repeating text, tiny images, languages.

Everything that goes is counted by reason and listed by id; no text of a sample is written to a report or a log.
"""

from __future__ import annotations

import io
import re
import zlib
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from data_prep.engine import HERE, Engine
from data_prep.reading.rows import read_json
from data_prep.reading.words import script_language
from data_prep.steps.step import (
    MAX_BAD_RECORDS,
    Slice,
    Step,
    choose_kept,
    derived,
    make_dataset,
    removed_report,
    slices,
)
from infimed_jax.data.images import FORMATS
from infimed_jax.data.prompts import as_turns
from infimed_jax.data.sample import Question, Sample
from infimed_jax.data.storage import open_samples
from infimed_jax.errors import UserError
from infimed_jax.progress import Report

VERSION = 3
"""Version of the rules; raise it when they change, so that datasets are filtered again."""
SOURCE_EXCLUDED = "source excluded by the assessment"
REFUSAL = "refusal"
EMPTY = "empty text"
DEGENERATE = "degenerate text"
REPEATED = "repeating text"
SMALL_IMAGE = "image too small"
LANGUAGE = "language"

_SORRY = r"(?:(?:i(?:'m| am)|we(?:'re| are)) (?:very |so |really |truly )?sorry|sorry|i apologi[sz]e|my apologies)"
_ALAS = r"(?:unfortunately|i(?:'m| am) afraid|i regret)"
_THEN = r"[^.!?]{0,40}?(?:[.!]\s*[^.!?]{0,20}?)?\b"
"""Words between an apology and what is refused, which may begin the next sentence."""
_CANNOT = (
    r"(?:i|we)(?:'m| am|'re| are)? (?:can ?not|can't|could not|couldn't|(?:not able|unable|not allowed) to|"
    r"won't be able to|will not|(?:do not|don't) have)"
)
_IMAGE = (
    r"(?:the |this |that |your |any |these |those |an? )?(?:(?:actual|attached|medical|provided|specific|uploaded) )*"
    r"(?:images?|pictures?|photos?|photographs?|files?|attachments?)\b"
)
_OBJECT = rf"(?:{_IMAGE}|(?:it|this|that)(?=[.,;!]|$)|(?:the |this )?(?:person|people|individual)s?\b)"
_DEED = (
    r"(?:(?:help|assist|answer|provide|fulfil|comply|respond|do that|offer|the (?:ability|capability))\b|"
    rf"access (?:to )?{_IMAGE}|give (?:you|any|medical)\b|make (?:an? |any )?(?:medical )?diagnos[ei]s\b|"
    rf"(?:directly )?(?:process|identify|view|see|analy[sz]e|interpret|diagnose|read|recogni[sz]e|open)"
    rf"(?: or (?:process|view|see|analy[sz]e|interpret))? {_OBJECT}|"
    rf"[^.!?]{{1,60}}? without (?:access to |seeing |viewing )?{_IMAGE})"
)
"""What is refused. A finding that cannot be seen, identified or excluded is an answer."""
_FINDING = (
    r"(?! (?:rule out|exclude|confirm|appreciate|detect|find|"
    rf"(?:see|identify|recogni[sz]e|make out) (?!(?:directly )?{_OBJECT})))"
)
_AI = r"(?:[\w-]+ ){0,2}(?:ai|artificial intelligence|language model)\b(?!-)"
"""One who speaks; an AI-detected finding is a finding."""
_OF_ONESELF = (
    r"(?: (?:assistant|model|language|system|chatbot|bot|program|developed|trained|created|designed|without)\b"
    r"(?: [\w-]+){0,6}?)?"
    r"(?:[,;:]? (?:i|we|my)\b|[,;:] [^.!?]{0,80}\b(?:cannot|can't|unable|not (?:able|possible)|beyond my)\b)"
)
_REFUSALS = re.compile(
    "|".join(
        (
            rf"^{_SORRY}\b{_THEN}{_CANNOT}{_FINDING}",
            rf"^{_SORRY}\b[^.!?]{{0,60}}\b(?:as an ai|language model|(?:do not|don't) have enough information)\b",
            rf"^{_ALAS}\b{_THEN}{_CANNOT} {_DEED}",
            rf"^{_CANNOT} {_DEED}",
            r"^it is not possible for me to\b",
            r"^(?:i|we) (?:must|have to) (?:respectfully )?decline\b",
            rf"^as an? {_AI}{_OF_ONESELF}",
            rf"^i(?:'m| am) (?:just |only |merely )?an? {_AI}",
            r"^(?:很|非常|十分)?(?:抱歉|对不起|對不起|遗憾)[,，。!！:： ]*(?:但|我|作为|由于|无法|不能)",
            r"^(?:我|作为(?:一个|一名)?(?:ai|人工智能)[^。]{0,20})(?:无法|不能|無法)(?:回答|提供|协助|帮助|查看|处理|识别|看到)",
            r"^作为(?:一个|一名|一款)?(?:ai|人工智能|语言模型|大模型)(?:语言模型|模型|助手|系统|程序)?[,，、。:： ]*"
            r"(?:我|本(?:人|模型|系统|助手)|无法|不能|没有)",
            rf"^(?:lo siento|lo lamento|perdón)\b{_THEN}no (?:puedo|podemos)\b",
            rf"^(?:désolée?|je suis désolée?|je regrette)\b{_THEN}je ne (?:peux|puis|suis pas en mesure)\b",
            rf"^(?:es tut mir leid|tut mir leid|entschuldigung|leider)\b{_THEN}(?:kann ich|ich kann)\b"
            r"[^.!?]{0,40}\b(?:nicht|keine?)\b",
            rf"^(?:desculpe|sinto muito|lamento)\b{_THEN}não (?:posso|consigo)\b",
            rf"^(?:mi dispiace|spiacente)\b{_THEN}non posso\b",
            rf"^(?:извините|простите|к сожалению)\b{_THEN}не (?:могу|можем)\b",
            r"^(?:申し訳|すみません|ごめんなさい)[^。]{0,40}(?:。[^。]{0,30})?(?:できません|できない)",
            r"^(?:죄송|미안)[^.]{0,40}(?:없습니다|수 없|어렵습니다)",
            r"^(?:죄송|미안)[^.]{0,20}\.[^.]{0,30}(?:ㄹ|을|를|드릴|할|볼) 수 없",
            r"^(?:عذرا|عذرًا|آسف|أعتذر)[^.]{0,40}(?:لا أستطيع|لا يمكنني)",
            r"^(?:como (?:un )?modelo de lenguaje|en tant que modèle de langage|als sprachmodell)\b",
        )
    ),
    re.IGNORECASE,
)
_ANSWERS_YET = re.compile(
    r"\b(?:but|however|although|though|nevertheless|nonetheless|yet)\b,? "
    r"(?!(?:please|you|if)\b|(?:i|we) (?!(?:can |do |would )?(?:see|note|observe|favou?r|suspect)\b))[^.!?]{0,200}?"
    r"\b(?:suggest(?:s|ive)?|shows?|appears?|indicates?|demonstrates?|reveals?|favou?rs?|looks?|likely|measures?|"
    r"represents?|(?:consistent|compatible) with|there (?:is|are) (?:an?|no|some|multiple|several)|see|note|observe|"
    r"suspect)\b"
    r"|(?:但|不过|然而)[^。！？]{0,60}(?:提示|显示|可见|考虑|符合|表现为|倾向)",
    re.IGNORECASE,
)
"""The turn from what cannot be done to a finding."""
_WORDS = re.compile(r"\w+")
_REPEATS = 5
"""Times that a run of words comes back to back before the text counts as repeating."""
_RUN = re.compile(r"(.{1,60}?)\1{9,}", re.DOTALL)
_CODE, _LONGEST_CODE = re.compile(r"[A-Za-z0-9._:/-]+|[0-9\s.,;|/-]+"), 64
"""Numbers, rows of them, identifiers and sequences repeat by chance or by nature; a DICOM UID has 64 characters."""
_SHORT, _LONG, _PLAIN = 80, 400, 1.9
"""Bytes below which text is not compressed, bytes from which its compression counts, and prose's own compression."""
_REPLACED = "\ufffd"


@dataclass(frozen=True)
class Rules:
    """What stays. Defaults leave out what no stage can use."""

    refusals: bool = True
    """Leave out samples with a refusing reply."""
    min_image_side: int = 28
    """Smallest allowed shorter side of an image, pixels; the default is two patches of the encoder."""
    max_compression: float = 12.0
    """Long text that zlib shrinks more than this says the same over and over; English prose gives 2 to 3."""
    languages: tuple[str, ...] = ()
    """Codes to keep; () keeps all. `meta["language"]` where there is one, else by script: Latin letters are `en`."""
    excluded: tuple[str, ...] = ()
    """Sources to leave out, as the assessment decides."""
    kept: tuple[str, ...] = ()
    """Sources that the assessment keeps."""

    def __post_init__(self) -> None:
        if self.min_image_side < 0 or self.max_compression <= 1:
            raise UserError("min_image_side must not be negative, and max_compression must be above 1")


def assessed_sources(report: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The sources that an assessment excludes, and those that it keeps.

    From `{"sources": {NAME: {"keep": bool, "reason": str}}}`.
    """
    sources = read_json(report, dict).get("sources")
    if not isinstance(sources, dict) or not all(
        isinstance(entry, dict) and isinstance(entry.get("keep"), bool) for entry in sources.values()
    ):
        raise UserError(f'{report} is no assessment: it needs "sources", and for each source "keep": true or false')
    excluded, kept = (tuple(sorted(name for name in sources if sources[name]["keep"] is k)) for k in (False, True))
    return excluded, kept


def why_left_out(sample: Sample, rules: Rules) -> str:
    """The first reason against a sample, or the empty string."""
    if sample.source in rules.excluded:
        return SOURCE_EXCLUDED
    turns = as_turns(sample)
    replies = [turn.text for turn in turns if turn.role in ("assistant", "document")]
    if not replies or not all(reply.strip() for reply in replies):
        return EMPTY
    if rules.refusals and any(is_refusal(reply) for reply in replies):
        return REFUSAL
    whole = [turn.text + "\n" + turn.reasoning for turn in turns]
    if not isinstance(sample, Question) and any(is_degenerate(reply) for reply in replies):
        return DEGENERATE
    if any(is_repeating(part, rules.max_compression) for part in whole):
        return REPEATED
    if rules.languages and language(sample, " ".join(whole)) not in rules.languages:
        return LANGUAGE
    if any(shorter_side(image) < rules.min_image_side for image in sample.images):
        return SMALL_IMAGE
    return ""


def is_refusal(reply: str) -> bool:
    """Whether a reply begins as a refusal and gives no finding after it; that something cannot be seen is none."""
    plain = reply.strip().lstrip("\"'*# ").replace("\u2019", "'")
    found = _REFUSALS.match(plain)
    return found is not None and _ANSWERS_YET.search(plain, found.end()) is None


def is_degenerate(reply: str) -> bool:
    """Whether hardly anything of it is text: no letter or digit, broken encoding, or mostly signs."""
    letters = sum(map(len, _WORDS.findall(reply)))
    visible = sum(not c.isspace() for c in reply)
    return letters == 0 or reply.count(_REPLACED) * 20 > visible or letters * 3 < visible


def is_repeating(part: str, max_compression: float) -> bool:
    """Whether some words, or one pattern of characters, come back to back, or the whole shrinks too well."""
    raw = part.encode()
    ratio = len(raw) / len(zlib.compress(raw, 1)) if len(raw) >= _SHORT else 1.0
    if len(raw) >= _SHORT and ratio < _PLAIN:
        return False  # nearly all text: spare it the slower looks
    if len(raw) >= _LONG and ratio > max_compression:
        return True
    words = _WORDS.findall(part.lower())
    for size in range(1, 9):
        same = 0
        for at in range(size, len(words)):
            same = same + 1 if words[at] == words[at - size] else 0
            if same >= size * (_REPEATS - 1) and not all(word.isdigit() for word in words[at - size + 1 : at + 1]):
                return True
    return any(
        any(c.isalnum() for c in found[1]) and (len(found[0]) > _LONGEST_CODE or not _CODE.fullmatch(found[0]))
        for found in _RUN.finditer(part[:4000])
    )


def language(sample: Sample, whole: str) -> str:
    """`meta["language"]`, or the script that most letters have; "" where there are none."""
    return sample.meta.get("language") or script_language(whole)


def shorter_side(image: bytes) -> int:
    """In pixels, from the header."""
    try:
        return min(Image.open(io.BytesIO(image), formats=FORMATS).size)
    except Exception:  # what cannot be opened has no side: the loader's matter, and counted there
        return 0


def filter_dataset(
    input: Path,
    output: Path,
    rules: Rules,
    *,
    engine: Engine = HERE,
    max_bad_records: float = MAX_BAD_RECORDS,
    on_progress: Report | None = None,
) -> dict[str, Any]:
    """Write a view of what stays of `input` to `output`, and `output.json`, returned too. UserError: nothing stays.

    Sources on which an assessment decided nothing stay, and are named as `not_assessed`.
    """
    samples = open_samples(input)
    assessed = {*rules.excluded, *rules.kept}
    sources = sorted({origin.partition("/")[0] for origin in samples.manifest["origins"]})
    not_assessed = [source for source in sources if assessed and source not in assessed]
    recipe = {"version": VERSION, "input": samples.fingerprint, "rules": asdict(rules)}
    recipe["rules"] = {key: list(v) if isinstance(v, tuple) else v for key, v in recipe["rules"].items()}
    return make_dataset(
        Step(
            output,
            name=samples.name,
            recipe=recipe,
            info=derived(samples),
            view_of=[samples],
            work=partial(_filter_slice, rules),
            pieces=slices(samples),
            report=lambda _, facts: (
                {"input": str(input), "rules": recipe["rules"], "not_assessed": not_assessed} | removed_report(facts)
            ),
            records=len(samples),
            max_bad_records=max_bad_records,
        ),
        engine,
        on_progress,
    )


def _filter_slice(rules: Rules, piece: Slice, folder: Path, name: str) -> dict[str, Any]:
    return choose_kept(piece, folder, name, lambda sample: why_left_out(sample, rules))

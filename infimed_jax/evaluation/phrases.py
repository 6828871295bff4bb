"""Phrases around an answer that carry no answer, in English and Chinese, and phrases that take an answer back.

Each is a closed list. What is not in it stays part of the answer: a rule that cut a reply at its first comma would
accept "lung, as seen in the image", and would pay for "lung, liver" too.
"""

from __future__ import annotations

import re

_IMAGE = r"(?:image|picture|photo(?:graph)?|figure|scan|film|slice|radiograph|x-?ray|ct|mri|mr|view)s?"

_LEAD = re.compile(
    r"(?:(?:so|thus|hence|therefore|overall|in (?:conclusion|short|summary)|to (?:conclude|summari[sz]e)|finally"
    rf"|(?:based on|according to|judging (?:by|from)|from|in|on) (?:the|this) (?:\w+ ){{0,2}}{_IMAGE})\b\s*,?\s+"
    r"|(?:因此|所以|综上|综上所述|总之|如[上下]?图所示|根据(?:图像|图片|影像|该图|此图)|(?:图|图像|图片|影像)(?:中|上))[,，:：\s]*)+",
    re.IGNORECASE,
)
_STATEMENT = re.compile(
    rf"(?:(?:this|that|it|these|those)(?:\s+(?:is|are)|'s)|(?:the|this)\s+(?:\w+\s+)?{_IMAGE}\s+(?:clearly\s+)?"
    r"(?:shows?|depicts?|demonstrates?|displays?|reveals?|is|are)|(?:i|we)(?:\s+can)?\s+see)\s+"
    r"|(?:(?:该|此|这张|本)?(?:图|图像|图片|影像)(?:中|上)?)?(?:显示|所示|展示)(?:了|的是|为)?[:：\s]*"
    r"|(?:这|此处|该部位)?是(?!的)\s*",
    re.IGNORECASE,
)
_SEEN = (
    "as see seen visible shown depicted demonstrated evident noted observed indicated present located found in on at "
    "from within"
)
_WHERE = (
    "can could be is are was clearly well best also of by the this that these above below provided given attached "
    "upper lower left right top bottom middle central center centre part half side region area portion corner quadrant"
)
_TAIL = re.compile(
    rf"(?:[,;(\[]| [–—-])\s*(?:(?:{'|'.join(_WHERE.split())})\s)*(?:{'|'.join(_SEEN.split())})\s"
    rf"(?:(?:{'|'.join((_SEEN + ' ' + _WHERE).split())})\s)*{_IMAGE}\s?[)\]]?\s?[.!]?$"
    r"|[,，(（]\s?(?:如|见|在)?(?:图|图像|图片|影像)(?:中|上)?(?:所示|可见)?\s?[)）]?[.。]?$",
    re.IGNORECASE,
)
_BECAUSE = re.compile(r",?\sbecause\b|[,，]?因为", re.IGNORECASE)
_REASON = re.compile(r",?\s(?:because|since|as it|as the|due to|given that)\b|[,，]?因为", re.IGNORECASE)

_SEES = (
    rf"(?:see|view|open|access|have|find)\s+(?:access to\s+)?(?:(?:the|this|that|an?|any|your)\s+(?:\w+\s+)?{_IMAGE}\b"
    r"|(?:\w+\s+)?(?:images|pictures|photos|scans)\b)"
)
_REFUSAL = re.compile(
    r"\bas an? (?:ai|artificial|(?:large )?language)\b"
    r"|\b(?:i'?m|i am|we are|my apologies|apologies)\b.{0,12}\b(?:sorry|unable|not able|not qualified)\b|\bsorry\b"
    r"|\b(?:i|we)\s+(?:can ?not|can't|could not|couldn't|am unable to|'m unable to|do not|don't|won't|will not)\s+"
    r"(?:\w+\s+){0,2}?(?:interpret|answer|assist|help|diagnose|analy[sz]e|provide|comment|know|assess|evaluate"
    rf"|{_SEES})"
    rf"|\b(?:unable|not able) to (?:interpret|answer|assist|help|diagnose|analy[sz]e|provide|comment|{_SEES})"
    rf"|\bno {_IMAGE} (?:(?:is|was|has been|were) )?(?:provided|attached|given|visible|shown|available)"
    r"|\b(?:please|you should|i recommend(?: that you)?)\s+consult"
    r"|抱歉|对不起|作为(?:一个|一名)?\s*(?:ai|人工智能|语言模型)"
    r"|(?:无法|不能|没法)(?:解读|查看|看到图|看见图|回答|分析|提供|打开|诊断|识别|访问)|看不到图|看不见图",
    re.IGNORECASE,
)
_HEDGE = re.compile(
    r"\b(?:it|that|this|which|answer) depends\b|\b(?:maybe|perhaps|inconclusive|indeterminate)\b"
    r"|\beither(?: (?:one|way))?(?=[.,;!?)]|$)|\b(?:it|this|that|answer|image|picture) (?:is|was|remains|seems) "
    r"(?:\w+ )?(?:unclear|uncertain|ambiguous)\b|\b(?:not|un)[ -]?(?:\w+ )?(?:sure|certain)\b|^unclear\b"
    r"|\b(?:can ?not|can't|could not|couldn't|hard to|difficult to|impossible to|not possible to|unable to) (?:be )?"
    r"(?:sure|certain|determined?|say|tell|know|decided?|judged?|excluded?|ruled out|rule out|confirm(?:ed)?)\b"
    r"|\bi (?:do not|don't) know\b|\bguess(?:ing)?\b|\balternatively\b"
    r"|不确定|不好说|难以(?:判断|确定)|无法(?:判断|确定|得知)|不清楚|不知道|视情况|取决于|也可能|或许|说不准",
    re.IGNORECASE,
)
_ADDS = re.compile(
    r"\b(?:or|also|as well|either|both|might|may|could|too|alternatively)\b|或|也|还|和|以及", re.IGNORECASE
)
"""Words by which a sentence adds to an answer."""
_VERB = re.compile(
    r"\b(?:is|are|was|were|has|have|had|shows?|depicts?|demonstrates?|displays?|reveals?|indicates?|suggests?"
    r"|supports?|explains?|confirms?|fits?|match(?:es)?|lies?|sits?|appears?|looks?|seems?|contains?|extends?|measures?"
    r"|causes?|produces?|occurs?|consists?|can|does|do)\b",
    re.IGNORECASE,
)
_OPENS = re.compile(
    r"\s*(?:the|this|that|these|those|it|its|there|here|an?|i|we|in|on|based|because|as|since|both|which|note|explanation"
    rf"|reason(?:ing)?|{_IMAGE})\b",
    re.IGNORECASE,
)
"""How a statement about the image begins, and one more answer does not."""


def refuses(text: str) -> bool:
    """Whether the text says that its writer does not answer, or has not seen the image."""
    return _REFUSAL.search(text) is not None


def hedges(text: str) -> bool:
    """Whether the text leaves open what the answer is."""
    return _HEDGE.search(text) is not None


def explains(sentence: str) -> bool:
    """Whether a sentence beside an answer is a statement, and neither one more answer nor an addition to it."""
    if _ADDS.search(sentence):
        return False
    if re.search(r"[\u4e00-\u9fff]", sentence):
        return len(sentence) > 5
    if not _OPENS.match(sentence):
        return False
    return len(sentence.split()) > 2 and _VERB.search(sentence) is not None


def without_lead(text: str) -> str:
    """Without "so,", "based on the image,", 根据图像 at the start."""
    return text[lead.end() :] if (lead := _LEAD.match(text)) else text


def without_reason(text: str) -> str:
    """Without ", because …" at the end."""
    reason = _REASON.search(text)
    return text[: reason.start()] if reason and reason.start() else text


def bare(text: str) -> str:
    """An open answer without the phrases that present it: "The image shows X", "X, as seen in the image", 图中显示X."""
    text = without_lead(text.strip())
    text = text[: because.start()] if (because := _BECAUSE.search(text)) and because.start() else text
    if statement := _STATEMENT.match(text):
        text = text[statement.end() :]
    if (tail := _TAIL.search(text)) and tail.start():
        text = text[: tail.start()]
    return text

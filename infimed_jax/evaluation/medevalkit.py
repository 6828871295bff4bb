"""MedEvalKit's rules, so that scores can stand beside published ones: its first release, and its current one with
closed questions by rule, as the InfiMed authors ran it.

Without a judge, open questions are scored by exact match there, and the verdict's `rule` says so.

Its quirks are kept on purpose: "normal" contains "no" and reads as no; "yes, a nodule" contains both and is wrong; an
unreadable reply to a choice becomes the most similar option, an empty one A; closed answers are not stripped of blanks;
thoughts and cut replies are read like any other text. Not repeated are its mistakes in counting (judged questions
counted twice, or never).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher

from infimed_jax.data.prompts import LETTERS
from infimed_jax.data.sample import Question
from infimed_jax.evaluation.answers import Status
from infimed_jax.evaluation.benchmark import Benchmark, Verdict


def grade_fixed(sample: Question, reply: str, finished: bool, benchmark: Benchmark) -> Verdict:
    """The current release with closed questions by rule."""
    kind = benchmark.medevalkit_kind(sample)
    if kind == "choice":
        return _judge_choice(sample, _choice_text(reply, benchmark), finished, benchmark)
    read = _parse(_first_extraction(reply, benchmark))
    if kind == "yes_no":
        value = _only_one_of(("yes", "no"), _without_stops(read))
        return _verdict(value == sample.answer, value, finished, "yes or no as a substring")
    if kind == "closed":
        read = _without_stops(read)
        return _verdict(read == sample.answer.lower(), read, finished, "closed, equal text")
    return _verdict(read == sample.answer.lower(), read, finished, "open, exact match without a judge")


def grade_first(sample: Question, reply: str, finished: bool, benchmark: Benchmark) -> Verdict:
    """The first release: yes/no by the text before the first full stop, SLAKE like open questions, and a choice's box
    or tag before its paragraphs."""
    kind = benchmark.medevalkit_kind(sample)
    if kind == "choice":
        return _judge_choice(sample, _box_or_tag(_choice_text(reply, benchmark)), finished, benchmark)
    text = _first_extraction(reply, benchmark)
    if kind == "yes_no":
        read = text.partition(".")[0]
        return _verdict(read == sample.answer, read, finished, "yes or no before the first full stop")
    read = _parse(text)
    return _verdict(read == sample.answer.lower(), read, finished, f"{kind}, exact match without a judge")


def boxed(text: str) -> str | None:
    """Content of the last `\\boxed{}`, stripped; unlike the strict grammar's, the brace must follow at once.

    The harness's helper writes "None" where there is no box, so a box with that text counts as none.
    """
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for end in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            content = text[start + len("\\boxed{") : end].strip()
            return None if content == "None" else content
    return None


def tagged(text: str) -> str:
    """All closed answer tags' contents, joined by blanks; the text itself where there is none."""
    return " ".join(_tags(text)).strip() or text


def _tags(text: str) -> Iterator[str]:
    """Contents from an opening tag to the next closing one, in time linear in the text."""
    end = 0
    while (start := text.find("<answer>", end)) >= 0 and (end := text.find("</answer>", start)) >= 0:
        yield text[start + len("<answer>") : end]


def _verdict(correct: bool, parsed: str | None, finished: bool, rule: str) -> Verdict:
    status: Status = "truncated" if not finished else "unparsed" if parsed is None else "ok"
    return Verdict(correct, status, parsed, rule)


def _first_extraction(reply: str, benchmark: Benchmark) -> str:
    """What MedEvalKit's VQA data sets do before the rule: box or tag, lower-case, and (but for SLAKE) strip."""
    box = boxed(reply)
    if box is not None:
        reply = box
    elif "<answer>" in reply:
        reply = tagged(reply)
    return reply.lower().strip() if benchmark.medevalkit_strips else reply.lower()


_MARKERS = (
    "**answer**:",
    "**answer**",
    "*answer*:",
    "**answer:**",
    "answer is",
    "answer:",
    "答案:",
    "final answer",
    "final answer is",
)


def _parse(reply: str) -> str:
    """MedEvalKit's reading of a reply: box, else tag, then the text after the last of each marker, in this order."""
    text = _box_or_tag(reply.lower())
    for marker in _MARKERS:
        text = text.split(marker)[-1]
    return text


def _box_or_tag(text: str) -> str:
    if "boxed" in text:
        box = boxed(text)
        return "None" if box is None else box  # its helper's word for no box
    return tagged(text) if "<answer>" in text else text


def _without_stops(text: str) -> str:
    return text.replace("\n", "").replace(".", "")


def _only_one_of(values: Sequence[str], text: str) -> str | None:
    found = [value for value in values if value in text]
    return found[0] if len(found) == 1 else None


def _choice_text(reply: str, benchmark: Benchmark) -> str:
    return (tagged(reply) if benchmark.medevalkit_tags and "<answer>" in reply else reply).lower()


def _judge_choice(sample: Question, text: str, finished: bool, benchmark: Benchmark) -> Verdict:
    """A bare letter, a letter before a full stop, an option as shown, else the most similar one of these."""
    options = [option.lower() for option in benchmark.shown(sample)]
    letters = LETTERS[: len(options)].lower()
    gold = letters.index(sample.answer.lower())
    paragraphs = text.split("\n\n")
    ending = paragraphs[-1].partition(".")[0]
    if _is_letter(paragraphs[0], letters):
        text = paragraphs[0]
    elif _is_letter(ending, letters):
        text = ending
    text = _parse(text).strip().lower().replace("\n", "")
    short = text.partition(".")[0].rpartition(":")[2]
    if _is_letter(short, letters):
        chosen, rule = letters.index(short), "choice by letter"
    elif short in options:
        chosen, rule = gold if short == options[gold] else options.index(short), "choice by text"
    else:
        chosen, rule = _most_similar(options, text), "choice by similarity"
    correct = chosen == gold or options[chosen] == letters[gold]  # an option that reads like the gold letter counts
    return _verdict(correct, letters[chosen].upper(), finished, rule)


def _is_letter(text: str, letters: str) -> bool:
    return len(text) == 1 and text in letters


def _most_similar(options: Sequence[str], text: str) -> int:
    """The first option with the highest difflib ratio; the first of all where none shares a character."""
    ratios = [SequenceMatcher(None, option, text).ratio() for option in options]
    return ratios.index(max(ratios))

"""From a reply to a verdict, under one of three named protocols whose scores are never mixed.

`strict` is the project's own. The other two repeat MedEvalKit's rules, so that scores can stand beside published ones;
without a judge, open questions are scored by exact match there, and the verdict's `rule` says so.

MedEvalKit's rules have quirks, kept on purpose: "normal" contains "no" and reads as no; "yes, a nodule" contains both
and is wrong; an unreadable reply to a choice becomes the most similar option, an empty one A; closed answers are not
stripped of blanks; thoughts and cut replies are read like any other text. Not repeated are its mistakes in counting
(judged questions counted twice, or never).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from difflib import SequenceMatcher

from infimed_jax.data.prompts import LETTERS
from infimed_jax.data.sample import Question
from infimed_jax.errors import UserError
from infimed_jax.evaluation.answers import Status, answer_of, matches
from infimed_jax.evaluation.benchmark import Benchmark, Verdict


def grade_strict(sample: Question, reply: str, finished: bool, _: Benchmark) -> Verdict:
    """The project's own answer grammar (`answers.py`)."""
    parsed = answer_of(sample, reply, finished)
    return Verdict(matches(parsed, sample), parsed.status, parsed.value, f"grammar, {sample.kind}")


def grade_medevalkit_fixed(sample: Question, reply: str, finished: bool, benchmark: Benchmark) -> Verdict:
    """MedEvalKit with closed questions by rule, as the InfiMed authors ran it."""
    kind = benchmark.medevalkit_kind(sample)
    if kind == "choice":
        return _judge_choice(sample, reply, finished)
    read = _parse(_first_extraction(reply, benchmark))
    if kind == "yes_no":
        value = _only_one_of(("yes", "no"), _without_stops(read))
        return _verdict(value == sample.answer, value, finished, "yes or no as a substring")
    if kind == "closed":
        read = _without_stops(read)
        return _verdict(read == sample.answer.lower(), read, finished, "closed, equal text")
    return _verdict(read == sample.answer.lower(), read, finished, "open, exact match without a judge")


def grade_medevalkit_2025_06(sample: Question, reply: str, finished: bool, benchmark: Benchmark) -> Verdict:
    """MedEvalKit's first release: yes/no by the text before the first full stop, SLAKE like open questions."""
    kind = benchmark.medevalkit_kind(sample)
    if kind == "choice":
        return _judge_choice(sample, reply, finished)
    text = _first_extraction(reply, benchmark)
    if kind == "yes_no":
        read = text.partition(".")[0]
        return _verdict(read == sample.answer, read, finished, "yes or no before the first full stop")
    read = _parse(text)
    return _verdict(read == sample.answer.lower(), read, finished, f"{kind}, exact match without a judge")


PROTOCOLS: dict[str, Callable[[Question, str, bool, Benchmark], Verdict]] = {
    "strict": grade_strict,
    "medevalkit-fixed": grade_medevalkit_fixed,
    "medevalkit-2025-06": grade_medevalkit_2025_06,
}


def check_protocol(protocol: str, benchmark: Benchmark) -> None:
    """UserError for a protocol that neither this module nor the benchmark has."""
    if protocol not in (known := {**PROTOCOLS, **benchmark.grades}):
        raise UserError(f"unknown protocol {protocol!r}; there are {', '.join(known)}")


def ask(sample: Question, protocol: str, benchmark: Benchmark) -> Question:
    """The question as the benchmark and the protocol's harness put it."""
    asked = benchmark.ask(sample)
    return replace(asked, kind=benchmark.medevalkit_kind(asked)) if protocol.startswith("medevalkit") else asked


def grade(sample: Question, reply: str, finished: bool, protocol: str, benchmark: Benchmark) -> Verdict:
    """By the benchmark's own rule for the protocol, otherwise by the protocol's general one."""
    if own := benchmark.grades.get(protocol):
        return own(sample, reply, finished)
    return PROTOCOLS[protocol](sample, reply, finished, benchmark)


def _verdict(correct: bool, parsed: str | None, finished: bool, rule: str) -> Verdict:
    status: Status = "truncated" if not finished else "unparsed" if parsed is None else "ok"
    return Verdict(correct, status, parsed, rule)


def _first_extraction(reply: str, benchmark: Benchmark) -> str:
    """What MedEvalKit's VQA data sets do before the rule: box or tag, lower-case, and (but for SLAKE) strip."""
    boxed = _boxed(reply)
    if boxed is not None:
        reply = boxed
    elif "<answer>" in reply:
        reply = _tagged(reply)
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
    """MedEvalKit's `parse_response`: box, else tag, then the text after the last of each marker, in this order."""
    text = reply.lower()
    if "boxed" in text:
        boxed = _boxed(text)
        text = "None" if boxed is None else boxed  # its helper's word for no box
    elif "<answer>" in text:
        text = _tagged(text)
    for marker in _MARKERS:
        text = text.split(marker)[-1]
    return text


def _boxed(text: str) -> str | None:
    """Content of the last `\\boxed{}`, stripped; unlike the strict grammar's, the brace must follow at once."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for end in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : end].strip()
    return None


def _tagged(text: str) -> str:
    """All closed answer tags' contents, joined by blanks; the text itself where there is none."""
    return " ".join(re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)).strip() or text


def _without_stops(text: str) -> str:
    return text.replace("\n", "").replace(".", "")


def _only_one_of(values: Sequence[str], text: str) -> str | None:
    found = [value for value in values if value in text]
    return found[0] if len(found) == 1 else None


def _judge_choice(sample: Question, reply: str, finished: bool) -> Verdict:
    """A bare letter, a letter before a full stop, an option's text, else the most similar option."""
    letters = LETTERS[: len(sample.options)].lower()
    options = [option.lower() for option in sample.options]
    gold = letters.index(sample.answer.lower())
    text = reply.lower()
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

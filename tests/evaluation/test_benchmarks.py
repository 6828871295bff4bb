"""The shipped benchmarks: prompts and parsers of their own, the data that they belong to, and what is published."""

import hashlib
import json
import string
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data_prep.sources import SOURCES
from data_prep.steps.filter import Rules, filter_dataset
from data_prep.steps.ingest import ingest
from infimed_jax import plugins
from infimed_jax.data.prompts import question_text
from infimed_jax.data.sample import Question
from infimed_jax.data.storage import open_samples
from infimed_jax.errors import UserError
from infimed_jax.evaluation.benchmark import (
    GENERAL,
    ROOM,
    benchmark_of,
    benchmark_read_by,
    load_benchmark,
    options_shown,
)
from infimed_jax.evaluation.benchmarks.mmmu_med import read_choice
from infimed_jax.evaluation.protocols import ask, grade
from infimed_jax.evaluation.rows import grade_rows, read_row
from tests.data_prep.samples import picture

CASES = Path(__file__).resolve().parents[2].parent / "shared/cases"
SEVEN = ("medxpertqa", "mmmu_med", "omnimedvqa", "path_vqa", "pmc_vqa", "slake", "vqa_rad")
PROTOCOL = {"medevalkit_head": "medevalkit-fixed", "medevalkit_first": "medevalkit-2025-06"}
ORGANS = ("lung", "liver", "left kidney")


def question(kind="choice", answer="B", options=ORGANS, text="What is it?", **meta):
    return Question("q", "mine", "t", (), kind, text, answer, options if kind == "choice" else (), meta=meta)


def prompt(sample, reasoning=False, protocol="medevalkit-fixed"):
    benchmark = benchmark_of(sample)
    return benchmark.words(ask(sample, protocol, benchmark), reasoning)


@pytest.fixture(scope="module")
def cases():
    if not CASES.exists():
        pytest.skip("shared/cases is absent")
    return lambda name: (CASES / name).read_text(encoding="utf-8").splitlines()


# ---------------------------------------------------------------------------------------------- the harness's own word


def test_every_verdict_of_the_harness(cases):
    """On every reply that MedEvalKit grades without a judge, a crash or a random draw."""
    rows = list(map(json.loads, cases("replies.jsonl")))
    for key, protocol in PROTOCOL.items():
        scores = list(grade_rows(CASES / "replies.jsonl", protocol))
        assert len(scores) == len(rows)
        for row, score in zip(rows, scores, strict=True):
            assert row[key] is None or score["correct"] is row[key], (row, score)
            assert (score["status"] == "unread") == (row["medevalkit_note"] == "random"), (row, score)
        assert sum(row[key] is not None for row in rows) > 900  # the others are the judge's, crashes and random draws


CUT = 200
"""The case file's PMC-VQA questions are cut here, and stripped afterwards; the harness's had the blank at the end."""


def test_every_prompt_of_the_harness(cases):
    for line in cases("prompts.jsonl"):
        given = json.loads(line)
        row = read_row(json.dumps(given | {"reply": ""}))
        sample = row.question
        if given["source"] == "pmc_vqa" and len(sample.question) == CUT - 1:
            sample = replace(sample, meta=sample.meta | {"question_shown": sample.question + " "})
        words = row.benchmark.words(ask(sample, "medevalkit-fixed", row.benchmark), given["reasoning"])
        assert hashlib.sha256(words.strip().encode()).hexdigest() == given["prompt_sha256"], given


# -------------------------------------------------------------------------------------------------------------- prompts


def test_pmc_vqa_shows_the_cells_of_its_table():
    usual = question(benchmark="pmc_vqa")
    assert "\nOptions: \n A:lung \n B:liver \n C:left kidney \nAnswer with" in prompt(usual)
    cells = ["A: lung", " B:liver", "left kidney "]
    own = question(benchmark="pmc_vqa", options_shown=json.dumps(cells))
    assert "\nOptions: \nA: lung\n B:liver\nleft kidney \nAnswer with" in prompt(own)
    assert "\nA. lung\nB. liver\nC. left kidney\n" in question_text(own)  # training's words
    empty = replace(own, meta=own.meta | {"options_shown": json.dumps([*cells, " D: "])})
    assert prompt(empty).count("\n") == prompt(own).count("\n") + 1
    assert grade(empty, "D", True, "medevalkit-fixed", benchmark_of(empty)).parsed == "D"
    with pytest.raises(UserError, match="options_shown has 2 texts for 3 options"):
        prompt(question(benchmark="pmc_vqa", options_shown=json.dumps(cells[:2])))


def test_medxpertqa_and_omnimedvqa_letter_their_options():
    for name in ("medxpertqa", "omnimedvqa", ""):
        sample = question(text="What?\nAnswer Choices: (A) lung (B) liver", **({"benchmark": name} if name else {}))
        for reasoning in (False, True):
            assert prompt(sample, reasoning) == question_text(sample, reasoning)
        assert "What?\nAnswer Choices: (A) lung (B) liver\nOptions: \nA. lung\nB. liver\nC. l" in prompt(sample)


@pytest.mark.parametrize("protocol", ["strict", "medevalkit-fixed"])
def test_mmmu_has_its_own_layout_and_one_image(protocol):
    sample = replace(question(text="See <image 1>.", benchmark="mmmu_med"), images=(b"1", b"2"))
    head = "See <image 1>.\n\n(A) lung\n(B) liver\n(C) left kidney\n\n\n        "
    assert prompt(sample, False, protocol) == head + "Answer with the option's letter from the given choices directly."
    assert prompt(sample, True, protocol).startswith(
        head + "Answer with the option's letter from the given choices and"
    )
    sent = ask(sample, protocol, benchmark_of(sample)).images
    assert sent == ((b"1", b"2") if protocol == "strict" else (b"1",))
    assert ask(sample, protocol, benchmark_of(sample), all_images=True).images == (b"1", b"2")


def test_mmmu_asks_open_questions_for_a_word_or_phrase():
    sample = question("open", "8.4", text="How much?", benchmark="mmmu_med")
    assert prompt(sample) == "How much?\n\n        Answer the question using a single word or phrase."
    assert prompt(sample, True).endswith('a single word or phrase and put the answer in one "\\boxed{}".')


def test_a_prompt_keeps_the_blanks_of_the_published_question():
    sample = question("yes_no", "yes", text="Is it?", benchmark="vqa_rad", question_shown=" Is it? ")
    assert prompt(sample).startswith(" Is it? \nPlease output") and question_text(sample).startswith("Is it?\n")
    del sample.meta["benchmark"]
    assert prompt(sample) == question_text(sample)


# -------------------------------------------------------------------------------------------------------- MMMU's parser


def brute_force(reply: str, options: tuple[str, ...]) -> str | None:
    """MMMU's rules by search: at every place of the reply, from its end, is there one of what is looked for?"""
    for mark in (",", ".", "!", "?", ";", ":", "'"):
        while reply.startswith(mark):
            reply = reply[1:]
        while reply.endswith(mark):
            reply = reply[:-1]
    padded = " " + reply + " "
    names = string.ascii_uppercase[: len(options)]
    rules = [{name: f"({name})" for name in names}, {name: f" {name} " for name in names}]
    if len(padded.split()) > 5:
        rules.append(dict(zip(names, options, strict=True)))
    for number, wanted in enumerate(rules):
        for place in range(len(padded), -1, -1):
            for name, what in wanted.items():
                here = padded[place : place + len(what)]
                if here == what or (number == 2 and here.lower() == what.lower()):
                    return name
    return None


PIECES = st.sampled_from(
    ["(A)", "(B)", "(D)", " A ", " B ", "C", "D", " ", ".", ",", "'", "lung", "Liver", "left kidney", "is", "the", "\n"]
)


@given(st.lists(PIECES, max_size=12).map("".join))
@example("")
@example("B")
@example("b")
@example("D.,")
@example("A B C D E F")
@example("it fits the liver and not the Lung")
@example("(A) and B and (B)")
def test_mmmu_reads_a_choice_by_its_own_rules(reply):
    letter, rule = read_choice(reply, ORGANS)
    assert letter == brute_force(reply, ORGANS)
    assert ("unread" in rule) == (letter is None)
    sample = question(benchmark="mmmu_med")
    for protocol in PROTOCOL.values():
        verdict = grade(sample, reply, True, protocol, benchmark_of(sample))
        assert (verdict.correct, verdict.parsed) == (letter == "B", letter)
        assert verdict.status == ("unread" if letter is None else "ok")


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("(B) or (A)", "A"),  # the last place wins
        ("A or (B) or C", "B"),  # brackets before blanks
        ("b", None),
        ("B)", None),
        ("**B**", None),
        ("liver", None),  # too short for an option's text
        ("The picture shows the liver of a man", "B"),
        ("The picture shows LIVER, and later the lung.", "A"),
        ("\\boxed{B}", "B"),
        ("(A) <answer>B</answer>", "B"),
        ("<answer>A</answer> \\boxed{B}", "A"),  # the tag is taken first, and the box within it
        ("<answer>\\boxed{B}</answer> (A)", "B"),
        ("<think>(A)</think> B", "A"),
        ("", None),
    ],
)
def test_mmmu_replies(reply, letter):
    sample = question(benchmark="mmmu_med")
    for protocol in PROTOCOL.values():
        for finished in (True, False):
            verdict = grade(sample, reply, finished, protocol, benchmark_of(sample))
            assert (verdict.parsed, verdict.correct) == (letter, letter == "B")
            assert verdict.status == ("unread" if letter is None else "ok" if finished else "truncated")


def test_open_mmmu_questions_are_never_right_in_the_harness():
    sample = question("open", "8.4", benchmark="mmmu_med")
    for protocol in PROTOCOL.values():
        verdict = grade(sample, "8.4", True, protocol, benchmark_of(sample))
        assert (verdict.correct, verdict.status) == (False, "ok")
        assert verdict.rule == "open MMMU: never right in the harness"
    assert grade(sample, "8.4", True, "strict", benchmark_of(sample)).correct


# ------------------------------------------------------------------------------------------------ whose question it is


def test_a_benchmark_and_its_adapters_name_each_other():
    assert tuple(plugins.names(ROOM)) == SEVEN
    for name in SEVEN:
        benchmark = load_benchmark(name)
        assert benchmark.name == name
        for adapter in benchmark.adapters:
            assert SOURCES[adapter].benchmark == name and benchmark_read_by(adapter) is benchmark
            assert benchmark.split in SOURCES[adapter].splits
    marked = {source.name for source in SOURCES.values() if source.benchmark}
    assert marked == {adapter for name in SEVEN for adapter in load_benchmark(name).adapters}
    assert benchmark_read_by("slake_of_mine") is GENERAL


def test_the_published_counts_and_scores():
    counts = {name: load_benchmark(name).questions for name in SEVEN}
    assert counts == {
        "mmmu_med": 150, "vqa_rad": 451, "slake": 2094, "path_vqa": 6719, "pmc_vqa": 33_430, "omnimedvqa": 88_996,
        "medxpertqa": 2000,
    }  # fmt: skip
    for model, average in {"InfiMed-Foundation-1.7B": 50.8, "InfiMed-Foundation-4B": 56.8}.items():
        scores = [load_benchmark(name).published["medevalkit-fixed"][model] for name in SEVEN]
        assert round(100 * sum(scores) / 7, 1) == average


def test_the_name_goes_before_the_mark_and_no_source_s_name_counts():
    sample = question(benchmark="slake")
    assert benchmark_of(sample).name == "slake" and benchmark_of(sample, "vqa_rad").name == "vqa_rad"
    assert benchmark_of(replace(sample, source="slake", meta={})) is GENERAL


def test_a_mark_runs_no_code(tmp_path):
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    for mark in (str(tmp_path / "evil.py"), "this", "antigravity", "os.path", "slakes"):
        with pytest.raises(UserError, match="name it by --benchmark"):
            benchmark_of(question(benchmark=mark))


def test_the_mark_stays_with_the_sample_through_ingest_and_a_view(tmp_path):
    row = {"img_name": "a/source.jpg", "question": "Is it? ", "answer": "Yes", "q_lang": "en", "answer_type": "CLOSED"}
    (tmp_path / "in/imgs/a").mkdir(parents=True)
    (tmp_path / "in/imgs/a/source.jpg").write_bytes(picture(side=40))
    (tmp_path / "in/test.json").write_text(json.dumps([row, row | {"question": "Where?", "answer": "Left"}]))
    ingest("slake", tmp_path / "in", tmp_path / "out", splits=("test",))
    filter_dataset(tmp_path / "out/test", tmp_path / "view", Rules())
    for folder in ("out/test", "view"):
        samples = [open_samples(tmp_path / folder)[place] for place in range(2)]
        assert [sample.meta["benchmark"] for sample in samples] == ["slake", "slake"]
        assert [sample.meta.get("question_shown") for sample in samples] == ["Is it? ", None]
        assert prompt(samples[0]).startswith("Is it? \nAnswer the question using a single word")


def test_options_are_lettered_where_none_are_shown():
    assert list(options_shown(question())) == ["A. lung", "B. liver", "C. left kidney"]

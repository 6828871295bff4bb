"""The page of an evaluation: without outside links, model text shown as text, and only images that were given."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest

from infimed_jax.config import Sampling
from infimed_jax.data.sample import Question
from infimed_jax.evaluation.page import CASES, draw_cases, write_evaluation_page
from infimed_jax.evaluation.respondents import Predictions, Terms
from infimed_jax.evaluation.run import evaluate
from tests.tiny import png

HOSTILE = (
    "<think></pre><script>alert(1)</script></think>\"><img src=x onerror=alert(2)><a href='javascript:alert(3)'>yes</a>"
    "<iframe src='data:text/html,<script>alert(4)</script>'></iframe>{{ 7 * 7 }}"
)


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def result(tmp_path):
    samples = [
        Question(f"a{n}/test/0", "a", "test", (png(n),), kind="open" if n % 3 else "choice", question=f"{HOSTILE} {n}?",
                 answer="lung" if n % 3 else "A", options=() if n % 3 else (HOSTILE, "liver"),
                 meta={"modality": HOSTILE if n % 2 else "ct"})
        for n in range(200)
    ]  # fmt: skip
    file = tmp_path / "p.jsonl"
    lines = [{"id": s.id, "response": HOSTILE if n % 2 else "lung"} for n, s in enumerate(samples)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return evaluate(samples, Predictions(file), Terms(Sampling()), name=HOSTILE)


def test_text_of_models_and_data_does_nothing(result, tmp_path):
    shown = {record.id: png(1) for record in draw_cases(result)[:5]}
    write_evaluation_page(
        tmp_path / "report.html", {HOSTILE: result}, {}, shown, {"device": HOSTILE, "stages": ["sft"]}
    )
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert [tag for tag, _ in page.tags].count("script") == 1  # our own
    assert not {"a", "iframe", "link", "object"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    sources = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert len(sources) == 5 and all(source.startswith("data:image/") for source in sources)
    assert "35 of 40 images are left out" in text
    assert any("{{ 7 * 7 }}" in words for words in page.words)
    cases = [attrs for tag, attrs in page.tags if "data-verdict" in attrs]
    assert len(cases) == CASES and {case["data-set"] for case in cases} == {HOSTILE}


def test_cases_are_of_every_kind_right_and_wrong(result):
    cases = draw_cases(result, cases=4)
    assert {(case.kind, case.correct) for case in cases} == {(r.kind, r.correct) for r in result.records}
    assert draw_cases(result) == draw_cases(result) and len({case.id for case in draw_cases(result)}) == CASES
    assert draw_cases(result, seed=1) != draw_cases(result)


def test_scores_and_groups_stand_on_the_page(result, tmp_path):
    write_evaluation_page(tmp_path / "report.html", {"one": result, "two": result}, {"one": {"accuracy": 0.25}}, {}, {})
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    share = result.accuracy
    assert f"{share.accuracy:.1%}" in text and f"{share.low:.1%} – {share.high:.1%}" in text
    assert "one by modality" in text and "25.0%" in text and "Mean of 2 sets" in text
    assert "<svg" in text and len(text) < 20e6

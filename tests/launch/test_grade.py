"""`grade`: one score a row, in order, without JAX; and one line for each way in which a file can be wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.run import main

ROOT = Path(__file__).resolve().parents[2]
YES = {"kind": "yes_no", "answer": "yes", "reply": "Yes, I see a nodule."}
CHOICE = {"kind": "choice", "options": ["lung", "liver"], "answer": "B", "reply": "A\n\n\\boxed{B}"}


def run(tmp_path, rows, *options):
    file = tmp_path / "replies.jsonl"
    file.write_bytes(rows if isinstance(rows, bytes) else b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    code = main(["grade", str(file), "--output", str(tmp_path / "scores.jsonl"), *options])
    scores = tmp_path / "scores.jsonl"
    return code, [json.loads(line) for line in scores.read_text().splitlines()] if scores.exists() else None


def test_a_line_for_each_row_in_order(tmp_path, capsys):
    rows = [{"id": "b", **YES}, CHOICE, {"id": 7, **YES, "reply": "<think>", "question": "Is it?", "source": "mine"}]
    code, scores = run(tmp_path, rows)
    assert code == 0 and scores == [
        {"id": "b", "correct": True, "status": "ok", "parsed": "yes", "rule": "grammar, yes_no"},
        {"correct": True, "status": "ok", "parsed": "B", "rule": "grammar, choice"},
        {"id": 7, "correct": False, "status": "truncated", "parsed": None, "rule": "grammar, yes_no"},
    ]
    assert "strict: 66.7% of 3 correct; truncated: 1" in capsys.readouterr().out
    _, scores = run(tmp_path, rows[:2], "--protocol", "medevalkit-fixed")
    assert [(s["correct"], s["parsed"]) for s in scores] == [(False, None), (False, "A")]
    _, scores = run(tmp_path, rows[:2], "--protocol", "medevalkit-2025-06")
    assert [(s["correct"], s["parsed"]) for s in scores] == [(False, "yes, i see a nodule"), (True, "B")]


def test_whose_rules_a_row_is_graded_by(tmp_path):
    """The option, else the row's own benchmark, else its mark, else its source if it is exactly an adapter's name."""
    row = {**CHOICE, "reply": "the answer is liver"}
    rows = [
        {**row, "benchmark": "mmmu_med", "meta": {"benchmark": "slake"}, "source": "slake"},
        {**row, "meta": {"benchmark": "mmmu_med"}, "source": "pmc_vqa"},
        {**row, "source": "mmmu_med"},
        {**row, "source": "mmmu_med_of_mine"},
    ]
    assert [s["status"] for s in run(tmp_path, rows, "--protocol", "medevalkit-fixed")[1]] == [*["unread"] * 3, "ok"]
    _, scores = run(tmp_path, rows, "--protocol", "medevalkit-fixed", "--benchmark", "pmc_vqa")
    assert {s["rule"] for s in scores} == {"choice by similarity"}


def test_options_are_compared_as_shown(tmp_path):
    row = {**CHOICE, "reply": "liver"}
    rows = [row, {**row, "options_shown": ["lung", "liver"]}, {**row, "options_shown": ["liver", "lung"]}]
    _, scores = run(tmp_path, rows, "--protocol", "medevalkit-fixed")
    assert [(s["rule"], s["parsed"]) for s in scores] == [
        ("choice by similarity", "B"), ("choice by text", "B"), ("choice by text", "A"),
    ]  # fmt: skip


def test_a_cut_reply_is_graded_as_cut(tmp_path):
    _, scores = run(tmp_path, [{**YES, "finish": "length"}, {**YES, "finish": "stop"}])
    assert [s["status"] for s in scores] == ["truncated", "ok"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**YES, "kind": "chat"}, '`kind` must be one of yes_no, choice, closed, open, not "chat"'),
        ({"answer": "yes", "reply": "yes"}, "`kind` must be one of yes_no, choice, closed, open, not null"),
        ({**CHOICE, "answer": "C"}, '`answer` must be the letter of an option (A, B), not "C"'),
        ({**CHOICE, "answer": "liver"}, '`answer` must be the letter of an option (A, B), not "liver"'),
        ({**CHOICE, "options": ["lung"]}, "a choice needs 2 to 26 options, not 1"),
        ({**CHOICE, "options": "lung"}, '`options` must be a list of texts, not "lung"'),
        ({**CHOICE, "options": ["lung", None]}, '`options` must be a list of texts, not ["lung", null]'),
        ({**CHOICE, "options_shown": ["lung"]}, "`options_shown` has 1 texts for 2 options"),
        ({**YES, "options": ["yes", "no"]}, "a question of kind yes_no takes no options, but has 2"),
        ({**YES, "answer": "maybe"}, '`answer` must be yes or no, not "maybe"'),
        ({"kind": "open", "answer": "lung"}, "`reply` is missing: the row has kind, answer"),
        ({**YES, "reply": None}, "`reply` must be text, not null"),
        ({**YES, "reply": 3}, "`reply` must be text, not 3"),
        ({**YES, "finish": "eos"}, '`finish` must be stop or length, not "eos"'),
        ({**YES, "meta": ["a"]}, '`meta` must be an object, not ["a"]'),
        ({**YES, "id": [1]}, "`id` must be text or a whole number, not [1]"),
        ({**YES, "benchmark": "./evil.py"}, "the data name the benchmark './evil.py', not one of"),
        (["yes"], 'no JSON object, as each line must be, but ["yes"]'),
    ],
)
def test_a_wrong_row_is_one_line_that_names_it(tmp_path, capsys, row, message):
    code, scores = run(tmp_path, [YES, row])
    assert (code, scores) == (2, None)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"replies.jsonl, line 2: {message}" in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"kind": "open"\n', "line 1: no JSON object, as each line must be"),
        (json.dumps(YES).encode() + b"\n" + b"[" * 100_000, "line 2: no JSON object, as each line must be"),
        (b'{"id": ' + b"9" * 5000 + b"}", "line 1: no JSON object, as each line must be"),
        (json.dumps(YES).encode() + b'\n{"reply": "caf\xe9"}\n', "line 2: not UTF-8, but another encoding"),
        (json.dumps(YES).encode("utf-16"), "line 1: not UTF-8, but another encoding"),
        (b"\n \n", "has no row"),
        (b"", "has no row"),
    ],
)
def test_a_file_that_is_no_json_lines_of_unicode(tmp_path, capsys, content, message):
    assert run(tmp_path, content) == (2, None)
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_byte_order_mark_empty_lines_and_lone_surrogates_are_read(tmp_path):
    row = json.dumps({"kind": "open", "answer": "\ud800", "reply": "\ud800"}).encode()
    code, scores = run(tmp_path, b"\xef\xbb\xbf" + json.dumps(YES).encode() + b"\n\n" + row)
    assert code == 0 and len(scores) == 2


def test_an_old_file_stays_where_a_row_is_wrong(tmp_path):
    run(tmp_path, [YES])
    code, scores = run(tmp_path, [YES, {}])
    assert code == 2 and len(scores) == 1 and len(list(tmp_path.iterdir())) == 2


def test_an_unknown_protocol_or_benchmark_is_refused(tmp_path, capsys):
    assert run(tmp_path, [YES], "--protocol", "medevalkit")[0] == 2
    assert "unknown protocol 'medevalkit'; there are strict, medevalkit-fixed" in capsys.readouterr().err
    assert run(tmp_path, [YES], "--benchmark", "slakes")[0] == 2
    assert "did you mean 'slake'?" in capsys.readouterr().err


@pytest.mark.parametrize("protocol", ["strict", "medevalkit-fixed", "medevalkit-2025-06"])
def test_hostile_replies_of_100_kb_are_graded(tmp_path, protocol):
    """Each finishes in well under a second; the suite's own time limit would end a quadratic reading."""
    pieces = ["<answer>", "\\boxed{", "the answer is ", "**", "\n\n", "lung ", "<answer></answer>", "é", "no, ", "(A) "]
    rows = [{**row, "reply": piece * (100_000 // len(piece))} for piece in pieces for row in (CHOICE, YES)]
    rows += [{**row, "source": "mmmu_med"} for row in rows[::2]]
    code, scores = run(tmp_path, rows, "--protocol", protocol)
    assert code == 0 and len(scores) == len(rows)


def test_grading_starts_no_jax(tmp_path):
    (tmp_path / "replies.jsonl").write_text(json.dumps({**CHOICE, "source": "mmmu_med"}))
    arguments = ["grade", str(tmp_path / "replies.jsonl"), "--output", str(tmp_path / "scores.jsonl")]
    code = f"import sys; from launch.run import main; main({arguments}); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0

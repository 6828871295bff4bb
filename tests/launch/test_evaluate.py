"""`evaluate` from the shell: accuracy apart on the questions that training data hold, as `data decontaminate` lists."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from infimed_jax.config import Config, Data, Train
from infimed_jax.data.sample import Question, Sample
from infimed_jax.data.storage import open_samples, write_samples
from infimed_jax.evaluation.contamination import WORDS, mark
from infimed_jax.evaluation.run import GROUPS
from infimed_jax.runs.history import stage_entry
from infimed_jax.runs.parameters import load_params, save_params
from infimed_jax.trees import flatten
from tests.data_prep import loopback as lo
from tests.launch.hf_sources import PATCHES, command, picture, write_sources

LONG = "does the enlarged left lobe press on any of the large vessels nearby"
OTHER = "which of the organs shown here lies closest to the lower edge of it"


def asked(id: str, image: int, question: str) -> Sample:
    return Question(id=id, source="toy", split=id.split("/")[1], images=(picture(image),), kind="yes_no",
                           question=question, answer="yes")  # fmt: skip


TESTS = {
    "toy/test/0": (asked("toy/test/0", 0, LONG), "image with question"),
    "toy/test/1": (asked("toy/test/1", 1, "is it large?"), "image"),
    "toy/test/2": (asked("toy/test/2", 2, OTHER), "question"),
    "toy/test/3": (asked("toy/test/3", 1, OTHER), "image, question"),
    "toy/test/4": (asked("toy/test/4", 4, "is it large?"), "none"),
}
TRAIN = {
    "a": [asked("toy/train/0", 0, LONG), asked("toy/train/1", 1, "what else?"), asked("toy/train/9", 9, "what?")],
    "b": [asked("toy/train/2", 7, OTHER), asked("toy/train/8", 8, "what?")],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Training sets a and b, their reports a.json and b.json, the test set, and a checkpoint."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_samples(folder / "test", [sample for sample, _ in TESTS.values()], name="toy")
    for name, samples in TRAIN.items():
        write_samples(folder / "in" / name, samples, name="toy")
        assert command("data", "decontaminate", "--input", folder / "in" / name, "--test", folder / "test",
                       "--output", folder / name) == 0  # fmt: skip
    text, vision = write_sources(folder)
    assert command("convert", "from-hf", "--text", text, "--vision", vision, "--output", folder / "checkpoint",
                   "--visual-tokens", PATCHES, "--dtype", "float32") == 0  # fmt: skip
    return folder


def evaluate(folder: Path, *more, checkpoint: Path | None = None) -> int:
    checkpoint = checkpoint or folder / "checkpoint"
    return command("evaluate", "--checkpoint", checkpoint, "--dataset", folder / "test", "--output",
                   folder / "evaluation", *more, "sampling.max_tokens=2")  # fmt: skip


def test_questions_are_told_apart_by_what_training_data_hold_of_them(folder):
    tests = open_samples(folder / "test")
    marked = mark(tests, tests, [folder / "a.json", folder / "b.json"])
    assert {s.id: s.meta["contamination"] for s in marked} == {id: what for id, (_, what) in TESTS.items()}
    one = mark(tests, tests, [folder / "b.json"])
    assert [s.meta["contamination"] for s in one] == ["none", "none", "question", "question", "none"]
    assert [replace(s, meta={}) for s in marked] == [replace(s, meta={}) for s, _ in TESTS.values()]


def test_each_part_has_its_accuracy(folder, capsys):
    reports = [part for name in "ab" for part in ("--contamination", folder / f"{name}.json")]
    assert evaluate(folder, *reports) == 0
    printed = capsys.readouterr().out
    assert all(f"training data hold {words}: " in printed for words in WORDS.values())
    table = json.loads((folder / "evaluation" / "summary.json").read_text())["groups"]["contamination"]
    assert {what: part["n"] for what, part in table.items()} == {what: 1 for _, what in TESTS.values()}
    assert evaluate(folder) == 0
    assert "training data" not in capsys.readouterr().out
    groups = json.loads((folder / "evaluation" / "summary.json").read_text())["groups"]
    assert "contamination" not in groups and "contamination" in GROUPS


def test_a_checkpoint_that_learnt_from_the_split_says_so(folder, tmp_path, capsys):
    entries = [
        stage_entry(Config(data=Data(dataset=str(folder / data)), train=Train(stage=stage)), {})
        for stage, data in (("pretrain", "in/a"), ("sft", "test"))
    ]
    params, metadata = load_params(folder / "checkpoint")
    save_params(tmp_path / "learnt", flatten(params).items(), metadata | {"history": entries})
    assert evaluate(folder, checkpoint=tmp_path / "learnt") == 0
    assert f"warning: {tmp_path / 'learnt'} learnt from toy/test, so it may answer by memory" in capsys.readouterr().err
    assert evaluate(folder) == 0
    assert "learnt from" not in capsys.readouterr().err


def test_a_report_about_other_questions_is_refused(folder, tmp_path, capsys):
    write_samples(tmp_path / "test", [TESTS["toy/test/0"][0]], name="toy")
    assert command("data", "decontaminate", "--input", folder / "in" / "a", "--test", tmp_path / "test", "--output",
                   tmp_path / "a") == 0  # fmt: skip
    assert evaluate(folder, "--contamination", tmp_path / "a.json") == 2
    assert f"other test questions than {folder / 'test'}: run `data decontaminate` with" in capsys.readouterr().err
    (tmp_path / "b.json").write_text('{"affected": {}}')
    assert evaluate(folder, "--contamination", tmp_path / "b.json") == 2
    assert "is no report of `data decontaminate`" in capsys.readouterr().err
    assert evaluate(folder, "--contamination", tmp_path / "none.json") == 2
    assert "cannot read the report" in capsys.readouterr().err


def slake(folder: Path, questions: int = 4) -> Path:
    """SLAKE's published layout, with as many questions about as many images."""
    rows = []
    for number in range(questions):
        image = folder / "imgs" / f"x{number}" / "source.jpg"
        image.parent.mkdir(parents=True)
        image.write_bytes(picture(number))
        rows.append({"img_id": number, "img_name": f"x{number}/source.jpg", "question": f"Is it {number}?",
                     "answer": "Yes", "q_lang": "en", "answer_type": "CLOSED", "qid": number, "location": "Lung",
                     "modality": "CT", "base_type": "vqa", "content_type": "Presence", "triple": []})  # fmt: skip
    (folder / "test.json").write_text(json.dumps(rows))
    return folder


def replies(file: Path, texts: dict[str, str]) -> Path:
    file.write_text("".join(json.dumps({"id": id, "response": text}) + "\n" for id, text in texts.items()))
    return file


def test_several_sets_in_one_command_as_published_and_prepared(folder, tmp_path, capsys):
    given = (
        {f"slake/test/{number:05d}": "yes" for number in range(3)} | dict.fromkeys(TESTS, "no") | {"toy/test/0": "yes"}
    )
    file, output = replies(tmp_path / "p.jsonl", given), tmp_path / "out"
    arguments = ("--benchmark", f"slake={slake(tmp_path / 'slake')}", "--dataset", folder / "test", "--output", output)
    assert command("evaluate", "--predictions", file, *arguments) == 2  # each set sees the other one's ids as unknown
    assert (
        "ids of no question, such as toy/test/0: repair the file, or pass it over with --lenient"
        in capsys.readouterr().err
    )
    assert command("evaluate", "--predictions", file, "--lenient", *arguments) == 0
    printed, warned = capsys.readouterr()
    assert "slake, strict: 75.0% of 4 [" in printed and "test, strict: 20.0% of 5 [" in printed
    assert "mean of 2: 47.5% [" in printed
    assert "25.0% of the replies are missing" in warned and "4 questions of slake, and 2,094 are published" in warned
    assert "4 distinct images: with fewer than 30 an interval says little" in warned
    results = json.loads((output / "results.json").read_text())
    assert results["mean"]["accuracy"] == (0.75 + 0.2) / 2 and set(results["sets"]) == {"slake", "test"}
    assert results["model_index"][0]["metrics"][0]["value"] == 0.75
    rows = (output / "results.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["set", "slake", "test"]
    for name in ("slake", "test"):
        assert {f.name for f in (output / name).iterdir()} == {
            "asked.json",
            "replies.jsonl",
            "scores.jsonl",
            "summary.json",
        }


def test_runs_are_compared_set_by_set(folder, tmp_path, capsys):
    for name, answer in (("a", "yes"), ("b", "no")):
        file = replies(tmp_path / f"{name}.jsonl", dict.fromkeys(TESTS, answer) | {"toy/test/0": "yes"})
        assert (
            command("evaluate", "--predictions", file, "--dataset", folder / "test", "--output", tmp_path / name) == 0
        )
    capsys.readouterr()
    assert command("compare", tmp_path / "a", tmp_path / "b") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("A - B = +80.0 points [") and "right only in A 4, only in B 0 of 5" in printed
    assert command("compare", tmp_path / "a", tmp_path) == 2
    assert "hold other sets" in capsys.readouterr().err
    assert command("compare", tmp_path / "a", folder / "test") == 2
    assert "holds no finished evaluation" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "nothing to evaluate: name --benchmark NAME=FOLDER or --dataset FOLDER"),
        (("--benchmark", "slake={0}", "--benchmark", "slake={0}"), "two sets have one name (slake, slake)"),
        (("--benchmark", "slakes={0}"), "not 'slakes'"),
        (("--benchmark", "slake={0}/none"), "does not exist: check the input folder and its layout"),
        (("--benchmark", "slake", "--benchmark", "slake={0}"), "one set of rules for --dataset, or NAME=FOLDER"),
        (("--benchmark", "slake={0}", "sampling.max_tokens=3"), "settings and --blind change nothing of them"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(tmp_path, capsys, arguments, words):
    published, file = slake(tmp_path / "slake"), replies(tmp_path / "p.jsonl", {"slake/test/00000": "yes"})
    arguments = [argument.format(published) for argument in arguments]
    assert command("evaluate", "--predictions", file, "--output", tmp_path / "out", *arguments) == 2
    assert words in capsys.readouterr().err


def test_a_question_of_a_benchmark_that_cannot_be_read_is_not_left_out(tmp_path, capsys):
    published, file = slake(tmp_path / "slake"), replies(tmp_path / "p.jsonl", {})
    (published / "imgs" / "x2" / "source.jpg").unlink()
    assert (
        command("evaluate", "--predictions", file, "--benchmark", f"slake={published}", "--output", tmp_path / "o") == 2
    )
    error = capsys.readouterr().err
    assert "slake/test/00002: image missing" in error and "x2/source.jpg" in error and error.count("\n") == 1


def test_a_judge_stands_beside_the_rule(tmp_path, capsys):
    published = slake(tmp_path / "slake")
    rows = json.loads((published / "test.json").read_text())
    (published / "test.json").write_text(json.dumps([row | {"answer": "Lung", "answer_type": "OPEN"} for row in rows]))
    texts = enumerate(("lung", "a lobe", "", "x"))
    file = replies(tmp_path / "p.jsonl", {f"slake/test/{n:05d}": text for n, text in texts})
    arguments = ("--predictions", file, "--benchmark", f"slake={published}", "--output", tmp_path / "out")

    def judge(body, _):
        return lo.say(json.dumps({"same": "x" not in json.loads(body["messages"][1]["content"])["reply"]}))

    with lo.serve(judge) as server:
        assert command("evaluate", *arguments, "--judge-endpoint", server.url, "--judge-model", "wise") == 0
    printed = capsys.readouterr().out
    assert "judge: 4 verdicts, about " in printed and "judge wise: 50.0% of 4 open questions [" in printed
    assert "by rule 25.0%; agrees with the rule on 75.0%; 0 verdicts null" in printed
    judged = [json.loads(line)["judge"] for line in (tmp_path / "out" / "judged.jsonl").read_text().splitlines()]
    assert judged == [[True], [True], [False], [False]]
    assert json.loads((tmp_path / "out/results.json").read_text())["sets"]["slake"]["judge"]["agreement"] == 0.75
    assert command("evaluate", *arguments, "--judge-endpoint", server.url) == 2
    assert "a judge needs --judge-endpoint, --judge-model" in capsys.readouterr().err

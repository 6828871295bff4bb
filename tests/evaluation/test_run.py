"""`evaluate` with a tiny random model, and with scripted replies where the verdicts must be known."""

import json
from dataclasses import asdict, replace

import jax
import numpy as np
import pytest

from data_prep.tokenizer import make_tokenizer
from infimed_jax.config import Config, Mesh, Sampling, Train
from infimed_jax.data.chat import load_tokenizer
from infimed_jax.data.images import ImageCache
from infimed_jax.data.sample import Chat, Question
from infimed_jax.errors import UserError
from infimed_jax.evaluation import run
from infimed_jax.evaluation.respondents import PolicyRespondent, Predictions, Terms
from infimed_jax.evaluation.run import compare_runs, evaluate, fingerprint, image_gain, image_id, read_evaluation
from infimed_jax.models.params import init_params
from infimed_jax.sampling.engine import Delta
from infimed_jax.sampling.policy import Policy
from infimed_jax.sharding import make_mesh
from tests import tiny
from tests.tiny import png

MODEL = tiny.model(vocab_size=320)
TRAIN = Train(compute_dtype="float32", attention="xla")
SAMPLING = Sampling(max_tokens=6, slots=4, burst=3)


def question(number: int, kind="yes_no", answer="yes", options=(), image=0, **meta):
    return Question(
        id=f"s/test/{number}",
        source="s",
        split="test",
        images=(png(image),),
        kind=kind,
        question=f"Q{number}?",
        answer=answer,
        options=options,
        meta={"image_id": f"i{image}", "modality": "ct" if image else "xray", **meta},
    )


SAMPLES = [
    question(0, answer="yes", image=0),
    question(1, answer="no", image=0),
    question(2, "choice", "B", ("lung", "liver"), image=1),
    question(3, "open", "left lung", image=1, organ="chest"),
    question(4, "closed", "2", image=2),
    question(5, answer="yes", image=2),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(make_tokenizer(["yes no lung liver"], tmp_path_factory.mktemp("tokenizer"), 290))


@pytest.fixture(scope="module")
def ask(tokenizer):
    """`evaluate` with everything but what a test is about."""
    with jax.set_mesh(make_mesh(Mesh(), jax.devices()[:1])):
        params = init_params(jax.random.key(0), MODEL)
        # Larger weights than at initialisation: else the reply does not depend on the image.
        params = jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, params)
        policy = Policy.of(params, Config(model=MODEL, train=TRAIN), tokenizer, ImageCache())

        def run_it(samples=SAMPLES, *, folder=None, name="", report=lambda *_: None, **terms):
            asked = Terms(**({"sampling": SAMPLING} | terms))
            respond = PolicyRespondent(policy, asked, jax.random.key(0), report)
            return evaluate(samples, respond, asked, folder=folder, name=name)

        yield run_it


@pytest.fixture
def script(monkeypatch, tokenizer):
    """Make the policy answer with given (reply, finish) pairs; returns the calls it had."""

    def install(replies):
        calls = []

        def answer(policy, prompts, sampling, key, *, longest, numbers, on_progress, on_delta):
            first = sum(len(call["prompts"]) for call in calls)
            calls.append({"prompts": prompts, "longest": longest, "numbers": list(numbers)})
            for number, (reply, finish) in zip(numbers, replies[first : first + len(prompts)], strict=True):
                ids = [*tokenizer.encode(reply), *([tokenizer.im_end] if finish == "stop" else [])]
                on_delta(Delta(number, np.array(ids, np.int32), np.zeros(len(ids), np.float32), finish))
            on_progress(len(prompts), len(prompts), "")

        monkeypatch.setattr(Policy, "answer", answer)
        return calls

    return install


REPLIES = [
    ("Yes.", "stop"),
    ("normal", "stop"),
    ("(B)", "stop"),
    ("Left lung, I", "length"),
    ("two", "stop"),
    ("<think>yes", "stop"),
]


def test_tiny_model_answers_every_question_and_leaves_files(ask, tmp_path):
    progress = []
    result = ask(name="tiny", folder=tmp_path / "out", report=lambda *state: progress.append(state))
    assert [record.id for record in result.records] == [sample.id for sample in SAMPLES]
    assert progress[-1] == (6, 6, "6/6 questions")
    assert all(record.tokens <= 6 for record in result.records)
    lines = [json.loads(line) for line in (tmp_path / "out/replies.jsonl").read_text().splitlines()]
    assert lines == [json.loads(json.dumps(asdict(record))) for record in result.records]
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary == json.loads(json.dumps(result.summary()))
    assert (summary["n"], summary["images"], summary["max_tokens"]) == (6, 3, 6)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "asked.json", "replies.jsonl", "scores.jsonl", "summary.json"
    }  # fmt: skip
    scores = [json.loads(line) for line in (tmp_path / "out/scores.jsonl").read_text().splitlines()]
    assert [(s["id"], s["correct"], s["status"]) for s in scores] == [
        (r.id, r.correct, r.status) for r in result.records
    ]
    again = read_evaluation(tmp_path / "out")
    assert (again.records, again.terms, again.summary()) == (result.records, result.terms, result.summary())


def test_chunks_change_nothing(ask, monkeypatch):
    whole = ask()
    monkeypatch.setattr(run, "CHUNK", 4)
    assert ask().records == whole.records


def test_chunks_draw_differently(ask, monkeypatch):
    """Sampled replies to one question, asked in two chunks."""
    monkeypatch.setattr(run, "CHUNK", 1)
    twice = [SAMPLES[0], replace(SAMPLES[0], id="again")]
    first, second = ask(twice, sampling=replace(SAMPLING, temperature=1.0)).records
    assert first.reply != second.reply


def test_the_model_sees_the_image_and_the_blind_control_does_not(ask):
    swapped = [replace(sample, images=(png(50 + i),)) for i, sample in enumerate(SAMPLES)]

    def replies(samples, **options):
        return [record.reply for record in ask(samples, **options).records]

    assert replies(SAMPLES) != replies(swapped)
    assert replies(SAMPLES, image=False) == replies(swapped, image=False)


def test_equal_files_are_decoded_once_into_one_array(ask, script):
    calls = script(REPLIES)
    ask()
    pixels = [prompt.pixels[0] for prompt in calls[0]["prompts"]]
    assert [id(image) for image in pixels[::2]] == [id(image) for image in pixels[1:4:2]] + [id(pixels[5])]
    assert len({id(image) for image in pixels}) == 3


def test_verdicts_and_summary_of_scripted_replies(ask, script):
    script(REPLIES)
    result = ask(name="scripted")
    assert [r.correct for r in result.records] == [True, False, True, False, True, False]
    assert [r.status for r in result.records] == ["ok", "unparsed", "ok", "truncated", "ok", "truncated"]
    assert [r.parsed for r in result.records] == ["yes", None, "B", None, "2", None]
    assert result.records[0].reply == "Yes."
    summary = result.summary()
    assert (summary["correct"], summary["n"], summary["accuracy"]) == (3, 6, 0.5)
    assert (summary["unparsed_rate"], summary["truncated_rate"]) == (1 / 6, 2 / 6)
    assert summary["length_limit_rate"] == 1 / 6
    assert summary["interval"][0] < 0.5 < summary["interval"][1]


def test_groups_add_up_to_the_whole(ask, script):
    script(REPLIES)
    groups = ask().groups()
    assert set(groups) == {"kind", "source", "modality", "organ"}
    for table in groups.values():
        assert (sum(a.correct for a in table.values()), sum(a.n for a in table.values())) == (3, 6)
    assert groups["modality"]["xray"].accuracy == 0.5 and groups["modality"]["ct"].n == 4
    assert set(groups["organ"]) == {"chest", "(none)"}
    assert groups["kind"]["yes_no"].images == 2


def test_protocol_decides(ask, script):
    script(REPLIES)
    assert [r.correct for r in ask(protocol="medevalkit-fixed").records] == [True, True, True, False, False, True]


def test_replies_for_which_the_harness_draws_are_counted_and_never_right(ask, script):
    samples = [question(n, "choice", "AB"[n], ("lung", "liver"), benchmark="mmmu_med") for n in range(2)]
    script([("lung", "stop"), ("B", "stop")])
    result = ask(samples, protocol="medevalkit-fixed")
    assert [(r.correct, r.status) for r in result.records] == [(False, "unread"), (True, "ok")]
    assert result.summary()["unread_rate"] == 0.5


def test_a_question_is_asked_as_its_protocol_knows_it(ask, script, tokenizer):
    """MedEvalKit asks VQA-RAD's closed questions as open ones; the record keeps the question's own kind."""
    sample = question(7, "closed", "left", benchmark="vqa_rad")
    for protocol, wording, correct in (("strict", "word or phrase", True), ("medevalkit-fixed", "concisely", False)):
        calls = script([("Left.", "stop")])
        (record,) = ask([sample], protocol=protocol).records
        assert wording in tokenizer.decode(calls[0]["prompts"][0].tokens)
        assert (record.kind, record.correct) == ("closed", correct)


BENCHMARK = """
from dataclasses import replace
from infimed_jax.evaluation.benchmark import Benchmark, Verdict

def first_word(sample, reply, finished):
    word = reply.split()[0].strip(".,").lower()
    return Verdict(word == sample.answer, "ok", word, "first word")

BENCHMARK = Benchmark("mine", ask=lambda sample: replace(sample, question=sample.question + " Now."),
                      medevalkit_kind=lambda sample: "open", grades={"first-word": first_word}, groups=("split_by",))
"""


def test_a_benchmark_from_a_file_says_how_its_questions_are_asked_and_graded(ask, script, tokenizer, tmp_path):
    (tmp_path / "my_benchmark.py").write_text(BENCHMARK)
    file = str(tmp_path / "my_benchmark.py")
    sample = question(8, answer="yes", split_by="a")
    calls = script([("Yes, I see", "stop")] * 3)
    result = ask([sample], benchmark=file, protocol="first-word")
    (record,) = result.records
    assert (record.correct, record.rule, record.question) == (True, "first word", "Q8?")
    assert "Q8? Now." in tokenizer.decode(calls[0]["prompts"][0].tokens)
    assert set(result.groups()["split_by"]) == {"a"}
    other = ask([sample], benchmark=file, protocol="medevalkit-fixed")
    assert "concisely" in tokenizer.decode(calls[1]["prompts"][0].tokens)
    assert not other.records[0].correct  # an open question wants the very text
    with pytest.raises(UserError, match="not comparable"):
        compare_runs(other, ask([sample], protocol="medevalkit-fixed"))
    with pytest.raises(UserError, match=r"unknown protocol 'first-word'; there are strict, medevalkit-fixed"):
        ask([sample], protocol="first-word")
    with pytest.raises(UserError, match=r"--benchmark must be one of medxpertqa, .*, not 'slakes'"):
        ask([sample], benchmark="slakes")


def test_a_benchmark_may_word_its_questions_itself(ask, script, tokenizer, tmp_path):
    words = 'wording=lambda question, reasoning: f"Now: {question.question} Thoughts: {reasoning}.")'
    text = f'from infimed_jax.evaluation.benchmark import Benchmark\nBENCHMARK = Benchmark("mine", {words}\n'
    (tmp_path / "worded.py").write_text(text)
    calls = script([("Yes.", "stop")] * 2)
    for reasoning in (False, True):
        ask([question(8)], benchmark=str(tmp_path / "worded.py"), reasoning=reasoning)
        (prompt,) = calls[-1]["prompts"]
        assert f"\nNow: Q8? Thoughts: {reasoning}.<|im_end|>" in tokenizer.decode(prompt.tokens)


def test_progress_counts_over_chunks(ask, script, monkeypatch):
    monkeypatch.setattr(run, "CHUNK", 4)
    calls, seen = script(REPLIES), []
    result = ask(report=lambda *state: seen.append(state))
    assert [len(call["prompts"]) for call in calls] == [4, 2]
    assert [state[:2] for state in seen] == [(4, 6), (6, 6)]
    assert {call["longest"] for call in calls} == {max(len(p) for call in calls for p in call["prompts"])}
    assert [r.correct for r in result.records] == [True, False, True, False, True, False]


def test_reasoning_opens_no_empty_think_block(ask, script, tokenizer):
    calls = script(REPLIES * 2)
    ask(reasoning=True)
    thinking = tokenizer.decode(calls[0]["prompts"][0].tokens)
    assert thinking.endswith("<|im_start|>assistant\n") and "\\boxed" in thinking
    ask(reasoning=False)
    assert tokenizer.decode(calls[1]["prompts"][0].tokens).endswith("<think>\n\n</think>\n\n")


def test_comparisons_are_of_like_with_like(ask, script):
    script(REPLIES)
    seeing = ask(name="seeing")
    script([("no", "stop")] * 6)
    blind = ask(name="blind", image=False)
    gain = image_gain(seeing, blind)
    assert (gain.difference, gain.only_a, gain.only_b, gain.images) == (2 / 6, 3, 1, 3)
    with pytest.raises(UserError, match="blind"):
        image_gain(blind, seeing)
    script(REPLIES)
    with pytest.raises(UserError, match="protocol"):
        compare_runs(seeing, ask(protocol="medevalkit-fixed"))
    script(REPLIES)
    with pytest.raises(UserError, match="different questions"):
        compare_runs(seeing, ask(SAMPLES[:5]))


def test_fingerprint_is_of_the_questions_in_any_order():
    assert fingerprint(SAMPLES) == fingerprint(SAMPLES[::-1])
    for change in ({"question": "Q?"}, {"answer": "no"}, {"images": (png(9),)}, {"id": "x"}, {"kind": "open"}):
        assert fingerprint([replace(SAMPLES[0], **change), *SAMPLES[1:]]) != fingerprint(SAMPLES)


def test_image_id_is_the_sources_else_the_files_else_the_questions():
    sample = SAMPLES[0]
    assert image_id(sample) == "s/i0"
    unnamed = replace(sample, meta={})
    assert image_id(unnamed) == image_id(replace(unnamed, id="other")) != image_id(replace(unnamed, images=(png(1),)))
    assert image_id(replace(unnamed, images=())) == sample.id
    assert image_id(replace(unnamed, images=(png(1), png(2)))) != image_id(replace(unnamed, images=(png(1), png(3))))


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        ([], {}, "empty"),
        (SAMPLES, {"protocol": "lenient"}, "unknown protocol 'lenient'; there are strict"),
        ([Chat("s/test/0", "s", "test", (), ())], {}, "s/test/0 is a chat"),
        ([SAMPLES[0], SAMPLES[0]], {}, "repeat an id"),
        (SAMPLES, {"folder": "/proc/x"}, "cannot write to the folder /proc/x"),
        ([replace(SAMPLES[3], images=(b"",))], {}, r"s/test/3: image 1 is unreadable \(empty file\)"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(ask, samples, options, message):
    with pytest.raises(UserError, match=message):
        ask(samples, **options)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("replies", [0, 1, 3, 5])
def test_a_stopped_evaluation_goes_on_to_the_same_files(ask, tmp_path, monkeypatch, replies, temperature):
    """Stopped after any number of replies, in any chunk; what had come is not asked again."""
    monkeypatch.setattr(run, "CHUNK", 4)
    sampling = replace(SAMPLING, temperature=temperature)
    ask(folder=tmp_path / "whole", sampling=sampling)
    asked, answer, put = [], Policy.answer, run.Journal.put

    def counted(policy, prompts, *args, numbers, **more):
        asked.extend(numbers)
        return answer(policy, prompts, *args, numbers=numbers, **more)

    def stopping(journal, number, reply):
        if len(journal.replies) == replies:
            raise Stopped
        put(journal, number, reply)

    with monkeypatch.context() as patch:
        patch.setattr(run.Journal, "put", stopping)
        with pytest.raises(Stopped):
            ask(folder=tmp_path / "stopped", sampling=sampling)
    part = tmp_path / "stopped/replies.part.jsonl"
    assert len(part.read_text().splitlines()) == replies
    part.write_text(part.read_text() + '[5, {"text": "cut')  # by a kill
    monkeypatch.setattr(Policy, "answer", counted)
    ask(folder=tmp_path / "stopped", sampling=replace(sampling, slots=8))
    assert len(asked) == len(SAMPLES) - replies
    for file in ("replies.jsonl", "scores.jsonl", "asked.json"):
        assert (tmp_path / "stopped" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    one, other = (json.loads((tmp_path / n / "summary.json").read_text()) for n in ("stopped", "whole"))
    for summary in (one, other):
        del summary["seconds"], summary["sampling"]["slots"]
    assert one == other
    assert not part.exists()
    ask(folder=tmp_path / "stopped", sampling=sampling)  # a finished one is graded again, not asked
    assert len(asked) == len(SAMPLES) - replies


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"protocol": "medevalkit-fixed"}, "protocol was 'strict', is 'medevalkit-fixed'"),
        ({"sampling": replace(SAMPLING, max_tokens=7)}, r"sampling was .*'max_tokens': 6.*, is .*'max_tokens': 7"),
        ({"samples": SAMPLES[1:]}, "questions was"),
        ({"image": False}, "image was True, is False"),
    ],
)
def test_another_evaluation_is_refused_in_the_same_folder(ask, tmp_path, change, words):
    ask(folder=tmp_path / "out")
    before = {file: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    with pytest.raises(UserError, match=f"holds another evaluation .*{words}.*choose another --output"):
        ask(folder=tmp_path / "out", **change)
    assert {file: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_a_folder_of_other_files_is_refused(ask, tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="holds other files: choose another --output"):
        ask(folder=tmp_path)
    (tmp_path / "asked.json").write_text("[1]")
    with pytest.raises(UserError, match=r"asked\.json is damaged"):
        ask(folder=tmp_path)


def predict(tmp_path, *lines, lenient=False, raw=b""):
    file = tmp_path / "predictions.jsonl"
    file.write_bytes(raw or "".join(f"{line}\n" for line in lines).encode())
    return evaluate(SAMPLES, Predictions(file, lenient), Terms(SAMPLING))


def said(number, response, **more):
    return json.dumps({"id": f"s/test/{number}", "response": response} | more)


def test_predictions_are_graded_and_questions_without_one_are_counted(tmp_path):
    lines = [said(5, "Yes."), said(0, "yes"), said(2, "B"), "", said(3, "left lung", finish="length")]
    result = predict(tmp_path, *lines)
    assert [r.correct for r in result.records] == [True, False, True, False, False, True]
    assert [r.status for r in result.records] == ["ok", "unanswered", "ok", "truncated", "unanswered", "ok"]
    assert result.summary()["unanswered_rate"] == 2 / 6


@pytest.mark.parametrize(
    ("line", "words", "lenient"),
    [
        (said(9, "yes"), "has 1 ids of no question, such as s/test/9", {"unknown ids": 1}),
        (said(0, "no"), "line 2: s/test/0 has a response already", {"repeated ids": 1}),
        (said(1, None), "line 2: the response to s/test/1 is null", {"null responses": 1}),
        (said(1, 7), "line 2: `id` and `response` must be texts", None),
        ('{"id": "s/test/1"}', "line 2: each line must be an object", None),
        ("no JSON", "line 2: each line must be an object", None),
        ("[" * 100_000, "line 2: each line must be an object", None),
    ],
)
def test_predictions_that_cannot_be_used_are_named(tmp_path, line, words, lenient):
    with pytest.raises(UserError, match=words):
        predict(tmp_path, said(0, "yes"), line)
    if lenient is None:
        with pytest.raises(UserError, match=words):
            predict(tmp_path, said(0, "yes"), line, lenient=True)
        return
    file = tmp_path / "predictions.jsonl"
    predictions = Predictions(file, lenient=True)
    result = evaluate(SAMPLES, predictions, Terms(SAMPLING))
    assert predictions.passed_over == lenient
    assert [r.correct for r in result.records] == [True] + [False] * 5


def test_predictions_in_another_encoding_are_named(tmp_path):
    with pytest.raises(UserError, match="line 1: not UTF-8"):
        predict(tmp_path, raw=said(0, "yes").encode("utf-16"))
    assert predict(tmp_path, raw=b"\xef\xbb\xbf" + said(0, "yes").encode()).records[0].correct
    with pytest.raises(UserError, match="cannot read the predictions"):
        Predictions(tmp_path / "none.jsonl")


def test_a_long_reply_is_one_reply(tmp_path):
    assert predict(tmp_path, said(0, "so " * 40_000 + "\n\nThe answer is yes.")).records[0].correct


def test_questions_that_are_read_in_each_pass_need_no_list(ask):
    """`evaluate` takes what can be iterated twice, such as files that are read in place."""

    class Files:
        def __iter__(self):
            return iter(SAMPLES)

    assert ask(Files()).records == ask().records

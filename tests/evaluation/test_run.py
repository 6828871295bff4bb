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
from infimed_jax.evaluation import respondents
from infimed_jax.evaluation.respondents import Terms, ask_policy
from infimed_jax.evaluation.run import compare_runs, evaluate, fingerprint, image_gain, image_id, read_evaluation
from infimed_jax.models.params import init_params
from infimed_jax.sampling.engine import Completion
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
            respond = ask_policy(policy, asked, jax.random.key(0), report)
            return evaluate(samples, respond, asked, folder=folder, name=name)

        yield run_it


@pytest.fixture
def script(monkeypatch, tokenizer):
    """Make the policy answer with given (reply, finish) pairs; returns the calls it had."""

    def install(replies):
        calls = []

        def answer(policy, prompts, sampling, key, *, longest, on_progress):
            first = sum(len(call["prompts"]) for call in calls)
            calls.append({"prompts": prompts, "longest": longest})
            made = []
            for reply, finish in replies[first : first + len(prompts)]:
                ids = [*tokenizer.encode(reply), *([tokenizer.im_end] if finish == "stop" else [])]
                made.append(Completion(np.array(ids, np.int32), np.zeros(len(ids), np.float32), finish))
            on_progress(len(made), len(prompts), "")
            return made

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
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"replies.jsonl", "summary.json"}
    again = read_evaluation(tmp_path / "out")
    assert (again.records, again.terms, again.summary()) == (result.records, result.terms, result.summary())


def test_chunks_change_nothing(ask, monkeypatch):
    whole = ask()
    monkeypatch.setattr(respondents, "CHUNK", 4)
    assert ask().records == whole.records


def test_chunks_draw_differently(ask, monkeypatch):
    """Sampled replies to one question, asked in two chunks."""
    monkeypatch.setattr(respondents, "CHUNK", 1)
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
    monkeypatch.setattr(respondents, "CHUNK", 4)
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

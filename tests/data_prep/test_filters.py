"""Filtering: each fault is found and named, ordinary medical text stays, and nothing vanishes uncounted."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.sources import slake, vqa_rad
from data_prep.steps.filter import (
    Rules,
    assessed_sources,
    filter_dataset,
    is_refusal,
    is_repeating,
    language,
    why_left_out,
)
from infimed_jax.data.sample import Chat, Turn
from infimed_jax.data.storage import open_samples, write_samples
from infimed_jax.errors import UserError
from tests.data_prep.samples import damage

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"
REFUSALS = [
    "Sorry, I can't help with that.",
    "I'm sorry, but I cannot provide a diagnosis.",
    "I\u2019m very sorry, but I can\u2019t assist with this request.",
    "I apologize, but I am unable to view the image.",
    "I cannot provide medical advice.",
    "I am unable to analyze this image.",
    "Unfortunately, I cannot see the picture.",
    "As an AI language model, I do not have eyes.",
    "Sorry, as an AI I should not say.",
    "很抱歉,我无法回答这个问题。",
    "对不起，我不能提供诊断。",
    "作为一个人工智能，我没有视觉。",
    "我无法查看图片。",
    "Lo siento, pero no puedo ayudar con eso.",
    "Je suis désolé, mais je ne peux pas répondre.",
    "Es tut mir leid, aber dabei kann ich nicht helfen.",
    "Desculpe, mas não posso ajudar.",
    "Mi dispiace, ma non posso rispondere.",
    "Извините, я не могу ответить.",
    "申し訳ありませんが、その質問にはお答えできません。",
    "죄송하지만 답변드릴 수 없습니다.",
    "I'm sorry. I can't help with that.",
    "Sorry! I cannot answer this question.",
    "I'm afraid I can't assist with that.",
    "I cannot determine the answer without the image.",
    "I don't have access to the image.",
    "I do not have the ability to view images.",
    "I can\u2019t see the image you are referring to.",
    "I am unable to view or analyze images directly.",
    "I cannot identify people in images.",
    "I'm just an AI language model and cannot view images.",
    "As a text-based AI, I cannot see the image.",
    "I must decline to answer.",
    "Lo siento. No puedo ver imágenes.",
    "Je suis désolé. Je ne peux pas voir l'image.",
    "Es tut mir leid, aber ich kann Ihnen dabei nicht helfen.",
    "Desculpe. Não consigo ver a imagem.",
    "申し訳ございません。画像を見ることができません。",
    "죄송합니다. 도와드릴 수 없습니다.",
    "As an AI assistant developed to help doctors, I'm unable to diagnose.",
    "As an AI model, providing a diagnosis is beyond my capabilities.",
    "作为AI助手，无法提供诊断。",
    "I cannot provide a diagnosis, but please consult a radiologist.",
    "I cannot provide medical advice, but I can recommend a doctor.",
    "I cannot see the image, but if you describe it, there is a chance.",
    "I'm sorry, but I cannot help. However, you can show it to a doctor.",
]
ANSWERS = [
    "The fracture cannot be seen in this view.",
    "I can see a fracture of the left clavicle.",
    "No.",
    "Unfortunately, the tumour has grown since the last study.",
    "It is not possible to exclude a small effusion; I cannot see the costophrenic angle.",
    "Sorry to hear that; a rash of this kind is usually harmless.",
    "The patient apologized and said that she could not move her arm.",
    "肺部无法看到明显病变。",
    "患者不能行走。",
    "Leider zeigt das Bild eine Fraktur.",
    "Leider kann ich einen Tumor sehen.",
    "I cannot see a fracture in this image.",
    "I can't see any abnormality in the lungs.",
    "I am unable to identify a fracture on this film.",
    "I am unable to see it extending into the mediastinum.",
    "We cannot exclude pneumonia.",
    "Unfortunately, I cannot rule out a malignancy.",
    "I'm afraid I cannot see a clear fat plane.",
    "I am sorry to see such a large mass. I cannot exclude malignancy.",
    "I don't have access to the prior study, but the nodule is 4 mm.",
    "As an air-filled structure, the lung is dark.",
    "죄송합니다. 결절이 없습니다.",
    "As an AI-detected finding, the nodule measures 8 mm.",
    "As an AI-assisted second reading shows, no fracture is present.",
    "As an AI tool flagged before, the nodule measures 8 mm.",
    "作为AI检测到的病灶，结节直径为8毫米。",
    "We cannot provide a diagnosis from a single slice, but the appearance suggests a meningioma.",
    "I cannot make a diagnosis from one view; however, the opacity is consistent with pneumonia.",
    "I can't provide a definite answer. However, there is a mass in the left lobe.",
    "I cannot give a medical diagnosis, but I see a fracture of the clavicle.",
    "我无法提供诊断，但影像提示脑膜瘤。",
    "Accession 11111111111",
    "ATATATAT",
    "The primer is ATATATATATATATATATATATAT.",
    "The UID is 1.2.1.2.1.2.1.2.1.2.1.2.1.2.1.2.1.2.1.2.1.2.1.2.",
    "Scores: 0, 0, 0, 0, 0, 0.",
    "0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0",
    "As an AI score of 0.9 suggests, malignancy cannot be excluded.",
    "作为AI辅助诊断结果，本例提示肺炎。",
]


def image(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((side, 40, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def chat(reply: str, number: int = 0, source: str = "toy", images: tuple[bytes, ...] = (), **meta: str) -> Chat:
    turns = (Turn("user", (*range(len(images)), "what is it")), Turn("assistant", (reply,)))
    return Chat(f"{source}/train/{number}", source, "train", images, turns, meta=meta)


@pytest.mark.parametrize("reply", REFUSALS)
def test_refusals_are_found(reply):
    assert is_refusal(reply) and why_left_out(chat(reply), Rules()) == "refusal"
    assert why_left_out(chat(reply), Rules(refusals=False)) == ""


@pytest.mark.parametrize("reply", ANSWERS)
def test_answers_are_none(reply):
    assert why_left_out(chat(reply), Rules()) == ""


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        (chat(" \n"), "empty text"),
        (chat("?!... ---"), "degenerate text"),
        (chat("a\ufffd\ufffd b\ufffd c"), "degenerate text"),
        (chat("lung lung lung lung lung"), "repeating text"),
        (chat("the left lung is clear. " * 5), "repeating text"),
        (chat("-- no finding; " + "abcabcabc" * 12), "repeating text"),
        (chat("左肺" * 12), "repeating text"),
        (chat("yes!" * 12), "repeating text"),
        (chat("ok", images=(image(40), image(27))), "image too small"),
        (chat("ok", source="poor"), "source excluded by the assessment"),
        (chat("肺部清晰，未见异常"), "language"),
        (chat("fine", language="fr"), "language"),
    ],
)
def test_each_fault_has_its_name(sample, reason):
    assert why_left_out(sample, Rules(excluded=("poor",), languages=("en",))) == reason


def test_ordinary_lists_and_tables_do_not_repeat():
    assert not is_repeating("No effusion. No pneumothorax. No consolidation. No fracture. No mass.", 12.0)
    assert not is_repeating("1 2 3 4 5 6 7 8 9 10 11 12", 12.0)
    assert not is_repeating("-" * 200 + " findings", 12.0)


def test_languages_by_script():
    for text, code in {"lung": "en", "肺部 CT": "zh", "肺は正常です": "ja", "легкие": "ru", "123": ""}.items():
        assert language(chat(text), text) == code


def test_what_goes_is_counted_and_listed_and_the_rest_stays_in_order(tmp_path):
    rows = [chat(REFUSALS[i % 21] if i % 3 else f"clear lung number {i}", i) for i in range(20)]
    write_samples(tmp_path / "in", rows, name="toy", shard_size=4)
    report = filter_dataset(tmp_path / "in", tmp_path / "out", Rules())
    assert list(open_samples(tmp_path / "out")) == rows[::3]
    assert report["removed"] == {"refusal": 13} and report["read"] == 20 == report["samples"] + 13
    assert report["removed_ids"]["refusal"] == [s.id for i, s in enumerate(rows) if i % 3]
    written = (tmp_path / "out.json").read_text()
    assert json.loads(written) == report and "orry" not in written
    assert filter_dataset(tmp_path / "in", tmp_path / "out", Rules()) == report
    with pytest.raises(UserError, match="nothing is left"):
        filter_dataset(tmp_path / "in", tmp_path / "none", Rules(excluded=("toy",)))
    assert not (tmp_path / "none").exists()


def test_damaged_records_are_named_counted_and_left_out(tmp_path):
    rows = [chat(REFUSALS[0] if i == 2 else f"clear lung number {i}", i) for i in range(6)]
    write_samples(tmp_path / "in", rows, name="toy")
    damage(tmp_path / "in")
    report = filter_dataset(tmp_path / "in", tmp_path / "out", Rules(), max_bad_records=0.2)
    assert list(open_samples(tmp_path / "out")) == [rows[1], *rows[3:]]
    assert report["removed"] == {"refusal": 1, "unreadable record": 1} and report["read"] == 6
    assert report["unreadable_records"] == ["toy record 0"]


def test_the_assessments_decision(tmp_path):
    file = tmp_path / "assessment.json"
    file.write_text(json.dumps({"sources": {"b": {"keep": False, "reason": "x"}, "a": {"keep": True, "reason": ""}}}))
    assert assessed_sources(file) == (("b",), ("a",))
    for broken in ("[]", "{}", '{"sources": {"a": {"keep": 1}}}'):
        file.write_text(broken)
        with pytest.raises(UserError, match=r"assessment\.json"):
            assessed_sources(file)


def test_sources_without_a_decision_stay_and_are_named(tmp_path):
    write_samples(tmp_path / "in", [chat("ok", i, source="abcb"[i]) for i in range(4)], name="toy")
    report = filter_dataset(tmp_path / "in", tmp_path / "out", Rules(excluded=("b",), kept=("a",)))
    assert report["not_assessed"] == ["c"] and [s.source for s in open_samples(tmp_path / "out")] == ["a", "c"]
    assert filter_dataset(tmp_path / "in", tmp_path / "all", Rules())["not_assessed"] == []


@pytest.mark.skipif(not (REAL / "vqa_rad").is_dir(), reason=f"VQA-RAD is not at {REAL}")
def test_no_real_vqa_rad_sample_is_lost():
    assert [why_left_out(s, Rules()) for s in vqa_rad.read(REAL / "vqa_rad", "documents")] == [""] * 1793


@pytest.mark.skipif(not (REAL / "slake_text").is_dir(), reason=f"SLAKE is not at {REAL}")
def test_no_real_slake_answer_is_taken_for_a_fault():
    rows = slake.read_rows(REAL / "slake_text" / "train.json")
    answers = [chat(row["answer"], language=row["q_lang"]) for row in rows if row["answer"].strip()]
    assert {why_left_out(sample, Rules()) for sample in answers} == {""}

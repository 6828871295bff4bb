"""Identifiers: found where a person would find them, nowhere else, and masked without touching anything besides."""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import privacy
from data_prep.privacy import find, mask, scrub
from data_prep.privacy import text as module
from data_prep.privacy.patterns import KINDS
from data_prep.privacy.text import NO_PROMISE
from infimed_jax.data.prompts import as_turns
from infimed_jax.data.sample import Chat, Turn
from infimed_jax.data.storage import open_samples, write_samples
from infimed_jax.errors import UserError
from tests.data_prep.samples import caption, damage, picture, question

IDENTIFIERS = [
    ("Seen on 2019-03-05.", "Seen on [DATE]."),
    ("Seen on 5/3/2019 and 03/05/19.", "Seen on [DATE] and [DATE]."),
    ("Seen on 05.03.2019, StudyDate 20190305.", "Seen on [DATE], StudyDate [DATE]."),
    ("Seen March 5, 2019, on the 5th of March and 05-MAR-2019.", "Seen [DATE], on the [DATE] and [DATE]."),
    ("In May 2020 and on Sept. 3rd.", "In [DATE] and on [DATE]."),
    ("2019年3月5日入院，3月8号出院", "[DATE]入院，[DATE]出院"),
    ("二〇一九年三月五日", "[DATE]"),
    ("MRN: 1234567", "MRN: [RECORD]"),
    ("medical record number is AB-1234", "medical record number is [RECORD]"),
    ("Patient ID 0012345, Accession No. CT-2019-33", "Patient ID [RECORD], Accession No. [RECORD]"),
    ("SSN 123-45-6789", "SSN [RECORD]"),
    ("病历号：A123456，住院号20190301", "病历号：[RECORD]，住院号[RECORD]"),
    ("身份证号 11010519491231002X", "身份证号 [RECORD]"),
    ("11010519491231002X", "[RECORD]"),
    ("Call 555-123-4567, (555) 123-4567 or +1 555 123 4567.", "Call [PHONE], [PHONE] or [PHONE]."),
    ("Tel. +49 89 1234 5678, fax: 089 123456", "Tel. [PHONE], fax: [PHONE]"),
    ("电话：13812345678，或138-1234-5678，010-12345678", "电话：[PHONE]，或[PHONE]，[PHONE]"),
    ("Write to jane.doe+x@mail.clinic.org.", "Write to [EMAIL]."),
    ("Dr. Smith and Prof John A. Doe", "Dr. [NAME] and Prof [NAME]"),
    ("Mrs. O'Brien-Müller, Mr. van der Berg", "Mrs. [NAME], Mr. [NAME]"),
    ("Patient name: Jane Doe; Referring physician: House", "Patient name: [NAME]; Referring physician: [NAME]"),
    ("PatientName DOE^JANE^^Mrs", "PatientName [NAME]"),
    ("患者张三，男，由王建国教授和李医生诊治", "患者[NAME]，男，由[NAME]教授和[NAME]医生诊治"),
    ("姓名：欧阳娜娜 性别：女", "姓名：[NAME] 性别：女"),
    ("姓名：张三性别：男", "姓名：[NAME]性别：男"),
    (
        "A 92-year-old woman, aged 95, 101 y/o, 90 yrs old",
        "A [AGE]-year-old woman, aged [AGE], [AGE] y/o, [AGE] yrs old",
    ),
    ("A nonagenarian. Age: 104.", "A [AGE]. Age: [AGE]."),
    ("男，92岁；九十三岁；年龄：101", "男，[AGE]岁；[AGE]岁；年龄：[AGE]"),
    ("Seen by Dr.Smith and Dr. Łukasz Šimić.", "Seen by Dr.[NAME] and Dr. [NAME]."),
    ("Dr. Müller-Łukasz", "Dr. [NAME]"),
    ("Signed by: Anna van Dyk", "Signed by: [NAME]"),
    ("Name: SMITH, JOHN A", "Name: [NAME] A"),
    ("Patient name: Doe, Jane, Age: 61", "Patient name: [NAME], Age: 61"),
    ("Name: Smith, Age: 61", "Name: [NAME], Age: 61"),
    ("Name: Smith, Male", "Name: [NAME], Male"),
    ("Reported by: Smith, Normal chest", "Reported by: [NAME], Normal chest"),
    ("Dr. J.R. Smith, Mr. J.Doe; dr. A.B. Smith, dr. A. Doe", "Dr. [NAME], Mr. [NAME]; dr. [NAME], dr. [NAME]"),
    ("Prof. Dr. Müller, Prof. Dr. med. Meier, Dr. Drake", "Prof. Dr. [NAME], Prof. Dr. med. [NAME], Dr. [NAME]"),
    ("prof. dr. müller, PROF. DR. MEIER", "prof. dr. [NAME], PROF. DR. [NAME]"),
    ("seen by dr. smith today", "seen by dr. [NAME] today"),
    ("dr. john q. smith reviewed the film with prof. van der berg.", "dr. [NAME] reviewed the film with prof. [NAME]."),
    ("dr. j. smith and mrs. o'brien-müller, per mr. jones", "dr. [NAME] and mrs. [NAME], per mr. [NAME]"),
    ("ms. jones is a 45 yo", "ms. [NAME] is a 45 yo"),
    ("in dr. smith's office", "in dr. [NAME] office"),
    (
        "dr Smith, dr. Smith, dr.Smith; mrs Jones; doctor John Doe",
        "dr [NAME], dr. [NAME], dr.[NAME]; mrs [NAME]; doctor [NAME]",
    ),
    ("ms. Jones and mr. Jones", "ms. [NAME] and mr. [NAME]"),
    ("SEEN BY DR. SMITH.", "SEEN BY DR. [NAME]."),
    ("DR. JOHN SMITH REVIEWED; MRS. O'BRIEN; PROF. VAN DER BERG", "DR. [NAME] REVIEWED; MRS. [NAME]; PROF. [NAME]"),
    ("PER DR. J. Q. SMITH AND DR. DOE", "PER DR. [NAME] AND DR. [NAME]"),
    ("Drs. Smith and Jones; Drs Lee, O'Neil & van Dyk agree", "Drs. [NAME]; Drs [NAME] agree"),
    ("Drs. Smith, Normal chest. Drs. Smith and Dr. Jones", "Drs. [NAME], Normal chest. Drs. [NAME] and Dr. [NAME]"),
    ("Dr. h.c. Weber, Dr.-Ing. Weber, Dipl.-Ing. Weber", "Dr. h.c. [NAME], Dr.-Ing. [NAME], Dipl.-Ing. [NAME]"),
    ("Prof. Dr.-Ing. habil. Weber, Dr. rer. nat. Weber", "Prof. Dr.-Ing. habil. [NAME], Dr. rer. nat. [NAME]"),
    ("д-р Иванов, доктор Петрова А.Б., Dr. Ђоковић", "д-р [NAME], доктор [NAME], Dr. [NAME]"),
    ("Patient: John Smith, PATIENT: DOE, JANE; Pat.: Eva Roth", "Patient: [NAME], PATIENT: [NAME]; Pat.: [NAME]"),
    ("REFERRING PHYSICIAN: JANE DOE, Ref. doctor: Roth", "REFERRING PHYSICIAN: [NAME], Ref. doctor: [NAME]"),
    ("Dictated by: Jane Doe", "Dictated by: [NAME]"),
    (
        "DOB: 5 Mar 60, DOB 03/1960, D.O.B.: 05.03.60; DOB: 05031960",
        "DOB: [DATE], DOB [DATE], D.O.B.: [DATE]; DOB: [DATE]",
    ),
    ("Date of birth: Mar 5 60, born; geb. 5. März 1960", "Date of birth: [DATE], born; geb. [DATE]"),
    ("DOB: 05 03 1960. Birth date 1960/3", "DOB: [DATE]. Birth date [DATE]"),
]


@pytest.mark.parametrize(("text", "masked"), IDENTIFIERS)
def test_identifiers_are_masked(text, masked):
    assert mask(text)[0] == masked


HARMLESS = [
    "MR brain and DR chest; MS plaques at L4-5, T2* 1.5 T, TR/TE 500/15.",
    "The lesion is 2.5 x 3.0 x 4.1 cm, 10-12-15 mm apart; ratio 3/4, 12/8, section 1.2.3.",
    "An 89-year-old, aged 45, BMI 91, 95 mm, 99 %, follow-up of 95 years of data, ages of the 120 patients.",
    "In 2019, stage III, grade 2/3; case no. 5; patient id: unknown.",
    "It may be 5 mm; May the reader decide; the march of time; in the second week.",
    "HU 1234567, 0.123456789, 100000000 cells, 1e-05, pages 1234-1239.",
    "The dr. said so, the dr. wants it; his dr. Then a dr. came; dr. recommends rest; ask your doctor. Smoking harms.",
    "dr image, dr chest, dr said, doctor said; saw the doctor Monday; can miss Crohn disease.",
    "DR IMAGE, DR CHEST, MR IMAGE, MR BRAIN, MS LESION; DO NOT MISS THE APPENDIX; MRS SHOWS CHOLINE.",
    "SEEN ON MR. LESION IS STABLE. KNOWN MS. PLAQUES PERSIST. SEVERE DR. NO EDEMA. THE DR. CAME.",
    "Signs of DR. Macula is normal. Proliferative DR. No edema. Compared with MR. Findings: MS. Plaques.",
    "TE of 30 ms. noise was low, 15ms. Images at TE 30 ms Flip 90, given in ms. Images on mr. lesion; the mr. images.",
    "DR. HARD EXUDATES; DR. MACULAR EDEMA. SEVERE DR. LASER SCARS. BACKGROUND DR. DRUSEN.",
    "Patient: Hello Doctor, I am ill. Patient: Male, 45. Patient: I have pain. Patient: Chest pain, Pat. Pending.",
    "доктор медицинских наук; доктор сказал; drs. disagree; Dipl. thesis; DOB: 1960, 45 years; DOB: unknown.",
    "mr imaging, ms lesions, mr Imaging; mr.nii, dr.com; mrs. and mr. with dr. or prof.",
    "Doctor and patient agree; Miss rate; miss nothing; the professor.",
    "随访2年3个月，3月后复查，89岁，约5号床，患者王某，女。",
    "对于医生而言，主任医师，高血压，黄色瘤，金属伪影，CT号未知。",
    "[DATE] [NAME] and Dr. [NAME], MRN: [RECORD], aged [AGE]",
    "name@ @home a@b c@d.e",
    "",
]


@pytest.mark.parametrize(
    "text", ["Dr. Müller saw Mrs. Šimić", "dr. müller saw mrs. garcía", "DR. MÜLLER SAW MRS. GARCÍA"]
)
def test_a_name_is_found_with_its_accents_apart(text):
    apart = unicodedata.normalize("NFD", text)
    title, seen_by = text.split()[0], " ".join(text.split()[2:4])
    assert apart != text and mask(apart)[0] == mask(text)[0] == f"{title} [NAME] {seen_by} [NAME]"


@pytest.mark.parametrize("text", HARMLESS)
def test_medical_text_is_left_alone(text):
    assert mask(text) == (text, Counter())


FRAGMENTS = [text for text, _ in IDENTIFIERS] + HARMLESS
PIECES = st.lists(
    st.one_of(
        st.sampled_from(FRAGMENTS),
        st.text(st.sampled_from("0123456789-/.:@ +()^年月日岁号王李医生百九DrMayMRN[]\n"), max_size=12),
        st.text(max_size=6),
    ),
    max_size=6,
)


TAG = re.compile(r"\[(?:{})\]".format("|".join(map(str.upper, KINDS))))


def tags(text: str) -> Counter[str]:
    return Counter(tag[1:-1].lower() for tag in TAG.findall(text))


@settings(deadline=None, max_examples=200)
@given(PIECES, st.sampled_from(["", " ", "; "]))
def test_masking_is_idempotent_counts_what_it_masks_and_keeps_the_rest(pieces, joint):
    text = joint.join(pieces)
    masked, counts = mask(text)
    assert mask(masked) == (masked, Counter())
    assert find(masked) == []
    # every tag that was not there before is counted, once
    assert tags(masked) - tags(text) == counts and tags(text) - tags(masked) == Counter()
    # what lies between the tags is the text's own, in its order: replacing each tag by a gap matches the text
    pattern = "(?s:.*?)".join(map(re.escape, TAG.split(masked)))
    assert re.fullmatch(pattern, text)


@settings(deadline=None, max_examples=100)
@given(PIECES)
def test_findings_lie_apart_in_order_inside_the_text(pieces):
    text = " ".join(pieces)
    found = find(text)
    assert all(0 <= f.start < f.end <= len(text) and f.kind in KINDS for f in found)
    assert all(a.end <= b.start for a, b in itertools.pairwise(found))


@pytest.mark.parametrize(
    "unit",
    [
        "a",
        "1",
        "1 ",
        "a.b-",
        "Dr. ",
        "dr. ",
        "dr. a. ",
        "dr. van ",
        "DR. A",
        "Drs. A, ",
        "Drs. Aa and ",
        "Dr. med",
        "Patient: Aa ",
        "DOB: 1 ",
        "DOB aaa. ",
        "д-р Иа ",
        "A^",
        "姓名：张",
        "1-",
        "+1 ",
        "patient id ",
        "王",
        "a@",
        "百",
    ],
)
def test_long_hostile_text_takes_no_more_than_linear_work(unit):
    # a pattern that backtracks would not come back from these
    mask(unit * 3000)


def dataset(tmp_path, samples):
    write_samples(tmp_path / "in", samples, name="d", info={"licence": "CC0-1.0"})
    return tmp_path / "in"


def test_scrub_masks_text_everywhere_and_keeps_the_rest(tmp_path):
    turns = (
        Turn("system", ("You are Dr. House.",)),
        Turn("user", ("On 2019-03-05: ", 0, " what?")),
        Turn("assistant", ("Seen.",), "Says Mr. Doe, aged 95."),
    )
    chat = Chat("vqa_rad/train/7", "vqa_rad", "train", (picture(),), turns, meta={"image_id": "x/2019-03-05.png"})
    plain = caption(1)
    folder = dataset(tmp_path, [chat, plain, question(2, question="Was it on 5/3/2019?")])
    report = scrub(folder, tmp_path / "out")
    first, second, third = open_samples(tmp_path / "out")
    assert [turn.content for turn in first.turns] == [
        ("You are Dr. [NAME].",), ("On [DATE]: ", 0, " what?"), ("Seen.",)
    ]  # fmt: skip
    assert first.turns[2].reasoning == "Says Mr. [NAME], aged [AGE]."
    assert first.images == chat.images
    assert first.meta == {"image_id": "x/2019-03-05.png", "identifiers": "age: 1, date: 1, name: 2"}
    assert second == plain
    assert third.question == "Was it on [DATE]?" and "[DATE]" in as_turns(third)[0].content[1]
    assert report["found"] == {"email": 0, "record": 0, "phone": 0, "date": 2, "name": 2, "age": 1}
    assert report["samples_with_findings"] == 2 and report["samples"] == 3
    assert report["findings"] == {"vqa_rad/train/7": {"age": 1, "date": 1, "name": 2}, "vqa_rad/train/2": {"date": 1}}
    assert report["metadata"] == {"image_id: date": 1}
    assert report["note"] == NO_PROMISE and "no promise of anonymity" in NO_PROMISE
    assert "promises none" in privacy.__doc__
    text = (tmp_path / "out.json").read_text()
    assert json.loads(text) == report and "House" not in text and "Doe" not in text and "5/3" not in text
    assert open_samples(tmp_path / "out").manifest["info"]["derived_from"] == {"licence": "CC0-1.0"}


def test_flag_counts_the_same_and_changes_no_text(tmp_path):
    samples = [question(0, question="Was it on 5/3/2019 by Dr. Smith?"), question(1), question(2, answer="2019-03-05")]
    folder = dataset(tmp_path, samples)
    flagged, masked = scrub(folder, tmp_path / "flag", "flag"), scrub(folder, tmp_path / "mask")
    assert flagged["found"] == masked["found"] and flagged["findings"] == masked["findings"]
    for before, after in zip(samples, open_samples(tmp_path / "flag"), strict=True):
        assert replace(after, meta=before.meta) == before
    assert [s.meta.get("identifiers") for s in open_samples(tmp_path / "flag")] == ["date: 1, name: 1", None, "date: 1"]


def test_a_question_about_an_identifier_cannot_be_masked_and_is_left_out_by_name(tmp_path):
    dates = ("2019-03-05", "2018-03-05")
    samples = [question(0), question(1, answer="Dr. Smith"), question(2, kind="choice", answer="A", options=dates)]
    samples.append(question(3, alternatives=("Dr. Smith",)))
    folder = dataset(tmp_path, samples)
    report = scrub(folder, tmp_path / "out")
    assert report["left_out"] == {"answer or option is an identifier": 3}
    assert report["left_out_ids"] == ["vqa_rad/train/1", "vqa_rad/train/2", "vqa_rad/train/3"]
    assert [sample.id for sample in open_samples(tmp_path / "out")] == ["vqa_rad/train/0"]
    with pytest.raises(UserError, match=r"no sample .* is left: .*: 3"):
        scrub(dataset(tmp_path / "b", samples[1:]), tmp_path / "b/out")


def test_a_finished_scrub_is_left_as_it_is_and_another_mode_is_done_anew(tmp_path):
    folder = dataset(tmp_path, [question(0, question="Was it on 5/3/2019?")])
    first = scrub(folder, tmp_path / "out")
    before = (tmp_path / "out/manifest.json").stat().st_mtime_ns
    assert scrub(folder, tmp_path / "out") == first
    assert (tmp_path / "out/manifest.json").stat().st_mtime_ns == before
    assert scrub(folder, tmp_path / "out", "flag")["mode"] == "flag"
    assert "5/3/2019" in next(iter(open_samples(tmp_path / "out"))).question


def test_a_stopped_scrub_goes_on_by_shard(tmp_path, monkeypatch):
    samples = [question(i, question=f"Was it on 5/3/2019, {i}?") for i in range(6)]
    write_samples(tmp_path / "in", samples, name="d", shard_size=2)
    whole = scrub(tmp_path / "in", tmp_path / "whole")
    seen, original = [], module.scrub_sample

    def dying(sample):
        if len(seen) == 3:
            raise RuntimeError("killed")
        seen.append(sample.id)
        return original(sample)

    monkeypatch.setattr(module, "scrub_sample", dying)
    with pytest.raises(RuntimeError):
        scrub(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.json").exists()
    again = []
    monkeypatch.setattr(module, "scrub_sample", lambda sample: again.append(sample.id) or original(sample))
    report = scrub(tmp_path / "in", tmp_path / "out")
    assert again == [f"vqa_rad/train/{i}" for i in (2, 3, 4, 5)]  # the first shard was done
    assert report == whole and report["found"]["date"] == 6
    assert list(open_samples(tmp_path / "out")) == list(open_samples(tmp_path / "whole"))


def test_unreadable_records_are_counted_and_named_until_their_shard_is_mended(tmp_path):
    samples = [caption(i) for i in range(4)]
    folder = dataset(tmp_path, samples)
    (shard,) = folder.glob("*.array_record*")
    content = shard.read_bytes()
    damage(folder)
    report = scrub(folder, tmp_path / "out", max_bad_records=0.25)
    assert report["left_out"] == {"unreadable record": 1} and report["unreadable_records"] == ["d record 0"]
    assert list(open_samples(tmp_path / "out")) == samples[1:]
    shard.write_bytes(content)
    report = scrub(folder, tmp_path / "out")
    assert report["left_out"] == {} and list(open_samples(tmp_path / "out")) == samples


def test_an_unknown_mode_is_refused(tmp_path):
    with pytest.raises(UserError, match="flag or mask"):
        scrub(tmp_path, tmp_path / "out", "delete")

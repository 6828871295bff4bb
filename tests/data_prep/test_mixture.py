"""Mixing: the right number of each part, once each, in an order that only the seed decides."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml

from data_prep.sources import SOURCES, named
from data_prep.steps.ingest import ingest
from data_prep.steps.mix import Part, load_mixture, mix
from infimed_jax.data.sample import Document
from infimed_jax.data.storage import open_samples, write_samples
from infimed_jax.data.training import held_out, open_for_training
from infimed_jax.errors import UserError
from tests.data_prep.samples import damage


def dataset(folder: Path, source: str, count: int, split: str = "train", info: dict | None = None) -> Path:
    samples = [Document(f"{source}/{split}/{i}", source, split, (), ((f"{source} {i}",),)) for i in range(count)]
    write_samples(folder, samples, name=source, info=info)
    return folder


@pytest.fixture
def parts(tmp_path) -> list[Path]:
    return [dataset(tmp_path / "a", "phantom", 40), dataset(tmp_path / "b", "mine", 30)]


def ids(folder: Path) -> list[str]:
    return [sample.id for sample in open_samples(folder)]


def test_all_of_all_parts_once(parts, tmp_path):
    report = mix([Part(folder) for folder in parts], tmp_path / "mix", 0)
    mixed = ids(tmp_path / "mix")
    assert sorted(mixed) == sorted(ids(parts[0]) + ids(parts[1]))
    assert mixed != sorted(mixed)
    assert report["samples"] == 70 and [row["taken"] for row in report["parts"]] == [40, 30]
    assert report["licences"] == {"mine": "unknown", "phantom": "Apache-2.0"}
    assert json.loads((tmp_path / "mix.json").read_text()) == report
    assert next(iter(open_samples(tmp_path / "mix"))) in [*open_samples(parts[0]), *open_samples(parts[1])]


def own(folder: Path, replies: list[str]) -> Path:
    folder.mkdir()
    turns = [[{"from": "human", "value": "Q"}, {"from": "gpt", "value": reply}] for reply in replies]
    (folder / "train.json").write_text(json.dumps([{"conversations": each} for each in turns]))
    return folder


def test_two_inputs_of_one_source_are_mixed_by_names_of_their_own(tmp_path):
    def ingested(output: str, replies: list[str], **options: str) -> Part:
        own(tmp_path / f"raw_{output}", replies)
        ingest("llava_json", tmp_path / f"raw_{output}", tmp_path / output, ["train"], options=options)
        return Part(tmp_path / output / "train")

    one, other = ingested("one", ["A", "B"]), ingested("other", ["C", ""])
    with pytest.raises(UserError, match=r"'llava_json/train/00000' occurs twice.*`data ingest --name`"):
        mix([one, other], tmp_path / "mix", 0)
    named = ingested("named", ["C", "<image>D", ""], name="clinic_b")
    report = mix([one, named], tmp_path / "mix", 0)
    assert sorted(ids(tmp_path / "mix"))[:2] == ["clinic_b/train/00000", "clinic_b/train/00001"]
    assert report["licences"] == {"clinic_b": "unknown", "llava_json": "unknown"}
    made = json.loads((tmp_path / "named" / "train.json").read_text())
    assert (made["source"], made["adapter"], made["allow_external_api"]) == ("clinic_b", "llava_json", False)
    assert made["skipped_first"] == {"no text": "clinic_b/train/00002"} and made["kept_although"] == {
        "misplaced_marks": 1
    }


def test_a_chosen_name_gains_no_terms_and_loses_none(tmp_path):
    folder = own(tmp_path / "raw", ["A"])
    for name in ("vqa_rad", "Upper", "a/b", ""):
        with pytest.raises(UserError, match="--name"):
            ingest("llava_json", folder, tmp_path / "out", ["train"], options={"name": name})
    assert named(SOURCES["llava_json"], "llava_json") == SOURCES["llava_json"]
    source = named(SOURCES["vqa_rad"], "my_rad")
    assert not source.allow_external_api  # services outside are cleared by the name of a source
    assert (source.licence, source.commercial_use) == ("CC0-1.0", True)
    exam = named(SOURCES["omnimedvqa"], "my_exam")
    assert not exam.training_allowed and exam.benchmark == "omnimedvqa"


def test_share_and_cap(parts, tmp_path):
    report = mix([Part(parts[0], share=0.5), Part(parts[1], share=0.9, cap=7)], tmp_path / "mix", 0)
    counts = Counter(id.split("/")[0] for id in ids(tmp_path / "mix"))
    assert counts == {"phantom": 20, "mine": 7}
    assert [(row["share"], row["cap"], row["taken"], row["samples"]) for row in report["parts"]] == [
        (0.5, 0, 20, 40),
        (0.9, 7, 7, 30),
    ]
    mix([Part(parts[0], share=0.75), Part(parts[1], cap=9)], tmp_path / "more", 0)
    assert set(ids(tmp_path / "mix")) <= set(ids(tmp_path / "more"))


def test_the_seed_decides_the_order_and_the_draw(parts, tmp_path):
    specs = [Part(parts[0], share=0.5), Part(parts[1])]
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        mix(specs, tmp_path / name, seed)
    one, again, two = (ids(tmp_path / name) for name in ("one", "again", "two"))
    assert one == again
    assert one != two and set(one) != set(two)


def test_a_mixture_is_made_once_and_anew_when_its_recipe_changes(parts, tmp_path):
    out = tmp_path / "mix"
    mix([Part(parts[0])], out, 0)
    made = (out / "manifest.json").stat().st_mtime_ns
    mix([Part(parts[0])], out, 0)
    assert (out / "manifest.json").stat().st_mtime_ns == made
    mix([Part(parts[0], cap=5)], out, 0)
    assert len(ids(out)) == 5


def test_an_id_twice_is_refused_and_leaves_nothing(parts, tmp_path):
    with pytest.raises(UserError, match="occurs twice"):
        mix([Part(parts[0]), Part(parts[0])], tmp_path / "mix", 0)
    assert not (tmp_path / "mix").exists() and not (tmp_path / "mix.json").exists()


def test_user_errors(parts, tmp_path):
    with pytest.raises(UserError, match="at least one part"):
        mix([], tmp_path / "mix", 0)
    with pytest.raises(UserError, match=r"share of .* must lie in \(0, 1\], not 2"):
        Part(parts[0], share=2)
    with pytest.raises(UserError, match="cap of"):
        Part(parts[0], cap=-1)
    with pytest.raises(UserError, match="no prepared dataset"):
        mix([Part(tmp_path / "nowhere")], tmp_path / "mix", 0)


def test_damaged_records_are_named_and_the_others_stay_where_they_were(parts, tmp_path):
    mix([Part(folder) for folder in parts], tmp_path / "whole", 0)
    whole = ids(tmp_path / "whole")
    damage(parts[0])
    report = mix([Part(folder) for folder in parts], tmp_path / "mix", 0, max_bad_records=0.02)
    assert report["unreadable_records"] == ["phantom record 0"] and report["samples"] == 69
    assert ids(tmp_path / "mix") == [id for id in whole if id != "phantom/train/0"]


def test_groups_are_balanced_by_the_scarcer_one(parts, tmp_path):
    specs = [Part(parts[0], group="general"), Part(parts[1], group="medical", cap=10)]
    report = mix(specs, tmp_path / "mix", 0, balance={"general": 3, "medical": 1})
    assert [row["taken"] for row in report["parts"]] == [30, 10]
    report = mix(specs, tmp_path / "other", 0, balance={"general": 1, "medical": 0.1})
    assert [row["taken"] for row in report["parts"]] == [40, 4]
    with pytest.raises(UserError, match="'medical', which the balance gives no weight"):
        mix(specs, tmp_path / "bad", 0, balance={"general": 1})
    with pytest.raises(UserError, match="no part is of that group"):
        mix(specs, tmp_path / "bad", 0, balance={"general": 1, "medical": 1, "text": 1})


def test_a_test_set_is_no_part(parts, tmp_path):
    """Neither as ingestion writes it, nor behind a step that only removes samples."""
    refused = {"training_allowed": False}
    for name, info in (("c", refused), ("d", {"derived_from": {"derived_from": refused}})):
        only = dataset(tmp_path / name, "mine", 3, info=info)
        with pytest.raises(UserError, match=f"{name} holds mine/train, for evaluation only"):
            mix([Part(folder) for folder in (*parts, only)], tmp_path / "mix", 0)


def test_a_held_out_split_is_told_once_and_named_in_the_report(parts, tmp_path, caplog):
    held = dataset(tmp_path / "held", "vqa_rad", 5, "test")
    report = mix([Part(parts[0]), Part(held)], tmp_path / "mix", 0)
    assert [row["held_out"] for row in report["parts"]] == [[], ["vqa_rad/test"]]
    assert json.loads((tmp_path / "mix.json").read_text())["parts"] == report["parts"]
    (told,) = caplog.messages
    assert str(held) in told and "vqa_rad/test" in told and "leave it out" in told
    # what is trained on is the mixture, so its door tells too; the second opening of one folder adds nothing
    for _ in range(2):
        open_for_training(tmp_path / "mix")
    assert len(caplog.messages) == 2 and "mix holds vqa_rad/test" in caplog.messages[1]


def test_which_splits_are_held_out():
    splits = {split for source in SOURCES.values() for split in source.splits}
    learnt = {split for split in splits if not held_out([f"any/{split}"])}
    assert splits - learnt == {"validation", "test", "dev", "test_v1", "test_clean_v1"}
    assert held_out(["a/train", "test/train", "b/testing", "c/test/more"]) == []


def test_the_demo_and_the_stages_train_on_no_held_out_split():
    configs = Path(__file__).resolve().parents[2] / "configs"
    demo = [yaml.safe_load((configs / f"runs/quickstart/{name}.yaml").read_text()) for name in ("phantom", "vqa_rad")]
    names = [name for run in demo for stage in run["mixtures"].values() for name in stage]
    for file in (configs / "mixtures").iterdir():
        names += [str(part.folder.relative_to("data")) for part in load_mixture(file, Path("data"))[0].parts]
    assert "vqa_rad/train_usual" in names and held_out(names) == []
    assert all(held_out([run["test"]]) for run in demo)


def test_a_file_says_what_the_calls_do(parts, tmp_path):
    file = tmp_path / "stage.yaml"
    file.write_text("parts: [{dataset: a, cap: 5, group: x}, {dataset: b, share: 0.5}, {dataset: c}]\nbalance: {x: 2}")
    mixture, missing = load_mixture(file, tmp_path, skip_missing=True)
    assert mixture.parts == (Part(parts[0], cap=5, group="x"), Part(parts[1], share=0.5))
    assert mixture.balance == {"x": 2} and missing == [str(tmp_path / "c")]
    assert len(load_mixture(file, tmp_path)[0].parts) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("parts: [", "not valid YAML"),
        ("[]", "must hold `parts`"),
        ("parts: []\nseed: 1", "nothing else"),
        ("parts: [a]", "each part names its `dataset`"),
        ("parts: [{dataset: a, caps: 3}]", "unknown key 'caps' of a: dataset, share, cap, group"),
        ("parts: [{dataset: a, cap: many}]", "cap of a cannot be 'many'"),
        ("parts: [{dataset: a, cap: true}]", "cap of a cannot be True"),
        ("parts: [{dataset: a, share: 2}]", "share of"),
        ("parts: [{dataset: a}]\nbalance: {x: 0}", "a weight above 0"),
        ("parts: [{dataset: a}]\nbalance: {x: .inf}", "a weight above 0"),
        ("parts: [{dataset: a, share: .nan}]", "share of a cannot be nan"),
    ],
)
def test_broken_files_are_refused_by_name(text, message, tmp_path):
    file = tmp_path / "stage.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        load_mixture(file, tmp_path)
    with pytest.raises(UserError, match="cannot read the mixture"):
        load_mixture(tmp_path / "nowhere.yaml", tmp_path)


def test_the_stages_files_are_the_papers(tmp_path):
    folder = Path(__file__).resolve().parents[2] / "configs" / "mixtures"
    assert sorted(f.stem for f in folder.iterdir()) == [
        "pretrain", "sft_cross_distribution", "sft_general", "sft_medical",
    ]  # fmt: skip
    stages = {file.stem: load_mixture(file, tmp_path)[0] for file in folder.iterdir()}
    caps = {part.folder.relative_to(tmp_path).parts[0]: part.cap for part in stages["sft_cross_distribution"].parts}
    assert (caps["mammoth_vl"], caps["llava_med_instruct"], caps["pmc_vqa"], caps["pubmedvision_instruct"]) == (
        180_000, 13_000, 20_000, 60_000,
    )  # fmt: skip
    left_out = {"iu_xray", "medpix", "pmc_oa", "vqa_med_2019", "omnimedvqa", "mmmu_med", "medxpertqa_mm"}
    for mixture in stages.values():
        assert mixture.parts and not left_out & {part.folder.relative_to(tmp_path).parts[0] for part in mixture.parts}


def test_a_seed_below_0_is_a_mistake(parts, tmp_path):
    with pytest.raises(UserError, match="seed must not be negative, not -1"):
        mix([Part(parts[0])], tmp_path / "mix", -1)

"""Options of sources, the refusal of evaluation sets, and what every source must say of itself."""

from __future__ import annotations

import pickle

import pytest

from data_prep.sources import SOURCES
from data_prep.sources.source import Secret, Source, check_split, secret_file, text, with_options
from data_prep.steps.ingest import ingest
from infimed_jax.errors import UserError

RECIPE = [
    "datacomp",
    "ccs",
    "obelics",
    "mmc4",
    "llava_med_60k_im_text",
    "llava_med_alignment",
    "llava_med_fig_caption",
    "medtrinity",
    "pubmedvision_alignment",
    "roco",
    "rocov2",
    "mammoth_vl",
    "llava_med_instruct",
    "pathvqa",
    "pmc_vqa",
    "pubmedvision_instruct",
    "slake",
    "vqa_rad",
    "iu_xray",
    "medpix",
    "pmc_oa",
    "vqa_med_2019",
]  # the paper's Table 1 and the sets that it left out
EVALUATION = ["medxpertqa_mm", "mmmu_med", "omnimedvqa"]
CLEARED = ["phantom", "shapes", "slake", "vqa_rad", "vqa_rad_hf"]


def test_every_dataset_of_the_recipe_has_its_source():
    assert not [name for name in RECIPE if name not in SOURCES]


def test_every_source_declares_itself():
    for source in SOURCES.values():
        assert source.layout and source.obtain and source.licence and source.splits
        if source.name not in ("phantom", "shapes"):
            assert source.columns
        assert len({option.name for option in source.options}) == len(source.options)
        pickle.dumps(source)  # workers get it


def test_nothing_is_cleared_for_outside_services_by_default():
    assert [name for name, source in SOURCES.items() if source.allow_external_api] == CLEARED


def test_evaluation_sets_are_refused_for_training(tmp_path):
    assert [name for name, source in SOURCES.items() if not source.training_allowed] == EVALUATION
    for name in EVALUATION:
        assert "train" not in SOURCES[name].splits
        with pytest.raises(UserError, match=f"{name} is for evaluation only, never for training"):
            ingest(name, tmp_path, tmp_path / "out", ["train"])
    with pytest.raises(UserError, match="slake has no split 'dev': its splits are train, validation, test"):
        check_split(SOURCES["slake"], "dev")


def test_options_are_typed_and_refused_where_unknown(tmp_path):
    parquet = SOURCES["parquet"]
    with pytest.raises(UserError, match="parquet has no option 'captoin': did you mean caption"):
        with_options(parquet, {"captoin": "x"})
    with pytest.raises(UserError, match="slake has no option 'window': it has none"):
        with_options(SOURCES["slake"], {"window": "full"})
    with pytest.raises(UserError, match="dicom needs --option salt=…: a file"):
        with_options(SOURCES["dicom"], {"window": "full"})
    with pytest.raises(UserError, match=r"option salt of dicom: .*No such file"):
        with_options(SOURCES["dicom"], {"salt": str(tmp_path / "none"), "window": "full"})
    bound, recorded = with_options(parquet, {"question": "q"})
    assert recorded == {"image": "image", "question": "q", "answer": "answer"}
    assert isinstance(bound, Source) and with_options(SOURCES["slake"], {}) == (SOURCES["slake"], {})


def test_values_become_text():
    values = [" a ", 3, 2.5, True, None, ["a"], float("nan"), b"a"]
    assert [text(value) for value in values] == ["a", "3", "2.5", "", "", "", "", ""]


def test_a_secret_shows_only_its_fingerprint(tmp_path):
    (tmp_path / "salt").write_text("0123456789abcdef-secret\n")
    salt = secret_file(str(tmp_path / "salt"))
    assert bytes(salt) == b"0123456789abcdef-secret"
    assert "secret" not in f"{salt} {salt!r}" and str(salt) == str(Secret(salt)) != str(Secret(b"other" * 5))
    (tmp_path / "salt").write_text("short")
    with pytest.raises(UserError, match="at least 16 bytes"):
        secret_file(str(tmp_path / "salt"))

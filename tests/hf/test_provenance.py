"""What a card may claim of a checkpoint: only what its own metadata and its data's manifests say."""

import json
import shutil

import numpy as np
import pytest

from infimed_jax.config import Config, Data, Train, to_dict
from infimed_jax.errors import UserError
from infimed_jax.hf.provenance import allows_commercial_use, checkpoint_card, max_positions
from infimed_jax.runs.checkpoint import open_checkpoint
from infimed_jax.runs.history import history_of, stage_entry
from infimed_jax.runs.parameters import save_params


@pytest.mark.parametrize(
    ("licence", "allowed"),
    [
        *((name, True) for name in ("CC0-1.0", "CC BY 4.0", "CC-BY-SA-4.0", "cc-by-4.0", "Apache-2.0", "MIT")),
        *((name, False) for name in ("CC BY-NC 4.0", "CC-BY-NC-SA-4.0", "cc-by-nc-nd-4.0", "MIMIC licence", "unknown")),
        *((name, False) for name in ("", "not stated", "MIT-like, non-commercial", "CC BY 4.0 (NC parts)")),
    ],
)
def test_only_known_licences_allow_commercial_use(licence, allowed):
    assert allows_commercial_use(licence) is allowed


def checkpoint(folder, history, **more):
    values = to_dict(Config(train=Train(stage=history[-1]["stage"])))
    save_params(folder, [("text.norm.scale", np.ones(2, np.float32))], {"config": values, "history": history, **more})
    return folder


def test_a_checkpoint_tells_its_history_where_runs_and_data_are_gone(tmp_path):
    base = {
        "name": "Qwen3-4B",
        "architecture": "Qwen3ForCausalLM",
        "gave": "text weights",
        "licence": "licence apache-2.0",
    }
    start = {"stage": "import", "sources": [base], "max_positions": 262_144}
    (tmp_path / "data").mkdir()
    manifest = {"origins": {"a/train": 3, "b/train": 1}, "info": {"licences": {"a": "CC0-1.0", "b": "CC BY 4.0"}}}
    (tmp_path / "data/manifest.json").write_text(json.dumps(manifest))
    first = checkpoint(tmp_path / "first", [start])
    cfg = Config(data=Data(dataset=str(tmp_path / "data")), train=Train(stage="sft"))
    sft = checkpoint(tmp_path / "sft", [*history_of(open_checkpoint(first).metadata), stage_entry(cfg, {})], step=70)
    shutil.rmtree(tmp_path / "data")
    shutil.rmtree(first)
    history = history_of(open_checkpoint(sft).metadata)
    assert [entry["stage"] for entry in history] == ["import", "sft"]
    assert max_positions(history) == 262_144
    card = checkpoint_card(history, commercial={"b": False})
    assert card.base_models == ("Qwen3-4B (Qwen3ForCausalLM, text weights): licence apache-2.0",)
    assert card.closed_bases == ()
    assert [(s.name, s.licence, s.commercial_use) for s in card.sources] == [
        ("a", "CC0-1.0", True),
        ("b", "CC BY 4.0", False),
    ]
    stated = [entry | {"commercial_use": {"a": False, "b": True}} for entry in history]
    assert [s.commercial_use for s in checkpoint_card(stated, commercial={}).sources] == [False, True]
    assert len(card.stages) == 1 and card.stages[0].startswith("sft: 70 steps, ")


def test_steps_that_only_take_samples_away_keep_the_licences(tmp_path):
    ingested = {"source": "a", "licence": "CC BY 4.0"}
    manifest = {"origins": {"a/train": 3}, "info": {"derived_from": {"derived_from": ingested}}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert stage_entry(Config(data=Data(dataset=str(tmp_path))), {})["licences"] == {"a": "CC BY 4.0"}


def test_what_is_not_known_is_not_claimed(tmp_path):
    """Neither settings of another version, nor licences of data that the run was given without its folder."""
    history = [{"stage": "sft"}, stage_entry(Config(train=Train(stage="grpo")), {"questions_sha256": ""})]
    card = checkpoint_card(history_of(open_checkpoint(checkpoint(tmp_path / "grpo", history)).metadata))
    assert card.stages[0] == "sft (its settings are not known)"
    assert card.stages[1].startswith("grpo: number of steps not recorded, GRPO, ")
    assert all(not source.commercial_use for source in card.sources) and len(card.sources) == 2


@pytest.mark.parametrize("known", [{}, {"step": 0}], ids=["no step", "step 0, as an older version passed it on"])
def test_a_number_of_steps_that_no_checkpoint_recorded_is_not_made_up(tmp_path, known):
    before = stage_entry(Config(train=Train(stage="pretrain")), {}) | known
    history = [before, stage_entry(Config(train=Train(stage="sft")), {})]
    card = checkpoint_card(history_of(open_checkpoint(checkpoint(tmp_path / "sft", history, step=1200)).metadata))
    assert card.stages[0].startswith("pretrain: number of steps not recorded, ")
    assert card.stages[1].startswith("sft: 1,200 steps, ")


def test_an_evaluation_must_be_one(tmp_path):
    history = [{"stage": "sft"}]
    (tmp_path / "summary.json").write_text('{"accuracy": 1}')
    with pytest.raises(UserError, match=r"summary.json is no evaluation's"):
        checkpoint_card(history, [tmp_path])
    with pytest.raises(UserError, match="missing"):
        checkpoint_card(history, [tmp_path / "nowhere"])

"""What a card may claim of a checkpoint: only what its own metadata and its data's manifests say."""

import json

import numpy as np
import pytest

from infimed_jax.config import Config, Data, Train, to_dict
from infimed_jax.errors import UserError
from infimed_jax.hf.provenance import allows_commercial_use, checkpoint_card, max_positions, stages
from infimed_jax.train.checkpoint import save_params


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


def checkpoint(folder, *, stage, history, init_from="", dataset="", **more):
    values = to_dict(Config(data=Data(dataset=str(dataset)), train=Train(stage=stage, init_from=str(init_from))))
    save_params(folder, [("text.norm.scale", np.ones(2, np.float32))], {"config": values, "history": history, **more})
    return folder


def test_an_imports_history_is_carried_and_its_runs_settings_are_read(tmp_path):
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
    first = checkpoint(tmp_path / "first", stage="import", history=[start])
    sft = checkpoint(tmp_path / "sft", stage="sft", history=[start, {"stage": "sft"}], init_from=first,
                     dataset=tmp_path / "data")  # fmt: skip
    history = stages(sft)
    assert [stage.name for stage in history] == ["import", "sft"] and all(stage.config for stage in history)
    assert max_positions(history) == 262_144
    card = checkpoint_card(history, commercial={"b": False})
    assert card.base_models == ("Qwen3-4B (Qwen3ForCausalLM, text weights): licence apache-2.0",)
    assert [(s.name, s.commercial_use) for s in card.sources] == [("a", True), ("b", False)]
    assert len(card.stages) == 1 and card.stages[0].startswith("sft: ")


def test_what_a_run_started_from_is_named_where_it_is_gone(tmp_path):
    history = [{"stage": "sft"}, {"stage": "grpo"}]
    made = checkpoint(tmp_path / "grpo", stage="grpo", history=history, init_from=tmp_path / "gone", grpo={})
    card = checkpoint_card(stages(made))
    assert card.stages[0] == "sft (its checkpoint is no longer there: settings not known)"
    assert card.stages[1].startswith("grpo: GRPO, ")
    assert all(not source.commercial_use for source in card.sources) and len(card.sources) == 2


def test_an_evaluation_must_be_one(tmp_path):
    made = checkpoint(tmp_path / "sft", stage="sft", history=[{"stage": "sft"}])
    (tmp_path / "summary.json").write_text('{"accuracy": 1}')
    with pytest.raises(UserError, match=r"summary.json is no evaluation's"):
        checkpoint_card(stages(made), [tmp_path])
    with pytest.raises(UserError, match="missing"):
        checkpoint_card(stages(made), [tmp_path / "nowhere"])

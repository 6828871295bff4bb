"""Settings: composed, typed, and refused by name."""

import dataclasses
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st

from infimed_jax import config
from infimed_jax.config import Config, ConfigError, from_dict, load, to_dict
from infimed_jax.config.fields import settings_of
from infimed_jax.models.infimed import config as infimed

ROOT = Path(__file__).resolve().parents[1]


def test_later_files_and_overrides_win(tmp_path):
    (tmp_path / "a.yaml").write_text("train: {steps: 1, stage: a}\nmodel: {text: {num_layers: 2}}\n")
    (tmp_path / "b.yaml").write_text("train: {steps: 2}\n")
    settings = load([tmp_path / "a.yaml", tmp_path / "b.yaml"], ["train.seed=7", "optimizer.learning_rate=1e-3"])
    assert (settings.train.steps, settings.train.stage, settings.train.seed) == (2, "a", 7)
    assert settings.model.text.num_layers == 2 and settings.optimizer.learning_rate == 1e-3
    assert settings.model.vision == infimed.Vision()


@settings_of_hypothesis(deadline=None)  # reading YAML is slow on a busy machine
@given(st.integers(1, 10**6), st.floats(0, 1), st.sampled_from(["none", "dots", "full"]), st.booleans())
def test_a_configuration_survives_its_own_file(steps, rate, remat, masked):
    settings = load(
        [],
        [
            f"train.steps={steps}",
            f"optimizer.learning_rate={rate!r}",
            f"train.remat={remat}",
            f"data.mask_segments={masked}",
        ],
    )
    assert from_dict(Config, yaml.safe_load(yaml.safe_dump(to_dict(settings)))) == settings
    assert settings.optimizer.learning_rate == rate and settings.data.mask_segments is masked


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.step=3", ("train.step", "did you mean train.steps")),
        ("trian.steps=3", ("trian", "train")),
        ("train.remat=ful", ("train.remat", "full")),
        ("train.steps=1.5", ("train.steps", "int")),
        ("train.steps=true", ("train.steps", "int")),
        ("train.stage=5", ("train.stage", "str")),
        ("data.mask_segments=1", ("data.mask_segments", "bool")),
        ("train.train=[vision,heads]", ("train.train", "heads")),
        ("train=3", ("train",)),
        ("train.steps", ("train.steps=20",)),
        ("train.stage=[", ("YAML",)),
        ("model.projector.visual_tokens=145", ("visual_tokens", "145")),
        ("model.projector.visual_tokens=784", ("visual_tokens", "784", "729")),
        ("model.vision.num_heads=7", ("hidden_size", "num_heads")),
        ("model.vision.feature_layer=28", ("feature_layer", "27")),
        ("model.text.num_kv_heads=3", ("num_kv_heads",)),
        ("train.global_batch=0", ("global_batch",)),
        ("train.micro_batches=3", ("global_batch", "micro_batches")),
        ("train.rows_per_device=-1", ("rows_per_device",)),
        ("train.lora.rank=-1", ("lora.rank",)),
        ("optimizer.weight_decay=.nan", ("optimizer.weight_decay", "finite", "nan")),
        ("optimizer.clip_norm=inf", ("optimizer.clip_norm", "finite", "inf")),
        ("optimizer.moments_dtype=float16", ("moments_dtype", "bfloat16")),
        ("mesh.tensor=-2", ("mesh.tensor=-2 must count devices, or be -1", "or 0 to have it chosen")),
        ("grpo.group_size=1", ("group_size",)),
        ("grpo.update_prompts=100", ("prompts", "update_prompts")),
        ("sampling.top_p=0", ("top_p",)),
        ("sampling.temperature=-1", ("temperature", "0 (greedy)")),
        ("sampling.temperature=.inf", ("temperature", "finite")),
        ("sampling.temperature=.nan", ("temperature", "finite")),
        ("sampling.temperature=1e-40", ("temperature", "[1e-6, 1e6]")),
        ("sampling.repetition_penalty=0", ("repetition_penalty", "[1e-6, 1e6]")),
        ("sampling.repetition_penalty=.inf", ("repetition_penalty", "finite")),
        ("mesh.data=0", ("mesh.data=0 must count devices, or be -1 for what the others leave",)),
        ("data.buckets=5", ("buckets",)),
        ("data.threads=-1", ("data.threads=-1 must be at least 0",)),
        ("train.log_every=0", ("train.log_every=0 must be at least 1",)),
        ("train.checkpoint_every=0", ("train.checkpoint_every=0 must be at least 1",)),
        ("train.keep_checkpoints=0", ("train.keep_checkpoints=0 must be at least 1",)),
        ("train.logit_chunk=0", ("train.logit_chunk=0 must be at least 1",)),
        ("train.epochs=0", ("train.epochs=0 must be at least 1",)),
        ("train.steps=-3", ("train.steps=-3 must be at least 0",)),
        ("train.seed=-1", ("train.seed=-1 must be at least 0",)),
        ("train.seed=4294967296", ("train.seed=4294967296 must be below 2**32",)),
        ("train.max_skipped_updates=-1", ("train.max_skipped_updates=-1 must be at least 0",)),
        ("optimizer.beta1=2", ("optimizer.beta1 must lie in [0, 1)",)),
        ("optimizer.final_fraction=2", ("optimizer.final_fraction is a share",)),
        ("model.text.num_kv_heads=0", ("model.text.num_kv_heads=0 must be at least 1",)),
        ("model.vision.patch_size=0", ("model.vision.patch_size=0 must be at least 1",)),
        ("sampling.slots=0", ("sampling.slots=0 must be at least 1",)),
        ("grpo.update_prompts=0", ("grpo.update_prompts=0 must be at least 1",)),
        ("grpo.steps=0", ("grpo.steps=0 must be at least 1",)),
        ("grpo.temperature=0", ("grpo.temperature must lie in [1e-6, 1e6]",)),
        ("grpo.clip_low=-0.1", ("grpo.clip_low=-0.1 must be at least 0",)),
    ],
)
def test_what_cannot_be_is_refused_by_name_in_one_line(override, words):
    with pytest.raises(ConfigError) as caught:
        load([], [override])
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.micro_batches=2", "train.rows_per_device=2"], ("micro_batches=2", "rows_per_device=2", "set one")),
        (["train.lora.rank=4", "train.train=[projector]"], ("train.lora.rank", "text")),
        (["train.lora.rank=4", "train.lora.targets=[]"], ("train.lora.targets",)),
    ],
)
def test_settings_that_contradict_each_other_are_refused(overrides, words):
    with pytest.raises(ConfigError) as caught:
        load([], overrides)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["mesh.data=-1"], "mesh.data and mesh.fsdp are -1"),  # mesh.fsdp is by default
        (["mesh.tensor=-1"], "mesh.fsdp and mesh.tensor are -1"),
        (["mesh.data=-1", "mesh.tensor=-1"], "mesh.data and mesh.fsdp and mesh.tensor are -1"),
    ],
)
def test_two_open_mesh_axes_are_refused(overrides, named):
    with pytest.raises(ConfigError, match=f"{named}, only one may be: give the others a number"):
        load([], overrides)


def test_broken_and_missing_files_are_named(tmp_path):
    (tmp_path / "broken.yaml").write_text("a: [")
    (tmp_path / "list.yaml").write_text("- 1")
    for name in ("broken.yaml", "list.yaml", "absent.yaml"):
        with pytest.raises(ConfigError, match=name):
            load([tmp_path / name])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"train:\n  steps: 5\n  steps: 6\n", "'steps' stands twice"),
        (b"train:\n  steps: 5\ntrain:\n  seed: 1\n", "'train' stands twice"),
        (b"train: 5\n", "train must be a group of settings, not 5"),
        (b"0\n", "must hold groups of settings"),
        (b"false\n", "must hold groups of settings"),
        (b"[]\n", "must hold groups of settings"),
        ("# Größe\ntrain: {}\n".encode("latin-1"), "is not UTF-8"),
        ("train: {}\n".encode("utf-16"), "is not UTF-8"),
        (b"a: " + b"[" * 3000, "is not valid YAML"),
        (b"train:\n  steps: " + b"9" * 5000, "is not valid YAML"),
        (b"data:\n  dataset: gs://bucket/x\n", "data.dataset=gs://bucket/x is an address"),
    ],
)
def test_a_file_that_would_be_misread_is_one_line(tmp_path, content, words):
    (tmp_path / "a.yaml").write_text("train:\n  steps: 7\n")
    (tmp_path / "b.yaml").write_bytes(content)
    with pytest.raises(config.ConfigError) as error:
        config.load([tmp_path / "a.yaml", tmp_path / "b.yaml"])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_group_with_comments_alone_changes_nothing(tmp_path):
    (tmp_path / "a.yaml").write_text("train:\n  steps: 7\n")
    (tmp_path / "b.yaml").write_text("train:\n  # steps: 9\noptimizer:\n")
    assert config.load([tmp_path / "a.yaml", tmp_path / "b.yaml"]).train.steps == 7
    assert config.load([tmp_path / "b.yaml", tmp_path / "a.yaml"]).train.steps == 7


def test_a_file_of_the_package_is_found_from_any_folder_and_gives_way_to_one_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load(["configs/models/tiny.yaml"]) == load([ROOT / "configs/models/tiny.yaml"]) != Config()
    (tmp_path / "configs/models").mkdir(parents=True)
    (tmp_path / "configs/models/tiny.yaml").write_text("train: {steps: 3}")
    assert load(["configs/models/tiny.yaml"]).train.steps == 3
    with pytest.raises(ConfigError, match=r"cannot read config configs/models/none\.yaml"):
        load(["configs/models/none.yaml"])


def test_every_file_of_configs_is_valid():
    files = [f for folder in ("models", "stages") for f in sorted((ROOT / "configs" / folder).glob("*.yaml"))]
    assert files
    for file in files:
        load([file])
        assert file.read_text().startswith("#"), f"{file} lacks its header comment"


@pytest.mark.parametrize("feature_layer, blocks", [(-1, 27), (-2, 26), (-28, 0), (0, 0), (26, 26), (27, 27)])
def test_the_tower_holds_the_blocks_that_the_feature_needs(feature_layer, blocks):
    assert infimed.Vision(feature_layer=feature_layer).num_blocks == blocks


def leaves(values, path=""):
    for key, value in values.items():
        yield from leaves(value, f"{path}{key}.") if isinstance(value, dict) else [(path + key, value)]


def test_help_states_every_setting_from_its_declaration():
    """Against a configuration's own values: each leaf once and in order, with its default, and words for what it is."""
    shown = {setting.name: setting for setting in settings_of(Config())}
    plain = [(name, list(s.default) if isinstance(s.default, tuple) else s.default) for name, s in shown.items()]
    assert plain == list(leaves(to_dict(Config())))
    assert [name for name, setting in shown.items() if len(setting.text) < 8] == []
    assert shown["train.steps"].limits == ("must be at least 0",)
    assert shown["train.remat"].type_name == "auto | none | dots | full"
    assert "SFT 0.1" in shown["optimizer.weight_decay"].text and "\n" not in shown["optimizer.weight_decay"].text


def test_a_subclass_inherits_fields_with_their_docstrings_and_limits():
    @dataclasses.dataclass(frozen=True)
    class Wider(config.Lora, path="mine"):
        pass

    assert [s.text for s in settings_of(Wider())] == [s.text for s in settings_of(config.Lora())]
    with pytest.raises(ConfigError, match=r"mine\.alpha must be positive"):
        Wider(alpha=0.0)


def test_a_familys_settings_come_from_its_own_module(tmp_path):
    (tmp_path / "outsider.py").write_text(
        "from dataclasses import dataclass\n"
        "from infimed_jax.config import Model\n"
        "@dataclass(frozen=True)\n"
        "class MODEL(Model):\n"
        "    PARTS = ('eye', 'mouth')\n"
        "    width: int = 3\n"
    )
    family = f"model.family={tmp_path / 'outsider.py'}"
    cfg = load([], [family, "model.width=5", "train.train=[mouth]"])
    assert (type(cfg.model).__name__, cfg.model.width) == ("MODEL", 5)
    assert from_dict(Config, to_dict(cfg)) == cfg
    with pytest.raises(ConfigError, match=r"model\.widht; did you mean model\.width"):
        load([], [family, "model.widht=5"])
    with pytest.raises(ConfigError, match=r"train\.train must be one of eye, mouth, not 'projector'"):
        load([], [family])


def test_a_module_without_settings_is_no_family(tmp_path):
    (tmp_path / "stranger.py").write_text("")
    with pytest.raises(ConfigError, match="its module must define MODEL"):
        load([], [f"model.family={tmp_path / 'stranger.py'}"])

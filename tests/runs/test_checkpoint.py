"""Checkpoints: round trips, damage, mismatches, a full disk, and a kill in the middle of a save."""

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import NamedSharding, PartitionSpec

from infimed_jax import config, sharding
from infimed_jax.errors import UserError
from infimed_jax.runs import checkpoint
from infimed_jax.runs.checkpoint import Checkpoints, abstract_like, find_checkpoint, open_checkpoint
from infimed_jax.runs.checksum import checksums, numpy_checksum
from infimed_jax.runs.parameters import load_params, open_params, save_params
from infimed_jax.train.optimizer import make_optimizer
from infimed_jax.train.state import TrainState, init_state
from infimed_jax.trees import flatten

CONFIG = config.Config(train=config.Train(train=("projector",)))
OPTIMIZER = make_optimizer(CONFIG.optimizer)
METADATA = {"config": {"train": {"stage": "toy"}}, "history": [{"stage": "a"}]}


@pytest.fixture(autouse=True)
def _mesh():
    mesh = sharding.make_mesh(config.Mesh())
    with jax.set_mesh(mesh):
        yield mesh


def _params(width: int = 4) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "body": {"layers": {"kernel": rng.normal(size=(3, width, width)).astype(np.float32)}},
        "projector": {"kernel": rng.normal(size=(width, 2)).astype(np.float32), "bias": np.ones(2, np.float32)},
    }


def _state(width: int = 4) -> TrainState:
    return init_state(_params(width), CONFIG, OPTIMIZER)


def _saved(folder: Path, steps: tuple[int, ...] = (1,), keep: int = 2) -> TrainState:
    checkpoints, state = Checkpoints(folder, keep), _state()
    for step in steps:
        checkpoints.save(step, state, METADATA | {"step": step})
    checkpoints.close()
    return state


def _leaves(params: Any) -> list[tuple[str, np.ndarray]]:
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), np.asarray(leaf)) for path, leaf in flat]


def _equal(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_round_trip_in_the_abstract_states_shardings(tmp_path: Path, _mesh):
    state = _saved(tmp_path)
    with_placement = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(_mesh, PartitionSpec())), state
    )
    checkpoints = Checkpoints(tmp_path)
    restored = checkpoints.restore(with_placement, 1)
    _equal(restored, state)
    assert all(leaf.sharding.mesh == _mesh for leaf in jax.tree.leaves(restored))
    assert checkpoints.metadata(1) == METADATA | {"step": 1}
    checkpoints.close()


def test_only_the_latest_are_kept(tmp_path: Path):
    _saved(tmp_path, steps=(1, 2, 5), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "5"]
    assert find_checkpoint(tmp_path).name == "5"


def test_a_copy_that_misses_its_files_is_named_before_its_step_runs_again(tmp_path: Path):
    _saved(tmp_path, steps=(3, 4))
    (tmp_path / "4" / "_CHECKPOINT_METADATA").unlink()
    with pytest.raises(UserError, match=r"/4 is not complete: remove it"):
        Checkpoints(tmp_path)


@pytest.mark.parametrize("rest", ["all", "metadata gone", "nothing in it"])
def test_what_a_kill_left_of_a_deletion_is_removed_and_the_newest_is_used(tmp_path: Path, rest: str, caplog):
    """Orbax deletes an old checkpoint file by file; nothing but a kill leaves one that is older than a whole one."""
    state = _saved(tmp_path, steps=(3, 4), keep=2)
    if rest == "metadata gone":
        (tmp_path / "3" / "_CHECKPOINT_METADATA").unlink()
    if rest == "nothing in it":
        shutil.rmtree(tmp_path / "3")
        (tmp_path / "3").mkdir()
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert (tmp_path / "3").exists() == (rest == "all") == ("was being deleted" not in caplog.text)
    _equal(checkpoints.restore(abstract_like(state), 4), state)
    checkpoints.save(5, state, METADATA)
    checkpoints.close()
    assert find_checkpoint(tmp_path).name == "5"


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"\x00" * 64,
        b"[1]",
        b'{"custom_metadata": 7}',
        b'{"custom_metadata": {"checksums": 1, "metadata": 2}}',
    ],
)
def test_a_damaged_index_is_one_line(tmp_path: Path, damage: bytes):
    _saved(tmp_path)
    (tmp_path / "1" / "_CHECKPOINT_METADATA").write_bytes(damage)
    with pytest.raises(UserError, match=r"checkpoint .*/1 (is damaged|cannot be read)"):
        load_params(tmp_path)


def test_a_checkpoint_that_its_run_deletes_meanwhile_is_not_called_damaged(tmp_path: Path):
    params = _saved(tmp_path, steps=(1,))
    stored = open_checkpoint(tmp_path)
    shutil.rmtree(tmp_path / "1")
    with pytest.raises(UserError, match=r"/1 was deleted while it was read, .*: run the same command again"):
        stored.read(flatten(abstract_like(params)))


def test_saving_a_step_again_leaves_it_as_it_is(tmp_path: Path):
    _saved(tmp_path, steps=(3, 3))
    assert find_checkpoint(tmp_path).name == "3"


def test_a_state_donated_right_after_the_save_is_written_as_it_was(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep=9)
    spoil = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    for step in range(3):
        state = {"w": jnp.full((256, 1024), float(step))}
        abstract = abstract_like(state)
        checkpoints.save(step, state, {})
        jax.block_until_ready(spoil(state))
    checkpoints.wait()
    for step in range(3):
        assert np.all(np.asarray(checkpoints.restore(abstract, step)["w"]) == step)
    checkpoints.close()


def test_parameters_alone_from_a_run_a_checkpoint_and_a_parameter_folder(tmp_path: Path):
    state = _saved(tmp_path / "run" / "checkpoints", steps=(1, 12))
    save_params(tmp_path / "params", _leaves(state.params), METADATA)
    folders = [tmp_path / "run", tmp_path / "run" / "checkpoints" / "12", tmp_path / "params"]
    for folder in folders:
        params, metadata = load_params(folder)
        _equal(params, jax.tree.map(np.asarray, state.params))
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
        assert metadata["history"] == METADATA["history"]
    assert load_params(folders[0])[1]["step"] == 12


def test_parameters_come_into_the_shardings_and_dtypes_asked_for(tmp_path: Path, _mesh):
    state = _saved(tmp_path)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=NamedSharding(_mesh, PartitionSpec())),
        state.params,
    )
    params, _ = load_params(tmp_path, abstract)
    assert state.frozen["body"]["layers"]["kernel"].dtype == jnp.bfloat16
    _equal(params, jax.tree.map(lambda x: x.astype(jnp.float32), state.params))
    assert all(leaf.sharding.mesh == _mesh for leaf in jax.tree.leaves(params))


def test_parameters_are_never_written_over_something(tmp_path: Path):
    save_params(tmp_path / "p", [("a.w", np.ones(3, np.float32))], {"n": 1})
    with pytest.raises(UserError, match="exists already"):
        save_params(tmp_path / "p", [("a.w", np.zeros(3, np.float32))], {"n": 2})
    params, metadata = load_params(tmp_path / "p")
    assert metadata["n"] == 1 and params["a"]["w"].tolist() == [1, 1, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_parameters_for_a_place_that_takes_none_are_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        UserError, match=f"cannot write to the folder {tmp_path}/file: file exists; name another folder"
    ):
        save_params(tmp_path / "file/p", [("a.w", np.ones(3, np.float32))], {})


def test_leaves_are_made_and_read_one_at_a_time(tmp_path: Path):
    """When a leaf is asked for, the one before is on the disk and gone."""
    before: list[weakref.ref] = []

    def leaves():
        for number in range(1, 5):
            assert all(leaf() is None for leaf in before), f"leaf {number} is asked for while another is held"
            leaf = np.ones((number, 1000), np.float32)
            before.append(weakref.ref(leaf))
            yield f"a.w{number}", leaf
            del leaf

    save_params(tmp_path / "p", leaves(), {"n": 1})
    tree, metadata = open_params(tmp_path / "p")
    assert metadata["n"] == 1
    assert {name: leaf.shape for name, leaf in tree["a"].items()} == {f"w{n}": (n, 1000) for n in range(1, 5)}
    np.testing.assert_array_equal(np.asarray(tree["a"]["w3"]), np.ones((3, 1000), np.float32))


def _replace(state: TrainState, kernel: jax.Array) -> TrainState:
    return TrainState(
        {"projector": state.trainable["projector"] | {"kernel": kernel}}, state.frozen, state.opt, state.step
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: _replace(s, jnp.zeros((4, 3))),
            r"trainable.projector.kernel as float32\[4, 2\].*asks for float32\[4, 3\]",
        ),
        (lambda s: _replace(s, jnp.zeros((4, 2), jnp.bfloat16)), r"as float32\[4, 2\].*asks for bfloat16\[4, 2\]"),
        (lambda s: TrainState(s.trainable, {}, s.opt, s.step), "1 unexpected, first frozen.body.layers.kernel"),
        (
            lambda s: TrainState(s.trainable | {"new": jnp.zeros(1)}, s.frozen, s.opt, s.step),
            "1 missing, first trainable.new",
        ),
    ],
)
def test_a_mismatch_is_one_line_that_names_the_leaf(tmp_path: Path, change, message: str):
    state = _saved(tmp_path)
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(UserError, match=message) as raised:
        checkpoints.restore(abstract_like(change(state)), 1)
    assert "\n" not in str(raised.value)
    checkpoints.close()


@pytest.mark.parametrize("part", ["missing", "shape"])
def test_parameters_of_another_model_are_refused(tmp_path: Path, part: str):
    state = _saved(tmp_path)
    other = state.params | (
        {"extra": {"w": jnp.zeros(2)}} if part == "missing" else {"projector": _params(6)["projector"]}
    )
    other = jax.tree.map(jnp.asarray, other)
    with pytest.raises(
        UserError, match="1 missing, first extra.w" if part == "missing" else "projector.kernel as float32"
    ):
        load_params(tmp_path, abstract_like(other))


def test_a_flipped_bit_raises_or_lies_where_nothing_is_read(tmp_path: Path):
    state = _saved(tmp_path)
    raised = 0
    for path in sorted((tmp_path / "1").rglob("d/*")):
        content = path.read_bytes()
        for place in range(0, len(content), 199):
            path.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
            try:
                with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
                    _equal(checkpoints.restore(abstract_like(state), 1), state)
            except UserError as error:
                assert "damaged" in str(error) or "cannot be read" in str(error)
                raised += 1
        path.write_bytes(content)
    assert raised > 0


def test_a_checkpoint_is_read_back_and_compared(tmp_path: Path, monkeypatch):
    state = _saved(tmp_path)
    read = []
    load = checkpoint.ocp.load
    monkeypatch.setattr(checkpoint.ocp, "load", lambda *arguments: read.append(load(*arguments)) or read[-1])
    monkeypatch.setattr(checkpoint, "READ_BYTES", 48)
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.verify(1, state)
        assert len(read) > 2, "in groups"
        monkeypatch.setattr(
            checkpoint, "checksums", lambda leaves: checksums(leaves) | dict.fromkeys(list(leaves)[:1], 7)
        )
        with pytest.raises(UserError, match=r"is damaged at .* remove it, and the one before it is used"):
            checkpoints.verify(1, state)


def test_the_checksum_is_what_catches_a_changed_value(tmp_path: Path, monkeypatch):
    """The reading library verifies some files itself; here it reads well, but something else than was saved."""
    state = _saved(tmp_path)
    load = checkpoint.ocp.load

    def flip(path, abstract):
        loaded = load(path, abstract)
        bits = np.array(loaded["trainable.projector.bias"]).view(np.uint32)
        bits[1] ^= 1
        return loaded | {"trainable.projector.bias": jnp.asarray(bits.view(np.float32))}

    monkeypatch.setattr(checkpoint.ocp, "load", flip)
    with (
        contextlib.closing(Checkpoints(tmp_path)) as checkpoints,
        pytest.raises(UserError, match=r"damaged at trainable\.projector\.bias"),
    ):
        checkpoints.restore(abstract_like(state), 1)
    with pytest.raises(UserError, match=r"damaged at trainable\.projector\.bias"):
        load_params(tmp_path)


@settings(max_examples=20, deadline=None)
@given(
    x=hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=3, max_side=5), elements=st.floats(width=32)),
    half=st.booleans(),
    data=st.data(),
)
def test_host_and_device_checksums_agree_and_every_flip_changes_them(x: np.ndarray, half: bool, data):
    x = x.astype(ml_dtypes.bfloat16) if half else x
    bits = np.array(x, copy=True).reshape(-1).view(np.uint16 if half else np.uint32)
    # Bits go in as they are: jnp.asarray may quieten a signalling NaN on the way.
    device = jax.lax.bitcast_convert_type(jnp.asarray(bits), x.dtype).reshape(x.shape)
    assert int(checksums({"x": device})["x"]) == numpy_checksum(x)
    flipped = bits.copy()
    flipped[data.draw(st.integers(0, bits.size - 1))] ^= bits.dtype.type(
        1 << data.draw(st.integers(0, 8 * bits.itemsize - 1))
    )
    assert numpy_checksum(flipped.view(x.dtype)) != numpy_checksum(x)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="does not exist"):
        load_params(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no complete checkpoint"):
        load_params(tmp_path)


_WRITER = """
import sys, time, resource, signal
from pathlib import Path
import jax, jax.numpy as jnp
from infimed_jax.runs.checkpoint import Checkpoints
from infimed_jax.errors import UserError

folder, mode = Path(sys.argv[1]), sys.argv[2]
small = {"w": jax.random.normal(jax.random.key(0), (64,))}
large = {"w": jax.random.normal(jax.random.key(1), (1 << 24,))}  # 64 MiB that do not compress
checkpoints = Checkpoints(folder, keep=1)
checkpoints.save(1, small, {"n": 1})
checkpoints.wait()
if mode == "kill":
    checkpoints.save(2, large, {"n": 2})
    print("writing", flush=True)
    time.sleep(60)
if mode == "readonly":
    folder.chmod(0o555)
    try:
        checkpoints.save(2, small, {"n": 2})
        checkpoints.wait()
    except UserError as error:
        print("refused:", error)
    folder.chmod(0o755)
    checkpoints.save(4, small, {"n": 4})
    checkpoints.close()
    sys.exit()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
checkpoints.save(2, large, {"n": 2})
try:
    while mode == "poll":
        checkpoints.wait(0)
    checkpoints.save(3, small, {"n": 3})
except UserError as error:
    print("refused:", error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
checkpoints.save(4, small, {"n": 4})
checkpoints.close()
"""


def _writer(folder: Path, mode: str, *before: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*before, sys.executable, "-c", _WRITER, str(folder), mode],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).resolve().parents[2],
    )


def test_a_kill_in_the_middle_of_a_save_leaves_the_previous_checkpoint(tmp_path: Path):
    process = _writer(tmp_path, "kill")
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    while not any(path.name != "1" for path in tmp_path.iterdir()):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "2").exists(), "the save was already complete: write more"
    assert find_checkpoint(tmp_path).name == "1"
    assert _verified_number(tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["1"], "the torn save is cleaned up"


@pytest.mark.parametrize("seen_at", ["the next save", "poll"])
def test_a_full_disk_is_one_line_and_the_previous_checkpoint_stays(tmp_path: Path, seen_at: str):
    output, _ = _writer(tmp_path, seen_at).communicate(timeout=120)
    (line,) = output.splitlines()
    assert line.startswith("refused: checkpoint of step 2 in") and "step 1 is the latest complete one" in line
    assert line.endswith("file too large; allow larger files (ulimit -f), and run the same command")
    assert _verified_number(tmp_path) == 4, "once there is space again, saving goes on"


def test_a_folder_that_may_not_be_written_is_no_want_of_space(tmp_path: Path):
    """Root passes by a folder's mode, unless it lacks that capability."""
    as_owner = ["setpriv", "--bounding-set", "-dac_override"] if os.geteuid() == 0 else []
    if as_owner and not shutil.which("setpriv"):
        pytest.skip("root writes everywhere, and there is no setpriv")
    output, _ = _writer(tmp_path, "readonly", *as_owner).communicate(timeout=120)
    (line,) = output.splitlines()
    assert line.startswith("refused: checkpoint of step 2 in") and "step 1 is the latest complete one" in line
    assert line.endswith(
        ": permission denied; give this user the right to it, or name another folder, and run the same command"
    )
    assert _verified_number(tmp_path) == 4, "once it may be written again, saving goes on"


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (OSError(errno.ENOSPC, "x"), "no space left on device; free some space"),
        (OSError(errno.EDQUOT, "x"), "disk quota exceeded; free some of the quota"),
        (OSError(errno.EROFS, "x"), "read-only file system; name a folder on a disk"),
        (OSError(errno.EPERM, "x"), "operation not permitted; give this user the right"),
        # As tensorstore words it; the code is not always there.
        (
            ValueError('PERMISSION_DENIED: Error writing "/a": Permission denied [os_error_code=13]'),
            "permission denied; give",
        ),
        (ValueError("RESOURCE_EXHAUSTED: write failed: No space left on device"), "no space left on device; free some"),
    ],
)
def test_what_a_disk_refuses_is_reported_with_its_own_fix(error: Exception, fix: str):
    with (
        pytest.raises(UserError, match=f"^saving: {fix}.*, and run the same command$"),
        checkpoint.disk_errors("saving"),
    ):
        raise error


@pytest.mark.parametrize(
    "error", [RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate"), OSError(errno.ENOENT, "full")]
)
def test_what_no_disk_refused_passes(error: Exception):
    with pytest.raises(type(error)) as raised, checkpoint.disk_errors("saving"):
        raise error
    assert raised.value is error


def _verified_number(folder: Path) -> int:
    """The metadata's number, after the state itself has been restored and verified."""
    checkpoints = Checkpoints(folder)
    step = checkpoints.latest_step()
    checkpoints.restore(abstract_like({"w": jnp.zeros(64)}), step)
    number = checkpoints.metadata(step)["n"]
    checkpoints.close()
    return number

"""`data mix` at the command line: the table says what came from where, however narrow the screen."""

from __future__ import annotations

from data_prep.steps.mix import Part, mix
from infimed_jax.data.sample import Document
from infimed_jax.data.storage import write_samples
from launch.commands.data import mixing


def test_names_of_datasets_are_whole_in_a_narrow_table(tmp_path, monkeypatch, capsys):
    names = [f"a_dataset_with_a_rather_long_name_{letter}" for letter in "ab"]
    for name in names:
        write_samples(tmp_path / name, [Document(f"toy/{name}/0", "toy", name, (), (("words",),))], name="toy")
    report = mix([Part(tmp_path / name) for name in names], tmp_path / "mixture", 0)
    monkeypatch.setenv("COLUMNS", "70")
    mixing._print_parts(report)
    rows = [line.split("│")[1].strip() for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert "".join(rows[:-1]) == "".join(str(tmp_path / name) for name in names)

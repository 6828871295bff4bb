"""The drawn samples: so many of each source, the same ones by the same seed, and no one else's business."""

from data_prep.llm.quality.sampling import draw
from infimed_jax.data.storage import open_samples, write_samples
from tests.data_prep.samples import caption, damage


def dataset(folder, **sizes):
    samples = [caption(i, source) for source, size in sizes.items() for i in range(size)]
    write_samples(folder, samples, name="d")
    return open_samples(folder)


def test_each_source_gives_so_many_of_its_own(tmp_path):
    mixed = dataset(tmp_path / "mixed", a=40, b=7)
    alone = dataset(tmp_path / "alone", c=30)
    places, sizes, unreadable = draw([mixed, alone], 10, seed=0)
    assert sizes == {"a": 40, "b": 7, "c": 30} and unreadable == []
    assert {source: len(found) for source, found in places.items()} == {"a": 10, "b": 7, "c": 10}
    for source, found in places.items():
        assert found == sorted(set(found))
        assert {(mixed, alone)[d][i].source for d, i in found} == {source}


def test_a_source_in_two_datasets_is_drawn_from_both(tmp_path):
    first, second = dataset(tmp_path / "1", a=50), dataset(tmp_path / "2", a=50)
    places, sizes, _ = draw([first, second], 40, seed=0)
    assert sizes == {"a": 100} and {d for d, _ in places["a"]} == {0, 1}


def test_the_draw_is_random_by_seed_and_by_nothing_else(tmp_path):
    one, two = dataset(tmp_path / "1", a=100), dataset(tmp_path / "2", b=100)
    places = [draw([one], 20, seed=seed)[0]["a"] for seed in range(30)]
    assert draw([one], 20, seed=3)[0]["a"] == places[3] == draw([one, two], 20, seed=3)[0]["a"]
    # another source brings other numbers, and over seeds every sample is drawn at some time
    assert [i for _, i in draw([two], 20, seed=3)[0]["b"]] != [i for _, i in places[3]]
    assert {i for found in places for _, i in found} == set(range(100))


def test_unreadable_records_of_a_mixed_dataset_are_counted(tmp_path):
    mixed = dataset(tmp_path / "mixed", a=3, b=3)
    damage(mixed.folder)
    places, sizes, unreadable = draw([open_samples(tmp_path / "mixed")], 10, seed=0)
    assert unreadable == ["d record 0"] and sum(sizes.values()) == 5
    assert sum(map(len, places.values())) == sum(sizes.values())

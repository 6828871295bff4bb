"""The one function that lays out a row, against a place-by-place construction."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infimed_jax import config
from infimed_jax.data.batch import Batch, Segment, build_row, stack_rows, unmask

P, SIZE = 6, 4


@dataclasses.dataclass(frozen=True)
class TwoSizes(config.Model):
    """Images of one or two rows of cells, three position axes as in Qwen2-VL."""

    position_axes = 3
    visual_tokens = P

    def span(self, pixels):
        rows, columns = map(int, pixels["grid"])
        return config.ImageSpan(rows * columns, (rows, columns))

    def blank_image(self):
        return {"pixels": np.zeros((SIZE, SIZE, 3), np.uint8), "grid": np.zeros(2, np.int32)}

    def positions(self, visual, spans):
        columns, start, place, spans = [], 0, 0, iter(spans)
        while place < len(visual):
            if not visual[place]:
                columns.append([start] * 3)
                start, place = start + 1, place + 1
                continue
            tokens, grid = next(spans)
            columns += [[start, start + row, start + column] for row in range(grid[0]) for column in range(grid[1])]
            start, place = start + max(grid), place + tokens
        return np.array(columns, np.int32).reshape(-1, 3).T


MODEL = TwoSizes()
GRIDS = {10: (1, 2), 20: (1, 2), 30: (2, 3)}
IMAGES = [
    {"pixels": np.full((SIZE, SIZE, 3), level, np.uint8), "grid": np.array(grid, np.int32)}
    for level, grid in GRIDS.items()
]


@st.composite
def segments(draw):
    """Text tokens and image spans in any order, with arbitrary loss weights."""
    pieces = draw(st.lists(st.none() | st.integers(0, 2), min_size=1, max_size=6))
    visual, pixels = [], []
    for piece in pieces:
        visual += [False] if piece is None else [True] * MODEL.span(IMAGES[piece]).tokens
        pixels += [] if piece is None else [IMAGES[piece]]
    n = len(visual)
    tokens = draw(st.lists(st.integers(0, 99), min_size=n, max_size=n))
    targets = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=n, max_size=n))
    return Segment(np.array(tokens, np.int32), np.array(targets, np.float32), np.array(visual), tuple(pixels))


@settings(max_examples=200, deadline=None)
@given(st.lists(segments(), max_size=4), st.integers(0, 5))
def test_each_place_is_what_it_should_be(row_segments, spare):
    context = sum(map(len, row_segments)) + spare
    row = build_row(row_segments, context=context, images=3, model=MODEL)
    place = 0
    slots: list[int] = []  # which of IMAGES is in which slot
    for number, segment in enumerate(row_segments, start=1):
        spans = iter(segment.pixels)
        span_place = start = 0
        for i in range(len(segment)):
            assert row.tokens[place] == segment.tokens[i]
            assert row.segment_ids[place] == number
            is_last = i + 1 == len(segment)
            expected = 0.0 if is_last or segment.visual[i + 1] else segment.targets[i + 1]
            assert row.loss_weights[place] == expected
            if segment.visual[i]:
                if span_place == 0:
                    level = int(next(spans)["pixels"][0, 0, 0])
                    if level not in slots:
                        slots.append(level)
                rows, columns = GRIDS[level]
                assert row.visual_index[place] == slots.index(level) * P + span_place
                down, right = divmod(span_place, columns)
                assert row.positions[:, place].tolist() == [start, start + down, start + right]
                span_place += 1
                if span_place == rows * columns:
                    span_place, start = 0, start + max(rows, columns)
            else:
                assert row.visual_index[place] == -1
                assert row.positions[:, place].tolist() == [start] * 3
                start += 1
            place += 1
    assert not row.tokens[place:].any()
    assert not row.segment_ids[place:].any()
    assert not row.loss_weights[place:].any()
    assert (row.visual_index[place:] == -1).all()
    for slot, level in enumerate(slots):
        assert (row.pixels["pixels"][slot] == level).all() and tuple(row.pixels["grid"][slot]) == GRIDS[level]
    assert not any(array[len(slots) :].any() for array in row.pixels.values())


def test_segments_that_do_not_fit_are_never_cut():
    text = Segment(np.zeros(3, np.int32), np.zeros(3, np.float32), np.zeros(3, bool))
    image = Segment(np.zeros(2, np.int32), np.zeros(2, np.float32), np.ones(2, bool), (IMAGES[0],))
    options = {"model": MODEL}
    with pytest.raises(ValueError, match="6 tokens do not fit a row of 5"):
        build_row([text, text], context=5, images=0, **options)
    with pytest.raises(ValueError, match="more than 0 images"):
        build_row([image], context=5, images=0, **options)
    with pytest.raises(ValueError, match="2 image places for 2 images"):
        build_row([dataclasses.replace(image, pixels=(IMAGES[0], IMAGES[1]))], context=5, images=2, **options)
    with pytest.raises(ValueError, match="2 image places for 0 images"):
        build_row([dataclasses.replace(image, pixels=())], context=5, images=2, **options)


def test_what_continues_a_segment_follows_its_largest_position():
    text = Segment(np.zeros(2, np.int32), np.ones(2, np.float32), np.zeros(2, bool))
    image = Segment(np.zeros(6, np.int32), np.zeros(6, np.float32), np.ones(6, bool), (IMAGES[2],))
    row = build_row([text, image, dataclasses.replace(text, continues=2)], context=10, images=1, model=MODEL)
    assert row.positions[:, 8:].tolist() == [[3, 4]] * 3 and row.prefix_ids[8:].tolist() == [2, 2]


def test_rows_stack_into_a_batch_that_jax_takes_apart():
    one = Segment(np.arange(3, dtype=np.int32), np.ones(3, np.float32), np.zeros(3, bool))
    row = build_row([one], context=5, images=1, model=MODEL)
    blank = build_row([], context=5, images=1, model=MODEL)
    batch = stack_rows([row, blank])
    assert batch.tokens.tolist() == [[0, 1, 2, 0, 0], [0] * 5]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 0, 0], [0] * 5]
    assert batch.loss_weights.tolist() == [[1, 1, 0, 0, 0], [0] * 5]
    assert batch.pixels["pixels"].shape == (2, 1, SIZE, SIZE, 3) and batch.positions.shape == (2, 3, 5)
    dtypes = {name: str(getattr(batch, name).dtype) for name in ("tokens", "loss_weights", "positions", "visual_index")}
    assert dtypes == {"tokens": "int32", "loss_weights": "float32", "positions": "int32", "visual_index": "int32"}
    assert isinstance(jax.tree.map(lambda x: x[:1], batch), Batch)
    assert len(jax.tree.leaves(batch)) == 7


@settings(max_examples=50, deadline=None)
@given(st.lists(segments(), max_size=4), st.integers(0, 3))
def test_unmasked_rows_run_on(row_segments, spare):
    used = sum(map(len, row_segments))
    row = build_row(row_segments, context=used + spare, images=3, model=MODEL)
    batch = unmask(stack_rows([row, row]))
    for b in range(2):
        assert batch.segment_ids[b].tolist() == [1] * used + [0] * spare
        assert batch.positions[b].tolist() == [[*range(used), *[0] * spare]] * 3
    assert batch.loss_weights[0].tolist() == row.loss_weights.tolist()

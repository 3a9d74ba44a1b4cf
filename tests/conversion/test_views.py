"""Views against numpy's own reshape, transpose and slicing of a counting array."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pma.conversion.patterns import Pattern, apply, parse
from pma.conversion.views import View, boxed_piece, covers, piece_of, ranges_of, stored_piece
from pma.errors import FormatError, MismatchError
from pma.types import DType, Fragment, TensorSpec


def elements(view: View, length: int) -> np.ndarray:
    """What a view shows of an array that counts."""
    counting = np.arange(length, dtype=np.int64)
    strides = [stride * counting.itemsize for stride in view.strides]
    return np.lib.stride_tricks.as_strided(counting[view.offset :], view.shape, strides)


def ranges(start: int, stop: int, at: int = 0) -> tuple[np.ndarray, ...]:
    return tuple(np.array([x], np.int64) for x in (start, stop, at))


@st.composite
def reindexings(draw: st.DrawFn) -> tuple[tuple[int, ...], View, View, np.ndarray]:
    """(source shape, view of the source, view of the target, what the target must be)."""
    factors = draw(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=3))
    shape = tuple(math.prod(axis) for axis in factors)
    view, expected = View.whole(shape), np.arange(math.prod(shape)).reshape(shape)
    for axis in range(len(shape) - 1, -1, -1):
        view = view.split(axis, factors[axis])
    expected = expected.reshape([size for axis in factors for size in axis])
    for axis in range(len(view.shape)):
        start = draw(st.integers(0, view.shape[axis] - 1))
        stop = draw(st.integers(start + 1, view.shape[axis]))
        view = view.cut(axis, start, stop)
        expected = expected[(slice(None),) * axis + (slice(start, stop),)]
    if len(view.shape) > 1 and draw(st.booleans()):
        axis = draw(st.integers(0, len(view.shape) - 1))
        index = draw(st.integers(0, view.shape[axis] - 1))
        view, expected = view.at(axis, index), expected.take(index, axis)
    order = draw(st.permutations(range(len(view.shape))))
    return shape, view.permuted(order), View.whole([view.shape[i] for i in order]), expected.transpose(order)


@given(reindexings())
def test_a_view_shows_what_numpy_shows(case: tuple[tuple[int, ...], View, View, np.ndarray]) -> None:
    shape, view, _, expected = case
    np.testing.assert_array_equal(elements(view, math.prod(shape)), expected)


@given(reindexings(), st.data())
@settings(max_examples=300)
def test_runs_of_any_range_are_numpys(
    case: tuple[tuple[int, ...], View, View, np.ndarray], data: st.DataObject
) -> None:
    _, view, target, expected = case
    piece = piece_of("w", view, target)
    flat = expected.reshape(-1)
    start = data.draw(st.integers(0, flat.size))
    stop = data.draw(st.integers(start, flat.size))
    at_R, source_R, count_R = piece.runs(*ranges(start, stop, 7))
    found = np.full(stop - start, -1)
    for at, source, count in zip(at_R - 7, source_R, count_R, strict=True):
        assert count > 0
        found[at : at + count] = np.arange(source, source + count)
    np.testing.assert_array_equal(found, flat[start:stop])
    assert (np.diff(at_R) > 0).all()


@given(reindexings())
def test_runs_are_as_long_as_they_can_be(
    case: tuple[tuple[int, ...], View, View, np.ndarray],
) -> None:
    _, view, target, expected = case
    piece = piece_of("w", view, target)
    breaks = int((np.diff(expected.reshape(-1)) != 1).sum())
    # where rows happen to touch, runs may be cut there; never within a row
    assert piece.element_count == expected.size
    assert piece.run * math.prod(piece.sizes) == expected.size
    assert math.prod(piece.sizes) >= breaks + 1


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_a_box_and_its_fragments_are_found(shape: list[int], data: st.DataObject) -> None:
    starts = [data.draw(st.integers(0, size - 1)) for size in shape]
    sizes = [data.draw(st.integers(1, size - start)) for size, start in zip(shape, starts, strict=True)]
    inside = tuple(slice(a, a + n) for a, n in zip(starts, sizes, strict=True))
    expected = np.arange(math.prod(shape)).reshape(shape)[inside].reshape(-1)
    start = data.draw(st.integers(0, expected.size))
    stop = data.draw(st.integers(start, expected.size))
    low_R, high_R, at_R = ranges_of(tuple(shape), (tuple(starts), tuple(sizes)), start, stop)
    found = np.full(stop - start, -1)
    for low, high, at in zip(low_R, high_R, at_R, strict=True):
        found[at : at + high - low] = np.arange(low, high)
    np.testing.assert_array_equal(found, expected[start:stop])

    box = (tuple(starts), tuple(sizes))
    at_R, stored_R, count_R = boxed_piece(tuple(shape), box).runs(*ranges(0, math.prod(shape)))
    for at, stored, count in zip(at_R, stored_R, count_R, strict=True):
        np.testing.assert_array_equal(expected[stored : stored + count], np.arange(at, at + count))


def test_a_flat_fragment_is_a_range() -> None:
    spec = TensorSpec(name="w", dtype=DType.F32, shape=(4, 6))
    fragment = Fragment(tensor="w", file="f", offset_bytes=100, length_bytes=40, flat_start=5)
    at_R, stored_R, count_R = stored_piece(spec, fragment).runs(*ranges(0, 24))
    assert (at_R.tolist(), stored_R.tolist(), count_R.tolist()) == ([5], [0], [10])


def test_empty_tensors_have_no_runs() -> None:
    piece = piece_of("w", View.whole((0, 4)).permuted((1, 0)), View.whole((4, 0)))
    assert [len(column) for column in piece.runs(*ranges(0, 0))] == [0, 0, 0]
    assert covers([piece], 0)


def test_pieces_cover_a_target_once() -> None:
    left, right = View.whole((4, 6)).cut(1, 0, 2), View.whole((4, 6)).cut(1, 2, 6)
    pieces = [piece_of("w", View.whole(view.shape), view) for view in (left, right)]
    assert covers(pieces, 24)
    assert not covers(pieces[:1], 24)
    assert not covers([*pieces, pieces[0]], 24)
    assert not covers([pieces[0], pieces[0], pieces[0]], 24)


def test_a_pattern_is_the_same_as_reshapes() -> None:
    facts = {"heads": 4, "half": 3, "two": 2}
    source, target, shape = apply(parse("(heads half two) hidden -> (heads two half) hidden"), (24, 5), facts)
    counting = np.arange(120).reshape(24, 5)
    expected = counting.reshape(4, 3, 2, 5).transpose(0, 2, 1, 3).reshape(24, 5)
    assert shape == (24, 5)
    found = np.empty(120, np.int64)
    found[elements(target, 120)] = elements(source, 120)
    np.testing.assert_array_equal(found.reshape(24, 5), expected)


@pytest.mark.parametrize("part", ["[:-2]", "[-2]", "[-1]"])
def test_megatrons_query_groups_come_apart(part: str) -> None:
    kept = "slots " if ":" in part else ""
    pattern = parse(f"(groups slots{part} dim) hidden -> (groups {kept}dim) hidden")
    source, target, shape = apply(pattern, (2 * 5 * 3, 4), {"groups": 2, "dim": 3})
    counting = np.arange(120).reshape(2, 5, 3, 4)
    slots = {"[:-2]": slice(0, 3), "[-2]": slice(3, 4), "[-1]": slice(4, 5)}[part]
    expected = counting[:, slots].reshape(-1, 4)
    assert shape == expected.shape
    found = np.empty(expected.size, np.int64)
    found[elements(target, expected.size)] = elements(source, 120)
    np.testing.assert_array_equal(found.reshape(shape), expected)


def test_parts_of_a_target_need_its_full_size() -> None:
    pattern: Pattern = parse("rows columns -> two[1] rows columns")
    assert pattern.fills_part
    source, target, shape = apply(pattern, (3, 4), {"two": 2})
    assert (shape, target.offset, source.offset) == ((2, 3, 4), 12, 0)
    with pytest.raises(MismatchError, match="size of two"):
        apply(pattern, (3, 4), {})


@pytest.mark.parametrize(
    "text",
    [
        "(a b",
        "a) b",
        "((a) b)",
        "a a",
        "a -> b",
        "a b -> a",
        "a -> a -> a",
        "a[] -> a",
        "A",
        "a[1:2",
        "a[:2]",
        "a()b",
    ],
)
def test_patterns_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(FormatError):
        parse(text)


@pytest.mark.parametrize(
    ("text", "shape", "message"),
    [
        ("rows", (3, 4), "expected 1 axes"),
        ("heads columns", (3, 4), "expected heads with heads 4"),
        ("(heads rest) columns", (6, 4), "heads 4"),
        ("(rest other) columns", (6, 4), "rest, other are unknown"),
        ("(heads[7] rest) -> rest", (8,), "none of index 7"),
        ("rows[:vocab] -> rows", (8,), "vocab is unknown"),
        ("rows[:many] -> rows", (8,), "not 0 to 9"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(text: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(MismatchError, match=message):
        apply(parse(text), shape, {"heads": 4, "many": 9})

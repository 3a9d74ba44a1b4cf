"""Accumulation against exact arithmetic and torch: divided once, cast once, the same for any tile."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pma.averaging import AT_ONCE, accumulate
from pma.averaging.accumulate import STORAGE
from pma.testing.reference import decoded, encoded, exact_mean, rounded
from pma.types import DType

FLOATS = [DType.F16, DType.BF16, DType.F32, DType.F64]
TORCH = {
    DType.F16: torch.float16,
    DType.BF16: torch.bfloat16,
    DType.F32: torch.float32,
    DType.F64: torch.float64,
}


def stored(values: NDArray[np.float64], dtype: DType) -> NDArray[np.generic]:
    return np.frombuffer(encoded(values, dtype.name), STORAGE[dtype])


def floats(values: NDArray[np.generic], dtype: DType) -> NDArray[np.float64]:
    return decoded(values.tobytes(), dtype.name)


def random(count: int, seed: int, dtype: DType) -> NDArray[np.generic]:
    return stored(np.random.default_rng(seed).standard_normal(count), dtype)


def averaged(
    sources: list[NDArray[np.generic]], weights: list[float] | None, dtype: DType, out: DType | None = None
) -> NDArray[np.generic]:
    total = np.empty(len(sources[0]), accumulate.accumulator_dtype(dtype))
    for start in range(0, len(sources), AT_ONCE):
        rows = sources[start : start + AT_ONCE]
        some = (weights or [1.0] * len(sources))[start : start + AT_ONCE]
        accumulate.add(total, rows, some, first=start == 0)
    result = np.empty(len(total), STORAGE[out or dtype])
    accumulate.finish(total, result, out or dtype, divisor=None if weights else len(sources))
    return result


def finished(values: list[float], dtype: DType) -> tuple[NDArray[np.float64], bool]:
    out = np.empty(len(values), STORAGE[dtype])
    finite = accumulate.finish(np.array(values), out, dtype, divisor=None)
    return floats(out, dtype), finite


def test_at_least_9999_of_10000_bf16_means_are_correctly_rounded() -> None:
    sources = [random(1_000_000, i, DType.BF16) for i in range(10)]
    exact = rounded(exact_mean([floats(source, DType.BF16) for source in sources]), "BF16")
    ours = floats(averaged(sources, None, DType.BF16), DType.BF16)
    assert (ours == exact).mean() >= 0.9999


def test_scaling_by_a_tenth_would_not_be() -> None:
    """The check above can fail: adding 1/N times each source in fp32 misses 1% of the roundings."""
    sources = [random(100_000, i, DType.BF16) for i in range(10)]
    exact = rounded(exact_mean([floats(source, DType.BF16) for source in sources]), "BF16")
    scaled = floats(averaged(sources, [0.1] * 10, DType.BF16), DType.BF16)
    assert (scaled == exact).mean() < 0.9999


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sources", [1, 4, 7])
def test_the_same_bits_as_torch(dtype: DType, sources: int) -> None:
    """One torch operation after the other, each with its own rounding."""
    values = [random(10_007, i, dtype) for i in range(sources)]
    weights = [(i + 1) / 30 for i in range(sources)]
    wide = torch.float32 if dtype.bits == 16 else torch.float64
    tensors = [torch.frombuffer(bytearray(v.tobytes()), dtype=TORCH[dtype]).to(wide) for v in values]
    for some in (None, weights):
        total = tensors[0] * (some[0] if some else 1)
        for tensor, weight in zip(tensors[1:], (some or [1] * sources)[1:], strict=True):
            total = total + tensor * weight
        expected = (total if some else total / sources).to(TORCH[dtype])
        ours = averaged(values, some, dtype)
        assert ours.tobytes() == expected.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", [1, 7, 65_537])
def test_a_tile_is_the_sum_of_its_parts(dtype: DType, count: int) -> None:
    """No fused multiply-add, no vector tail: any cut of the elements gives the same bits."""
    sources = [random(count, i, dtype) for i in range(6)]
    for weights in (None, [0.3, 0.2, 0.2, 0.1, 0.1, 0.1]):
        whole = averaged(sources, weights, dtype)
        for cut in {1, count // 3, count - 1} - {0, count}:
            parts = [averaged([s[a:b] for s in sources], weights, dtype) for a, b in ((0, cut), (cut, count))]
            assert whole.tobytes() == np.concatenate(parts).tobytes()


@pytest.mark.parametrize("sources", [1, 3, 4, 5])
def test_negative_zero_stays(sources: int) -> None:
    mean = averaged([stored(np.array([-0.0]), DType.F32)] * sources, None, DType.F32)
    assert np.signbit(mean).all()


@given(st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=50))
def test_fp64_sums_round_once_to_16_bits(values: list[float]) -> None:
    for dtype, largest in ((DType.BF16, torch.finfo(torch.bfloat16).max), (DType.F16, 65504)):
        out, finite = finished(values, dtype)
        exact = rounded(np.array(values), dtype.name)
        exact = np.where(np.abs(exact) > largest, np.copysign(np.inf, exact), exact)
        np.testing.assert_array_equal(out, exact)
        assert finite == bool(np.isfinite(exact).all())


def test_a_value_that_double_rounding_gets_wrong() -> None:
    # just above the middle between two bf16 values; fp32 rounds it onto the middle, which then goes to even
    value = 1 + 2**-8 + 2**-40
    assert finished([value], DType.BF16)[0] == [1 + 2**-7]
    assert torch.tensor([value], dtype=torch.float64).float().bfloat16().item() == 1.0


@given(st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1, max_size=20))
def test_what_is_not_finite_is_told_and_kept(values: list[float]) -> None:
    total = np.array(values, np.float32)
    for dtype in FLOATS:
        out = np.empty(len(values), STORAGE[dtype])
        finite = accumulate.finish(total.copy(), out, dtype, divisor=None)
        assert finite == bool(np.isfinite(floats(out, dtype)).all())
        np.testing.assert_array_equal(np.isnan(floats(out, dtype)), np.isnan(total))


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
def test_every_fp32_pattern_rounds_to_bf16_as_torch_rounds_it(patterns: list[int]) -> None:
    total = np.array(patterns, np.uint32).view(np.float32)
    out = np.empty(len(total), np.uint16)
    accumulate.finish(total.copy(), out, DType.BF16, divisor=None)
    expected = torch.from_numpy(total.copy()).bfloat16()
    np.testing.assert_array_equal(floats(out, DType.BF16), expected.double().numpy())


def test_the_twin_reads_and_writes_bf16_as_torch_does() -> None:
    values = torch.randn(1000).bfloat16()
    raw = values.view(torch.int16).numpy().tobytes()
    np.testing.assert_array_equal(decoded(raw, "BF16"), values.double().numpy())
    assert encoded(values.double().numpy(), "BF16") == raw


def test_accumulators_are_wider_than_inputs() -> None:
    assert accumulate.accumulator_dtype(DType.BF16) is np.float32
    assert accumulate.accumulator_dtype(DType.F32) is np.float64

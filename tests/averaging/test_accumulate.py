"""Accumulation against exact arithmetic: divided once, cast once, the same for any tile."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pma.averaging import accumulate
from pma.testing.reference import decoded, encoded, exact_mean, rounded
from pma.types import DType


def averaged(sources: list[torch.Tensor], weights: list[float] | None, out: torch.dtype) -> torch.Tensor:
    wide = torch.float32 if sources[0].element_size() == 2 else torch.float64
    total = torch.empty(len(sources[0]), dtype=wide)
    scratch = accumulate.scratch_for(total)
    for n, values in enumerate(sources):
        accumulate.add(total, values, scratch, weight=weights[n] if weights else None, first=n == 0)
    result = torch.empty(len(total), dtype=out)
    accumulate.finish(total, result, divisor=None if weights else len(sources))
    return result


def test_at_least_9999_of_10000_bf16_means_are_correctly_rounded() -> None:
    sources = [
        torch.randn(1_000_000, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(10)
    ]
    exact = rounded(exact_mean([source.double().numpy() for source in sources]), "BF16")
    ours = averaged(sources, None, torch.bfloat16).double().numpy()
    assert (ours == exact).mean() >= 0.9999


def test_scaling_by_a_tenth_would_not_be() -> None:
    """The check above can fail: adding 1/N times each source in fp32 misses 1% of the roundings."""
    sources = [torch.randn(100_000, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(10)]
    exact = rounded(exact_mean([source.double().numpy() for source in sources]), "BF16")
    scaled = averaged(sources, [0.1] * 10, torch.bfloat16).double().numpy()
    assert (scaled == exact).mean() < 0.9999


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 7, 65_535, 65_536, 65_537, 200_003])
def test_a_block_is_the_sum_of_its_parts(dtype: torch.dtype, count: int) -> None:
    """No fused multiply-add, no vector tail: any cut of the elements gives the same bits."""
    sources = [torch.randn(count, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3)]
    for weights in (None, [0.5, 0.3, 0.2]):
        whole = averaged(sources, weights, dtype)
        cut = count // 3
        parts = [
            averaged([s[a:b] for s in sources], weights, dtype) for a, b in ((0, cut), (cut, count)) if a < b
        ]
        assert torch.equal(whole, torch.cat(parts))


def test_negative_zero_stays() -> None:
    mean = averaged([torch.tensor([-0.0])] * 3, None, torch.float32)
    assert torch.signbit(mean).item()


@given(st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=50))
def test_fp64_sums_round_once_to_16_bits(values: list[float]) -> None:
    for dtype, name in ((torch.bfloat16, "BF16"), (torch.float16, "F16")):
        out = torch.empty(len(values), dtype=dtype)
        accumulate.finish(torch.tensor(values, dtype=torch.float64), out, divisor=None)
        largest = torch.finfo(dtype).max
        exact = rounded(np.array(values), name)
        exact = np.where(np.abs(exact) > largest, np.copysign(np.inf, exact), exact)
        np.testing.assert_array_equal(out.double().numpy(), exact)


def test_a_value_that_double_rounding_gets_wrong() -> None:
    # just above the middle between two bf16 values; fp32 rounds it onto the middle, which then goes to even
    value = 1 + 2**-8 + 2**-40
    out = torch.empty(1, dtype=torch.bfloat16)
    accumulate.finish(torch.tensor([value], dtype=torch.float64), out, divisor=None)
    assert out.item() == 1 + 2**-7
    assert torch.tensor([value], dtype=torch.float64).float().bfloat16().item() == 1.0


@given(st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1, max_size=20))
def test_all_finite_is_exact(values: list[float]) -> None:
    assert accumulate.all_finite(torch.tensor(values)) == bool(np.isfinite(np.array(values)).all())


def test_all_finite_where_the_sum_overflows() -> None:
    assert accumulate.all_finite(torch.tensor([3e38, 3e38, 3e38]))


def test_the_twin_reads_and_writes_bf16_as_torch_does() -> None:
    values = torch.randn(1000).bfloat16()
    raw = values.view(torch.int16).numpy().tobytes()
    np.testing.assert_array_equal(decoded(raw, "BF16"), values.double().numpy())
    assert encoded(values.double().numpy(), "BF16") == raw


def test_accumulators_are_wider_than_inputs() -> None:
    assert accumulate.accumulator_dtype(DType.BF16) == torch.float32
    assert accumulate.accumulator_dtype(DType.F32) == torch.float64

"""The reference twin: what a merge must be, computed in memory by numpy with other code than the engine's.

Files are parsed by the safetensors library, sums are numpy's, and rounding is done on exact fp64 values by
scaling.
"""

# N checkpoints, B elements of a tensor

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# significant bits and exponent of the smallest subnormal
_FORMATS = {"F16": (11, -24), "BF16": (8, -133), "F32": (24, -149)}
_NUMPY = {"F16": np.float16, "F32": np.float32, "F64": np.float64, "C64": np.float32}


def read_all(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Every tensor of a safetensors checkpoint as {dtype, shape, data}, by the safetensors library."""
    from safetensors import deserialize

    tensors = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        if file.name == "pma_interval_mean.safetensors":
            continue  # stored beside the checkpoint, no part of it
        tensors.update(dict(deserialize(file.read_bytes())))
    return tensors


def reference_average(
    checkpoints: Sequence[Path], weights: Sequence[float], dtype: str | None = None
) -> dict[str, bytes]:
    """The bytes of every tensor of the merge. Equal weights: sum, divide once; others: multiply and add in
    the sum's type.

    `dtype`: output type of averaged floating tensors, the inputs' own by default.
    """
    sources = [read_all(path) for path in checkpoints]
    equal = len(set(weights)) == 1
    merged = {}
    for name, newest in sources[-1].items():
        if newest["dtype"] not in ("BF16", *_NUMPY):
            merged[name] = bytes(newest["data"])
            continue
        wide: type[np.floating[Any]] = np.float32 if newest["dtype"] in ("BF16", "F16") else np.float64
        total: NDArray[Any] | None = None
        for source, weight in zip(sources, weights, strict=True):
            values = decoded(source[name]["data"], source[name]["dtype"]).astype(wide)
            term = values if equal else values * wide(weight)
            total = term if total is None else total + term
        assert total is not None
        mean = total / wide(len(sources)) if equal else total
        merged[name] = encoded(mean, dtype if dtype and newest["dtype"] != "C64" else newest["dtype"])
    return merged


def exact_mean(arrays: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """The mean in fp64, which for values of 16 bits is exact before the division."""
    total = np.zeros_like(arrays[0])
    for values in arrays:
        total += values
    return total / len(arrays)


def decoded(data: bytes, dtype: str) -> NDArray[np.float64]:
    """Little-endian bytes as fp64 values."""
    if dtype == "BF16":
        return (
            (np.frombuffer(data, np.uint16).astype(np.uint32) << np.uint32(16))
            .view(np.float32)
            .astype(np.float64)
        )
    return np.frombuffer(data, _NUMPY[dtype]).astype(np.float64)


def encoded(values: NDArray[Any], dtype: str) -> bytes:
    """Values rounded to the nearest of `dtype`, ties to even, as bytes."""
    exact = rounded(values.astype(np.float64), dtype)
    if dtype == "BF16":
        return (exact.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16).tobytes()
    return exact.astype(_NUMPY[dtype]).tobytes()


def rounded(values: NDArray[np.float64], dtype: str) -> NDArray[np.float64]:
    """The nearest value of `dtype` for each fp64 value, ties to even: scale to integers, round, scale
    back, all exact.
    """
    if dtype not in _FORMATS:
        return values
    bits, smallest = _FORMATS[dtype]
    _, exponents = np.frexp(values)
    quanta = np.ldexp(1.0, np.maximum(exponents - bits, smallest))
    return np.asarray(np.rint(values / quanta) * quanta)


def same_bytes(expected: Mapping[str, bytes], checkpoint: Path) -> list[str]:
    """Names of tensors of `checkpoint` that differ from `expected`, or are missing or too many."""
    found = read_all(checkpoint)
    names = expected.keys() | found.keys()
    return sorted(
        n for n in names if n not in expected or n not in found or bytes(found[n]["data"]) != expected[n]
    )

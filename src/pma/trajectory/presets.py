"""How many checkpoints and how far apart, by the model's size, as the paper chose them.

Source: arXiv 2505.12082, sections 4.1 and 4.3. Mixtures of experts are looked up by their total parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

# (parameters, V in tokens, N)
_DENSE = ((411e6, 2e9, 6), (2e9, 5e9, 6), (8e9, 15e9, 10), (70e9, 40e9, 10))
_MIXTURE = ((7e9, 4e9, 10), (13e9, 8e9, 10), (100e9, 80e9, 10))


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A suggested window, and how far it can be trusted."""

    last: int
    every_tokens: int
    extrapolated: bool
    capped: bool


def fitted(size: Preset, stable_tokens: Sequence[int]) -> Preset:
    """`size` on a run whose stable checkpoints lie at `stable_tokens`: V a whole number of their median
    distance.

    V is rounded down, but is at least one distance; N is cut to the stable checkpoints that are that far
    apart.
    """
    gaps = sorted(b - a for a, b in pairwise(stable_tokens))
    if not gaps:
        return size
    spacing = max(1, gaps[len(gaps) // 2])
    every = max(spacing, size.every_tokens // spacing * spacing)
    last = min(size.last, (stable_tokens[-1] - stable_tokens[0]) // every + 1)
    return replace(size, last=last, every_tokens=every)


def preset(parameters: int, *, mixture_of_experts: bool, stable_tokens: int | None = None) -> Preset:
    """N and V for a model of that many parameters: log-linear between the paper's sizes.

    Outside the paper's sizes the nearest two are extended and `extrapolated` is set. Where N·V would exceed
    `stable_tokens`, the tokens seen at constant rate, V is cut to fit and `capped` is set.
    """
    table = _MIXTURE if mixture_of_experts else _DENSE
    inner = max(1, min(len(table) - 1, sum(size <= parameters for size, _, _ in table)))
    (size_0, every_0, last_0), (size_1, every_1, last_1) = table[inner - 1], table[inner]
    share = (math.log(max(parameters, 1)) - math.log(size_0)) / (math.log(size_1) - math.log(size_0))
    every = math.exp(math.log(every_0) + share * (math.log(every_1) - math.log(every_0)))
    last = round(last_0 + min(max(share, 0.0), 1.0) * (last_1 - last_0))
    capped = stable_tokens is not None and last * every > stable_tokens
    if capped:
        assert stable_tokens is not None
        every = stable_tokens / last
    return Preset(
        last=last,
        every_tokens=max(1, round(every)),
        extrapolated=not table[0][0] <= parameters <= table[-1][0],
        capped=capped,
    )

"""Models of a study as points of one space, and their loss over fixed text as a surface above it."""

# P parameters, B batches of text

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pma.analysis import curvature, windows
from pma.analysis.curvature import Surface, of_model
from pma.analysis.parameters import Layout, Vector
from pma.analysis.windows import TokenWindows
from pma.engine import average
from pma.evaluation.model import load_scorer
from pma.evaluation.scoring import Scorer
from pma.studies.making import Run
from pma.studies.measuring import Measured, beginnings
from pma.verbs import plan

Values = NDArray[np.float64]


def load(item: Measured, home: Path) -> Scorer:
    """The model, ready to score."""
    with plan(item.choice(home), item.options()) as planned:
        return load_scorer(average(planned), planned.sources[-1].point.path)


def vector(item: Measured, home: Path) -> Vector:
    """The model's parameters, shape (P,)."""
    model = load(item, home).model
    return Layout.of_model(model).vector(dict(model.named_parameters()))


def text_windows(
    scorer: Scorer, run: Run, home: Path, where: str, *, characters: int, context_tokens: int, count: int
) -> TokenWindows:
    """Windows of the beginnings of a run's held-out or validation documents, the same for all its models."""
    documents = beginnings(run.folder(home) / "text" / f"{where}.txt", characters)
    tokens = [scorer.encode(document.text) for document in documents]
    return windows.cut(tokens, context_tokens=context_tokens, windows=count)


def surface(scorer: Scorer, text: TokenWindows, *, batches: int) -> Surface:
    """The loss over this text, of any model like the scorer's."""
    return of_model(scorer.model, text, batches=batches)


def over_batches(value_B: Values, share_B: Values) -> dict[str, float]:
    """Mean over the text with its 95% interval, as plain values."""
    return {key: float(value) for key, value in asdict(curvature.over_batches(value_B, share_B)).items()}


def rounded(values: Any, digits: int = 6) -> Any:
    """Nested lists of numbers, short enough to keep."""
    return (
        np.asarray([float(f"{each:.{digits}g}") for each in np.ravel(values)])
        .reshape(np.shape(values))
        .tolist()
    )

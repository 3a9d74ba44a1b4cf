"""Verdicts on synthetic runs, from files to words."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from pma import verbs
from pma.diagnosis.diagnosing import Diagnosis
from pma.diagnosis.verdict import Verdict
from pma.testing.builders import Raw, write_safetensors
from pma.trajectory import Window
from pma.types import DType, TensorSpec
from pma.verbs import Choice

EVERY, SIZE = 10, 4000


def write_run(
    folder: Path,
    weights: Callable[[int, np.random.Generator], np.ndarray],
    *,
    loss: Callable[[int], float],
    rate: Callable[[int], float] = lambda step: 1e-3,
    checkpoints: int = 12,
    log: bool = True,
    gradient: float | None = 1.0,
) -> Path:
    """A run whose checkpoint at a step has these weights (of a generator that goes on), and this log."""
    random = np.random.default_rng(0)
    spec = TensorSpec(name="layer.mlp.weight", dtype=DType.F32, shape=(SIZE,))
    history: list[Mapping[str, float]] = []
    for step in range(1, checkpoints * EVERY + 1):
        if step % 2 == 0:
            row = {
                "step": step,
                "loss": loss(step) + 0.005 * random.standard_normal(),
                "learning_rate": rate(step),
            }
            history.append(row | ({} if gradient is None else {"grad_norm": gradient}))
        if step % EVERY == 0:
            path = folder / f"checkpoint-{step}"
            write_safetensors(path, [Raw(spec=spec, data=weights(step, random).astype(np.float32).tobytes())])
            state = {"global_step": step, "log_history": history if log else []}
            (path / "trainer_state.json").write_text(json.dumps(state))
    return folder


def noise(step: int, random: np.random.Generator) -> np.ndarray:
    """Around one place."""
    return 1 + 0.2 * random.standard_normal(SIZE)


def travelling(step: int, random: np.random.Generator) -> np.ndarray:
    """Along a line, with hardly any noise."""
    return 1 + 0.01 * step * np.cos(np.arange(SIZE)) + 1e-5 * random.standard_normal(SIZE)


def flat(step: int) -> float:
    return 3.0


def falling(step: int) -> float:
    return 6 - 0.01 * step


def diagnosed(run: Path, **how: int) -> Diagnosis:
    return verbs.diagnose(Choice(paths=(run,), **how))  # type: ignore[arg-type]


def test_noise_is_to_be_merged_as_wide_as_there_is(tmp_path: Path) -> None:
    done = diagnosed(write_run(tmp_path / "run", noise, loss=flat))
    advice = done.advice
    assert advice.verdict is Verdict.MERGE
    assert advice.windows[0].last >= 10
    assert advice.windows[0].predicted.gain > 3 * advice.windows[0].predicted.error
    assert advice.windows[0].flags.endswith("--every 10")
    assert verbs.plan(Choice(paths=(tmp_path / "run",), window=Window(last=advice.windows[0].last))).sources


def test_a_run_that_travels_is_to_wait(tmp_path: Path) -> None:
    advice = diagnosed(write_run(tmp_path / "run", travelling, loss=falling)).advice
    assert advice.verdict is Verdict.WAIT
    assert "travels faster" in advice.reasons[0]
    assert advice.to_json()["window"] is None
    gains = [window.predicted.gain for window in advice.windows]
    assert max(gains) < 0.01
    assert gains == sorted(gains, reverse=True)
    widest = max(advice.windows, key=lambda w: (w.last - 1) * (w.every or 0))
    # eleven intervals of ten steps: the mean lags 55 steps behind, of 0.01 nats each
    assert widest.predicted.cost == pytest.approx(0.55, rel=0.25)


def test_the_end_of_a_decay_is_not_the_place(tmp_path: Path) -> None:
    def decays(step: int) -> float:
        return 1e-3 * (1 if step <= 40 else max(121 - step, 1) / 81)

    def settles(step: int, random: np.random.Generator) -> np.ndarray:
        return 1 + 0.2 * decays(step) / 1e-3 * random.standard_normal(SIZE)

    loss = lambda step: 3.0 if step <= 40 else 3.0 - 0.003 * (step - 40)  # noqa: E731
    done = diagnosed(write_run(tmp_path / "run", settles, loss=loss, rate=decays))
    assert done.advice.verdict is Verdict.NOT_HERE
    assert "1% of its peak" in done.advice.reasons[0]
    assert "checkpoints up to step 40 are of another phase or rate" in done.advice.reasons
    assert max((w.last - 1) * (w.every or 0) for w in done.advice.windows) <= 70
    before = diagnosed(tmp_path / "run", at=40)
    assert before.advice.verdict is Verdict.MERGE


def test_a_warmup_is_to_wait(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", noise, loss=falling, rate=lambda step: 1e-5 * step)
    advice = diagnosed(run).advice
    assert (advice.verdict, advice.windows) == (Verdict.WAIT, ())
    assert "still being raised" in advice.reasons[0]


def test_a_collapse_is_not_the_place_and_a_spike_cuts_the_window(tmp_path: Path) -> None:
    rises = lambda step: 3.0 if step <= 200 else 5.0  # noqa: E731
    done = diagnosed(write_run(tmp_path / "a", noise, loss=rises, checkpoints=25))
    assert done.advice.verdict is Verdict.NOT_HERE
    assert "--at 190" in done.advice.reasons[0]
    spikes = lambda step: 4.5 if 190 < step <= 200 else 3.0  # noqa: E731
    done = diagnosed(write_run(tmp_path / "b", noise, loss=spikes, checkpoints=28))
    assert done.advice.verdict is Verdict.MERGE
    assert max((w.last - 1) * (w.every or 0) for w in done.advice.windows) == 280 - 210
    assert any("spike at step" in reason for reason in done.advice.reasons)


def test_other_data_cuts_the_window(tmp_path: Path) -> None:
    other = lambda step: 3.0 if step <= 60 else 2.5  # noqa: E731
    advice = diagnosed(write_run(tmp_path / "run", noise, loss=other)).advice
    assert advice.verdict is Verdict.MERGE
    assert any("-0.5" in reason and "step 62" in reason for reason in advice.reasons)
    assert max((w.last - 1) * (w.every or 0) for w in advice.windows) == 120 - 70


def test_without_a_log_nothing_is_promised(tmp_path: Path) -> None:
    done = diagnosed(write_run(tmp_path / "run", noise, loss=flat, log=False))
    assert done.advice.verdict is Verdict.CANNOT_TELL
    assert done.whole.walk is not None


def test_without_gradient_norms_there_are_other_constants(tmp_path: Path) -> None:
    advice = diagnosed(write_run(tmp_path / "run", noise, loss=flat, gradient=None)).advice
    assert advice.verdict is Verdict.MERGE


def test_two_checkpoints_are_too_few_for_a_verdict(tmp_path: Path) -> None:
    advice = diagnosed(write_run(tmp_path / "run", noise, loss=flat, checkpoints=2)).advice
    assert advice.verdict is Verdict.WAIT
    assert "only 2 checkpoints" in advice.reasons[-1]


def test_checkpoints_at_odd_steps_are_only_counted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", noise, loss=flat)
    for step in (40, 60, 70):
        (run / f"checkpoint-{step}").rename(tmp_path / f"{step}")
    advice = diagnosed(run).advice
    assert {window.every for window in advice.windows} == {None}
    assert len(advice.windows) == 8

from dataclasses import replace

import numpy as np
import pytest

from pma.averaging.decay import DECAYS
from pma.errors import InputError
from pma.forecast.probes import (
    RATES_J,
    Probe,
    annealed_loss,
    kept_by_decay,
    kept_by_merge,
    spread_of,
)

from .toy import Toy, power_law_toy

END = 20_000
ERROR = 5e-4
TOYS = {
    "as it is": power_law_toy(),
    "noise in sharp directions": power_law_toy(slope=1.0),
    "noise in flat ones": power_law_toy(slope=0.4),
    "low rate": power_law_toy(rate=0.1),
    "fast start": power_law_toy(exponent=2.0),
}


def decay(shape: str, steps: int) -> np.ndarray:
    return np.array([DECAYS[shape](i / steps) for i in range(1, steps + 1)])


def probes(toy: Toy, windows: tuple[int, ...] = (100, 300, 1000, 3000, 6000), seed: int = 0) -> list[Probe]:
    """Merges of ten checkpoints ending at two steps, and raw ones, each with an evaluation's noise."""
    random, weights = np.random.default_rng(seed), np.full(10, 0.1)
    made = []
    for window in windows:
        for end in (END - 2000, END):
            steps = np.linspace(end - window, end, 10).astype(int).tolist()
            loss = toy.merged(steps, weights) + ERROR * random.standard_normal()
            made.append(Probe(steps=tuple(steps), weights=tuple(weights), loss=loss, error=ERROR))
    for step in range(2000, END + 1, 500):
        loss = toy.raw(step) + ERROR * random.standard_normal()
        made.append(Probe(steps=(step,), weights=(1.0,), loss=loss, error=ERROR))
    return made


def test_the_toys_closed_form_is_what_training_gives() -> None:
    toy = Toy(
        curvature_I=np.array([1.0, 0.05]),
        start_I=np.array([0.5, 1.0]),
        noise_I=np.array([0.1, 0.2]),
        rate=0.2,
    )
    random, shares = np.random.default_rng(0), np.concatenate((np.ones(60), decay("linear", 40)))
    x, seen = np.tile(toy.start_I, (40_000, 1)), []
    for share in shares:
        noise = np.sqrt(toy.noise_I) * random.standard_normal(x.shape)
        x = x - toy.rate * share * (toy.curvature_I * x + noise)
        seen.append(x)

    def mean_loss(values: np.ndarray) -> float:
        return float(toy.floor + 0.5 * (toy.curvature_I * values**2).mean(axis=0).sum())

    assert mean_loss(seen[59]) == pytest.approx(toy.raw(60), abs=1e-3)
    assert mean_loss(seen[99]) == pytest.approx(toy.annealed(60, shares[60:]), abs=1e-3)
    merged = (seen[19] + seen[39] + 2 * seen[59]) / 4
    assert mean_loss(merged) == pytest.approx(toy.merged([20, 40, 60], np.array([0.25, 0.25, 0.5])), abs=1e-3)


def test_what_one_checkpoint_or_no_decay_keeps_is_all() -> None:
    np.testing.assert_allclose(kept_by_merge([500], [1.0]), 1.0)
    np.testing.assert_allclose(kept_by_decay(np.ones(1000)), 1.0, atol=1e-9)
    # checkpoints that have forgotten each other keep 1/N; those that have not, all
    kept = kept_by_merge(np.arange(10) * 1000, np.full(10, 0.1))
    assert kept[RATES_J > 0.05] == pytest.approx(0.1)
    assert kept[0] == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS)
def test_merges_forecast_every_decay_of_the_toy(toy: Toy) -> None:
    """Of any shape, up to longer than the longest window; far better than the best of the merges itself."""
    spread = spread_of(probes(toy), END)
    errors, last, as_merged = [], [], []
    for shape in DECAYS:
        for steps in (1000, 4000, 8000):
            truth = toy.annealed(END, decay(shape, steps))
            expected, error = annealed_loss(spread, decay(shape, steps))
            errors.append(abs(expected - truth))
            assert errors[-1] < max(4 * error, 1e-3), (shape, steps)
            last.append(abs(toy.raw(END) - truth))
            window = np.linspace(END - steps, END, 10).astype(int).tolist()
            as_merged.append(abs(toy.merged(window, np.full(10, 0.1)) - truth))
    assert np.mean(errors) < 7e-4
    assert np.mean(errors) < 0.25 * np.mean(as_merged)
    assert np.mean(errors) < 0.03 * np.mean(last)


def test_a_given_exponent_is_kept() -> None:
    spread = spread_of(probes(TOYS["low rate"]), END, alphas=(0.5,), draws=3)
    assert spread.alpha == 0.5
    assert spread.unknowns_BU.shape == (3, len(spread.unknowns_U))
    assert spread.drift_loss(END) == pytest.approx(TOYS["low rate"].raw(END), abs=1e-3)


def test_short_windows_leave_long_decays_open() -> None:
    toy = TOYS["noise in flat ones"]
    long, short = spread_of(probes(toy), END), spread_of(probes(toy, (50, 100, 200)), END)
    shares = decay("linear", 4000)
    assert short.longest_window == 200
    assert annealed_loss(short, shares)[1] > 2 * annealed_loss(long, shares)[1]


def test_too_little_is_refused() -> None:
    toy = TOYS["as it is"]
    with pytest.raises(InputError, match="merges over 2 windows of different length"):
        spread_of(probes(toy, (100, 300)), END)
    worse = [replace(p, loss=p.loss + (len(p.steps) > 1)) for p in probes(toy)]
    with pytest.raises(
        InputError, match="no merge that ends at step 20000 is better than the raw checkpoint there"
    ):
        spread_of(worse, END)

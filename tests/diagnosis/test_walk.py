"""Walks whose drift, noise and memory are known in closed form."""

from __future__ import annotations

import numpy as np
import pytest

from pma.diagnosis.movement import movement
from pma.diagnosis.walk import fit, squared_distances
from pma.errors import InputError

STEPS = np.arange(0.0, 500, 25)


def expected_gram(speed: float, noise: float, rate: float, fresh: float) -> np.ndarray:
    """Inner products of deviations from the last of a walk of endlessly many coordinates."""
    lag = np.abs(STEPS[:, None] - STEPS)
    shared = noise * np.exp(-rate * lag) + fresh * np.eye(len(STEPS))
    drift = speed**2 * np.outer(STEPS - STEPS[-1], STEPS - STEPS[-1])
    from_last = np.eye(len(STEPS))
    from_last[:, -1] -= 1
    return from_last @ shared @ from_last.T + drift


@pytest.mark.parametrize(
    ("speed", "noise", "rate", "fresh"),
    [(0.01, 2.0, 0.01, 0.0), (0.0, 1.0, 0.004, 0.5), (0.02, 0.0, 0.01, 1.0), (0.03, 5.0, 0.03, 0.0)],
)
def test_a_walk_is_found_again(speed: float, noise: float, rate: float, fresh: float) -> None:
    walk = fit(STEPS.tolist(), expected_gram(speed, noise, rate, fresh))
    assert walk.misfit < 0.01
    assert walk.speed == pytest.approx(speed, rel=0.05, abs=1e-3)
    assert walk.noise + walk.fresh == pytest.approx(noise + fresh, rel=0.1)
    expected = noise * np.exp(-rate * 25) / (noise + fresh)
    assert walk.memory(25) == pytest.approx(expected, abs=0.03)
    # N² / Σ ρ^|i-j|: what textbooks call the effective sample size
    lag = np.abs(STEPS[:, None] - STEPS)
    rho = (noise * np.exp(-rate * lag) + fresh * np.eye(len(STEPS))) / (noise + fresh)
    assert walk.effective(STEPS) == pytest.approx(len(STEPS) ** 2 / rho.sum(), rel=0.1)


def test_a_drawn_walk_of_many_coordinates() -> None:
    random = np.random.default_rng(3)
    rate, count, coordinates = 0.01, len(STEPS), 20_000
    memory = np.exp(-rate * 25)
    walk_NB = np.empty((count, coordinates))
    walk_NB[0] = random.standard_normal(coordinates)
    for n in range(1, count):
        fresh = random.standard_normal(coordinates) * np.sqrt(1 - memory**2)
        walk_NB[n] = memory * walk_NB[n - 1] + fresh
    walk_NB += np.outer(STEPS, random.standard_normal(coordinates)) * 0.002
    deviations = walk_NB - walk_NB[-1]
    found = fit(STEPS.tolist(), deviations @ deviations.T)
    assert found.speed == pytest.approx(0.002 * np.sqrt(coordinates), rel=0.1)
    assert found.noise + found.fresh == pytest.approx(coordinates, rel=0.1)
    assert found.rate == pytest.approx(rate, rel=0.15)


def test_pure_drift_is_all_drift_and_pure_noise_none() -> None:
    straight = fit(STEPS.tolist(), expected_gram(0.1, 0.0, 0.01, 0.0))
    assert straight.drift_share(475) == pytest.approx(1)
    noise = fit(STEPS.tolist(), expected_gram(0.0, 0.0, 0.01, 2.0))
    assert noise.drift_share(475) < 1e-6
    assert noise.effective(STEPS) == pytest.approx(len(STEPS), rel=0.01)


def test_checkpoints_that_do_not_move() -> None:
    walk = fit(STEPS.tolist(), np.zeros((20, 20)))
    assert (walk.speed, walk.noise, walk.fresh) == (0, 0, 0)
    assert walk.effective(STEPS) == 1
    assert walk.memory(25) == 0


def test_three_checkpoints_are_too_few() -> None:
    with pytest.raises(InputError, match="3 checkpoints"):
        fit([0, 1, 2], np.eye(3))


def test_movement_against_vectors() -> None:
    """All figures from the inner products, against the same from the vectors themselves."""
    random = np.random.default_rng(1)
    weights_NB = np.cumsum(random.standard_normal((7, 300)), axis=0) + 5
    newest = weights_NB[-1]
    deviations = weights_NB - newest
    with_newest = deviations @ newest
    with_newest[-1] = newest @ newest
    steps = [1.0, 2, 3, 4, 5, 6, 7]
    found = movement(steps, 300, deviations @ deviations.T, with_newest)
    updates = np.diff(weights_NB, axis=0)
    lengths = np.linalg.norm(updates, axis=1)
    merge = weights_NB.mean(axis=0)
    assert found.path == pytest.approx(lengths.sum())
    assert found.distance == pytest.approx(np.linalg.norm(newest - weights_NB[0]))
    assert found.newest_norm == pytest.approx(np.linalg.norm(newest))
    assert found.members_norm == pytest.approx(np.linalg.norm(weights_NB, axis=1).mean())
    assert found.merge_norm == pytest.approx(np.linalg.norm(merge))
    assert found.removed == pytest.approx(np.linalg.norm(newest - merge))
    np.testing.assert_allclose(found.cosines_UU, updates @ updates.T / np.outer(lengths, lengths))
    left, values, _ = np.linalg.svd(weights_NB - merge, full_matrices=False)
    np.testing.assert_allclose(found.shares_K, (values**2 / (values**2).sum())[:3])
    signs = np.where(left[-1, :3] < 0, -1, 1)
    np.testing.assert_allclose(found.coordinates_KN, (left[:, :3] * values[:3] * signs).T)
    squared = np.square(weights_NB[:, None] - weights_NB).sum(axis=2)
    np.testing.assert_allclose(squared_distances(deviations @ deviations.T), squared, atol=1e-9)
    assert found.to_json(steps)["straightness"] == pytest.approx(found.distance / lengths.sum())


def test_two_checkpoints_have_one_update_and_no_walk() -> None:
    found = movement([1, 2], 3, [[2.0, 0], [0, 0]], [1.0, 4])
    assert (found.path, found.walk, found.neighbours) == (pytest.approx(2**0.5), None, None)
    assert found.to_json([1, 2])["drift_share"] is None


def test_one_checkpoint_does_not_move() -> None:
    with pytest.raises(InputError, match="one checkpoint"):
        movement([1], 3, [[0.0]], [4])

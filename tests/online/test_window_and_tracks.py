"""Sliding windows and power-function tracks against numpy; other averages put together from stored tracks."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pma.averaging.power_ema import gamma_from_sigma, power_profile, window_profile
from pma.errors import FormatError, UsageError
from pma.online import Recorder, reconstructed

from .models import NAMES, Tiny, exact_mean, sequential_mean, step_of, weights


def run(recorder: Recorder, model: Tiny, last: int, interval: int) -> list[dict[str, np.ndarray]]:
    seen = []
    for step in range(1, last + 1):
        step_of(model, step)
        recorder.update(step)
        seen.append(weights(model))
        if step % interval == 0:
            recorder.end_interval()
    return seen


@pytest.mark.parametrize("on_cpu", [False, True], ids=["at once", "by a thread"])
def test_a_window_of_snapshots_is_the_mean_of_the_last(on_cpu: bool) -> None:
    model = Tiny(torch.bfloat16)
    recorder = Recorder(model, on_cpu=on_cpu, window=3, window_of="snapshots")
    seen = run(recorder, model, 20, 4)
    found = recorder.average("window")
    for name in NAMES:
        expected = sequential_mean([seen[step - 1][name] for step in (12, 16, 20)])
        assert found[name].numpy().tobytes() == expected.tobytes()
    assert recorder.average().keys() == found.keys()  # the window is what is applied by default
    assert all(torch.equal(recorder.average()[name], found[name]) for name in NAMES)


def test_a_window_of_means_weighs_every_step_alike() -> None:
    model = Tiny()
    recorder = Recorder(model, window=2)
    seen = run(recorder, model, 11, 4)  # two whole intervals, three steps more
    found = recorder.average("window")
    for name in NAMES:
        total = sum_of(seen[:4], name) + sum_of(seen[4:8], name)
        assert found[name].numpy().tobytes() == (total / np.float32(8)).tobytes()
        assert np.allclose(found[name], exact_mean([s[name] for s in seen[:8]]), atol=1e-6)
    assert torch.equal(
        recorder.average("interval")["inner.weight"],
        torch.from_numpy(sequential_mean([s["inner.weight"] for s in seen[8:]])),
    )


def sum_of(seen: list[dict[str, np.ndarray]], name: str) -> np.ndarray:
    total = seen[0][name]
    for step in seen[1:]:
        total = total + step[name]
    return total


def test_the_last_interval_is_there_until_the_next_begins() -> None:
    model = Tiny()
    for window in (0, 2):
        recorder = Recorder(model, window=window)
        seen = run(recorder, model, 4, 4)
        expected = sequential_mean([s["inner.bias"] for s in seen])
        assert recorder.average("interval")["inner.bias"].numpy().tobytes() == expected.tobytes()


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("sigma", [0.05, 0.25])
def test_a_track_weighs_steps_by_its_profile(sigma: float, every: int) -> None:
    model = Tiny()
    recorder = Recorder(model, every=every, tracks=(sigma,))
    seen = run(recorder, model, 60, 20)
    steps = np.arange(1, 61)
    weights_T = power_profile(gamma_from_sigma(sigma), 60, first_step=every, every=every)(steps)
    for name in NAMES:
        expected = np.tensordot(weights_T, np.stack([s[name].astype(np.float64) for s in seen]), 1)
        assert np.allclose(recorder.average(sigma)[name].numpy(), expected, rtol=0, atol=2e-6)


def test_other_averages_come_out_of_stored_tracks(tmp_path: Path) -> None:
    model = Tiny()
    recorder = Recorder(model, tracks=(0.05, 0.1))
    seen, folders = [], []
    for step in range(1, 121):
        step_of(model, step)
        recorder.update(step)
        seen.append(weights(model))
        if step % 10 == 0:
            folders.append(tmp_path / f"checkpoint-{step}")
            folders[-1].mkdir()
            recorder.save(folders[-1])
            recorder.save_state(folders[-1])
    steps = np.arange(1, 121)
    scale = np.abs(np.stack([s["inner.weight"] for s in seen])).max()
    for target, worst in (
        (power_profile(gamma_from_sigma(0.1), 120), 1e-10),  # it is one of them
        (power_profile(gamma_from_sigma(0.15), 120), 0.02),
        (window_profile(61, 120), 0.3),
    ):
        found = reconstructed(folders, target)
        assert found.relative_error <= worst
        assert sum(c for _, c in found.coefficients) == pytest.approx(1)
        weights_T = target(steps)
        made_T = sum(c * track.profile(steps) for track, c in found.coefficients)
        error = np.linalg.norm(made_T - weights_T) / np.linalg.norm(weights_T)
        assert found.relative_error == pytest.approx(error, rel=1e-6, abs=1e-12)
        for name in NAMES:
            stack = np.stack([s[name].astype(np.float64) for s in seen])
            # the tensors are those of the profile that was reached, up to the tracks' own rounding
            expected = np.tensordot(made_T, stack, 1)
            assert np.allclose(found.tensors[name].numpy(), expected, rtol=0, atol=3e-5 * scale)
    with recorder.applied(tensors=found.tensors):
        assert torch.equal(model.inner.weight, found.tensors["inner.weight"])
    assert weights(model)["inner.weight"].tobytes() == seen[-1]["inner.weight"].tobytes()


def test_an_earlier_end_leaves_later_tracks_out(tmp_path: Path) -> None:
    model = Tiny()
    recorder = Recorder(model, tracks=(0.1,))
    for step in (1, 2):
        recorder.update(step)
        (tmp_path / str(step)).mkdir()
        recorder.save_state(tmp_path / str(step))
    found = reconstructed([tmp_path / "1", tmp_path / "2"], window_profile(1, 1), last_step=1)
    assert [track.last_step for track, _ in found.coefficients] == [1]
    with pytest.raises(UsageError, match="no track is stored"):
        reconstructed([tmp_path / "2"], window_profile(1, 1), last_step=1)


def test_checkpoints_without_tracks_or_with_damaged_ones_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no pma_recorder"):
        reconstructed([tmp_path], window_profile(1, 2))
    recorder = Recorder(Tiny(), tracks=(0.1,))
    recorder.update(1)
    file = recorder.save_state(tmp_path) / "state.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b"last_step", b"lost_step"))
    with pytest.raises(FormatError, match="damaged"):
        reconstructed([tmp_path], window_profile(1, 1))
    file.write_bytes(whole.replace(b"track_0.inner.bias", b"track_9.inner.bias"))
    with pytest.raises(FormatError, match=r"track_0.inner.bias"):
        reconstructed([tmp_path], window_profile(1, 1))
    with pytest.raises(FormatError, match=r"track_0.inner.bias"):
        Recorder(Tiny(), tracks=(0.1,)).load_state(tmp_path)


def test_a_new_recorder_stands_in_where_nothing_is_carried(tmp_path: Path) -> None:
    recorder = Recorder(Tiny())
    recorder.update(1)
    recorder.save(tmp_path)
    assert not recorder.carries_state
    assert recorder.save_state(tmp_path) is None
    assert not Recorder(Tiny()).load_state(tmp_path)

"""Discovery, phases, windows, lineages and presets."""

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pma import trajectory, verbs
from pma.errors import InputError, UsageError
from pma.quantities import Steps, Tokens
from pma.testing import tiny_run
from pma.testing.builders import PEAK_RATE, write_trainer_state
from pma.trajectory import Phase, Window
from pma.trajectory.phases import phase_at
from pma.verbs import Choice


def steps(points: object) -> list[int]:
    return [p.step for p in points]  # type: ignore[attr-defined]


def run_with_rates(folder: Path, rates: dict[int, float], count: int = 10) -> trajectory.Trajectory:
    paths = tiny_run(folder, steps=count, shapes={"w": (2,)})
    for path in paths:
        write_trainer_state(path, int(path.name.split("-")[1]), rates=rates)
    return trajectory.discover([folder])


# ---- discovery ----


def test_checkpoints_are_ordered_by_step_not_by_name(tmp_path: Path) -> None:
    tiny_run(tmp_path, steps=12, every=10, shapes={"w": (2,)})
    found = trajectory.discover([tmp_path])
    assert steps(found.points) == list(range(10, 121, 10))
    assert found.points[0].tokens == 1000
    assert found.points[0].meta.tokens_source == "num_input_tokens_seen in trainer_state.json"
    assert found.points[0].learning_rate == PEAK_RATE


def test_zero_tokens_mean_unknown(tmp_path: Path) -> None:
    path = tiny_run(tmp_path, steps=1)[0]
    state = json.loads((path / "trainer_state.json").read_text())
    (path / "trainer_state.json").write_text(json.dumps(state | {"num_input_tokens_seen": 0}))
    point = trajectory.discover([tmp_path]).points[0]
    assert (point.tokens, point.meta.tokens_source) == (None, None)


@pytest.mark.parametrize("what", ["no state", "empty", "state only"])
def test_a_checkpoint_that_is_being_written_is_left_out_and_said_so(tmp_path: Path, what: str) -> None:
    paths = tiny_run(tmp_path, steps=3)
    if what == "no state":
        (paths[2] / "trainer_state.json").unlink()
    elif what == "empty":
        shutil.rmtree(paths[2])
        paths[2].mkdir()
    else:
        (paths[2] / "model.safetensors").unlink()
    found = trajectory.discover([tmp_path])
    assert steps(found.points) == [10, 20]
    assert [path for path, _ in found.left_out] == [paths[2]]
    with pytest.raises(InputError, match="not complete"):
        trajectory.from_checkpoints(paths)


@pytest.mark.parametrize("make", ["missing", "file", "empty", "other things"])
def test_wrong_folders(tmp_path: Path, make: str) -> None:
    root = tmp_path / "root"
    if make == "file":
        root.write_text("x")
    elif make != "missing":
        root.mkdir()
    if make == "other things":
        (root / "notes").mkdir()
    with pytest.raises(InputError, match=r"expected a run|no checkpoint"):
        trajectory.discover([root])


def test_a_run_without_a_complete_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-10").mkdir()
    with pytest.raises(InputError, match="no complete checkpoint yet"):
        trajectory.discover([tmp_path])


def test_a_half_written_state_leaves_one_checkpoint_out_and_not_the_run(tmp_path: Path) -> None:
    path = tiny_run(tmp_path, steps=2)[1]
    (path / "trainer_state.json").write_text('{"global_step": 1')
    found = trajectory.discover([tmp_path])
    assert steps(found.points) == [10]
    assert "being written, or damaged" in found.left_out[0][1]
    with pytest.raises(InputError, match="not complete"):
        trajectory.from_checkpoints([path])


def test_several_roots_are_one_trajectory(tmp_path: Path) -> None:
    paths = tiny_run(tmp_path / "scratch", steps=4)
    (tmp_path / "archive").mkdir()
    for path in paths[:2]:
        path.rename(tmp_path / "archive" / path.name)
    assert steps(trajectory.discover([tmp_path / "scratch", tmp_path / "archive"]).points) == [10, 20, 30, 40]


def test_a_restart_follows_the_surviving_lineage(tmp_path: Path) -> None:
    """Steps 30 and 40 were trained twice; the second time led to 50, and their logs tell it."""
    dead = tiny_run(tmp_path / "dead", steps=4, shapes={"w": (2,)})
    live = tiny_run(tmp_path / "live", steps=5, shapes={"w": (2,)})
    for path in live:
        step = int(path.name.split("-")[1])
        write_trainer_state(path, step, losses={30: 1.5, 40: 1.4, 50: 1.3})
    for path in live[:2]:
        shutil.rmtree(path)
    found = trajectory.discover([tmp_path / "dead", tmp_path / "live"])
    assert [p.path for p in found.points] == [dead[0], dead[1], live[2], live[3], live[4]]
    assert {path for path, _ in found.left_out} == {dead[2], dead[3]}


def rolled_back(folder: Path, live_folder: Path) -> tuple[list[Path], Path]:
    """Steps 10 to 50, then a restart from 20 that has come to 30 so far."""
    dead = tiny_run(folder, steps=5, shapes={"w": (2,)})
    live = live_folder / "checkpoint-30"
    if live_folder != folder:
        shutil.copytree(dead[2], live)
    write_trainer_state(live, 30, losses={30: 1.5})
    for age, path in enumerate([*(p for p in dead if p != live), live]):
        os.utime(path / "trainer_state.json", ns=(10**18 + age, 10**18 + age))
    return dead, live


def test_a_restart_that_is_not_yet_as_far_is_the_run(tmp_path: Path) -> None:
    """As after rolling back a spike: 40 and 50 are dead, though they have the highest steps."""
    dead, live = rolled_back(tmp_path, tmp_path)
    found = trajectory.discover([tmp_path])
    assert [p.path for p in found.points] == [dead[0], dead[1], live]
    assert {path for path, _ in found.left_out} == {dead[3], dead[4]}


def test_lineages_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    rolled_back(tmp_path / "one", tmp_path / "other")
    with pytest.raises(
        InputError, match=r"checkpoint-50 has the highest step but .*other/checkpoint-30 was written later"
    ):
        trajectory.discover([tmp_path / "one", tmp_path / "other"])


@pytest.mark.parametrize("step", [None, "30", 2**70, True, -1])
def test_a_checkpoint_that_does_not_say_its_step_is_left_out(tmp_path: Path, step: object) -> None:
    path = tiny_run(tmp_path, steps=3)[2]
    state = json.loads((path / "trainer_state.json").read_text())
    (path / "trainer_state.json").write_text(json.dumps(state | {"global_step": step}))
    found = trajectory.discover([tmp_path])
    assert steps(found.points) == [10, 20]
    assert "do not say its step" in found.left_out[0][1]


def test_a_name_that_contradicts_the_records_is_left_out(tmp_path: Path) -> None:
    tiny_run(tmp_path, steps=3)[0].rename(tmp_path / "checkpoint-15")
    found = trajectory.discover([tmp_path])
    assert steps(found.points) == [20, 30]
    assert "says it is step 10" in found.left_out[0][1]


def test_odd_log_entries_are_passed_over(tmp_path: Path) -> None:
    path = tiny_run(tmp_path, steps=1)[0]
    odd = [
        7,
        {"step": "x", "loss": 1},
        {"step": 10, "loss": "nan", "learning_rate": True},
        {"step": 10, "loss": 10**400},
    ]
    (path / "trainer_state.json").write_text(
        json.dumps({"global_step": 10, "num_input_tokens_seen": 10**400, "log_history": odd})
    )
    point = trajectory.discover([tmp_path]).points[0]
    assert (point.tokens, point.learning_rate, point.meta.log.losses) == (None, None, ())


def test_equal_logs_leave_it_to_the_time_of_writing(tmp_path: Path) -> None:
    first = tiny_run(tmp_path / "first", steps=2, shapes={"w": (2,)})
    second = tiny_run(tmp_path / "second", steps=2, shapes={"w": (2,)})
    for age, path in enumerate([*first, *second]):
        os.utime(path / "trainer_state.json", ns=(10**18 + age, 10**18 + age))
    found = trajectory.discover([tmp_path / "second", tmp_path / "first"])
    assert [p.path for p in found.points] == second
    assert "later written" in found.left_out[0][1]


def test_a_loss_of_nan_is_not_a_contradiction(tmp_path: Path) -> None:
    paths = tiny_run(tmp_path, steps=3, shapes={"w": (2,)})
    for path in paths:
        write_trainer_state(path, int(path.name.split("-")[1]), losses={20: float("nan")})
    assert steps(trajectory.discover([tmp_path]).points) == [10, 20, 30]


def test_explicit_lists_are_ordered_by_step_unless_as_given(tmp_path: Path) -> None:
    paths = tiny_run(tmp_path, steps=3)
    assert steps(trajectory.from_checkpoints([paths[2], paths[0]]).points) == [10, 30]
    assert steps(trajectory.from_checkpoints([paths[2], paths[0]], as_given=True).points) == [30, 10]


def test_the_same_checkpoint_or_step_twice_is_refused(tmp_path: Path) -> None:
    paths = tiny_run(tmp_path / "a", steps=2)
    other = tiny_run(tmp_path / "b", steps=2)
    (tmp_path / "link").symlink_to(paths[0])
    with pytest.raises(UsageError, match="given twice"):
        trajectory.from_checkpoints([paths[0], tmp_path / "link"])
    with pytest.raises(UsageError, match="both step 10"):
        trajectory.from_checkpoints([paths[0], other[0]])


def test_a_run_that_also_holds_the_final_model_is_a_run(tmp_path: Path) -> None:
    paths = tiny_run(tmp_path, steps=3)
    shutil.copy(paths[2] / "model.safetensors", tmp_path)
    assert steps(trajectory.resolve([tmp_path]).points) == [10, 20, 30]
    assert not trajectory.is_checkpoint(tmp_path)
    assert trajectory.is_checkpoint(paths[0])


def test_runs_and_checkpoints_do_not_mix(tmp_path: Path) -> None:
    paths = tiny_run(tmp_path / "run", steps=2)
    with pytest.raises(UsageError, match="not both"):
        trajectory.resolve([paths[0], tmp_path / "run"])
    with pytest.raises(UsageError, match="one by one"):
        trajectory.resolve([tmp_path / "run"], as_given=True)
    with pytest.raises(InputError, match="missing or empty"):
        trajectory.resolve([paths[0], tmp_path / "gone"])


# ---- phases ----


def test_phases_of_warmup_stable_decay() -> None:
    rates = [(1, 0.0), (10, 0.5), (20, 1.0), (30, 1.0), (40, 1.0), (50, 0.7), (60, 0.2)]
    assert [phase_at(s, rates).value for s in (1, 10, 20, 30, 40, 45, 50, 60)] == [
        "warmup", "warmup", "stable", "stable", "stable", "stable", "decay", "decay",
    ]  # fmt: skip


def test_a_slow_cosine_is_a_decay() -> None:
    import math

    rates = [(s, 0.5 * (1 + math.cos(math.pi * s / 100_000))) for s in range(0, 100_001, 10)]
    assert {phase_at(s, rates) for s in range(50, 100_000, 50)} == {Phase.DECAY}


@pytest.mark.parametrize("rates", [[], [(10, 1.0)]])
def test_too_few_rates_are_unknown(rates: list[tuple[int, float]]) -> None:
    assert phase_at(10, rates) is Phase.UNKNOWN


def test_a_window_across_phases_is_refused(tmp_path: Path) -> None:
    decay = {80: PEAK_RATE * 0.9, 90: PEAK_RATE * 0.5, 100: PEAK_RATE * 0.1}
    found = run_with_rates(tmp_path, decay)
    with pytest.raises(
        UsageError, match=r"crosses phases: step 50 stable.*step 80 decay.*--allow-mixed-phases"
    ):
        trajectory.select(found, Window(last=6))
    assert steps(trajectory.select(found, Window(last=6, allow_mixed_phases=True))) == [
        50,
        60,
        70,
        80,
        90,
        100,
    ]
    assert steps(trajectory.select(found, Window(last=3))) == [80, 90, 100]
    assert steps(trajectory.select(found, Window(last=3, at=70))) == [50, 60, 70]


def test_a_window_across_two_constant_rates_is_refused(tmp_path: Path) -> None:
    found = run_with_rates(tmp_path, dict.fromkeys(range(60, 101, 10), PEAK_RATE / 10))
    with pytest.raises(UsageError, match="crosses phases"):
        trajectory.select(found, Window(last=7))
    assert steps(trajectory.select(found, Window(last=3))) == [80, 90, 100]


# ---- windows ----


@pytest.fixture
def ten(tmp_path: Path) -> trajectory.Trajectory:
    tiny_run(tmp_path, steps=10, shapes={"w": (2,)})
    return trajectory.discover([tmp_path])


def test_every_in_steps_and_tokens(ten: trajectory.Trajectory) -> None:
    assert steps(trajectory.select(ten, Window(last=3, every=Steps(30)))) == [40, 70, 100]
    assert steps(trajectory.select(ten, Window(last=3, every=Tokens(3000)))) == [40, 70, 100]
    assert steps(trajectory.select(ten, Window(last=3, every=Steps(32), at=90))) == [30, 60, 90]


def test_every_takes_the_nearest_within_a_quarter(tmp_path: Path) -> None:
    for path in tiny_run(tmp_path, steps=10, shapes={"w": (2,)}):
        if path.name in ("checkpoint-40", "checkpoint-50"):
            shutil.rmtree(path)
    found = trajectory.discover([tmp_path])
    assert steps(trajectory.select(found, Window(last=2, every=Steps(50), at=80))) == [30, 80]
    assert steps(trajectory.select(found, Window(last=2, every=Steps(45)))) == [60, 100]
    with pytest.raises(
        UsageError, match=r"within a quarter of 20 steps of step 40; there are steps 10 .*30 .*60"
    ):
        trajectory.select(found, Window(last=4, every=Steps(20)))


def test_a_window_that_does_not_exist_says_what_does(ten: trajectory.Trajectory) -> None:
    with pytest.raises(UsageError, match=r"only 10 complete checkpoints: steps 10 \(1K tokens\)"):
        trajectory.select(ten, Window(last=11))
    with pytest.raises(UsageError, match="no checkpoint of that step; there are"):
        trajectory.select(ten, Window(last=2, at=55))
    with pytest.raises(UsageError, match="at least one"):
        Window(last=0)


def test_tokens_are_needed_for_distances_in_tokens(tmp_path: Path) -> None:
    path = tiny_run(tmp_path, steps=2)[0]
    state = json.loads((path / "trainer_state.json").read_text())
    (path / "trainer_state.json").write_text(json.dumps(state | {"num_input_tokens_seen": 0}))
    with pytest.raises(UsageError, match=r"does not record its tokens.*in steps"):
        trajectory.select(trajectory.discover([tmp_path]), Window(last=2, every=Tokens(1000)))


# ---- presets ----

TABLE = [
    (411_000_000, False, 2e9, 6),
    (2_000_000_000, False, 5e9, 6),
    (8_000_000_000, False, 15e9, 10),
    (70_000_000_000, False, 40e9, 10),
    (7_000_000_000, True, 4e9, 10),
    (13_000_000_000, True, 8e9, 10),
    (100_000_000_000, True, 80e9, 10),
]


@pytest.mark.parametrize(("parameters", "mixture", "every", "last"), TABLE)
def test_presets_are_the_papers(parameters: int, mixture: bool, every: float, last: int) -> None:
    size = trajectory.preset(parameters, mixture_of_experts=mixture)
    assert (size.last, size.extrapolated, size.capped) == (last, False, False)
    assert size.every_tokens == pytest.approx(every)


def test_presets_between_and_outside_the_table() -> None:
    middle = trajectory.preset(round((8e9 * 70e9) ** 0.5), mixture_of_experts=False)
    assert middle.every_tokens == pytest.approx((15e9 * 40e9) ** 0.5, rel=1e-6)
    assert not middle.extrapolated
    assert trajectory.preset(400_000, mixture_of_experts=False).extrapolated
    assert trajectory.preset(10**12, mixture_of_experts=True).extrapolated


@given(st.integers(1, 10**13), st.booleans(), st.integers(1, 10**13))
def test_a_preset_never_reaches_beyond_the_stable_tokens(parameters: int, mixture: bool, stable: int) -> None:
    size = trajectory.preset(parameters, mixture_of_experts=mixture, stable_tokens=stable)
    assert size.last in range(6, 11)
    assert size.every_tokens * size.last <= stable + size.last or not size.capped
    assert size.capped or size.every_tokens * size.last <= stable + size.last


def test_a_preset_is_fitted_to_the_checkpoints_there_are() -> None:
    size = trajectory.preset(2_000_000_000, mixture_of_experts=False)
    at = [i * 3_000_000_000 for i in range(1, 30)]
    assert trajectory.fitted(size, at).every_tokens == 3_000_000_000  # 5B rounded down to the run's 3B
    assert trajectory.fitted(size, at[:4]).last == 4
    assert trajectory.fitted(size, [i * 8_000_000_000 for i in range(30)]).every_tokens == 8_000_000_000
    assert trajectory.fitted(size, []) == size


def test_names_say_the_step_where_no_record_does(tmp_path: Path) -> None:
    for path in tiny_run(tmp_path / "trainer", steps=3):
        (path / "trainer_state.json").unlink()
        path.rename(tmp_path / path.name.replace("checkpoint-", "step_"))
    shutil.rmtree(tmp_path / "trainer")
    assert steps(trajectory.discover([tmp_path]).points) == [10, 20, 30]
    assert steps(trajectory.from_checkpoints([tmp_path / "step_20"]).points) == [20]


def test_what_accelerate_saved_is_complete_with_its_random_states(tmp_path: Path) -> None:
    for path in tiny_run(tmp_path, steps=2):
        (path / "trainer_state.json").unlink()
    with pytest.raises(InputError, match="step-N"):
        trajectory.discover([tmp_path])
    (tmp_path / "checkpoint-10" / "random_states_0.pkl").write_bytes(b"")
    assert steps(trajectory.discover([tmp_path]).points) == [10]


def test_files_whose_names_are_not_known_are_shown(tmp_path: Path) -> None:
    tiny_run(tmp_path, steps=1)[0].joinpath("model.safetensors").rename(tmp_path / "ckpt_10.safetensors")
    shutil.rmtree(tmp_path / "checkpoint-10")
    with pytest.raises(InputError, match=r"found ckpt_10\.safetensors\. .*--pattern"):
        trajectory.discover([tmp_path])


def test_merges_side_by_side_are_no_run(tmp_path: Path) -> None:
    tiny_run(tmp_path / "run", steps=3)
    for last in (2, 3):
        chosen = Choice(paths=(tmp_path / "run",), window=Window(last=last))
        verbs.merge(chosen, tmp_path / "out" / f"m{last}")
    with pytest.raises(InputError, match="holds no checkpoint"):
        trajectory.discover([tmp_path / "out"])

"""The recorder against a sequential fp32 reference in numpy: to the bit, on every path."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

from pma.averaging.accumulate import add, finish
from pma.errors import FormatError, InputError, MismatchError, UsageError
from pma.formats import interval_mean
from pma.online import Recorder
from pma.types import DType

from . import resumable
from .models import NAMES, Tiny, exact_mean, sequential_mean, step_of, weights


def trained(recorder: Recorder, model: Tiny, steps: range) -> list[dict[str, np.ndarray]]:
    """The weights after each step, all of which the recorder was told of."""
    seen = []
    for step in steps:
        step_of(model, step)
        recorder.update(step)
        seen.append(weights(model))
    return seen


def assert_same(found: dict, seen: list[dict[str, np.ndarray]]) -> None:
    for name in NAMES:
        got = found[name].numpy() if isinstance(found[name], torch.Tensor) else found[name]
        assert got.dtype == np.float32
        assert got.tobytes() == sequential_mean([weights[name] for weights in seen]).tobytes(), name


@pytest.mark.parametrize("on_cpu", [False, True], ids=["at once", "by a thread"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_mean_is_the_sequential_sum_divided_once(tmp_path: Path, on_cpu: bool, dtype: torch.dtype) -> None:
    model = Tiny(dtype)
    recorder = Recorder(model, on_cpu=on_cpu)
    for first in (1, 8):  # the second interval begins anew
        seen = trained(recorder, model, range(first, first + 7))
        path = recorder.save(tmp_path)
        assert path == tmp_path / interval_mean.MEAN_FILE
        assert_same(load_file(path), seen)
        record = interval_mean.read_record(path)
        assert (record.first_step, record.last_step, record.updates, record.every) == (first, first + 6, 7, 1)
        rounded = dtype in (torch.bfloat16, torch.float16)
        assert record.averaged == ("rounded weights" if rounded else "weights")


def test_the_distance_from_a_merge_of_the_same_weights() -> None:
    """A merge averages fp32 checkpoints in fp64. Over 1,000 steps the fp32 sum is within 32 units in the last
    place of the largest weight of a tensor; the median is below one (see docs/online.md).
    """
    model = Tiny()
    recorder = Recorder(model)
    seen = trained(recorder, model, range(1, 1001))
    found = recorder.average()
    for name in ("embed.weight", "inner.weight"):
        values = [weights[name].ravel() for weights in seen]
        sums, merged = np.empty(len(values[0])), np.empty(len(values[0]), np.float32)
        for number, value in enumerate(values):
            add(sums, [value], [1.0], first=number == 0)
        assert finish(sums, merged, DType.F32, divisor=len(values))
        assert np.array_equal(merged, exact_mean(values).astype(np.float32))
        unit = np.spacing(np.abs(values).max().astype(np.float32))
        distance = np.abs(found[name].numpy().ravel() - merged) / unit
        assert distance.max() <= 32
        assert np.median(distance) < 1


def test_the_file_has_the_state_dicts_names_and_ties(tmp_path: Path) -> None:
    model = Tiny()
    recorder = Recorder(model)
    trained(recorder, model, range(1, 3))
    stored = load_file(recorder.save(tmp_path))
    floating = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    assert set(stored) == floating == {*NAMES, "head.weight"}
    assert np.array_equal(stored["head.weight"], stored["embed.weight"])


def test_the_mean_of_a_checkpoint_that_is_a_file_lies_beside_it(tmp_path: Path) -> None:
    model = Tiny()
    recorder = Recorder(model)
    trained(recorder, model, range(1, 3))
    torch.save(model.state_dict(), tmp_path / "model_000002.pt")
    path = recorder.save(tmp_path / "model_000002.pt")
    assert path == tmp_path / "model_000002.pma_interval_mean.safetensors"
    assert interval_mean.find(tmp_path / "model_000002.pt") == path
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["pma_interval_mean"])["updates"] == 2
        assert file.metadata()["format"] == "pt"
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


@pytest.mark.parametrize("on_cpu", [False, True], ids=["at once", "by a thread"])
def test_every_k_steps(tmp_path: Path, on_cpu: bool) -> None:
    model = Tiny()
    recorder = Recorder(model, every=3, on_cpu=on_cpu)
    seen = trained(recorder, model, range(1, 12))
    path = recorder.save(tmp_path)
    assert_same(load_file(path), [seen[2], seen[5], seen[8]])
    record = interval_mean.read_record(path)
    assert (record.first_step, record.last_step, record.updates, record.every) == (3, 9, 3, 3)


def test_an_interval_without_a_recorded_step_has_no_file(tmp_path: Path) -> None:
    model = Tiny()
    recorder = Recorder(model, every=5)
    trained(recorder, model, range(1, 4))
    assert recorder.save(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="no recorded step"):
        recorder.average()


def test_a_thread_adds_what_was_there_though_training_goes_on() -> None:
    """Weights are overwritten the moment `update` returns, while the thread is kept waiting."""
    model = Tiny()
    recorder = Recorder(model, on_cpu=True)
    recorder._feed._thread.submit(lambda: __import__("time").sleep(0.2))
    step_of(model, 1)
    expected = weights(model)
    recorder.update(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
        model.expert_bias.fill_(float("nan"))
    assert_same(recorder.average(), [expected])


def test_what_a_thread_raises_is_not_lost() -> None:
    recorder = Recorder(Tiny(), on_cpu=True)
    recorder.update(1)
    recorder._feed.wait()
    recorder._kept.interval.tensors.pop()
    recorder.update(2)
    with pytest.raises(RuntimeError, match="same number"):
        recorder.update(3)


def masters_state(model: Tiny) -> dict[str, torch.Tensor]:
    return {name: p.detach().to(torch.float32) + 1e-4 for name, p in model.named_parameters()}


def test_masters_are_averaged_where_they_are_kept(tmp_path: Path) -> None:
    model = Tiny(torch.bfloat16)
    masters = masters_state(model)
    by_mapping = Recorder(model, masters=masters)
    by_function = Recorder(model, masters=lambda name, parameter: masters[name])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for name, parameter in model.named_parameters():
        optimizer.state[parameter]["master_param"] = masters[name]
    by_optimizer = Recorder(model, optimizer=optimizer)
    recorders = (by_mapping, by_function, by_optimizer)
    seen = []
    for step in range(1, 5):
        step_of(model, step)
        for name, parameter in model.named_parameters():
            masters[name].add_(0.01 * step)
            parameter.data.copy_(masters[name])
        for recorder in recorders:
            recorder.update(step)
        seen.append({**weights(model), **{name: value.numpy().copy() for name, value in masters.items()}})
    for number, recorder in enumerate(recorders):
        (tmp_path / str(number)).mkdir()
        path = recorder.save(tmp_path / str(number))
        assert interval_mean.read_record(path).averaged == "masters"
        assert_same(load_file(path), seen)


def test_masters_for_some_are_said_to_be_rounded_weights() -> None:
    model = Tiny(torch.bfloat16)
    masters = masters_state(model)
    del masters["inner.bias"]
    recorder = Recorder(model, masters=masters)
    recorder.update(1)
    assert recorder._kept.interval.averaged == "rounded weights"


def test_a_master_of_another_shape_is_refused() -> None:
    model = Tiny(torch.bfloat16)
    recorder = Recorder(model, masters={"inner.weight": torch.zeros(2, 2)})
    with pytest.raises(InputError, match=r"master of inner.weight: torch.float32 \(2, 2\)"):
        recorder.update(1)


@pytest.mark.parametrize("on_cpu", [False, True], ids=["at once", "by a thread"])
@pytest.mark.parametrize("window_of", ["interval means", "snapshots"])
def test_a_resumed_recorder_goes_on_to_the_same_bits(tmp_path: Path, on_cpu: bool, window_of: str) -> None:
    """Saved by torch in the middle of an interval, loaded into a new recorder of a new model."""

    def make(model: Tiny) -> Recorder:
        return Recorder(model, on_cpu=on_cpu, window=2, window_of=window_of, tracks=(0.05, 0.2))

    whole_model = Tiny()
    initial = {name: tensor.clone() for name, tensor in whole_model.state_dict().items()}
    whole, part_model = make(whole_model), Tiny()
    part_model.load_state_dict(initial)
    part = make(part_model)
    for recorder, model, last in ((whole, whole_model, 20), (part, part_model, 11)):
        for step in range(1, last + 1):
            step_of(model, step)
            recorder.update(step)
            if step % 4 == 0:
                recorder.end_interval()
    torch.save({"model": part_model.state_dict(), "recorder": part.state_dict()}, tmp_path / "all.pt")
    loaded = torch.load(tmp_path / "all.pt", weights_only=True)
    again_model = Tiny()
    again_model.load_state_dict(loaded["model"])
    again = make(again_model)
    again.load_state_dict(loaded["recorder"])
    for step in range(12, 21):
        step_of(again_model, step)
        again.update(step)
        if step % 4 == 0:
            again.end_interval()
    for which in ("interval", "window", 0.05, 0.2):
        expected, found = whole.average(which), again.average(which)
        assert all(torch.equal(expected[name], found[name]) for name in NAMES), which


def test_torchs_distributed_checkpoints_keep_it(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    model = Tiny()
    recorder = Recorder(model, tracks=(0.1,), window=2)
    trained(recorder, model, range(1, 6))
    with pytest.warns(UserWarning, match="single process"):
        dcp.save({"recorder": recorder}, checkpoint_id=tmp_path / "dcp")
    again = Recorder(model, tracks=(0.1,), window=2)
    with pytest.warns(UserWarning, match="single process"):
        dcp.load({"recorder": again}, checkpoint_id=tmp_path / "dcp")
    for which in ("interval", 0.1):
        expected, found = recorder.average(which), again.average(which)
        assert all(torch.equal(expected[name], found[name]) for name in NAMES)
    again.update(6)
    with pytest.raises(UsageError, match="expected 7"):
        again.update(6)


def test_a_killed_run_goes_on_to_the_same_file(tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    resumable.run(tmp_path / "whole")
    for kill_at in (9, 0):
        command = [sys.executable, resumable.__file__, str(tmp_path / "killed"), str(kill_at)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode == (-9 if kill_at else 0), done.stderr
    for step in ("6", "12"):
        files = [tmp_path / name / step / interval_mean.MEAN_FILE for name in ("whole", "killed")]
        assert files[0].read_bytes() == files[1].read_bytes()


class Other(torch.nn.Module):
    def __init__(self, width: int, name: str = "a") -> None:
        super().__init__()
        self.register_parameter(name, torch.nn.Parameter(torch.zeros(width)))


@pytest.mark.parametrize(
    ("model", "settings", "words"),
    [
        (Other(3), {}, r"another model: a is \[2\], expected \[3\]"),
        (Other(2, "b"), {}, r"another model: b is 'missing'"),
        (Other(2), {"every": 2}, "every so many steps: 1, this recorder: 2"),
        (Other(2), {"tracks": (0.1,)}, "tracks of these widths"),
        (Other(2), {"window": 4}, "window of so many"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(model: torch.nn.Module, settings: dict, words: str) -> None:
    recorder = Recorder(Other(2))
    recorder.update(1)
    other = Recorder(model, **settings)
    with pytest.raises(MismatchError, match=words):
        other.load_state_dict(recorder.state_dict())
    other.update(5)  # it goes on as it was


def test_damaged_states_are_refused() -> None:
    recorder = Recorder(Other(2))
    recorder.update(1)
    whole = recorder.state_dict()
    record = json.loads(whole["record"])
    for broken in (
        {},
        {**whole, "record": "{"},
        {**whole, "record": json.dumps({**record, "version": 9})},
        {**whole, "record": json.dumps({**record, "sums": {}})},
        {**whole, "record": json.dumps({**record, "setup": 3})},
        {**whole, "tensors": {}},
        {**whole, "tensors": {"interval.a": torch.zeros(3)}},
    ):
        with pytest.raises(FormatError):
            Recorder(Other(2)).load_state_dict(broken)


def test_steps_left_out_or_repeated_are_refused() -> None:
    recorder = Recorder(Tiny())
    recorder.update(4)
    for step in (4, 3, 6):
        with pytest.raises(UsageError, match="expected 5, once after each optimizer step"):
            recorder.update(step)
    recorder.update(5)


def test_wrong_requests() -> None:
    for settings in ({"every": 0}, {"window": -1}, {"window_of": "weeks"}, {"tracks": (0.5,)}):
        with pytest.raises(UsageError):
            Recorder(Tiny(), **settings)
    recorder = Recorder(Tiny(), tracks=(0.1,))
    recorder.update(1)
    with pytest.raises(UsageError, match="no window is kept"):
        recorder.average("window")
    with pytest.raises(UsageError, match="tracks of widths"):
        recorder.average(0.2)
    with pytest.raises(UsageError, match="the checkpoint is saved first"):
        recorder.save(Path("/nonexistent/folder"))


def test_models_that_cannot_be_averaged() -> None:
    with pytest.raises(InputError, match="no floating-point"):
        Recorder(torch.nn.Module())
    quantised = Other(2)
    quantised.register_buffer("packed", torch.zeros(2, dtype=torch.float8_e4m3fn))
    with pytest.raises(InputError, match="packed is"):
        Recorder(quantised)


def test_a_parameter_that_was_replaced_is_not_missed(tmp_path: Path) -> None:
    model = Tiny()
    recorder = Recorder(model)
    model.inner.weight = torch.nn.Parameter(torch.zeros(6, 6))
    recorder.update(1)
    with pytest.raises(UsageError, match=r"inner\.weight was replaced"):
        recorder.save(tmp_path)


def test_a_compiled_model_has_the_models_names() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model[0] = torch.compile(model[0])
    assert any("_orig_mod" in name for name in model.state_dict())
    recorder = Recorder(model)
    recorder.update(1)
    assert set(recorder.average()) == {"0.weight", "0.bias"}


def test_the_module_is_imported_without_torch() -> None:
    code = "import sys, pma.online; pma.online.__all__; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_complex_weights_are_averaged_in_pairs() -> None:
    model = torch.nn.Module()
    model.register_parameter("phase", torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64)))
    recorder = Recorder(model)
    values = [np.array([1 + 2j, 0.1j, 3]) * step for step in (1, 2, 3)]
    for step, value in enumerate(values, 1):
        with torch.no_grad():
            model.phase.copy_(torch.from_numpy(value))
        recorder.update(step)
    found = recorder.average()["phase"]
    assert found.dtype == torch.complex64
    assert np.allclose(found.numpy(), np.mean(values, axis=0))


def test_pairs_of_placements_agree() -> None:
    models = [Tiny(torch.bfloat16) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    recorders = [
        Recorder(model, on_cpu=on_cpu, tracks=(0.1,))
        for model, on_cpu in zip(models, (False, True), strict=True)
    ]
    for step, (recorder, model) in itertools.product(range(1, 9), zip(recorders, models, strict=True)):
        step_of(model, step)
        recorder.update(step)
    for which in ("interval", 0.1):
        a, b = (recorder.average(which) for recorder in recorders)
        assert all(torch.equal(a[name], b[name]) for name in NAMES)


def test_an_average_is_applied_and_taken_back_to_the_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = Tiny(dtype)
        recorder = Recorder(model, on_cpu=True)
        seen = trained(recorder, model, range(1, 6))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with recorder.applied():
            for name in NAMES:
                mean = torch.from_numpy(sequential_mean([step[name] for step in seen]))
                inside = model.state_dict()[name]
                assert torch.equal(inside, mean.to(inside.dtype)), name
            assert torch.equal(model.head.weight, model.embed.weight)
            assert int(model.seen) == 5  # integers are the model's own
        with pytest.raises(KeyboardInterrupt), recorder.applied():
            raise KeyboardInterrupt
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
        step_of(model, 6)
        recorder.update(6)  # and recording goes on
        seen.append(weights(model))
        assert_same(recorder.average(), seen)


def test_the_gradient_mode_and_gradients_are_left_alone() -> None:
    model = Tiny()
    recorder = Recorder(model)
    recorder.update(1)
    model(torch.arange(4)).sum().backward()
    gradient = model.inner.weight.grad.clone()
    with recorder.applied():
        assert torch.is_grad_enabled()
    with torch.inference_mode(), recorder.applied():
        model(torch.arange(4))
    assert torch.equal(model.inner.weight.grad, gradient)
    model(torch.arange(4)).sum().backward()


def test_tensors_that_do_not_fit_are_not_applied() -> None:
    model = Tiny()
    recorder = Recorder(model)
    recorder.update(1)
    tensors = recorder.average()
    before = weights(model)
    for wrong in ({**tensors, "inner.bias": torch.zeros(2)}, {"inner.bias": tensors["inner.bias"]}):
        with pytest.raises(MismatchError, match="average of"), recorder.applied(tensors=wrong):
            pass
    assert all(weights(model)[name].tobytes() == before[name].tobytes() for name in NAMES)

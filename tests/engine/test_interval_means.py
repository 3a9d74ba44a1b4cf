"""Merges of interval means: the numpy twin's to the bit, the exact average over every step of a run, and
errors.
"""

# N checkpoints, T steps, D dimensions

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pma import engine, trajectory, verbs
from pma.engine import MergeOptions
from pma.errors import FormatError, MismatchError, NonfiniteError, PmaError, UsageError
from pma.formats.interval_mean import IntervalMean
from pma.quantities import Steps
from pma.testing import random_raw, reference_average, store_mean, tiny_llama_run, tiny_run
from pma.testing.builders import Raw, write_safetensors
from pma.testing.distributed import in_ranks, load_dcp
from pma.testing.reference import read_all, same_bytes
from pma.trajectory import Window
from pma.types import DType
from pma.verbs import Choice

MEAN = "pma_interval_mean.safetensors"
FIXTURES = Path(__file__).parent.parent / "formats" / "fixtures"
SHAPES = {"embed.weight": (32, 16), "layer.0.weight": (16, 48), "layer.0.bias": (16,), "scale": ()}
EXTRA = [random_raw("ids", DType.I64, (5,), seed=1), random_raw("wave", DType.C64, (7,), seed=5)]
pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:FutureWarning")


def drawn(seed: int) -> dict[str, NDArray[Any]]:
    random = np.random.default_rng(seed)
    floats = {name: random.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    return {**floats, "wave": random.standard_normal(14).astype(np.float32).view(np.complex64)}


def run_with_means(
    folder: Path, steps: int = 5, records: Sequence[Mapping[str, Any]] = (), **how: Any
) -> Path:
    """A run whose stored means have nothing to do with its weights, so that they cannot be mixed up."""
    for number, path in enumerate(tiny_run(folder, steps, extra=EXTRA, **how)):
        store_mean(path, drawn(number), **(records[number] if records else {}))
    return folder


def merged(run: Path, out: Path, window: Window | None = None, **options: Any) -> Path:
    choice = Choice(paths=(run,), window=window or Window(last=5))
    verbs.merge(choice, out, MergeOptions(use="interval-means", **options))
    return out


def described(run: Path, window: Window | None = None, **options: Any) -> dict[str, Any]:
    choice = Choice(paths=(run,), window=window or Window(last=5))
    with verbs.plan(choice, MergeOptions(use="interval-means", **options)) as plan:
        return plan.describe()


def twin(folder: Path, run: Path, weights: Sequence[float], dtype: str) -> dict[str, bytes]:
    """The same by numpy, from the means as checkpoints of their own, and what they lack from the run."""
    sources = []
    paths = sorted(run.glob("checkpoint-*"))
    for number, path in list(enumerate(paths))[-len(weights) :]:
        tensors = [Raw(spec=EXTRA[0].spec, data=bytes(read_all(path)["ids"]["data"]))]
        for name, value in drawn(number).items():
            kind = DType.C64 if np.iscomplexobj(value) else DType.F32
            tensors.append(Raw(spec=random_raw(name, kind, value.shape).spec, data=value.tobytes()))
        sources.append(folder / f"{number}")
        write_safetensors(sources[-1], tensors)
    return reference_average(sources, weights, dtype)


@pytest.mark.parametrize(("dtype", "stored"), [("bf16", "BF16"), ("fp16", "F16"), ("fp32", "F32")])
@pytest.mark.parametrize("scheme", ["sma", "wma", "1-sqrt"])
def test_equals_the_twin_in_the_newest_checkpoints_type(
    tmp_path: Path, dtype: str, stored: str, scheme: str
) -> None:
    run = run_with_means(tmp_path / "run", dtype=dtype, shards=2)
    out = merged(run, tmp_path / "out", scheme=scheme)
    weights = [source["weight"] for source in described(run, scheme=scheme)["sources"]]
    assert same_bytes(twin(tmp_path / "twin", run, weights, stored), out) == []
    newest = run / "checkpoint-50"
    assert sorted(f.name for f in out.iterdir()) == sorted(
        {f.name for f in newest.iterdir()} - {"trainer_state.json", MEAN} | {"pma.json"}
    )
    assert (out / "config.json").read_bytes() == (newest / "config.json").read_bytes()
    assert engine.verify(out, samples=None).findings == ()


def test_another_type_is_the_users_choice(tmp_path: Path) -> None:
    run = run_with_means(tmp_path / "run", steps=3)
    out = merged(run, tmp_path / "out", Window(last=3), dtype=DType.F32)
    assert same_bytes(twin(tmp_path / "twin", run, [1 / 3] * 3, "F32"), out) == []
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"


def test_in_memory_and_swept_equal_what_is_written(tmp_path: Path) -> None:
    run = run_with_means(tmp_path / "run", steps=3)
    out = merged(run, tmp_path / "out", Window(last=3), scheme="wma")
    choice = Choice(paths=(run,), window=Window(last=3))
    tensors = verbs.average(choice, MergeOptions(use="interval-means", scheme="wma"))
    expected = read_all(out)
    for name, tensor in tensors.items():
        written = torch.frombuffer(bytearray(expected[name]["data"]), dtype=tensor.dtype)
        assert torch.equal(tensor.reshape(-1), written), name
    with (
        verbs.plan(choice, MergeOptions(scheme="wma")) as snapshots,
        verbs.plan(choice, MergeOptions(use="interval-means", scheme="wma")) as means,
    ):
        # one path, two contents: never in one pass
        assert len(engine.passes([snapshots, means], in_memory=False)) == 2
        engine.sweep_to_folders([(snapshots, tmp_path / "one"), (means, tmp_path / "two")])
    assert same_bytes({n: bytes(t["data"]) for n, t in expected.items()}, tmp_path / "two") == []
    assert same_bytes({n: bytes(t["data"]) for n, t in expected.items()}, tmp_path / "one") != []


# ---- what they are the mean of ----


RATE, STEPS, DIMENSIONS = 0.05, 400, 2_000


def descent(seed: int) -> NDArray[np.float32]:
    """Weights after every step of SGD with noisy gradients on a quadratic whose optimum is 0, in fp32."""
    random = np.random.default_rng(seed)
    curvature_D = random.uniform(2, 10, DIMENSIONS).astype(np.float32)
    weights_D = np.zeros(DIMENSIONS, np.float32)
    weights_TD = np.empty((STEPS, DIMENSIONS), np.float32)
    for step in range(STEPS):
        noise_D = random.standard_normal(DIMENSIONS).astype(np.float32)
        weights_D = weights_D - np.float32(RATE) * (curvature_D * weights_D + noise_D)
        weights_TD[step] = weights_D
    return weights_TD


def descent_run(folder: Path, ends: Sequence[int]) -> NDArray[np.float32]:
    """Checkpoints after the steps `ends`, each with the mean since the one before, from step 200 on."""
    weights_TD = descent(0)
    for begin, end in zip([200, *ends], ends, strict=False):
        path = folder / f"checkpoint-{end}"
        weights = Raw(spec=random_raw("w", DType.F32, (DIMENSIONS,)).spec, data=weights_TD[end - 1].tobytes())
        write_safetensors(path, [weights])
        (path / "trainer_state.json").write_text(json.dumps({"global_step": end, "log_history": []}))
        mean_D = weights_TD[begin:end].astype(np.float64).mean(axis=0)
        store_mean(path, {"w": mean_D}, first_step=begin + 1, last_step=end, updates=end - begin)
    return weights_TD


def weights_in(out: Path) -> NDArray[np.float32]:
    return np.frombuffer(read_all(out)["w"]["data"], np.float32)


@pytest.mark.parametrize("ends", [(240, 280, 320, 360, 400), (210, 290, 297, 360, 400)])
def test_five_means_are_the_average_over_every_step(tmp_path: Path, ends: tuple[int, ...]) -> None:
    weights_TD = descent_run(tmp_path / "run", ends)
    exact_D = weights_TD[200:400].astype(np.float64).mean(axis=0)
    found_D = weights_in(merged(tmp_path / "run", tmp_path / "means"))
    # each stored mean was rounded once to fp32, and so was their mean: half a unit in the last place each
    largest = np.abs(weights_TD[200:400]).max()
    assert np.abs(found_D - exact_D).max() <= largest * 2.0**-24 * 2
    verbs.merge(Choice(paths=(tmp_path / "run",), window=Window(last=5)), tmp_path / "snapshots")
    snapshots_D = weights_in(tmp_path / "snapshots")
    assert np.abs(snapshots_D - exact_D).max() > 1000 * np.abs(found_D - exact_D).max()
    # nearer to the optimum than five snapshots: gradient noise is averaged over 200 steps, not over 5
    assert np.square(found_D).sum() < np.square(snapshots_D).sum() / 2


def test_equal_intervals_weigh_equally_and_others_by_their_updates(tmp_path: Path) -> None:
    descent_run(tmp_path / "even", (240, 280, 320, 360, 400))
    assert [s["weight"] for s in described(tmp_path / "even")["sources"]] == [0.2] * 5
    descent_run(tmp_path / "uneven", (210, 290, 297, 360, 400))
    found = described(tmp_path / "uneven")
    expected = np.array([10, 80, 7, 63, 40]) / 200
    assert np.allclose([s["weight"] for s in found["sources"]], expected, rtol=1e-15)
    assert found["interval_means"] == {
        "first_step": 201, "last_step": 400, "updates": 200, "updates_missing": 0, "gaps": [],
        "every": [1], "averaged": ["weights"],
        "intervals": [source["interval_mean"] for source in found["sources"]],
    }  # fmt: skip
    linear = described(tmp_path / "uneven", scheme="wma")
    product = np.arange(1, 6) * np.array([10, 80, 7, 63, 40])
    assert np.allclose([s["weight"] for s in linear["sources"]], product / product.sum(), rtol=1e-15)
    given = described(tmp_path / "uneven", weights=(0.1, 0.2, 0.3, 0.2, 0.2))
    assert [s["weight"] for s in given["sources"]] == [0.1, 0.2, 0.3, 0.2, 0.2]


def test_gaps_and_missing_updates_are_said(tmp_path: Path) -> None:
    run = run_with_means(tmp_path / "run", records=[{"updates": 10}] * 4 + [{"updates": 8}])
    found = described(run, Window(last=3, every=Steps(20)))["interval_means"]
    assert (found["first_step"], found["last_step"], found["gaps"]) == (1, 50, [[11, 20], [31, 40]])
    assert (found["updates"], found["updates_missing"]) == (28, 2)


def test_every_kth_step_leaves_no_gaps(tmp_path: Path) -> None:
    records = [{"first_step": 10 * n + 5, "updates": 2, "every": 5} for n in range(5)]
    run = run_with_means(tmp_path / "run", records=records)
    found = described(run)["interval_means"]
    assert (found["gaps"], found["updates"], found["every"]) == ([], 10, [5])


# ---- other formats ----


def test_shards_written_by_two_processes_merge_like_files(tmp_path: Path) -> None:
    states, names = {}, {"embed": (33, 8), "layer.weight": (16, 5), "bias": (3,), "scale": ()}
    for step in (10, 20, 30):
        made = torch.Generator().manual_seed(step)
        mean = {name: torch.randn(shape, generator=made) for name, shape in names.items()}
        record = IntervalMean(
            first_step=step - 9, last_step=step, updates=10, every=1, averaged="masters"
        ).to_json()
        weights = {name: (tensor + 1).bfloat16() for name, tensor in mean.items()}
        states[step] = {"weights": weights, "mean": mean, "record": record}
    torch.save(states, tmp_path / "states.pt")
    in_ranks(FIXTURES / "save_means.py", 2, tmp_path / "states.pt", tmp_path / "run")
    window = Window(last=3)
    assert described(tmp_path / "run", window)["interval_means"]["averaged"] == ["masters"]
    out = merged(tmp_path / "run", tmp_path / "out", window)
    found = load_dcp(out)
    for name in names:
        exact = torch.stack([states[s]["mean"][name].double() for s in states]).mean(0)
        assert torch.equal(found[name], exact.bfloat16()), name
    assert engine.verify(out, samples=None).findings == ()
    assert {p.name for p in out.iterdir()} == {".metadata", "__0_0.distcp", "__1_0.distcp", "pma.json"}
    for step in states:  # the same means as files
        path = tmp_path / "run" / f"step-{step}"
        shutil.rmtree(path / "pma_interval_mean")
        store_mean(path, {n: t.numpy() for n, t in states[step]["mean"].items()}, averaged="masters")
    as_files = load_dcp(merged(tmp_path / "run", tmp_path / "files", window))
    assert all(torch.equal(as_files[name], found[name]) for name in names)


def test_files_of_torch_have_their_mean_beside(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    means = []
    for step in (100, 200, 300):
        made = torch.Generator().manual_seed(step)
        state = {"a": torch.randn(9, 4, generator=made).bfloat16(), "ids": torch.tensor([step])}
        torch.save(state, run / f"model_{step:06d}.pt")
        (run / f"meta_{step:06d}.json").write_text(json.dumps({"step": step}))
        means.append(torch.randn(9, 4, generator=made))
        store_mean(run / f"model_{step:06d}.pt", {"a": means[-1].numpy()})
    out = merged(run, tmp_path / "out", Window(last=3))
    found = torch.load(out / "model_000300.pt", weights_only=True)
    assert torch.equal(found["a"], torch.stack(means).double().mean(0).bfloat16())
    assert found["ids"].item() == 300
    assert sorted(p.name for p in out.iterdir()) == ["meta_000300.json", "model_000300.pt", "pma.json"]
    assert engine.verify(out, samples=None).findings == ()


def test_masters_of_an_optimizer_become_the_mean_too(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    means = {step: torch.randn(6, 3, generator=torch.Generator().manual_seed(step)) for step in (10, 20)}
    for step, mean in means.items():
        state = {
            "w": mean.bfloat16() + 1,
            "optimizer.state.w.fp32_param": torch.ones(6, 3),
            "optimizer.state.w.exp_avg": torch.full((6, 3), float(step)),
        }
        dcp.save(state, checkpoint_id=tmp_path / "run" / f"step-{step}", no_dist=True)
        store_mean(tmp_path / "run" / f"step-{step}", {"w": mean.numpy()})
    found = load_dcp(merged(tmp_path / "run", tmp_path / "out", Window(last=2), with_optimizer=True))
    exact = torch.stack(list(means.values())).double().mean(0)
    assert torch.equal(found["w"], exact.bfloat16())
    assert torch.equal(found["optimizer.state.w.fp32_param"], exact.float())
    assert torch.equal(found["optimizer.state.w.exp_avg"], torch.full((6, 3), 20.0))


def test_a_conversion_takes_the_means(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    paths = tiny_llama_run(tmp_path / "run", dtype="bfloat16")
    for number, path in enumerate(paths):
        weights = load_file(path / "model.safetensors")
        random = np.random.default_rng(number)
        store_mean(path, {name: random.standard_normal(t.shape) for name, t in weights.items()})
    choice = {"window": Window(last=3)}
    plain = merged(tmp_path / "run", tmp_path / "plain", **choice)
    out = merged(tmp_path / "run", tmp_path / "out", **choice, like=paths[0])
    found, expected = load_file(out / "model.safetensors"), load_file(plain / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert found["model.norm.weight"].dtype is torch.bfloat16
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert engine.verify(out, samples=None).findings == ()


# ---- what is recorded ----


def test_the_record_names_the_means_and_verify_reads_them(tmp_path: Path) -> None:
    run = run_with_means(tmp_path / "run", steps=3)
    out = merged(run, tmp_path / "out", Window(last=3))
    record = json.loads((out / "pma.json").read_text())
    assert record["use"] == "interval-means"
    for number, source in enumerate(record["sources"], start=1):
        assert source["interval_mean"]["last_step"] == 10 * number
        assert [f["name"] for f in source["files"]] == ["model.safetensors", MEAN]
    whole = engine.verify(out, samples=None)
    assert (whole.findings, whole.sources_changed) == ((), ())
    assert whole.blocks_derived == whole.blocks_total > 0
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(data)
    assert any("is not what the sources give" in finding for finding in engine.verify(out).findings)
    store_mean(run / "checkpoint-20", drawn(7))
    [changed] = engine.verify(out).sources_changed
    assert "checkpoint-20/pma_interval_mean.safetensors has changed" in changed


def test_another_use_is_another_merge_to_an_interrupted_one(tmp_path: Path) -> None:
    from pma.engine.provenance import heading

    run = run_with_means(tmp_path / "run", steps=3)
    choice = Choice(paths=(run,), window=Window(last=3))
    with (
        verbs.plan(choice) as snapshots,
        verbs.plan(choice, MergeOptions(use="interval-means")) as means,
    ):
        assert heading(snapshots)["options"] != heading(means)["options"]
        assert heading(snapshots)["sources"] != heading(means)["sources"]
        assert snapshots.describe()["interval_means_beside"] == means.describe()["interval_means_beside"] == 3


# ---- what is refused ----


def refused(run: Path, error: type[PmaError], message: str, **options: Any) -> None:
    with pytest.raises(error, match=message):
        described(run, **options)


def test_checkpoints_without_a_mean_are_listed(tmp_path: Path) -> None:
    run = run_with_means(tmp_path / "run")
    for step in (20, 40):
        (run / f"checkpoint-{step}" / MEAN).unlink()
    message = "beside 2 of the window's 5 checkpoints: .*checkpoint-20, .*checkpoint-40; choose another"
    refused(run, UsageError, message)
    with verbs.plan(Choice(paths=(run,), window=Window(last=5))) as plan:
        assert plan.describe()["interval_means_beside"] == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"averaged": "rounded weights"},
            "checkpoint-20 was recorded differently: averaged rounded weights, but",
        ),
        (
            {"first_step": 15, "updates": 2, "every": 5},
            "checkpoint-20 was recorded differently: every 5, but 1",
        ),
        ({"first_step": 10, "updates": 11}, "overlap: one is of steps 1 to 10, one of 10 to 20"),
    ],
)
def test_means_recorded_differently_need_given_weights(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    run = run_with_means(tmp_path / "run", records=[{}, change, {}, {}, {}])
    refused(run, MismatchError, message)
    assert len(described(run, weights=(0.2,) * 5)["sources"]) == 5


def test_a_mean_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    run = run_with_means(tmp_path / "run")
    shutil.copy(run / "checkpoint-10" / MEAN, run / "checkpoint-20" / MEAN)
    refused(run, MismatchError, "checkpoint-20 ends at step 10, expected step 20; it is another")


def test_values_that_are_not_finite_are_told(tmp_path: Path) -> None:
    run = run_with_means(tmp_path / "run")
    tensors = drawn(1)
    tensors["layer.0.weight"][3, 40] = np.nan
    store_mean(run / "checkpoint-20", tensors)
    with pytest.raises(NonfiniteError, match=r"layer\.0\.weight\[3, 40\] in the interval mean of .*-20: nan"):
        merged(run, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
    merged(run, tmp_path / "out", allow_nonfinite=True)


def test_tensors_that_are_missing_can_be_left_out_or_copied(tmp_path: Path) -> None:
    run = run_with_means(tmp_path / "run")
    tensors = drawn(1)
    del tensors["layer.0.bias"]
    store_mean(run / "checkpoint-20", tensors)
    refused(run, MismatchError, "the interval mean of .*checkpoint-20 lacks layer.0.bias, which")
    out = merged(run, tmp_path / "out", copy=("layer.0.bias",))
    newest = read_all(run / "checkpoint-50")["layer.0.bias"]["data"]
    assert read_all(out)["layer.0.bias"]["data"] == newest
    assert "layer.0.bias" not in read_all(merged(run, tmp_path / "without", exclude=("layer.0.bias",)))


def test_a_damaged_record_is_told_when_it_is_used(tmp_path: Path) -> None:
    run = run_with_means(tmp_path / "run")
    path = run / "checkpoint-20" / MEAN
    path.write_bytes(path.read_bytes().replace(b'updates\\": 10', b'updates\\": -9'))
    refused(
        run, FormatError, "checkpoint-20/pma_interval_mean.safetensors: .*updates is -9, expected a count"
    )
    found = verbs.inspect(run / "checkpoint-20")
    assert "updates is -9" in found["interval_mean"]["unusable_because"]
    assert verbs.inspect(run / "checkpoint-10")["interval_mean"]["updates"] == 10
    assert verbs.inspect(run)["interval_means_beside"] == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use": "means"}, "--use 'means' is not known; there are snapshots, interval-means"),
        ({"use": "interval-means", "like": Path("x"), "copy": ("a",)}, "--copy does not go with both"),
    ],
)
def test_options_that_cannot_be_meant(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        MergeOptions(**options)


def test_checkpoints_named_one_by_one(tmp_path: Path) -> None:
    run = run_with_means(tmp_path / "run")
    points = trajectory.from_checkpoints([run / "checkpoint-50", run / "checkpoint-40"]).points
    with engine.plan(points, MergeOptions(use="interval-means")) as plan:
        assert [source.mean.last_step for source in plan.sources if source.mean] == [40, 50]

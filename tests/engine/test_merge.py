"""Merges against the numpy twin, to the bit, for any threads and block size; written files load where
users load them.
"""

import json
import mmap
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from pma import averaging, engine, formats, trajectory
from pma.engine import MergeOptions, blocks, building, compute, memory_budget, provenance
from pma.errors import InputError, MismatchError, UsageError
from pma.formats.safetensors import SafetensorsReader
from pma.testing import Raw, random_raw, reference_average, tiny_llama_run, tiny_run
from pma.testing.builders import write_safetensors, write_trainer_state
from pma.testing.reference import read_all, same_bytes
from pma.types import DType, TensorSpec

EXTRA = [
    random_raw("ids", DType.I64, (5,), seed=1),
    random_raw("mask", DType.BOOL, (3,), seed=2),
    random_raw("byte", DType.U8, (1,), seed=3),
    random_raw("empty", DType.F32, (0, 3), seed=4),
    random_raw("wave", DType.C64, (7,), seed=5),
]


def merged(paths: list[Path], out: Path, **options: object) -> Path:
    found = trajectory.from_checkpoints(paths)
    with engine.plan(found.points, MergeOptions(**options)) as plan:
        engine.write(plan, out)
    return out


def weights(scheme: str, paths: list[Path]) -> list[float]:
    steps = [float(path.name.split("-")[1]) for path in paths]
    return averaging.scheme(scheme)(steps).tolist()


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "fp64"])
@pytest.mark.parametrize("scheme", ["sma", "wma", "ema:0.2", "1-sqrt", "cosine:0.1"])
def test_equals_the_twin(tmp_path: Path, dtype: str, scheme: str) -> None:
    paths = tiny_run(tmp_path / "run", steps=5, dtype=dtype, extra=EXTRA)
    out = merged(paths, tmp_path / "out", scheme=scheme)
    assert same_bytes(reference_average(paths, weights(scheme, paths)), out) == []


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "fp64"])
@pytest.mark.parametrize("out_dtype", [DType.F16, DType.BF16, DType.F32, DType.F64])
def test_equals_the_twin_in_another_output_type(tmp_path: Path, dtype: str, out_dtype: DType) -> None:
    paths = tiny_run(tmp_path / "run", steps=3, dtype=dtype, extra=EXTRA)
    out = merged(paths, tmp_path / "out", dtype=out_dtype)
    assert same_bytes(reference_average(paths, [1 / 3] * 3, out_dtype.name), out) == []


@pytest.fixture(scope="module")
def larger_run(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Tensors that cross block boundaries at odd places: about 14 MB a checkpoint in two shards."""
    shapes = {"a": (1_500_001,), "b": (3,), "c": (999_983, 5), "d": (17, 13), "e": (1,)}
    folder = tmp_path_factory.mktemp("larger")
    return tiny_run(folder, steps=3, shapes=shapes, shards=2, extra=EXTRA)


@pytest.fixture(scope="module")
def larger_expected(larger_run: list[Path]) -> dict[str, dict[str, bytes]]:
    return {s: reference_average(larger_run, weights(s, larger_run)) for s in ("sma", "wma")}


@pytest.mark.parametrize("scheme", ["sma", "wma"])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("chunk_bytes", [64, 4096, 1_000_000 // 8 * 8, 4 * 2**20])
def test_threads_and_block_size_do_not_matter(
    tmp_path: Path,
    larger_run: list[Path],
    larger_expected: dict[str, dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
    scheme: str,
    threads: int,
    chunk_bytes: int,
) -> None:
    if chunk_bytes == 64:
        larger_run = tiny_run(
            tmp_path / "run", steps=3, shapes={"a": (1_001,), "b": (3,), "c": (99, 5)}, extra=EXTRA
        )
        expected = reference_average(larger_run, weights(scheme, larger_run))
    else:
        expected = larger_expected[scheme]
    for module in (blocks, building, compute, provenance):
        monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
    # tiles that are no divisor of the chunk, nor it of them
    monkeypatch.setattr(memory_budget, "LARGEST_TILE_BYTES", max(64, chunk_bytes * 3 // 8 // 64 * 64))
    monkeypatch.setattr(memory_budget, "_SMALLEST_TILE_BYTES", 8)
    out = merged(larger_run, tmp_path / "out", scheme=scheme, threads=threads)
    assert same_bytes(expected, out) == []
    assert engine.verify(out).findings == ()


def test_buffers_begin_on_pages() -> None:
    # 16 bytes later every read would take up to twice as long, and nothing else would tell
    for row in compute.on_pages(3, memory_budget.LARGEST_TILE_BYTES):
        assert row.ctypes.data % mmap.PAGESIZE == 0
        row[:] = 1  # writable


def test_in_memory_equals_on_disk(tmp_path: Path, larger_run: list[Path]) -> None:
    out = merged(larger_run, tmp_path / "out")
    with engine.plan(trajectory.from_checkpoints(larger_run).points) as plan:
        tensors = engine.average(plan)
    for path in out.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert torch.equal(
                tensor.flatten().view(torch.uint8), tensors[name].flatten().view(torch.uint8)
            ), name


def test_partitions_make_the_same_output(larger_run: list[Path]) -> None:
    """Several processes can each stream a part: together they make every byte once."""
    from pma.engine.memory import MemoryPart
    from pma.engine.stream import Output, stream
    from pma.engine.work import work_of

    with engine.plan(trajectory.from_checkpoints(larger_run).points) as plan:
        work = work_of(plan)
        whole = Output(part=MemoryPart(plan))
        stream(work, [whole])
        parts = plan.partition(3)
        assert [number for part in parts for number in part] == list(range(len(plan.blocks)))
        assert all(parts)
        joined = Output(part=MemoryPart(plan))
        for part in reversed(parts):
            stream(work, [joined], numbers=part)
    assert joined.part.files == whole.part.files
    assert joined.digests == whole.digests


shapes_strategy = st.dictionaries(
    st.text("abc.", min_size=1, max_size=6),
    st.lists(st.integers(0, 9), max_size=3).map(tuple),
    min_size=1,
    max_size=5,
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shapes_strategy, st.sampled_from(["bf16", "fp32"]), st.integers(1, 4), st.integers(1, 3))
def test_any_shapes_equal_the_twin(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: dict[str, tuple[int, ...]],
    dtype: str,
    steps: int,
    shards: int,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    paths = tiny_run(folder / "run", steps=steps, dtype=dtype, shapes=shapes, shards=min(shards, len(shapes)))
    out = merged(paths, folder / "out", scheme="wma")
    assert same_bytes(reference_average(paths, weights("wma", paths)), out) == []


def test_one_checkpoint_averages_to_itself(tmp_path: Path) -> None:
    paths = tiny_run(tmp_path / "run", steps=1, extra=EXTRA)
    out = merged(paths, tmp_path / "out")
    assert same_bytes({name: bytes(t["data"]) for name, t in read_all(paths[0]).items()}, out) == []


def test_sources_with_other_shards_and_order_merge(tmp_path: Path) -> None:
    paths = tiny_run(tmp_path / "run", steps=2, shards=1) + tiny_run(tmp_path / "more", steps=3, shards=3)[2:]
    out = merged(paths, tmp_path / "out")
    assert same_bytes(reference_average(paths, [1 / 3] * 3), out) == []
    assert len(list(out.glob("*.safetensors"))) == 3  # laid out as the newest is


def test_integers_come_from_the_newest(tmp_path: Path) -> None:
    paths = []
    for number in (1, 2):
        path = tmp_path / "run" / f"checkpoint-{number}"
        write_safetensors(
            path,
            [random_raw("w", DType.BF16, (4,), seed=number), random_raw("n", DType.I64, (4,), seed=number)],
        )
        write_trainer_state(path, number, every=1)
        paths.append(path)
    with engine.plan(trajectory.from_checkpoints(paths).points) as plan:
        assert plan.describe()["copied"] == ["n"]
        engine.write(plan, tmp_path / "out")
    assert bytes(read_all(tmp_path / "out")["n"]["data"]) == bytes(read_all(paths[1])["n"]["data"])


def test_copy_and_exclude(tmp_path: Path) -> None:
    paths = tiny_run(tmp_path / "run", steps=2)
    out = merged(paths, tmp_path / "out", copy=("*.bias",), exclude=("scale",))
    found, newest = read_all(out), read_all(paths[1])
    assert bytes(found["layer.0.bias"]["data"]) == bytes(newest["layer.0.bias"]["data"])
    assert set(found) == set(newest) - {"scale"}
    record = json.loads((out / "pma.json").read_text())
    assert record["excluded"] == ["scale"]
    assert record["copied_from_newest"] == ["layer.0.bias"]
    assert engine.verify(out).findings == ()
    with pytest.raises(UsageError, match="matches no tensor"):
        merged(paths, tmp_path / "other", exclude=("nothing*",))


@pytest.mark.parametrize("max_shard_size", ["1GB", "10KB"])
def test_transformers_loads_the_result(tmp_path: Path, max_shard_size: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    paths = tiny_llama_run(tmp_path / "run", steps=3, max_shard_size=max_shard_size)
    out = merged(paths, tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    sources = [AutoModelForCausalLM.from_pretrained(path).state_dict() for path in paths]
    for name, tensor in model.state_dict().items():
        mean = sum(source[name].double() for source in sources) / 3
        assert torch.equal(tensor, mean.float()), name
    assert AutoTokenizer.from_pretrained(out).encode("ab") == AutoTokenizer.from_pretrained(paths[0]).encode(
        "ab"
    )


def test_another_output_type_is_what_transformers_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    paths = tiny_llama_run(tmp_path / "run", steps=2, dtype="bfloat16")
    out = merged(paths, tmp_path / "out", dtype=DType.F32)
    assert next(AutoModelForCausalLM.from_pretrained(out).parameters()).dtype == torch.float32


def test_side_files_are_copied_and_never_imported(tmp_path: Path) -> None:
    paths = tiny_run(tmp_path / "run", steps=2)
    (paths[1] / "modeling_custom.py").write_text("raise SystemExit('imported')")
    (paths[1] / "chat_template.jinja").write_text("{{ messages }}")
    (paths[1] / "optimizer.pt").write_bytes(b"\x80\x04 a pickle")
    out = merged(paths, tmp_path / "out")
    assert (out / "modeling_custom.py").read_text() == "raise SystemExit('imported')"
    assert (out / "chat_template.jinja").is_file()
    assert not (out / "optimizer.pt").exists()
    assert not (out / "trainer_state.json").exists()
    copied = json.loads((out / "pma.json").read_text())["small_files"]
    assert {file["name"] for file in copied} == {
        "config.json",
        "modeling_custom.py",
        "chat_template.jinja",
    }


def test_the_record_says_what_it_was_made_from(tmp_path: Path) -> None:
    import hashlib

    paths = tiny_run(tmp_path / "run", steps=3)
    with engine.plan(trajectory.discover([tmp_path / "run"]).points, MergeOptions(scheme="wma")) as plan:
        engine.write(plan, tmp_path / "out", sha256=True, hash_sources=True)
    record = json.loads((tmp_path / "out" / "pma.json").read_text())
    assert [source["step"] for source in record["sources"]] == [10, 20, 30]
    assert [source["weight"] for source in record["sources"]] == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    source_file = record["sources"][0]["files"][0]
    assert source_file["size_bytes"] == (paths[0] / "model.safetensors").stat().st_size
    assert source_file["sha256"] == hashlib.sha256((paths[0] / "model.safetensors").read_bytes()).hexdigest()
    output = record["outputs"][0]
    assert (
        output["sha256"] == hashlib.sha256((tmp_path / "out" / "model.safetensors").read_bytes()).hexdigest()
    )


def test_a_window_is_the_same_bits_whatever_the_order_given(tmp_path: Path) -> None:
    paths = tiny_run(tmp_path / "run", steps=4)
    first = merged(paths, tmp_path / "a", scheme="ema:0.2")
    second = merged(paths[::-1], tmp_path / "b", scheme="ema:0.2")
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_adapted_buffers_are_averaged(tmp_path: Path) -> None:
    shapes = {"layers.0.mlp.gate.e_score_correction_bias": (8,), "bn.running_mean": (4,)}
    paths = tiny_run(tmp_path / "run", steps=2, shapes=shapes)
    out = merged(paths, tmp_path / "out")
    assert same_bytes(reference_average(paths, [0.5, 0.5]), out) == []


def test_fp8_is_refused_by_name(tmp_path: Path) -> None:
    extra = [random_raw("layer.0.q", DType.F8_E4M3, (4, 4))]
    paths = tiny_run(tmp_path / "run", steps=2, extra=extra)
    with pytest.raises(InputError, match=r"layer\.0\.q in .*checkpoint-20 is F8_E4M3, .*dequantise"):
        engine.plan(trajectory.from_checkpoints(paths).points)


def test_differences_between_sources_are_named(tmp_path: Path) -> None:
    paths = tiny_run(tmp_path / "run", steps=2, shapes={"w": (4, 4), "v": (2,)})
    other = tmp_path / "other" / "checkpoint-30"
    for shapes, dtype, message in (
        ({"w": (4, 4)}, DType.BF16, "v is in .*checkpoint-10 but missing in .*checkpoint-30, the newest"),
        ({"w": (4, 4), "v": (3,)}, DType.BF16, r"v in .*checkpoint-10: shape \(2,\), expected \(3,\)"),
        ({"w": (4, 4), "v": (2,)}, DType.F32, "dtype BF16, expected F32"),
        ({"w": (4, 4), "v": (2,), "u": (1,)}, DType.BF16, "u is in .*checkpoint-30 but missing in"),
    ):
        write_safetensors(other, [random_raw(n, dtype, s) for n, s in shapes.items()])
        write_trainer_state(other, 30)
        with pytest.raises(MismatchError, match=message):
            engine.plan(trajectory.from_checkpoints([*paths, other]).points)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_value_that_is_not_finite_is_named(tmp_path: Path, dtype: str, value: float) -> None:
    paths = tiny_run(tmp_path / "run", steps=3, dtype=dtype)
    tensors = load_file(paths[1] / "model.safetensors")
    tensors["layer.0.weight"][3, 40] = value
    from safetensors.torch import save_file

    save_file(tensors, paths[1] / "model.safetensors")
    with pytest.raises(InputError, match=r"layer\.0\.weight\[3, 40\] in .*checkpoint-20.*--allow-nonfinite"):
        merged(paths, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob(".*")) == []
    out = merged(paths, tmp_path / "out", allow_nonfinite=True)
    expected = reference_average(paths, [1 / 3] * 3)
    differing = same_bytes(expected, out)
    assert differing in ([], ["layer.0.weight"])  # NaN has many bit patterns; every other value is exact
    found = np.isfinite(load_file(out / "model.safetensors")["layer.0.weight"].double().numpy())
    assert (~found).sum() == 1


def test_memory_is_bounded_whatever_the_number_of_checkpoints(tmp_path: Path) -> None:
    """Twenty checkpoints of 60 MB in a fresh process: below 400 MiB, and no more than three need."""
    paths = tiny_run(tmp_path / "run", steps=1, shapes={f"w{i}": (2_500_000,) for i in range(12)})
    for number in range(2, 21):
        copy = tmp_path / "run" / f"checkpoint-{number * 10}"
        copy.mkdir()
        os.link(paths[0] / "model.safetensors", copy / "model.safetensors")
        write_trainer_state(copy, number * 10)
    peaks = {last: peak_mib(tmp_path / "run", last, tmp_path / f"out{last}") for last in (3, 20)}
    assert peaks[20] < 400
    assert peaks[20] < peaks[3] * 1.15


def peak_mib(run: Path, last: int, out: Path) -> float:
    command = [sys.executable, "-m", "pma", "merge", str(run), "--last", str(last), "-o", str(out)]
    script = (
        "import resource, subprocess, sys;"
        f"subprocess.run({command!r}, check=True, stdout=subprocess.DEVNULL);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    printed = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    ).stdout
    return int(printed) / 1024


def test_the_memory_budget_sets_the_tiles(tmp_path: Path) -> None:
    paths = tiny_run(tmp_path / "run", steps=2, shapes={"w": (10_000_000,)})
    points = trajectory.from_checkpoints(paths).points
    for memory_bytes, tile_bytes in ((40 * 2**20, 2**19), (20 * 2**20, 2**18)):
        with engine.plan(points, MergeOptions(memory_bytes=memory_bytes, threads=2)) as plan:
            assert plan.tile_bytes == tile_bytes
            held = 2 * memory_budget.worker_bytes(tile_bytes, merges=1)
            assert memory_bytes / 2 < held <= memory_bytes
    with pytest.raises(UsageError, match="--memory"):
        engine.plan(points, MergeOptions(memory_bytes=8 * 2**20, threads=2))


@pytest.mark.parametrize(("steps", "shards"), [(6, 40), (66, 2)])
def test_many_open_files_are_not_needed(tmp_path: Path, steps: int, shards: int) -> None:
    paths = tiny_run(tmp_path / "run", steps=steps, shapes={f"w{i}": (8,) for i in range(40)}, shards=shards)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 180), hard))
    try:
        out = merged(paths, tmp_path / "out")
        assert same_bytes(reference_average(paths, [1 / steps] * steps), out) == []
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("options", [{"dtype": DType.I64}, {"threads": 0}])
def test_options_that_cannot_be_meant(options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        MergeOptions(**options)


def test_planning_needs_no_torch(tmp_path: Path) -> None:
    paths = tiny_run(tmp_path / "run", steps=2)
    script = (
        "import sys; from pathlib import Path; from pma import engine, trajectory;"
        f"engine.plan(trajectory.from_checkpoints([Path({str(paths[0])!r}), "
        f"Path({str(paths[1])!r})]).points);"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_a_mean_too_large_for_the_output_type_is_an_error(tmp_path: Path) -> None:
    paths = []
    for number in (1, 2):
        path = tmp_path / "run" / f"checkpoint-{number}"
        write_safetensors(path, [Raw(spec=TensorSpec(name="w", dtype=DType.F32, shape=(2,)), data=LARGE)])
        write_trainer_state(path, number, every=1)
        paths.append(path)
    with pytest.raises(InputError, match=r"w: .* a mean is too large for F16"):
        merged(paths, tmp_path / "out", dtype=DType.F16)
    assert not (tmp_path / "out").exists()
    assert merged(paths, tmp_path / "wide", dtype=DType.BF16).is_dir()


LARGE = np.array([1.0, 1e5], dtype=np.float32).tobytes()


def test_a_copied_tensor_may_not_hold_nan_either(tmp_path: Path) -> None:
    paths = tiny_run(tmp_path / "run", steps=2)
    file = paths[1] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-2] + b"\xc0\x7f")  # the last element of the last tensor
    name = list(engine.plan(trajectory.from_checkpoints(paths).points).tensors)[-1]
    with pytest.raises(InputError, match=r"checkpoint-20: nan"):
        merged(paths, tmp_path / "out", copy=(name,))
    assert merged(paths, tmp_path / "out", copy=(name,), allow_nonfinite=True).is_dir()


def test_a_tensor_that_only_an_older_checkpoint_has_can_be_excluded(tmp_path: Path) -> None:
    paths = tiny_run(tmp_path / "run", steps=1, extra=[random_raw("old.extra", DType.BF16, (2,))])
    paths += tiny_run(tmp_path / "more", steps=2)[1:]
    with pytest.raises(MismatchError, match=r"old\.extra .* --exclude"):
        merged(paths, tmp_path / "out")
    assert set(read_all(merged(paths, tmp_path / "out", exclude=("old.*",)))) == set(read_all(paths[1]))


def test_patterns_that_match_nothing_are_mistakes(tmp_path: Path) -> None:
    paths = tiny_run(tmp_path / "run", steps=2)
    with pytest.raises(UsageError, match="--copy 'nothing' matches no tensor"):
        merged(paths, tmp_path / "out", copy=("nothing",))
    with pytest.raises(UsageError, match="leaves no tensor"):
        merged(paths, tmp_path / "out", exclude=("*",))


def test_a_configuration_that_cannot_be_rewritten_shows_in_the_plan(tmp_path: Path) -> None:
    paths = tiny_run(tmp_path / "run", steps=2)
    (paths[1] / "config.json").write_text("not json")
    with pytest.raises(InputError, match=r"checkpoint-20/config\.json is not valid JSON"):
        engine.plan(trajectory.from_checkpoints(paths).points, MergeOptions(dtype=DType.F32))


def test_a_merge_named_like_a_checkpoint_can_be_merged_again(tmp_path: Path) -> None:
    paths = tiny_run(tmp_path / "run", steps=2)
    first = merged(paths, tmp_path / "x" / "checkpoint-99")
    other = merged(paths[:1], tmp_path / "x2" / "checkpoint-avg")
    assert merged([first, other], tmp_path / "again").is_dir()


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "fp64"])
@pytest.mark.parametrize("scheme", ["sma", "wma"])
def test_the_compiled_loop_equals_the_general_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, scheme: str
) -> None:
    paths = tiny_run(
        tmp_path / "run", steps=6, dtype=dtype, shapes={"w": (400_003,), "v": (7, 9)}, extra=EXTRA
    )
    direct = merged(paths, tmp_path / "direct", scheme=scheme)
    assert same_bytes(reference_average(paths, weights(scheme, paths)), direct) == []
    monkeypatch.setattr(SafetensorsReader, "descriptor", lambda *_: None)
    general = merged(paths, tmp_path / "general", scheme=scheme)
    assert (direct / "model.safetensors").read_bytes() == (general / "model.safetensors").read_bytes()


def test_where_the_compiled_loop_cannot_read_the_general_path_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own descriptor leads to an empty file: every direct read comes back short."""
    paths = tiny_run(tmp_path / "run", steps=3)
    asked = []

    @contextmanager
    def empty(self: SafetensorsReader, file: str, *_: int) -> Iterator[int]:
        asked.append(file)
        with open("/dev/null", "rb") as nothing:
            yield nothing.fileno()

    monkeypatch.setattr(SafetensorsReader, "descriptor", empty)
    out = merged(paths, tmp_path / "out")
    assert asked
    assert same_bytes(reference_average(paths, weights("sma", paths)), out) == []


def test_pages_of_a_run_larger_than_memory_are_not_left_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgotten = []
    advise = os.posix_fadvise
    monkeypatch.setattr(os, "posix_fadvise", lambda *a: (forgotten.append(a), advise(*a))[1])
    paths = tiny_run(tmp_path / "run", steps=3)
    merged(paths, tmp_path / "small")
    assert not forgotten
    monkeypatch.setattr("pma.engine.stream._physical_memory_bytes", lambda: 1000)
    out = merged(paths, tmp_path / "large")
    assert {advice for *_, advice in forgotten} == {os.POSIX_FADV_DONTNEED}
    assert sum(length for _, _, length, _ in forgotten) >= sum(
        spec.length_bytes for path in paths for spec in formats.open_checkpoint(path).tensors.values()
    )
    assert same_bytes(reference_average(paths, weights("sma", paths)), out) == []


def test_what_the_trainer_keeps_beside_weights_is_not_dropped_silently(tmp_path: Path) -> None:
    paths = tiny_run(tmp_path, steps=2)
    for name in ("scheduler.bin", "random_states_0.pkl"):
        (paths[1] / name).write_bytes(b"never opened")
    points = trajectory.from_checkpoints(paths).points
    with engine.plan(points) as plan:
        assert [Path(name).name for name in plan.describe()["ignored_files"]] == [
            "random_states_0.pkl",
            "scheduler.bin",
        ]
    with pytest.raises(InputError, match=r"--with-optimizer.*not read: random\w+\.pkl; not read: sch"):
        engine.plan(points, MergeOptions(with_optimizer=True))

"""Inner products streamed by the engine, against numpy on whole tensors read by the safetensors library."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from pma.diagnosis.groups import group_of
from pma.engine import MergeOptions, gram, memory_budget
from pma.engine.gram import InnerProducts, inner_products
from pma.errors import MismatchError, NonfiniteError, UsageError
from pma.formats import open_checkpoint
from pma.quantities import parse_bytes
from pma.testing import random_raw, tiny_run
from pma.testing.builders import write_safetensors
from pma.testing.reference import decoded, read_all
from pma.types import DType
from pma.verbs import Choice, plan

SHAPES = {
    "model.embed_tokens.weight": (64, 40),
    "model.layers.0.self_attn.q_proj.weight": (40, 40),
    "model.layers.0.mlp.gate.weight": (4, 40),
    "model.layers.0.mlp.experts.0.up_proj.weight": (48, 40),
    "model.layers.0.input_layernorm.weight": (40,),
    "model.layers.1.mlp.up_proj.weight": (333, 401),
    "scale": (),
}


def streamed(paths: Sequence[Path], **options: object) -> InnerProducts:
    with plan(Choice(paths=tuple(paths)), MergeOptions(**options)) as planned:  # type: ignore[arg-type]
        return inner_products(planned, group_of)


def twin(paths: Sequence[Path], group: str) -> tuple[int, np.ndarray, np.ndarray]:
    """Elements, products of deviations, products with the newest: whole vectors in fp64."""
    sources = [read_all(path) for path in paths]
    names = [
        name
        for name in sources[0]
        if group_of(name) == group and sources[0][name]["dtype"] in ("BF16", "F16", "F32", "F64", "C64")
    ]
    vectors_NB = np.stack(
        [np.concatenate([decoded(s[name]["data"], s[name]["dtype"]) for name in names]) for s in sources]
    )
    deviations_NB = vectors_NB - vectors_NB[-1]
    with_newest_N = deviations_NB @ vectors_NB[-1]
    with_newest_N[-1] = vectors_NB[-1] @ vectors_NB[-1]
    return vectors_NB.shape[1], deviations_NB @ deviations_NB.T, with_newest_N


def check(found: InnerProducts, paths: Sequence[Path]) -> None:
    for g, group in enumerate(found.groups):
        elements, deviations_NN, newest_N = twin(paths, group)
        assert found.elements_G[g] == elements
        # of the two lengths: fp32 in stretches, but of fp64 sources
        share = 1e-13 if all(each["dtype"] == "F64" for each in read_all(paths[0]).values()) else 2e-7
        length_N = np.sqrt(np.diag(deviations_NN))
        assert (abs(found.deviations_GNN[g] - deviations_NN) <= share * np.outer(length_N, length_N)).all()
        with_newest_N = np.append(length_N[:-1], np.sqrt(newest_N[-1])) * np.sqrt(newest_N[-1])
        assert (abs(found.newest_GN[g] - newest_N) <= share * with_newest_N).all()


@pytest.mark.parametrize(("dtype", "steps"), [("bf16", 5), ("fp16", 4), ("fp32", 3), ("fp64", 2)])
def test_every_type_and_group(tmp_path: Path, dtype: str, steps: int) -> None:
    paths = tiny_run(tmp_path, steps, dtype, shapes=SHAPES, shards=2)
    found = streamed(paths)
    assert set(found.groups) == {group_of(name) for name in SHAPES}
    check(found, paths)
    assert found.bytes_read == sum(len(t["data"]) for path in paths for t in read_all(path).values())


def test_values_whose_squares_overflow_fp32(tmp_path: Path) -> None:
    paths = []
    for number in range(3):
        values = np.random.default_rng(number).standard_normal(3000).astype(np.float32)
        values[1234] = (number + 1) * 1e25  # a buffer for masking, say
        raw = random_raw("w", DType.F32, (3000,))
        write_safetensors(tmp_path / f"{number}", [type(raw)(spec=raw.spec, data=values.tobytes())])
        paths.append(tmp_path / f"{number}")
    check(streamed(paths), paths)


def test_close_checkpoints_lose_nothing_to_cancellation(tmp_path: Path) -> None:
    """Deviations a millionth of the weights: products of raw weights would have no digit of them left."""
    base = np.random.default_rng(0).standard_normal(5000)
    paths = []
    for number in range(3):
        values = (base + 1e-6 * number * np.cos(np.arange(5000))).astype(np.float32)
        raw = random_raw("w", DType.F32, (5000,))
        write_safetensors(tmp_path / f"{number}", [type(raw)(spec=raw.spec, data=values.tobytes())])
        paths.append(tmp_path / f"{number}")
    check(streamed_as_given(paths), paths)


def streamed_as_given(paths: Sequence[Path]) -> InnerProducts:
    with plan(Choice(paths=tuple(paths), as_given=True)) as planned:
        return inner_products(planned, group_of)


def test_integers_play_no_part_and_complex_numbers_are_two(tmp_path: Path) -> None:
    extra = [random_raw("steps", DType.I64, (7,)), random_raw("c", DType.C64, (9,))]
    paths = tiny_run(tmp_path, 3, extra=extra)
    found = streamed(paths)
    check(found, paths)
    sizes = dict(zip(found.groups, found.elements_G.tolist(), strict=True))
    assert sizes["other"] == 16 * 48 + 16 + 1 + 18


@pytest.mark.parametrize("directly", [True, False])
@pytest.mark.parametrize(("threads", "tile_bytes"), [(1, 2**16), (3, 2**19)])
def test_threads_tiles_and_shards_do_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, tile_bytes: int, directly: bool
) -> None:
    """Tiles of 64 KiB cut the largest tensor, whose shards differ from source to source."""
    paths = tiny_run(tmp_path / "a", 3, "fp32", shapes=SHAPES, shards=3)
    again = tiny_run(tmp_path / "b", 2, "fp32", shapes=SHAPES)
    mixed = [*paths[:2], again[0]]
    monkeypatch.setattr(memory_budget, "LARGEST_TILE_BYTES", tile_bytes)
    if not directly:  # read from Python, as from stores
        monkeypatch.setattr(gram, "MOST_CUTS", 0)
    with plan(Choice(paths=tuple(mixed), as_given=True), MergeOptions(threads=threads)) as planned:
        check(inner_products(planned, group_of), mixed)


def test_excluded_tensors_are_not_read(tmp_path: Path) -> None:
    paths = tiny_run(tmp_path, 3, shapes=SHAPES)
    found = streamed(paths, exclude=("*mlp*",))
    assert set(found.groups) == {"embedding", "attention", "norms", "other"}


def test_nan_is_found_where_it_is(tmp_path: Path) -> None:
    shapes = {"a": (300,), "b.norm": (5, 7)}
    paths = tiny_run(tmp_path, 3, "fp32", shapes=shapes)
    file = paths[1] / "model.safetensors"
    with closing(open_checkpoint(paths[1])) as reader:
        (fragment,) = reader.fragments("b.norm")
    data = bytearray(file.read_bytes())
    place = fragment.offset_bytes + 4 * (2 * 7 + 3)
    data[place : place + 4] = np.float32(np.inf).tobytes()
    file.write_bytes(data)
    with pytest.raises(NonfiniteError, match=r"b\.norm\[2, 3\] in .*checkpoint-20: inf"):
        streamed(paths)


def test_too_many_checkpoints_for_the_memory(tmp_path: Path) -> None:
    paths = tiny_run(tmp_path, 60)
    with pytest.raises(UsageError, match="60 checkpoints at once in 2 threads"):
        streamed(paths, memory_bytes=parse_bytes("16MiB"))


def test_a_source_that_changes_meanwhile(tmp_path: Path) -> None:
    paths = tiny_run(tmp_path, 3)
    with plan(Choice(paths=tuple(paths))) as planned:
        (paths[0] / "model.safetensors").touch()
        with pytest.raises(MismatchError, match="changed"):
            inner_products(planned, group_of)

"""Layouts of safetensors cut into more files: every tensor once, in order, in files of like size."""

import json
from collections.abc import Mapping

from hypothesis import given, settings
from hypothesis import strategies as st

from pma import formats
from pma.formats import safetensors
from pma.types import DType, Layout, TensorSpec

lengths = st.lists(st.integers(0, 1000), min_size=1, max_size=30)


def layout(lengths: list[int], files: int) -> Layout:
    tensors = {
        f"t{i:02}": TensorSpec(name=f"t{i:02}", dtype=DType.U8, shape=(n,)) for i, n in enumerate(lengths)
    }
    shards = {name: f"model-{i * files // len(tensors)}.safetensors" for i, name in enumerate(tensors)}
    return safetensors.layout_of(tensors, shards)


def inside(layout: Layout) -> Mapping[str, list[str]]:
    return {file.name: [fragment.tensor for fragment in file.fragments] for file in layout.files}


@settings(max_examples=200, deadline=None)
@given(lengths, st.integers(1, 5), st.integers(1, 40))
def test_every_tensor_is_in_one_of_so_many_files(lengths: list[int], files: int, count: int) -> None:
    before = layout(lengths, min(files, len(lengths)))
    after = formats.in_files(before, count)
    if len(before.files) >= min(count, len(lengths)):
        assert after is before
        return
    assert len(after.files) == min(count, len(lengths))
    assert [name for names in inside(after).values() for name in names] == list(before.tensors)
    assert after.tensors == before.tensors
    index = json.loads(after.records[safetensors.INDEX_FILE])["weight_map"]
    assert index == {name: file for file, names in inside(after).items() for name in names}
    # the number alone tells how they are cut: whoever knows it can cut them so again
    assert formats.in_files(before, len(after.files)) == after
    bytes_F = [sum(fragment.length_bytes for fragment in file.fragments) for file in after.files]
    assert max(bytes_F) <= sum(lengths) / len(bytes_F) + 2 * max(lengths)


def test_a_lone_file_is_cut_and_gets_an_index() -> None:
    tensors = {name: TensorSpec(name=name, dtype=DType.U8, shape=(8,)) for name in "abcd"}
    lone = safetensors.plan_layout(tensors, None)
    assert [file.name for file in lone.files] == ["model.safetensors"]
    two = formats.in_files(lone, 2)
    assert inside(two) == {
        "model-00001-of-00002.safetensors": ["a", "b"],
        "model-00002-of-00002.safetensors": ["c", "d"],
    }


def test_other_formats_keep_their_files() -> None:
    from pma.formats import torch_files

    tensors = {name: TensorSpec(name=name, dtype=DType.F32, shape=(8,)) for name in "abcd"}
    planned = torch_files.plan_layout(tensors, None)
    assert formats.in_files(planned, 4) is planned

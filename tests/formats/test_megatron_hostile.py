"""Megatron's common state goes along with a merge: one that would act when loaded is refused, one with a
class that is only unknown is carried unread. Files as megatron-core lays them out, without megatron-core.
"""

import builtins
import os
import pickle
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from pma import formats, trajectory, verbs
from pma.errors import FormatError, InputError
from pma.formats import hostile_names, megatron
from pma.formats.torch_archive import TORCH
from pma.formats.unpickling import PLAIN
from pma.testing.refusals import assert_refused
from pma.verbs import Choice

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:FutureWarning")


class Calls:
    """Pickles to a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def iteration(folder: Path, step: int, *, inside: Any = None) -> Path:
    """A checkpoint without its common file, or with its common state inside."""
    path = folder / f"iter_{step:07}"
    weights: dict[str, Any] = {"w": torch.full((6, 4), float(step)), "v": torch.ones(8)}
    if inside is not None:
        weights["common_state/shard_0_1"] = [inside]
    dcp.save(weights, checkpoint_id=path, no_dist=True)
    if inside is None:
        torch.save({"iteration": step}, path / "common.pt")
    (path / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    return path


def write_common(path: Path, data: bytes) -> None:
    """A `common.pt` whose pickle is `data`."""
    with zipfile.ZipFile(path / "common.pt", "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")


def named(module: str, name: str) -> bytes:
    """An object of a class that the pickle names, made without its constructor."""
    return b"\x80\x02}X\x01\x00\x00\x00a" + f"c{module}\n{name}\n".encode() + b")\x81s."


TOUCH = "touch canary"
ACTS: dict[str, Callable[[], bytes]] = {
    "os.system": lambda: pickle.dumps(Calls(os.system, TOUCH), 2),
    "os.system, protocol 5": lambda: pickle.dumps(Calls(os.system, TOUCH), 5),
    "subprocess": lambda: pickle.dumps(Calls(subprocess.call, ["touch", "canary"]), 2),
    "eval": lambda: pickle.dumps(Calls(eval, "open('canary', 'w')"), 2),
    "exec": lambda: pickle.dumps(Calls(exec, "open('canary', 'w')"), 2),
    "getattr": lambda: pickle.dumps(Calls(getattr, 1, "real"), 2),
    "__import__": lambda: pickle.dumps(Calls(builtins.__import__, "antigravity"), 2),
    "attrgetter": lambda: pickle.dumps(Calls(attrgetter, "a"), 2),
    "partial": lambda: pickle.dumps(Calls(partial, print), 2),
    "rmtree": lambda: pickle.dumps(Calls(shutil.rmtree, "canary"), 2),
    "after an unknown class": lambda: pickle.dumps(
        [Calls(Unknown), Calls(os.system, TOUCH)], 2
    ),
    "of Python 2": lambda: named("__builtin__", "eval"),
    "of Windows": lambda: named("nt", "system"),
    "loads": lambda: named("torch", "load"),
    "a hub": lambda: named("torch.hub", "load_state_dict_from_url"),
    "numpy's runner": lambda: named("numpy.testing._private.utils", "runstring"),
    "through a harmless module": lambda: b"\x80\x04\x8c\x04uuid\x8c\x09os.system\x93\x8c\x01x\x85R.",
    "through a trainer": lambda: (
        b"\x80\x04\x8c\x12megatron.core.util\x8c\x09os.system\x93\x8c\x01x\x85R."
    ),
    "by dunders": lambda: b"\x80\x04\x8c\x08megatron\x8c\x0ff.__globals__.x\x93\x8c\x01x\x85R.",
    "protocol 0": lambda: pickle.dumps(Calls(os.system, TOUCH), 0),
    "an instance opcode": lambda: b"(S'touch canary'\nios\nsystem\n.",
    "nested without end": lambda: b"\x80\x02" + b"]" * 1_000_000 + b"a" * 999_999 + b".",
    "cut short": lambda: pickle.dumps({"iteration": 10}, 2)[:-4],
}  # fmt: skip


class Unknown:
    """A class of some trainer's."""


@pytest.mark.parametrize("trick", ACTS)
def test_a_common_state_that_acts_is_refused(
    trick: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = iteration(tmp_path / "run", 10)
    write_common(path, ACTS[trick]())
    with pytest.raises(FormatError, match=r"iter_0000010/common\.pt.*refused"):
        formats.open_checkpoint(path)
    other = iteration(tmp_path / "run", 20)
    with pytest.raises(InputError, match=r"iter_0000010/common\.pt.*refused"):
        verbs.merge(Choice(paths=(path, other)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "canary").exists()
    assert trajectory.discover([tmp_path / "run"]).left_out[0][0] == path


def test_it_is_refused_at_once(tmp_path: Path) -> None:
    path = iteration(tmp_path, 10)
    write_common(path, ACTS["os.system"]())
    assert_refused(path, "common.pt", "system")


def test_common_state_inside_that_acts_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = iteration(tmp_path, 10, inside={"iteration": 10, "args": Calls(os.system, TOUCH)})
    with pytest.raises(FormatError, match=r"distcp.*system.*refused"):
        formats.open_checkpoint(path)
    for beside in (pickle.dumps({"iteration": 10}, 2), named("megatron.core", "SomethingNew")):
        write_common(path, beside)  # which Megatron would look at
        with pytest.raises(FormatError, match=r"distcp.*system.*refused"):
            formats.open_checkpoint(path)
    assert not (tmp_path / "canary").exists()


def test_common_state_inside_that_is_too_large_to_be_one(tmp_path: Path) -> None:
    path = iteration(tmp_path, 10, inside={"iteration": 10, "filler": bytes(17 * 2**20)})
    with pytest.raises(FormatError, match="too large"):
        formats.open_checkpoint(path)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("megatron.core.transformer.enums", "SomethingNew"),
        ("transformer_engine.common.recipe", "DelayedScaling"),
        ("mycompany.training.logging", "Args"),
        ("torch.nn.init", "xavier_uniform_"),
        ("datetime", "datetime"),
        ("collections", "deque"),
    ],
)
def test_a_class_that_is_only_unknown_goes_along_unread(module: str, name: str, tmp_path: Path) -> None:
    paths = [iteration(tmp_path / "run", step) for step in (10, 20)]
    write_common(paths[1], named(module, name))
    carried = (paths[1] / "common.pt").read_bytes()
    meta = formats.read_meta(paths[1])
    assert (meta.step, meta.tokens, meta.incomplete) == (20, None, None)
    assert f"{module}.{name}" in str(meta.tokens_source)
    verbs.merge(Choice(paths=tuple(paths)), tmp_path / "out")
    assert (tmp_path / "out/iter_0000020/common.pt").read_bytes() == carried
    merged = dcp_tensor(tmp_path / "out/iter_0000020", "w")
    assert torch.equal(merged, torch.full((6, 4), 15.0))


def dcp_tensor(path: Path, name: str) -> torch.Tensor:
    into = {name: torch.zeros(6, 4)}
    dcp.load(into, checkpoint_id=path, no_dist=True)
    return into[name]


def test_no_name_that_checkpoints_need_counts_as_acting() -> None:
    known = set(megatron._RECORDS) - {"argparse.Namespace", "types.SimpleNamespace", "signal.Signals"}
    assert [name for name in known if hostile_names.acts(name)] == []
    assert not any(hostile_names.acts(n) for n in PLAIN if n.startswith(("collections", "numpy")))
    assert not hostile_names.acts("torch.float32")
    assert "torch.float32" in TORCH


def with_member(attributes: list[str]) -> bytes:
    """A `Namespace`, and a class of a company's own with `getattr` of it, and of what that gives, in turn."""
    gets, ends = b"", b""
    for attribute in attributes:
        gets = b"c__builtin__\ngetattr\n" + gets
        ends += b"X" + len(attribute).to_bytes(4, "little") + attribute.encode() + b"\x86R"
    beside = b"X\x01\x00\x00\x00ncargparse\nNamespace\n)\x81X\x01\x00\x00\x00a"
    return b"\x80\x02}(" + beside + gets + b"cmycompany.enums\nMode\n" + ends + b"u."


def test_an_unknown_enumeration_as_early_python_3_11_writes_it(tmp_path: Path) -> None:
    paths = [iteration(tmp_path / "run", step) for step in (10, 20)]
    write_common(paths[1], with_member(["FAST"]))
    verbs.merge(Choice(paths=tuple(paths)), tmp_path / "out")
    assert (tmp_path / "out/iter_0000020/common.pt").is_file()


@pytest.mark.parametrize("attributes", [["os", "system"], ["__init__"], ["mro", "x"]])
def test_getattr_that_leads_elsewhere_is_refused(attributes: list[str], tmp_path: Path) -> None:
    path = iteration(tmp_path / "run", 10)
    write_common(path, with_member(attributes))
    with pytest.raises(FormatError, match=r"common\.pt.*getattr"):
        formats.open_checkpoint(path)

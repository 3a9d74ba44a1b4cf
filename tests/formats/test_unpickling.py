"""The unpickler against hostile pickles, each refused by name, fast, in little memory, with nothing run; and
against what real picklers write.
"""

import os
import pickle
import struct
import subprocess
import zipfile
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest

from pma.errors import FormatError
from pma.formats import pickle_scan
from pma.formats.torch_pickle import encode
from pma.formats.unpickling import DefaultMapping, Named, OrderedMapping, Record, unpickle
from pma.testing.refusals import assert_refused


def dumped(value: Any, protocol: int = 2) -> bytes:
    return pickle.dumps(value, protocol)


class Calls:
    """Pickles to a call of `function` with `arguments`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def named(module: str, name: str, protocol: int = 2) -> bytes:
    """Opcodes that put a global on the stack."""
    if protocol < 4:
        return f"c{module}\n{name}\n".encode()
    return b"".join(b"\x8c" + bytes([len(t)]) + t.encode() for t in (module, name)) + b"\x93"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def put(index: int) -> bytes:
    return b"r" + struct.pack("<I", index)


TOUCH = "touch canary"
RUNS = {
    "os.system": lambda: dumped(Calls(os.system, TOUCH)),
    "os.system, protocol 5": lambda: dumped(Calls(os.system, TOUCH), 5),
    "subprocess": lambda: dumped(Calls(subprocess.call, ["touch", "canary"])),
    "eval": lambda: dumped(Calls(eval, "open('canary', 'w')")),
    "exec": lambda: dumped(Calls(exec, "open('canary', 'w')")),
    "open": lambda: dumped(Calls(open, "canary", "w")),
    "import": lambda: dumped(Calls(__import__, "os")),
    "getattr": lambda: dumped(Calls(getattr, "", "join")),
    "nested name": lambda: (
        b"\x80\x04" + named("torch.serialization", "os.system", 4) + text(TOUCH) + b"\x85R."
    ),
    "name with a space": lambda: b"\x80\x02" + named("os", "system ") + text(TOUCH) + b"\x85R.",
    "attribute of a known name": lambda: (
        b"\x80\x04" + named("collections", "OrderedDict.fromkeys", 4) + b"]\x85R."
    ),
    "known name, other module": lambda: b"\x80\x02" + named("os", "OrderedDict") + b")R.",
    "an object made without a call": lambda: b"\x80\x02" + named("subprocess", "Popen") + b")\x81.",
    "deep in a list": lambda: dumped([{"a": ({"b": [Calls(os.system, TOUCH)]},)}]),
    "after much that is harmless": lambda: dumped([*range(10_000), Calls(os.system, TOUCH)]),
    "in a persistent id": lambda: b"\x80\x02" + named("os", "system") + text(TOUCH) + b"\x85RQ.",
    "numpy": lambda: dumped(Calls(np.fromfile, "canary")),
}


@pytest.mark.parametrize("trick", RUNS)
def test_nothing_is_run(trick: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FormatError, match="refused"):
        unpickle(RUNS[trick](), "x.pt")
    assert not (tmp_path / "canary").exists()


def test_a_refusal_names_what_was_asked_for() -> None:
    with pytest.raises(FormatError, match=r"x\.pt.*'posix\.system'.*nothing in it was run"):
        unpickle(dumped(Calls(os.system, TOUCH)), "x.pt")
    with pytest.raises(FormatError) as caught:
        unpickle(b"\x80\x02" + named("a\x1b[31m", "b") + b".", "x.pt")
    assert str(caught.value).isprintable()


TERABYTES = b"\x8a\x06" + b"\xff" * 5 + b"\x7f"
OPCODES = {
    "INST": b"(S'touch canary'\nios\nsystem\n.",
    "OBJ": b"\x80\x02(" + named("os", "system") + text(TOUCH) + b"o.",
    "EXT1": b"\x80\x02\x82\x01)R.",
    "EXT2": b"\x80\x02\x83\x01\x00)R.",
    "EXT4": b"\x80\x02\x84\x01\x00\x00\x00)R.",
    "persistent id as text": b"P0\n.",
    "persistent id without storages": b"\x80\x02" + text("0") + b"Q.",
    "next buffer": b"\x80\x05\x97.",
    "readonly buffer": b"\x80\x05\x97\x98.",
    "protocol 6": b"\x80\x06N.",
    "long integer as text": b"L" + b"9" * 100_000 + b"L\n.",
    "long integer of gigabytes": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b".",
    "long integer of a negative length": b"\x80\x02\x8b" + struct.pack("<i", -1) + b".",
    "bytes of exabytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b".",
    "text of exabytes": b"\x80\x04\x8d" + struct.pack("<Q", 2**63) + b".",
    "array of exabytes": b"\x80\x05\x96" + struct.pack("<Q", 2**60) + b".",
    "text of gigabytes": b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b".",
    "frame of exabytes": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"N.",
    "memo index of billions": b"\x80\x02Nr" + struct.pack("<I", 2**32 - 1) + b".",
    "memo index not put": b"\x80\x02h\x05.",
    "memo of nothing": b"\x80\x02q\x00.",
    "empty": b"",
    "only a stop": b".",
    "no stop": b"\x80\x02N",
    "two values": b"\x80\x02NN.",
    "bytes after the stop": b"\x80\x02N.N",
    "open mark": b"\x80\x02(N.",
    "tuple without mark": b"\x80\x02t.",
    "below the mark": b"\x80\x02N(\x85.",
    "a call of text": b"\x80\x02" + text("os.system") + b")R.",
    "a call with a list": b"\x80\x02" + named("collections", "OrderedDict") + b"]R.",
    "an object of text": b"\x80\x02" + text("os.system") + b")\x81.",
    "altered list": b"\x80\x02]}b.",
    "altered text": b"\x80\x02" + text("x") + b"}b.",
    "altered function": b"\x80\x02" + named("collections", "OrderedDict") + b"}" + text("__code__") + b"Nsb.",
    "items of text": b"\x80\x02" + text("x") + b"(NNu.",
    "elements of a mapping": b"\x80\x02}(Ne.",
    "an odd number of items": b"\x80\x02}(Nu.",
    "a list as a key": b"\x80\x02}]Ns.",
    "a tuple as a key": b"\x80\x02})Ns.",
    "a tuple as an element": b"\x80\x04\x8f()\x90.",
    "a large integer as a key": b"\x80\x02}\x8a\x10" + bytes(15) + b"\x01Ns.",
    "a name of two lists": b"\x80\x04]]\x93.",
    "a name without an end": b"\x80\x02cos",
    "OrderedDict of pairs": b"\x80\x02" + named("collections", "OrderedDict") + b"](N)\x86ea\x85R.",
    "set of tuples": b"\x80\x02" + named("__builtin__", "set") + b"](N)\x86ea\x85R.",
    "a bytearray of terabytes": b"\x80\x02" + named("builtins", "bytearray") + TERABYTES + b"\x85R.",
    "bytes of terabytes": b"\x80\x02" + named("builtins", "bytes") + TERABYTES + b"\x85R.",
    "a list of what is called": b"\x80\x02" + named("builtins", "list") + text("x") + b"\x85R.",
}  # fmt: skip


@pytest.mark.parametrize("trick", OPCODES)
def test_opcodes_that_lie_or_are_not_needed(trick: str) -> None:
    with pytest.raises(FormatError, match=r"x\.pt"):
        unpickle(OPCODES[trick], "x.pt")


def nested_tuples() -> bytes:
    return b"\x80\x02}(" + b")" + b"\x85" * 1_000_000 + b"Nu."


def doubling_tuple() -> bytes:
    """A tuple of 2^60 leaves as a key: hashing it would take for ever."""
    levels = b"".join(b"\x86" + put(i) + b"h" + bytes([i]) for i in range(60))
    return b"\x80\x02}NN" + levels + b"\x86Ns."


def colliding_tuples() -> bytes:
    """(-1, -2, …): -1 and -2 have the same hash."""
    digits = [b"J" + struct.pack("<i", value) for value in (-1, -2)]
    rows = [b"(" + b"".join(digits[n >> i & 1] for i in range(12)) for n in range(2**12)]
    return b"\x80\x02}(" + b"".join(row + b"tN" for row in rows) + b"u."


def names(count: int) -> bytes:
    return b"\x80\x02}(" + b"".join(text(str(i)) + b"N" for i in range(count)) + b"u."


BOMBS: dict[str, Callable[[], bytes]] = {
    "nested tuples": nested_tuples,
    "doubling tuple": doubling_tuple,
    "colliding tuples": colliding_tuples,
    "nested lists": lambda: b"\x80\x02" + b"]" * 1_000_000 + b"a" * 999_999 + b".",
    "lists in a name": lambda: b"\x80\x02}" + text("x") + b"]" * 200_000 + b"a" * 199_999 + b"s.",
    "nested mappings": lambda: b"\x80\x02" + b"}K\x01" * 500_000 + b"N" + b"s" * 500_000 + b".",
    "a million lists": lambda: b"\x80\x02](" + b"]" * 1_000_000 + b"e.",
    "a million sets": lambda: b"\x80\x04](" + b"\x8f" * 1_000_000 + b"e.",
    "a million names": lambda: names(1_000_000),
    "a million globals": lambda: b"\x80\x02](" + named("collections", "OrderedDict") * 1_000_000 + b"e.",
    "a million calls": lambda: (
        b"\x80\x02" + named("collections", "OrderedDict") + put(0) + b"0](" + b"h\x00)R" * 1_000_000 + b"e."
    ),
    "a million marks": lambda: b"\x80\x02" + b"(" * 1_000_000 + b".",
    "millions of pushes and pops": lambda: b"\x80\x02" + b"N0" * 2_500_000 + b"N.",
    "millions of memos": lambda: b"\x80\x04N" + b"\x94" * 5_500_000 + b".",
    "millions of puts": lambda: b"\x80\x02N" + b"q\x00" * 2_700_000 + b".",
    "millions of duplicates": lambda: b"\x80\x02(N" + b"2" * 5_000_000 + b"t.",
    "millions of frames": lambda: b"\x80\x04" + (b"\x95" + bytes(8)) * 600_000 + b"N.",
    "a wide text": lambda: b"\x80\x02" + text("\U0001f600" + "a" * 20_000_000) + b".",
}  # fmt: skip


@pytest.mark.parametrize("trick", BOMBS)
def test_bombs_are_refused_fast_and_in_little_memory(trick: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", BOMBS[trick]())
    assert_refused(path, "model.pt")


def test_a_bomb_large_enough_to_be_scanned_compiled() -> None:
    """The compiled scan refuses what the other does."""
    assert pickle_scan._COMPILE_FROM_BYTES < 7_000_000
    with pytest.raises(FormatError, match="nested too deeply"):
        unpickle(b"\x80\x02)" + b"\x85" * 7_000_000 + b".", "x.pt", budget_bytes=2**30)
    with pytest.raises(FormatError, match=r"posix\.system"):
        data = dumped([bytes(7_000_000), Calls(os.system, TOUCH)], 4)
        unpickle(data, "x.pt", budget_bytes=2**30)
    assert unpickle(dumped({"a": bytes(7_000_000)}, 4), "x.pt", budget_bytes=2**30) == {"a": bytes(7_000_000)}


VALUES: list[Any] = [
    None, True, False, 0, 255, 256, -1, 2**31, -(2**63), 2**200, 1.5, float("inf"), "", "text", "\u20ac" * 9,
    b"", b"\x00\xff" * 200, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], [1, [2]], list(range(3000)),
    {}, {"a": {1: [None]}}, {1, 2}, {"x": (1, "y")}, set(), {i: str(i) for i in range(3000)},
]  # fmt: skip


def scanned(data: bytes) -> pickle_scan.Scan | str:
    try:
        return pickle_scan.scan(data, "x.pt", 2**30)
    except FormatError as error:
        return str(error)


def test_the_compiled_scan_says_what_the_other_does(monkeypatch: pytest.MonkeyPatch) -> None:
    pickles = [dumped(value, protocol) for value in VALUES for protocol in (2, 3, 4, 5)]
    pickles += [*OPCODES.values(), *(make() for make in RUNS.values())]
    pickles += [whole[:cut] for whole in pickles for cut in range(1, min(len(whole), 60), 7)]
    uncompiled = [scanned(data) for data in pickles]
    monkeypatch.setattr(pickle_scan, "_COMPILE_FROM_BYTES", 0)
    assert [scanned(data) for data in pickles] == uncompiled
    assert len({type(found) for found in uncompiled}) == 2


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_read_as_they_were(protocol: int) -> None:
    for value in VALUES:
        assert unpickle(dumped(value, protocol), "x") == value
    shared = [1]
    first, second = unpickle(dumped([shared, shared], protocol), "x")
    assert first is second


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_known_classes(protocol: int) -> None:
    ordered: Any = OrderedDict(b=1, a=2)
    ordered._metadata = {"": {"version": 1}}
    found = unpickle(dumped(ordered, protocol), "x")
    assert isinstance(found, OrderedMapping)
    assert list(found.items()) == [("b", 1), ("a", 2)]
    assert found.attributes == {"_metadata": {"": {"version": 1}}}
    default = unpickle(dumped(defaultdict(list, a=[1]), protocol), "x")
    assert isinstance(default, DefaultMapping)
    assert default == {"a": [1]}
    assert str(default.factory).endswith(".list")
    assert unpickle(dumped(Counter("aab"), protocol), "x") == {"a": 2, "b": 1}
    assert unpickle(dumped(Path("/run/step-1"), protocol), "x") == "/run/step-1"
    assert unpickle(dumped(PurePosixPath("a/b"), protocol), "x") == "a/b"
    assert unpickle(dumped(frozenset("ab"), protocol), "x") == {"a", "b"}
    for number in (
        np.float64(1.5),
        np.float32(0.5),
        np.int64(-7),
        np.bool_(True),
        np.uint8(3),
        np.float16(2),
    ):
        assert unpickle(dumped(number, protocol), "x") == number.item()
    assert unpickle(dumped(np.arange(3), protocol), "x").name == "numpy.ndarray"
    assert isinstance(unpickle(dumped(list, protocol), "x"), Named)


class Config:
    """A class of a framework, made and restored in the ordinary way."""

    def __init__(self, width: int) -> None:
        self.width = width


class Names(dict[str, int]):
    """A class that is a mapping."""


class Sizes(list[int]):
    """A class that is a list."""


class Kind(Enum):
    """Pickled as a call of the class."""

    FIRST = 1


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_listed_classes_become_records(protocol: int) -> None:
    listed = [f"{__name__}.{name}" for name in ("Config", "Names", "Sizes", "Kind")]
    values = [Config(3), Names(a=1), Sizes([1, 2]), Kind.FIRST]
    made = [unpickle(_dumped_here(value, protocol), "x", records=listed) for value in values]
    assert all(isinstance(record, Record) for record in made)
    config, mapping, sizes, kind = made
    assert (config.name, config.state, config.called) == (listed[0], {"width": 3}, False)
    assert config.get("width") == 3
    assert mapping.entries == {"a": 1}
    assert sizes.elements == [1, 2]
    # Python 3.11.0 to 3.11.3 write members by name
    assert (kind.args, kind.by_name) in (((1,), False), (("FIRST",), True))
    assert kind.called
    for value in values:
        with pytest.raises(FormatError, match="refused"):
            unpickle(_dumped_here(value, protocol), "x")


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_members_of_enumerations_by_name(protocol: int) -> None:
    """As Python 3.11.0 to 3.11.3 write them; written again in the same way."""
    data = _dumped_here(Calls(getattr, Kind, "FIRST"), protocol)
    kind = unpickle(data, "x", records=[f"{__name__}.Kind"])
    assert (kind.name, kind.args, kind.by_name) == (f"{__name__}.Kind", ("FIRST",), True)
    again = unpickle(encode(kind)[0], "x", records=[f"{__name__}.Kind"])
    assert (again.args, again.by_name) == (("FIRST",), True)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (Kind.FIRST, "value"),
        ("", "join"),
        (dict, "fromkeys"),
        (Kind, "__init__"),
        (Kind, "a.b"),
        (Kind, 1),
    ],
)
def test_getattr_gives_nothing_but_members(owner: Any, name: Any) -> None:
    data = _dumped_here([Config(1), Kind.FIRST, Calls(getattr, owner, name)], 2)
    with pytest.raises(FormatError, match="a member of an enumeration"):
        unpickle(data, "x", records=[f"{__name__}.{each}" for each in ("Config", "Kind")])


def _dumped_here(value: Any, protocol: int) -> bytes:
    """Pickled although the test's module cannot be imported by name."""
    import sys

    module = type(sys)(__name__)
    module.__dict__.update({name: globals()[name] for name in ("Config", "Names", "Sizes", "Kind")})
    before = sys.modules.get(__name__)
    sys.modules[__name__] = module
    try:
        return dumped(value, protocol)
    finally:
        sys.modules.pop(__name__) if before is None else sys.modules.update({__name__: before})


def test_what_stands_for_a_name_is_called_in_its_place() -> None:
    data = b"\x80\x02" + named("some.module", "make") + b"K\x02K\x03\x86R."
    assert unpickle(data, "x", globals={"some.module.make": lambda a, b: a * b}) == 6
    with pytest.raises(FormatError, match=r"ZeroDivisionError"):
        unpickle(data, "x", globals={"some.module.make": lambda a, b: 1 / 0})

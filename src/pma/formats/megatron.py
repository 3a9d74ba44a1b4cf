"""Megatron's `torch_dist` checkpoints: `iter_NNNNNNN` folders, each DCP with Megatron's common state beside
or inside.

A merge is a folder that `--load` takes: one iteration, and the file that names it. Load it with
`--no-load-optim --no-load-rng`, or with `--finetune`, unless the optimizer came along.
Source: megatron-core 0.16.1, `dist_checkpointing`; Megatron-LM `training/checkpointing.py`.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from pma.errors import FormatError, IncompleteError, InputError, UsageError, printable
from pma.formats import hostile_names
from pma.formats.contracts import CheckpointReader
from pma.formats.dcp_checkpoint import DcpReader
from pma.formats.dcp_layout import part_layout
from pma.formats.dcp_metadata import METADATA_FILE
from pma.formats.dcp_profiles import MEGATRON
from pma.formats.folder import open_folder
from pma.formats.strict_json import parse_object
from pma.formats.torch_archive import read_archive
from pma.formats.unpickling import Record, UnknownNameError
from pma.types import CheckpointMeta, Layout, TensorSpec

FORMAT = "megatron"
CHECKPOINT_NAME = re.compile(r"iter_(?P<step>\d{7,18})", re.ASCII)
TRACKER_FILE = "latest_checkpointed_iteration.txt"
_RELEASE = "release"
_CONFIG_FILE = "metadata.json"
_COMMON_FILE = "common.pt"
_COMMON_ENTRY = re.compile(r"common_state(/.*)?")
_RECORD_FILE = "pma.json"
_LARGEST_COMMON_BYTES = 64 * 2**20
_LARGEST_CONFIG_BYTES = 2**20
# a buffer of the distributed optimizer, cut without regard to parameters (`dp_reshardable`)
_RAW_BUFFER = re.compile(r"(chained_\d+\.)?optimizer\.distributed\..*")
#: classes that Megatron's arguments hold; they become inert records
_RECORDS = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    "signal.Signals",
    "datetime.timedelta",
    "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.transformer.enums.AttnMaskType",
    "megatron.core.transformer.enums.LayerType",
    "megatron.core.transformer.enums.CudaGraphScope",
    "megatron.core.enums.ModelType",
    "megatron.core.enums.Fp4Recipe",
    "megatron.core.enums.Fp8Recipe",
    "megatron.core.rerun_state_machine.RerunMode",
    "megatron.core.rerun_state_machine.RerunState",
    "megatron.core.rerun_state_machine.RerunDiagnostic",
    "megatron.core.rerun_state_machine.RerunValidationStatus",
    "megatron.core.rerun_state_machine.Call",
    "megatron.core.rerun_state_machine.QuickStats",
    "megatron.training.tokenizer.tokenizer.MegatronTokenizer",
)


def detect(path: Path) -> bool:
    """Whether `path` is an iteration of Megatron's, or a merge of ours with one iteration in it."""
    if not path.is_dir():
        return False
    if (path / TRACKER_FILE).is_file():
        return (path / _RECORD_FILE).is_file()
    if (path / _CONFIG_FILE).is_file():
        return (path / METADATA_FILE).is_file() or any(path.glob("*.distcp"))
    return CHECKPOINT_NAME.fullmatch(path.name) is not None and any(path.glob("*.distcp"))


def open_reader(path: Path) -> Reader:
    """Open a checkpoint: parses its `.metadata` and its common state, reads no tensor.

    Raises FormatError also for a common state that is hostile; one with classes that are not known is no
    reason to refuse the weights.
    """
    return Reader(path)


class Reader(DcpReader):
    """Reads one Megatron checkpoint by position. Implements `CheckpointReader`.

    Raw buffers of the optimizer are left out, because nothing tells which parameters they belong to.
    """

    format = FORMAT

    def __init__(self, path: Path) -> None:
        tracker = path / TRACKER_FILE
        #: the iteration's folder, where `path` is one above it
        self.inner = f"{_folder_named(tracker)}/" if tracker.is_file() else ""
        _check_config(path / self.inner / _CONFIG_FILE)
        super().__init__(path, (self.inner,), MEGATRON)
        raw = [name for part in self.parts for name in part.metadata.tensors if _RAW_BUFFER.fullmatch(name)]
        self._raw = frozenset(raw)
        if raw:
            self.ignored_files = (
                f"{self.inner}{printable(raw[0])} ({len(raw)} raw optimizer buffers of dp_reshardable)",
            )
        try:
            self._check_common()
        except BaseException:
            self.close()
            raise

    @cached_property
    def tensors(self) -> Mapping[str, TensorSpec]:
        return {name: spec for name, spec in self.stored().items() if name not in self._raw}

    @property
    def iteration_folder(self) -> str:
        """The name that Megatron gives to the folder of this iteration."""
        name = self.inner.rstrip("/") or self.path.name
        if CHECKPOINT_NAME.fullmatch(name):
            return name
        step = _count(self.common().get("iteration"))
        return _RELEASE if step is None or name == _RELEASE else f"iter_{step:07}"

    def common(self) -> Mapping[str, Any]:
        """Megatron's common state as inert records. Raises UnknownNameError where it holds a class that is
        not known, FormatError where it cannot be what Megatron wrote.
        """
        name = next(self._common_names(), None)
        value = self._common_value(name, _RECORDS) if name is not None else None
        # megatron-core saves an object as the list of its shards
        value = value[0] if isinstance(value, list) and value else value
        return value if isinstance(value, dict) else {}

    def _check_common(self) -> None:
        """What Megatron should not load is refused: it would go along with a merge as it is."""
        for name in self._common_names():
            try:
                self._common_value(name, _RECORDS)
            except UnknownNameError:
                # carried unread, where all that it does is to make objects of such classes
                self._common_value(name, hostile_names.Harmless(_RECORDS))

    def _common_names(self) -> Iterator[str]:
        """The file, then the entries: Megatron looks at one of them, a merge has them all."""
        if (self.path / self.inner / _COMMON_FILE).is_file():
            yield _COMMON_FILE
        yield from filter(_COMMON_ENTRY.fullmatch, self.tensors)

    def _common_value(self, name: str, records: Container[str]) -> Any:
        if name == _COMMON_FILE:
            return read_archive(self.folder, self.inner + name, records=records).value
        value = self.value(name, records)
        if value is None:
            raise FormatError(f"{self.path}: {printable(name)} is too large, or no common state at all")
        return value


def read_meta(path: Path) -> CheckpointMeta:
    """Iteration, tokens (samples × sequence length) and learning rate from the common state."""
    try:
        reader = open_reader(path)
    except InputError as error:
        return CheckpointMeta(incomplete=str(error))
    try:
        return _meta(reader)
    finally:
        reader.close()


def plan_layout(tensors: Mapping[str, TensorSpec], like: CheckpointReader | None) -> Layout:
    """Where each tensor of an output goes: chunks and files as in `like`, in an iteration's folder of the
    same name, with the file that names it beside.
    """
    if not isinstance(like, Reader):
        raise UsageError("Megatron's checkpoints can be written only where the sources are Megatron's")
    (part,) = like.parts
    name = like.iteration_folder
    files, records = part_layout(part.metadata, f"{name}/", tensors)
    common = like.inner + _COMMON_FILE
    before = {}
    if (like.path / common).is_file():
        before[f"{name}/{_COMMON_FILE}"] = like.folder.read_whole(common, _LARGEST_COMMON_BYTES)
    config = like.folder.read_whole(like.inner + _CONFIG_FILE, _LARGEST_CONFIG_BYTES)
    named = CHECKPOINT_NAME.fullmatch(name)
    tracker = _RELEASE if named is None else str(int(named["step"]))
    after = {f"{name}/{_CONFIG_FILE}": config, TRACKER_FILE: tracker.encode()}
    return Layout(tensors=dict(tensors), files=tuple(files), records={**before, **records, **after})


def _meta(reader: Reader) -> CheckpointMeta:
    missing = _unfinished(reader)
    if missing is not None:
        return CheckpointMeta(incomplete=missing)
    named = CHECKPOINT_NAME.fullmatch(reader.inner.rstrip("/") or reader.path.name)
    step = int(named["step"]) if named else None
    try:
        common = reader.common()
    except UnknownNameError as error:
        return CheckpointMeta(step=step, tokens_source=f"not known: {error}")
    recorded = _count(common.get("iteration"))
    arguments = common.get("args")
    tokens, source = None, None
    if isinstance(arguments, Record):
        samples, length = (_count(arguments.get(n)) for n in ("consumed_train_samples", "seq_length"))
        if samples is not None and length is not None and samples * length < 2**63:
            tokens, source = samples * length, "consumed_train_samples × seq_length"
    rate = _rate(common.get("optimizer"))
    return CheckpointMeta(
        step=recorded if recorded is not None else step,
        tokens=tokens,
        tokens_source=source,
        learning_rate=rate,
    )


def _unfinished(reader: Reader) -> str | None:
    """Why a checkpoint does not count as finished; None if it does."""
    inside = any(_COMMON_ENTRY.fullmatch(name) for name in reader.tensors)
    if not inside and not (reader.path / reader.inner / _COMMON_FILE).is_file():
        return f"{_COMMON_FILE} is missing"
    tracker = reader.path.parent / TRACKER_FILE
    named = CHECKPOINT_NAME.fullmatch(reader.path.name)
    if named is None or not tracker.is_file():
        return None
    latest = CHECKPOINT_NAME.fullmatch(_folder_named(tracker))
    if latest is not None and int(latest["step"]) < int(named["step"]):
        return f"{TRACKER_FILE} still names iteration {int(latest['step'])}"
    return None


def _folder_named(tracker: Path) -> str:
    """The folder that a root's marker names."""
    text = tracker.read_bytes()[:64].strip().decode("ascii", "replace") if tracker.stat().st_size < 64 else ""
    if text == _RELEASE:
        return _RELEASE
    if not text.isascii() or not text.isdecimal() or len(text) > 18:
        raise FormatError(f"{tracker} names no iteration: {printable(text)!r}")
    return f"iter_{int(text):07}"


def _check_config(path: Path) -> None:
    if not path.is_file():
        raise IncompleteError(f"{path} is missing; Megatron writes it last, so the save did not finish")
    config = parse_object(open_folder(path.parent).read_whole(path.name, _LARGEST_CONFIG_BYTES), str(path))
    backend = config.get("sharded_backend")
    if backend != "torch_dist":
        raise FormatError(
            f"{path}: the backend is {printable(str(backend))!r}; only torch_dist is read. Convert the "
            "checkpoint with Megatron's own --ckpt-format torch_dist"
        )


def _rate(value: object, depth: int = 3) -> float | None:
    """The learning rate of the first group of an optimizer, or of several in a row."""
    if not isinstance(value, dict):
        return None
    groups = value.get("param_groups")
    if isinstance(groups, list) and groups and isinstance(groups[0], dict):
        rate = groups[0].get("lr")
        return rate if isinstance(rate, float) and 0 <= rate < 1e6 else None
    found = (_rate(inner, depth - 1) for inner in value.values()) if depth else ()
    return next((rate for rate in found if rate is not None), None)


def _count(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < 2**63 else None

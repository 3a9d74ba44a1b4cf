"""How long a merge takes on several nodes, from the bytes that each moves and the rates of its storage."""

from __future__ import annotations

from dataclasses import dataclass

from pma.engine.partition import Part
from pma.engine.plan import Plan
from pma.errors import UsageError

# until a process streams, and after the last did: the compiled arithmetic is loaded, the lease and the files
# are made, the output gets its name. Measured alone on a core: 0.25 to 0.33 s of loading, 0.03 of the rest
_STARTING_SECONDS = 0.3
# rank 0 waits for all others twice, at the start and at the end: half a pause of 5 ms for each of them, and
# a look at each, which over a network takes about a millisecond
_SECONDS_PER_OTHER = 2 * (0.005 / 2 + 0.001)
# with Ray, before the nodes stream: connecting takes 0.6 s, and a process on each, which imports Ray, as much
_RAY_SECONDS = 1.2


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """One process a node: `seconds` from the plan's start on until the output has its name; the most bytes
    that a node moves; its memory.

    `seconds` has `planning_seconds` in it, and `starting_seconds`: to load the arithmetic, meet and commit;
    with Ray also for its start, and as the nodes plan after the process that drives.
    `files_shared`: output files that more than one node writes; `nodes_idle`: nodes without a block. In a
    store a file is written by one node: `files_in_store` of them, which may be more than the `files` of an
    output in a folder, take `seconds_to_store`.
    """

    nodes: int
    seconds: float
    planning_seconds: float
    starting_seconds: float
    read_bytes_per_second: int
    write_bytes_per_second: int
    bytes_to_read_per_node: int
    bytes_to_write_per_node: int
    peak_memory_bytes_per_node: int
    files: int
    files_shared: int
    nodes_idle: int
    files_in_store: int
    seconds_to_store: float


def predict(
    plan: Plan,
    nodes: int,
    *,
    read_rate: int,
    write_rate: int,
    planning_seconds: float = 0.0,
    on_ray: bool = False,
) -> Scaling:
    """What `nodes` processes would take whose storage moves so many bytes a second for each.

    `planning_seconds`: what making `plan` took; every node makes it. The slowest part decides: while a thread
    writes another reads, so the slower of both does; with one thread a node, their sum.
    """
    if nodes < 1 or min(read_rate, write_rate) < 1:
        raise UsageError("--nodes, --read and --write: at least one node, and rates above zero")
    parts, in_store = plan.partition(nodes), plan.resharded(nodes)
    threads, parts_in_store = plan.options.threads, in_store.partition(nodes, whole_files=True)
    starting_seconds = _STARTING_SECONDS + _SECONDS_PER_OTHER * (nodes - 1)
    if on_ray:
        starting_seconds += _RAY_SECONDS + planning_seconds
    seconds, to_store = (
        planning_seconds
        + starting_seconds
        + max(_stream_seconds(part, read_rate, write_rate, threads) for part in those)
        for those in (parts, parts_in_store)
    )
    return Scaling(
        nodes=nodes,
        seconds=round(seconds, 3),
        planning_seconds=round(planning_seconds, 3),
        starting_seconds=round(starting_seconds, 3),
        read_bytes_per_second=read_rate,
        write_bytes_per_second=write_rate,
        bytes_to_read_per_node=max(part.bytes_to_read for part in parts),
        bytes_to_write_per_node=max(part.bytes_to_write for part in parts),
        peak_memory_bytes_per_node=plan.peak_memory_bytes,
        files=len(plan.layout.files),
        files_shared=_files_shared(plan, parts),
        nodes_idle=sum(not len(part) for part in parts),
        files_in_store=len(in_store.layout.files),
        seconds_to_store=round(to_store, 3),
    )


def _stream_seconds(part: Part, read_rate: int, write_rate: int, threads: int) -> float:
    reading, writing = part.bytes_to_read / read_rate, part.bytes_to_write / write_rate
    return max(reading, writing) if threads > 1 else reading + writing


def _files_shared(plan: Plan, parts: list[Part]) -> int:
    edges = [(one[0], one[-1]) for part in parts for one in part.ranges]
    writers: dict[str, int] = {}
    for file in (file for first, last in edges for file in plan.blocks.files(first, last)):
        writers[file] = writers.get(file, 0) + 1
    return sum(count > 1 for count in writers.values())

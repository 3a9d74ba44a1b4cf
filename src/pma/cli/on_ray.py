"""`--on ray`: which cluster is meant, models measured there, and how its nodes do, in one display."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any

import typer

from pma import engine
from pma.cli.output import note
from pma.engine import Crew, NodeProgress, OnRay, Plan
from pma.errors import UsageError, printable
from pma.evaluation.making import Measuring, measured
from pma.quantities import bytes_text

On = Annotated[
    str | None,
    typer.Option("--on", metavar="ENGINE", help="Share the work among the nodes of a cluster: ray."),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray-address",
        metavar="HOST:PORT",
        help="The cluster; by default $RAY_ADDRESS, or this machine's own.",
    ),
]
PerNode = Annotated[
    int | None,
    typer.Option(
        "--per-node", metavar="N", help="Parts at once on a node (1, or as its resource pma_io says)."
    ),
]
ModelsPerNode = Annotated[
    int | None,
    typer.Option("--per-node", metavar="N", help="Models at once on a node (one a GPU, or --threads cores)."),
]
_LINE_SECONDS = 10.0

Show = Callable[[Sequence[NodeProgress]], None]
Words = Callable[[NodeProgress], str]


def on_ray(
    on: str | None,
    address: str | None,
    per_node: int | None,
    *,
    crew: Crew | None = None,
    measures_roofline: bool = False,
) -> OnRay | None:
    """The cluster that flags name; None where none is asked for. Raises UsageError."""
    if on is None:
        if address is not None or per_node is not None:
            raise UsageError("--ray-address and --per-node need --on ray")
        return None
    if on != "ray":
        raise UsageError(f"--on {printable(on)} is not known; there is ray (torchrun and srun need no flag)")
    if crew is not None:
        raise UsageError(
            f"--on ray is for one process, and this one was started as rank {crew.rank} of {crew.size}; "
            "start it without torchrun or srun"
        )
    if measures_roofline:
        raise UsageError("--measure-roofline measures one process; leave it out with --on ray")
    return OnRay(address=address, **({} if per_node is None else {"per_node": per_node}))


@dataclass(frozen=True, kw_only=True)
class Evaluating:
    """What measures models, and which of them are made together from one pass over their checkpoints."""

    measuring: Measuring
    passes: Callable[[Sequence[Plan]], Sequence[Sequence[int]]]


@contextmanager
def evaluating(
    on: OnRay | None, *, threads: int, per_node: int | None, as_json: bool
) -> Iterator[Evaluating]:
    """In this process, or on the cluster, for the block; there with how each node does, as `nodes_shown`."""
    if on is None:
        yield Evaluating(measuring=measured, passes=partial(engine.passes, in_memory=True))
        return
    from pma.evaluation.on_ray import OnNodes

    with (
        nodes_shown(as_json=as_json, words=_models_words) as show,
        OnNodes(on, threads=threads, most_per_node=per_node, show=show, tell=note) as nodes,
    ):
        yield Evaluating(measuring=nodes, passes=nodes.passes)


@contextmanager
def nodes_shown(*, as_json: bool, words: Words | None = None) -> Iterator[Show]:
    """Call it with how each node does: lines now and then beside the progress of all, or with `as_json`
    events; and once more at the end.
    """
    last: list[NodeProgress] = []
    told_at = time.monotonic()

    def tell(nodes: Sequence[NodeProgress]) -> None:
        for node in nodes:
            note(f"  {node.name}: {(words or _parts_words)(node)}")

    def show(nodes: Sequence[NodeProgress]) -> None:
        nonlocal told_at
        last[:] = nodes
        if as_json:
            note(json.dumps({"event": "nodes", "nodes": [_figures(node) for node in nodes]}))
        elif time.monotonic() - told_at >= _LINE_SECONDS:
            told_at = time.monotonic()
            tell(nodes)

    yield show
    if not as_json and last:
        tell(last)


def _figures(node: NodeProgress) -> dict[str, Any]:
    seconds = max(node.seconds, 1e-6)
    return {
        **asdict(node),
        "read_bytes_per_second": round(node.bytes_read / seconds),
        "write_bytes_per_second": round(node.bytes_written / seconds),
    }


def _parts_words(node: NodeProgress) -> str:
    figures = _figures(node)
    read, written = figures["read_bytes_per_second"], figures["write_bytes_per_second"]
    return (
        f"{node.parts_done} parts done, {_now(node)}; read {bytes_text(node.bytes_read)} at "
        f"{bytes_text(read)}/s"
        + (f", wrote {bytes_text(node.bytes_written)} at {bytes_text(written)}/s" if written else "")
    )


def _models_words(node: NodeProgress) -> str:
    rate = 60 * node.parts_done / max(node.seconds, 1e-6)
    read = bytes_text(node.bytes_read)
    return f"{node.parts_done} models done, {_now(node)}, {rate:.3g} a minute; read {read}"


def _now(node: NodeProgress) -> str:
    return "gone" if node.lost else f"{node.parts_running} running"

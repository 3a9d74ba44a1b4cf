"""Models measured on the nodes of a Ray cluster: batches given out, results heard."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from types import TracebackType
from typing import Any, Self

from pma import engine
from pma.cluster import Cluster, Node, NodeProgress, OnRay, connected
from pma.engine import Plan
from pma.engine.on_ray.checking import ALL, check_all
from pma.engine.on_ray.recipes import recipe
from pma.engine.on_ray.roster import Roster
from pma.engine.on_ray.workers import Job, Room, Workers
from pma.engine.provenance import absolute, check_unchanged
from pma.errors import UsageError, printable
from pma.evaluation.making import Load, Told, Wanted
from pma.evaluation.measures import Measure
from pma.evaluation.on_ray import looking
from pma.evaluation.on_ray.models import Batch, Item, Models


class OneKind:
    """Of a cluster's nodes those with GPUs, where any had one when they were seen first, else those without:
    results of GPUs and of processors differ in their last digits, so whatever comes or goes, it stays so.
    """

    def __init__(self) -> None:
        self._gpus: bool | None = None

    @property
    def kind(self) -> str:
        if self._gpus is None:
            return ALL.kind
        return "with GPUs" if self._gpus else "without GPUs"

    def __call__(self, nodes: Sequence[Node]) -> Sequence[Node]:
        if self._gpus is None and nodes:
            self._gpus = any(node.gpus >= 1 for node in nodes)
        return [node for node in nodes if (node.gpus >= 1) == self._gpus]


class OnNodes:
    """What measures models on a Ray cluster, for the block: a `Measuring`.

    One process for each GPU, or where no node had any at first for each `threads` cores, at most
    `most_per_node` on a node, makes batches of models, as many as `--memory` holds, from one pass over their
    checkpoints. The cluster is connected to when there is something to measure; the processes stay for what
    else comes.

    `show` hears how each node does, its parts being models, `tell` a line of what is unusual. Raises
    UsageError or StorageError for a cluster that cannot be used, MismatchError where a node sees other
    sources, and what measuring here would raise.
    """

    def __init__(
        self,
        on: OnRay,
        *,
        threads: int,
        most_per_node: int | None = None,
        show: Callable[[Sequence[NodeProgress]], None] | None = None,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._on, self._threads, self._most_per_node = on, threads, most_per_node
        self._show, self._tell = show, tell
        self._stack = ExitStack()
        self._cluster: Cluster | None = None
        self._workers: Workers[Item] | None = None
        self._looked_at: set[str] = set()
        self._kept: dict[object, Any] = {}
        self.used = OneKind()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def __call__(
        self,
        wanted: Sequence[Wanted],
        told: Told,
        *,
        context_tokens: int | None = None,
        begun: Callable[[int], None] = lambda place: None,
        load: Load | None = None,
    ) -> None:
        """As every `Measuring`; results come in any order."""
        workers = self._ready([each.plan for each in wanted], [m for each in wanted for m in each.measures])
        kept = {m.key: self._keep(m.key, m) for each in wanted for m in each.measures}
        load_kept = None if load is None else self._keep(load, load)
        asked = _Asked(wanted, told, begun, kept, load_kept, context_tokens, self)
        jobs = [
            [
                (place, number, measure.key)
                for place in places
                for number, measure in enumerate(wanted[place].measures)
            ]
            for places in self.passes([each.plan for each in wanted])
        ]
        try:
            workers.carry_out(jobs, asked)
        except BaseException:
            workers.end()
            self._workers = None
            raise

    def passes(self, plans: Sequence[Plan]) -> list[list[int]]:
        """Numbers of the plans that are made together: as `engine.passes`, and so that no process is idle
        while another has several.
        """
        processes = sum(self.room(node).workers for node in self.used(self._connected().nodes()))
        most = -(-len(plans) // max(processes, 1))
        batches = []
        for numbers in engine.passes(plans, in_memory=True):
            count = -(-len(numbers) // most)
            cuts = [len(numbers) * i // count for i in range(count + 1)]
            batches += [numbers[a:b] for a, b in pairwise(cuts)]
        return batches

    def room(self, node: Node) -> Room:
        """A process for each GPU, or for each `threads` cores."""
        gpus = int(node.gpus)
        workers = gpus or max(1, int(node.cores / self._threads))
        cores = min(float(self._threads), node.cores / workers)
        if self._most_per_node is not None:
            workers = min(workers, self._most_per_node)
        # beyond one, Ray has only whole cores
        return Room(workers=workers, cores=int(cores) if cores > 1 else cores, gpus=1 if gpus else 0)

    def _connected(self) -> Cluster:
        if self._cluster is None:
            self._cluster = self._stack.enter_context(connected(self._on))
        return self._cluster

    def _ready(self, plans: Sequence[Plan], measures: Sequence[Measure]) -> Workers[Item]:
        cluster = self._connected()
        sources = {str(absolute(source.point.path)) for plan in plans for source in plan.sources}
        if self._workers is not None and sources <= self._looked_at:
            return self._workers
        packed = looking.packed(plans, [name for measure in measures for name in measure.needs])
        look_in = looking.__name__
        nodes = check_all(cluster, packed, self._on.node_seconds, look_in, used=self.used)
        self._looked_at |= sources
        if self._workers is None:
            how: dict[str, Any] = {"packed": packed, "look_in": look_in, "used": self.used}
            roster = Roster(cluster, nodes, on=self._on, tell=self._tell, **how)
            self._workers = Workers[Item](
                cluster, roster, Models, self._threads, show=self._show, tell=self._tell
            )
            self._stack.callback(self._workers.end)
        return self._workers

    def _keep(self, key: object, value: object) -> Any:
        """Where the cluster keeps it, for all processes of all batches."""
        if key not in self._kept:
            try:
                self._kept[key] = self._connected().keep(value)
            except (TypeError, AttributeError) as error:  # what pickling raises
                raise UsageError(
                    f"{printable(repr(value))} cannot be sent to another process: {printable(str(error))}"
                ) from error
        return self._kept[key]


class _Asked:
    """What one call asked for: whose results are heard, and which models are begun."""

    def __init__(
        self,
        wanted: Sequence[Wanted],
        told: Told,
        begun: Callable[[int], None],
        measures: Mapping[str, Any],
        load: Any | None,
        context_tokens: int | None,
        nodes: OnNodes,
    ) -> None:
        self._wanted, self._told, self._tell_begun = wanted, told, begun
        self._measures, self._load, self._context_tokens = measures, load, context_tokens
        self._begun: set[int] = set()
        self._left = [dict(enumerate(each.measures)) for each in wanted]
        self.room = nodes.room

    def arguments(self, job: Job[Item]) -> tuple[Any, ...]:
        """The batch that is left to make."""
        places = list(dict.fromkeys(place for place, _, _ in job))
        return (
            Batch(
                recipes={place: recipe(self._wanted[place].plan) for place in places},
                names={place: self._wanted[place].name for place in places},
                measures={key: self._measures[key] for _, _, key in job},
                load=self._load,
                context_tokens=self._context_tokens,
            ),
        )

    def begun(self, item: Item) -> None:
        """Once for each model."""
        if item[0] not in self._begun:
            self._begun.add(item[0])
            self._tell_begun(item[0])

    def heard(self, item: Item, answer: Mapping[str, Any]) -> int:
        """Tell a result; a model is done with its last."""
        place, number, _ = item
        measure = self._left[place].pop(number)
        self._told(place, measure, measure.read(answer["result"]))
        return not self._left[place]

    def name(self, item: Item) -> str:
        """Which merge it is."""
        plan = self._wanted[item[0]].plan
        newest = plan.sources[-1].point.path.name
        return f"model {item[0] + 1} ({plan.options.scheme_text} of {len(plan.sources)} up to {newest})"

    def check(self) -> None:
        """Of the sources of all."""
        for each in self._wanted:
            check_unchanged(each.plan)

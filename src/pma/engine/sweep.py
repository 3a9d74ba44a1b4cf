"""Many merges from few reads: plans that are cut alike are streamed together, as many as memory holds."""

# K merges

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from pma.engine.blocks import Policy
from pma.engine.commit import How, Merge, check_room
from pma.engine.delivery import write_all
from pma.engine.memory import average_all
from pma.engine.memory_budget import merges_within
from pma.engine.plan import Plan
from pma.engine.stream import Output, Progress, stream
from pma.engine.work import alike, shared_work
from pma.remote import RemotePath

if TYPE_CHECKING:
    from torch import Tensor


def passes(plans: Sequence[Plan], *, in_memory: bool) -> list[list[int]]:
    """Numbers of the plans that are made together, in as few passes over the checkpoints as possible.

    Together go plans whose outputs are cut alike, as many as their memory budget holds: the buffers of each,
    and with `in_memory` also its result.
    """
    groups: list[list[int]] = []
    for number, plan in enumerate(plans):
        group = next((g for g in groups if alike(plans[g[0]], plan)), None)
        if group is None:
            groups.append([number])
        else:
            group.append(number)
    made = []
    for group in groups:
        first = plans[group[0]]
        result_bytes = first.bytes_to_write if in_memory else 0
        most = merges_within(first.options.memory_bytes, first.options.threads, result_bytes)
        # evenly filled: five of at most four are three and two
        count = -(-len(group) // most)
        made += [group[len(group) * i // count : len(group) * (i + 1) // count] for i in range(count)]
    return made


def bytes_to_read_by(plans: Sequence[Plan], made_together: Sequence[Sequence[int]]) -> int:
    """Bytes that all passes read, each of which makes plans of such numbers, as `passes` gives them."""
    total = 0
    for numbers in made_together:
        together = [plans[number] for number in numbers]
        sources = {reader.path for plan in together for reader in plan.readers}
        averaged, copied = (together[0].bytes_of(p) for p in (Policy.AVERAGE, Policy.COPY_NEWEST))
        total += averaged * len(sources) + copied * len(together)
    return total


def sweep_in_memory(
    plans: Sequence[Plan],
    use: Callable[[int, dict[str, Tensor]], None],
    progress: Progress | None = None,
) -> None:
    """Make every plan's result and hand it to `use` with its number; it is forgotten after that."""
    for numbers in passes(plans, in_memory=True):
        together = [plans[number] for number in numbers]
        results = average_all(shared_work(together), together, progress)
        for number in numbers:
            use(number, results.pop(0))


def sweep_to_folders(targets: Sequence[tuple[Plan, Path]], **how: Unpack[How]) -> list[Merge]:
    """Write every plan to its new folder, in the order given; `how` as in `engine.write`. An interrupted
    sweep goes on.
    """
    # what goes to a store leaves this machine after each pass
    check_room([(plan, out) for plan, out in targets if not isinstance(out, RemotePath)])
    done: dict[int, Merge] = {}
    for numbers in passes([plan for plan, _ in targets], in_memory=False):
        together = [targets[number] for number in numbers]
        done |= zip(numbers, write_all(together, **how), strict=True)
    return [done[number] for number in range(len(targets))]


def sweep_digests(
    plans: Sequence[Plan], progress: Progress | None = None
) -> list[dict[tuple[str, int], str]]:
    """The digest of every chunk of every plan's result, without keeping the results."""
    digests: dict[int, dict[tuple[str, int], str]] = {}
    for numbers in passes(plans, in_memory=False):
        outputs = [Output(part=None) for _ in numbers]
        stream(shared_work([plans[number] for number in numbers]), outputs, progress=progress)
        digests |= {number: output.digests for number, output in zip(numbers, outputs, strict=True)}
    return [digests[number] for number in range(len(plans))]

"""The studies by name: what each asks of the paper. What a study does is in the module of its name."""

from __future__ import annotations

from dataclasses import dataclass

from pma.errors import UsageError

PAPER = "arXiv 2505.12082"


@dataclass(frozen=True, kw_only=True)
class Study:
    """`claim`: what the paper (or `source`) says. `seeds`: how many it runs, from `first_seed` on; of one it
    is exploratory.
    """

    name: str
    title: str
    source: str
    claim: str
    seeds: int = 1
    first_seed: int = 0

    def seeds_of(self, count: int | None) -> tuple[int, ...]:
        """So many seeds, or the study's own number."""
        return tuple(range(self.first_seed, self.first_seed + (count or self.seeds)))


STUDIES = (
    Study(
        name="fig1",
        title="Merging in the stable phase: mixtures of experts",
        source=f"{PAPER}, Fig. 1",
        claim="merging checkpoints of the stable phase improves mixtures of experts of every size",
        seeds=3,
    ),
    Study(
        name="fig2",
        title="Merging during cosine decay",
        source=f"{PAPER}, Fig. 2",
        claim="an average early in the decay is about as good as the end of it; the gain vanishes as "
        "the rate does",
        seeds=3,
    ),
    Study(
        name="fig3",
        title="Constant rate and merging, or annealing",
        source=f"{PAPER}, Fig. 3",
        claim="after a fork, merging at constant rate beats the raw model and the annealing one early, and "
        "stays comparable to annealing",
        seeds=3,
    ),
    Study(
        name="fig4",
        title="Schemes",
        source=f"{PAPER}, Fig. 4",
        claim="early, WMA is best, EMA 0.2 above EMA 0.1, all above the raw model; later the differences "
        "vanish",
        seeds=3,
    ),
    Study(
        name="fig5",
        title="The interval V and the number N",
        source=f"{PAPER}, Fig. 5",
        claim="early, a large V falls below the raw model and more checkpoints are worse; at the end V "
        "hardly matters and more are better",
        seeds=3,
    ),
    Study(
        name="fig6",
        title="Continued training from a merge",
        source=f"{PAPER}, Fig. 6",
        claim="continued training from a merge has lower loss and better scores at first, parity at the end, "
        "under each schedule",
    ),
    Study(
        name="table1",
        title="Fine-tuning from a merge",
        source=f"{PAPER}, Table 1 and Fig. 7 left",
        claim="fine-tuning from a merge is never worse, with calmer gradient norms",
    ),
    Study(
        name="fig7",
        title="A collapse, and going on from the merge before it",
        source=f"{PAPER}, Fig. 7 right",
        claim="a run that collapsed at an exceptionally high rate passes the place when resumed from the "
        "merge of the 3 checkpoints before, and returns to its trajectory",
        seeds=12,
        first_seed=10,  # the setting was found with those before
    ),
    Study(
        name="fig8",
        title="The plane through checkpoints and their merge",
        source=f"{PAPER}, Fig. 8",
        claim="checkpoints lie around a basin, and their mean lies nearer its centre",
    ),
    Study(
        name="fig9",
        title="Merging in the stable phase: dense models",
        source=f"{PAPER}, Fig. 9",
        claim="merging checkpoints of the stable phase improves dense models of every size",
        seeds=3,
    ),
    Study(
        name="mechanism",
        title="Why merging works: curvature around the merge",
        source=f"{PAPER}, Sec. 4.6",
        claim="the deviations of checkpoints from the optimum complement each other under the Hessian, so "
        "that the loss of their mean is below the mean of their losses",
    ),
    Study(
        name="lr",
        title="Learning rate and merging",
        source=f"{PAPER}, limitations",
        claim="left open: does a higher learning rate give better merges?",
    ),
    Study(
        name="snapshots",
        title="Snapshots, or means over intervals",
        source="beyond the paper",
        claim="few stored means over intervals are as good as many snapshots",
        seeds=3,
    ),
    Study(
        name="forecast",
        title="What annealing would give, forecast from merges",
        source=f"{PAPER}, Sec. 4.1: merges predict annealing",
        claim="the losses of merges, corrected by what other runs taught, tell the loss after a decay",
        seeds=3,
    ),
    Study(
        name="optimizer",
        title="The optimizer's state when training goes on from a merge",
        source="no published ablation",
        claim="left open: which treatment of the moments keeps the merge's advantage longest?",
    ),
    Study(
        name="router",
        title="Routing before and after merging",
        source="beyond the paper",
        claim="left open: does merging keep the routing of experts and their load balance?",
    ),
    Study(
        name="posttrain",
        title="Merging along fine-tuning",
        source=f"{PAPER}, limitations",
        claim="left open: does merging along post-training help?",
    ),
    Study(
        name="diagnose",
        title="Which merges gain, told from weights and log alone",
        source="beyond the paper",
        claim="a diagnosis tells, without evaluating, which merges beat last and which window is best",
    ),
)


def study(name: str) -> Study:
    """The study of that name. Raises UsageError for another."""
    for each in STUDIES:
        if each.name == name:
            return each
    names = ", ".join(each.name for each in STUDIES)
    raise UsageError(f"there is no study {name!r}; there are {names}; or say all, alone")

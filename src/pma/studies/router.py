"""Routing of mixtures of experts before and after merging: agreement of choices, and balance of loads."""

# D documents, L layers, T tokens, E experts

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pma.analysis import routing
from pma.analysis.routing import Balance, Routing
from pma.studies import landscape, router_telling, seeds
from pma.studies.lab import HELD_OUT, Lab
from pma.studies.landscape import over_batches, rounded
from pma.studies.making import Anneal
from pma.studies.measuring import Measured
from pma.studies.presets import MIXTURE, Preset
from pma.studies.tuning import anneal, trunks

__all__ = ["VERSION", "draw", "run", "tell"]
VERSION = 1
WINDOWS, BATCHES = 128, 16
PAIRS = (
    ("last", "merge"),
    ("last", "neighbour"),
    ("last", "earlier"),
    ("annealed", "merge"),
    ("annealed", "last"),
)
tell, draw = router_telling.tell, router_telling.draw
Values = NDArray[np.float64]


def run(lab: Lab) -> dict[str, Any]:
    """Mixtures of every size, first seed, at three points in training; at the last there is an annealed
    model.
    """
    preset = lab.preset
    sizes = preset.of(MIXTURE)
    forks = [anneal(lab, trunks(lab, size)[lab.seeds[0]]) for size in sizes]
    lab.make(forks)
    model = sizes[0].recipe.model
    return {
        "seed": lab.seeds[0],
        "last": preset.last,
        "every_steps": preset.every_steps,
        "tokens": WINDOWS * sizes[0].recipe.text.context_tokens,
        "tokens_a_step": sizes[0].recipe.tokens_a_step,
        "experts": model["num_experts"],
        "top": model["num_experts_per_tok"],
        "models": lab.map(of_run, [(lab.home, preset, fork) for fork in forks]),
    }


def of_run(home: Path, preset: Preset, fork: Anneal) -> dict[str, Any]:
    """One size at its points."""
    trunk, every, window = fork.trunk, preset.every_steps, preset.last * preset.every_steps
    points = []
    for at in preset.stages:
        wanted = {
            "last": Measured(run=trunk, at=at),
            "merge": Measured(run=trunk, at=at, last=preset.last, every=every),
            "neighbour": Measured(run=trunk, at=at - every),
            "earlier": Measured(run=trunk, at=at - window),
        }
        if at == fork.step + fork.steps:
            wanted["annealed"] = Measured(run=fork, at=at)
        points.append({"step": at, **_at_point(home, preset, fork, wanted)})
    return {"size": trunk.recipe.name, "rate": trunk.recipe.optimizer.learning_rate, "points": points}


def _at_point(home: Path, preset: Preset, fork: Anneal, wanted: dict[str, Measured]) -> dict[str, Any]:
    routed: dict[str, Routing] = {}
    losses: dict[str, Values] = {}
    text = share_B = None
    for name, item in wanted.items():
        scorer = landscape.load(item, home)
        text = text or landscape.text_windows(
            scorer,
            fork,
            home,
            HELD_OUT,
            characters=preset.characters_a_document,
            context_tokens=fork.trunk.recipe.text.context_tokens,
            count=WINDOWS,
        )
        routed[name] = routing.of_model(scorer.model, text)
        surface = landscape.surface(scorer, text, batches=BATCHES)
        losses[name] = surface.losses(surface.layout.vector(dict(scorer.model.named_parameters())))
        share_B = surface.share_B
    assert share_B is not None
    agreed = {f"{a} {b}": routing.agreement(routed[a], routed[b]) for a, b in PAIRS if a in routed}
    documents_T = routed["last"].document_T
    return {
        "loss": {name: float(share_B @ loss_B) for name, loss_B in losses.items()},
        "gain": over_batches(losses["last"] - losses["merge"], share_B),
        "agreement": {pair: _by_document(each.mean(axis=0), documents_T) for pair, each in agreed.items()},
        "agreement_by_layer": {pair: rounded(each.mean(axis=1)) for pair, each in agreed.items()},
        "more_than": {
            "neighbour": _difference(agreed, "last merge", "last neighbour", documents_T),
            "earlier": _difference(agreed, "last merge", "last earlier", documents_T),
            **(
                {"annealed": _difference(agreed, "annealed merge", "annealed last", documents_T)}
                if "annealed" in routed
                else {}
            ),
        },
        "balance": {name: _means(routing.balance(each.load())) for name, each in routed.items()},
        "load": {name: rounded(each.load(), 4) for name, each in routed.items()},
        "change": _change(routed["last"], routed["merge"]),
    }


def _by_document(value_T: Values, document_T: NDArray[np.int64]) -> dict[str, float]:
    """Mean over tokens with its interval over documents, as plain values."""
    found = asdict(routing.over_documents(value_T, document_T))
    return {key: float(value) for key, value in found.items()}


def _difference(
    agreed: dict[str, Values], first: str, second: str, document_T: NDArray[np.int64]
) -> dict[str, float]:
    return _by_document((agreed[first] - agreed[second]).mean(axis=0), document_T)


def _means(told: Balance) -> dict[str, float]:
    return {name: float(np.mean(value_L)) for name, value_L in vars(told).items()}


def _change(last: Routing, merge: Routing) -> dict[str, Any]:
    """Balance of the merge's loads less that of last's, means over layers; the heaviest load as a share of
    last's. By jackknife over documents, as balance is no mean over tokens.
    """
    documents = np.unique(last.document_T)
    masks = [np.ones(len(last.document_T), dtype=bool), *(last.document_T != d for d in documents)]
    rows = []
    for mask in masks:
        before, after = (_means(routing.balance(each.load(mask))) for each in (last, merge))
        rows.append(
            [
                after["entropy_L"] - before["entropy_L"],
                after["heaviest_L"] / before["heaviest_L"] - 1,
                after["variation_L"] - before["variation_L"],
            ]
        )
    whole, parts = np.array(rows[0]), np.array(rows[1:])
    pseudo_DV = len(documents) * whole - (len(documents) - 1) * parts
    told = {}
    for v, name in enumerate(("entropy", "heaviest", "variation")):
        interval = seeds.of_values(pseudo_DV[:, v].tolist()).to_json()
        told[name] = {key: value for key, value in interval.items() if key != "by_seed"}
    return told

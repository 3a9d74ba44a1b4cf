"""Looks on made-up losses, of which all is known; what `Look.to_json` tells of them."""

from typing import Any

import numpy as np
import torch

from pma.analysis import experts
from pma.analysis.contours import contours
from pma.analysis.curvature import Surface
from pma.analysis.deviations import bending
from pma.analysis.line import PLACES, search, weights_at
from pma.analysis.looking import BestCheckpoint, Look, Text
from pma.analysis.parameters import Layout
from pma.analysis.routing import Routing
from pma.evaluation.paired import mean_estimate, paired_difference

DOCUMENTS, PARAMETERS = 20, 6
STEPS = (10, 20, 30, 40)


def made_up_look(*, best_t: float = 1.0, mixture: bool = True, noise: float = 0.0) -> dict[str, Any]:
    """A look at a bowl: the loss on the line is lowest at `best_t`."""
    random = np.random.default_rng(0)
    tokens, chooses = np.full(DOCUMENTS, 50.0), np.arange(DOCUMENTS) % 2 == 0
    places = np.array(PLACES)
    level = 3 + 0.1 * (-1.0) ** (np.arange(DOCUMENTS) // 2)  # 3 on average, in both halves
    nats = (level + 0.2 * (places[:, None] - best_t) ** 2) * tokens
    nats = nats + noise * random.standard_normal(nats.shape)
    line = search(PLACES, nats, tokens, chooses)
    points = random.standard_normal((4, PARAMETERS))
    merge = points.mean(axis=0)
    told = nats[1][~chooses] + 1.0
    return Look(
        steps=STEPS,
        weights=(0.25,) * 4,
        line_weights=weights_at(line.t, (0.25,) * 4),
        text=Text(
            given=30,
            documents=DOCUMENTS,
            choosing_documents=10,
            cut_characters=100,
            tokens=1_000,
            context_tokens=64,
        ),
        line=line,
        best=BestCheckpoint(
            step=20,
            is_last=False,
            loss=mean_estimate(told, tokens[~chooses]),
            merge_below=paired_difference(told, nats[PLACES.index(1)][~chooses], tokens[~chooses]),
        ),
        experts=_routing(random) if mixture else None,
        bending=bending(_bowl(), merge, points, steps=STEPS),
        contours=contours(_bowl(), merge, points, steps=STEPS, best=1, points_a_side=5),
        left_out={},
    ).to_json()


def _bowl() -> Surface:
    def loss(b: int) -> Any:
        return lambda named: (0.5 + b / 10) * (named["a"] ** 2).sum()

    return Surface(
        layout=Layout(shapes={"a": (PARAMETERS,)}),
        batch_losses=[loss(b) for b in range(3)],
        share_B=np.full(3, 1 / 3),
        tokens=300,
        dtype=torch.float64,
    )


def _routing(random: np.random.Generator) -> experts.Experts:
    def one() -> Routing:
        chosen = random.permuted(np.tile(np.arange(4), (2, 40, 1)), axis=-1)[..., :2]
        return Routing(chosen_LTK=chosen, experts=4, document_T=np.arange(40) // 10)

    return experts.compare(last=one(), merge=one(), neighbour=one())

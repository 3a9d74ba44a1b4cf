"""Real loss curves do not alarm, under any schedule; and a rise of known height put into them is found."""

import os
from pathlib import Path

import numpy as np
import pytest

from pma.logs import Kind, breakaways, read
from pma.logs.breakaways import find

_GIVEN = os.environ.get("PMA_LOSS_CURVES")
FOLDER = Path(_GIVEN) if _GIVEN else Path(__file__).parents[3] / "shared" / "data" / "loss_curves"
CURVES = sorted(FOLDER.glob("*/*.csv"))

pytestmark = pytest.mark.skipif(
    not CURVES, reason=f"no loss curves in {FOLDER}; PMA_LOSS_CURVES names a folder of SIZE/*.csv"
)


@pytest.mark.parametrize("path", CURVES or [Path("none")], ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_real_curve_does_not_alarm_and_half_a_nat_more_does(path: Path) -> None:
    curves = read(path)
    assert breakaways(curves) == ()
    steps, loss = curves.series("loss")
    for at in range(80, len(loss) - 12, 25):
        raised = loss.copy()
        raised[at:] += 0.5
        (only,) = find(steps, raised, "loss")
        assert only.first_step == steps[at], at
        assert np.flatnonzero(steps == only.seen_step)[0] < at + 20
        assert only.kind in (Kind.COLLAPSE, Kind.SPIKE)

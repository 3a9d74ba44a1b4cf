"""Last against merge and neighbour: agreement by hand, equal models, balance."""

import numpy as np
import pytest

from pma.analysis import experts
from pma.analysis.routing import Routing


def routing(chosen, experts_there=4, documents=(0, 0, 1)):
    return Routing(chosen_LTK=np.array(chosen), experts=experts_there, document_T=np.array(documents))


LAST = routing([[[0, 1], [0, 2], [1, 3]], [[0, 1], [0, 1], [0, 1]]])


def test_equal_models_agree_on_everything():
    found = experts.compare(last=LAST, merge=LAST, neighbour=LAST)
    assert found.merge == found.neighbour
    assert (found.merge.mean.value, found.merge.by_layer) == (1, (1, 1))
    assert found.merge.whole_by_layer == (1, 1)
    assert (found.more.value, found.more.standard_error) == (0, 0)
    assert (found.experts, found.top, found.chance, found.tokens) == (4, 2, 0.5, 3)


def test_agreement_by_layer_and_by_document():
    merge = routing([[[1, 0], [2, 3], [0, 2]], [[0, 1], [0, 1], [0, 2]]])
    neighbour = routing([[[2, 3], [1, 3], [1, 3]], [[0, 1], [0, 1], [0, 1]]])
    found = experts.compare(last=LAST, merge=merge, neighbour=neighbour)
    assert found.merge.by_layer == pytest.approx((1.5 / 3, 2.5 / 3))
    assert found.merge.whole_by_layer == pytest.approx((1 / 3, 2 / 3))
    assert found.neighbour.by_layer == pytest.approx((1 / 3, 1))
    assert found.merge.mean.value == pytest.approx(4 / 6)
    assert found.more.value == pytest.approx(0)
    # tokens agree on (1, ¾) in one document and on ¼ in the other: a ratio's residuals, over two documents
    residuals = np.array([1.75 - 2 * 2 / 3, 0.25 - 2 / 3]) / 1.5
    assert found.merge.mean.standard_error == pytest.approx(residuals.std(ddof=1) / np.sqrt(2))


def test_loads():
    found = experts.compare(last=LAST, merge=LAST, neighbour=LAST)
    # second layer: two experts take everything
    assert found.last_load.heaviest[1] == pytest.approx(2)
    assert found.last_load.entropy[1] == pytest.approx(0.5)

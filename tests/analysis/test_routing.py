"""Routing against logits made by hand, and against the model's own router."""

import numpy as np
import pytest
import torch

from pma.analysis import routing
from pma.errors import InputError

from .models import tiny_model, tiny_windows


def of(logits, top=2):
    logits = np.array(logits, dtype=float)
    return routing.from_logits(logits, top=top, document_T=np.zeros(logits.shape[1], dtype=int))


def test_agreement_is_the_share_of_common_experts_in_any_order():
    a = of([[[9, 5, 1, 0], [9, 5, 1, 0], [9, 5, 1, 0]]])
    b = of([[[5, 9, 1, 0], [9, 0, 5, 1], [0, 1, 5, 9]]])
    np.testing.assert_allclose(routing.agreement(a, b), [[1, 0.5, 0]])
    np.testing.assert_allclose(routing.agreement(a, a), 1)


def test_independent_routings_agree_by_chance():
    draw = np.random.default_rng(0)
    a, b = (of(draw.standard_normal((1, 20_000, 8))) for _ in range(2))
    assert routing.agreement(a, b).mean() == pytest.approx(2 / 8, abs=0.01)


def test_loads_are_shares_of_choices():
    found = of([[[9, 5, 1, 0], [9, 0, 5, 1], [9, 5, 0, 1], [9, 0, 1, 5]]])
    np.testing.assert_allclose(found.load(), [[0.5, 0.25, 0.125, 0.125]])
    np.testing.assert_allclose(found.load([0]), [[0.5, 0.5, 0, 0]])
    np.testing.assert_allclose(found.load([False, True, False, True]), [[0.5, 0, 0.25, 0.25]])


def test_balance_of_even_single_and_uneven_loads():
    found = routing.balance([[0.25, 0.25, 0.25, 0.25], [1, 0, 0, 0], [0.5, 0.5, 0, 0]])
    np.testing.assert_allclose(found.entropy_L, [1, 0, 0.5], atol=1e-12)
    np.testing.assert_allclose(found.heaviest_L, [1, 4, 2])
    np.testing.assert_allclose(found.variation_L, [0, np.sqrt(3), 1])


def test_routings_of_other_texts_are_not_compared():
    with pytest.raises(InputError, match="1 layers × 1 tokens × 2 of 4 experts"):
        routing.agreement(of([[[1, 2, 3, 4]]]), of([[[1, 2, 3, 4], [1, 2, 3, 4]]]))


def test_a_models_routing_is_what_its_routers_choose():
    model, windows = tiny_model(experts=4).eval(), tiny_windows()
    seen: list[list[torch.Tensor]] = [[], []]
    for layer, kept in zip(model.model.layers, seen, strict=True):
        layer.mlp.gate.register_forward_hook(lambda _module, _given, out, kept=kept: kept.append(out[2]))
    found = routing.of_model(model, windows, windows_a_batch=4)
    tokens = windows.ids_WC[:, :-1].size
    assert found.chosen_LTK.shape == (2, tokens, 2)
    for chosen, kept in zip(found.chosen_LTK, seen, strict=True):
        assert np.array_equal(np.sort(chosen), np.sort(torch.cat(kept).numpy()))
    assert found.experts == 4
    assert np.array_equal(found.document_T, np.repeat(windows.document_W, 8))


def test_a_dense_model_has_no_routing():
    with pytest.raises(InputError, match="a llama model has no experts"):
        routing.of_model(tiny_model(), tiny_windows())

"""A look at real models: what it tells of last and merge is what `pma eval` tells."""

from dataclasses import replace

import numpy as np
import pytest

from pma import verbs
from pma.analysis import looking, room
from pma.analysis.halves import halve
from pma.analysis.keeping import Budget
from pma.analysis.looking import look
from pma.engine import MergeOptions
from pma.errors import InputError, UsageError
from pma.evaluation.text import Document
from pma.testing import tiny_llama_run
from pma.verbs import Candidate, Choice, Window

SMALL = Budget(
    text_characters=4_000,
    routing_tokens=256,
    derivative_tokens=256,
    plane_tokens=128,
    context_tokens=32,
    batches=4,
    plane_points=3,
)
WORDS = ("the", "loss", "of", "merges", "lies", "below", "that", "checkpoints", "if", "around", "basin")
RANDOM = np.random.default_rng(5)
DOCUMENTS = [Document(name=str(n), text=" ".join(RANDOM.choice(WORDS, 25))) for n in range(12)]


def points(run, last=3):
    choice = Choice(paths=(run,), window=Window(last=last))
    return choice, choice.points()[1]


@pytest.mark.parametrize(("experts", "dtype"), [(0, "float32"), (4, "float32"), (0, "bfloat16")])
def test_last_and_merge_are_those_of_eval(tmp_path, experts, dtype):
    tiny_llama_run(tmp_path / "run", steps=3, experts=experts, dtype=dtype, spread=0.3)
    choice, window = points(tmp_path / "run")
    shares: list[float] = []
    found = look(window, DOCUMENTS, budget=SMALL, progress=lambda share, _words: shares.append(share))
    last, merge = verbs.evaluate(
        [
            Candidate(name="last", choice=Choice(paths=(window[-1].path,))),
            Candidate(name="merge", choice=choice),
        ],
        DOCUMENTS,
        cloze=0,
    )
    for mine, theirs in ((found.line.last_loss, last.loss), (found.line.merge_loss, merge.loss)):
        assert mine.value == pytest.approx(theirs.value, rel=1e-12)
        assert mine.standard_error == pytest.approx(theirs.standard_error, rel=1e-9)
    assert found.steps == (10, 20, 30)
    assert found.weights == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert [place.t for place in found.line.places] == sorted(looking.PLACES)
    assert found.text.tokens == sum(last.tokens)
    assert found.left_out == {}
    assert found.bending is not None
    assert found.contours is not None
    assert (found.experts is None) == (experts == 0)
    assert shares == sorted(shares)
    assert 0.9 < shares[-1] <= 1


def test_a_place_between_is_the_merge_with_those_weights(tmp_path):
    tiny_llama_run(tmp_path / "run", steps=3, spread=0.3)
    choice, window = points(tmp_path / "run")
    found = look(window, DOCUMENTS, MergeOptions(scheme="wma"), budget=SMALL)
    t = 1.5
    weights = tuple(t * np.array([1 / 6, 2 / 6, 3 / 6]) + np.array([0, 0, 1 - t]))
    halves = halve(DOCUMENTS, most_characters=SMALL.text_characters)
    (there,) = verbs.evaluate(
        [Candidate(name="there", choice=choice, options=MergeOptions(weights=weights))],
        halves.half(chooses=False),
        cloze=0,
    )
    assert found.line.at(t).loss.value == pytest.approx(there.loss.value, rel=1e-6)


def test_equal_checkpoints_have_no_line_no_plane_and_one_routing(tmp_path):
    tiny_llama_run(tmp_path / "run", steps=3, experts=4, spread=0.0)
    _, window = points(tmp_path / "run")
    found = look(window, DOCUMENTS, budget=SMALL)
    assert found.experts is not None
    assert found.experts.merge.by_layer == (1, 1)
    assert found.experts.merge.mean.value == 1
    assert found.line.t == 1
    assert found.line.gain.value == pytest.approx(0, abs=1e-6)
    assert found.contours is None
    assert "lie on a line" in found.left_out["contours"]


def test_the_expansion_tells_a_small_gain(tmp_path):
    """Where checkpoints are near each other the loss is a quadratic, as far as fp32 can tell."""
    tiny_llama_run(tmp_path / "run", steps=4, spread=0.2)
    _, window = points(tmp_path / "run", last=4)
    found = look(window, DOCUMENTS, budget=SMALL).bending
    assert found is not None
    assert abs(found.measured.value) > 1e-4
    assert found.predicted.value == pytest.approx(found.measured.value, rel=0.1)


def test_what_cannot_be_looked_at(tmp_path, monkeypatch):
    paths = tiny_llama_run(tmp_path / "run", steps=2)
    _, window = points(tmp_path / "run", last=2)
    with pytest.raises(InputError, match="3 different documents, expected at least 4"):
        look(window, DOCUMENTS[:3], budget=SMALL)
    with pytest.raises(UsageError, match="a window of one checkpoint"):
        look(window[:1], DOCUMENTS, budget=SMALL)
    with pytest.raises(UsageError, match="interval-means"):
        look(window, DOCUMENTS, MergeOptions(use="interval-means"), budget=SMALL)
    monkeypatch.setattr(room, "available_bytes", lambda: 10**6)
    with pytest.raises(InputError, match=r"takes about .* and .* are available"):
        look(window, DOCUMENTS, budget=SMALL)
    monkeypatch.undo()
    (paths[-1] / "config.json").unlink()
    with pytest.raises(InputError, match=r"checkpoint-20 cannot be evaluated"):
        look(window, DOCUMENTS, budget=SMALL)


def test_without_room_for_derivatives_the_line_is_told_alone(tmp_path, monkeypatch):
    tiny_llama_run(tmp_path / "run", steps=2)
    _, window = points(tmp_path / "run", last=2)
    needed: list[room.Room] = []
    measured = room.room_for

    def larger(*given, **how):
        needed.append(measured(*given, **how))
        return replace(needed[-1], vectors_bytes=10**15)

    monkeypatch.setattr(looking, "room_for", larger)
    found = look(window, DOCUMENTS, budget=SMALL)
    assert (found.bending, found.contours) == (None, None)
    assert "takes about" in found.left_out["bending"]
    assert found.line.gain.value != 0
    # two checkpoints and the merge as vectors and deviations in fp64 are the least
    parameters = 2 * 3 * 8 * 20_000
    assert needed[0].vectors_bytes > parameters


def test_a_look_is_plain_values(tmp_path):
    import json

    tiny_llama_run(tmp_path / "run", steps=3, experts=4, spread=0.3)
    _, window = points(tmp_path / "run")
    found = look(window, DOCUMENTS, budget=SMALL).to_json()
    assert json.loads(json.dumps(found, allow_nan=False))["line"]["t"] == found["line"]["t"]

"""The schedule of successive halving, by hand; the race, by a script."""

from collections.abc import Sequence

import pytest

from pma.sweeping.halving import Rung, Standing, Sums, cost, race, rungs, widest

SIXTEENTHS = [1 / 16] * 16


def pairs(planned: Sequence[Rung]) -> list[tuple[int, int]]:
    return [(rung.candidates, rung.parts) for rung in planned]


@pytest.mark.parametrize(
    ("candidates", "first", "expected", "sixteenths"),
    [
        (64, 1, [(64, 1), (16, 4), (4, 16)], 64 * 1 + 16 * 3 + 4 * 12),
        (64, 3, [(64, 3), (16, 12), (4, 16)], 64 * 3 + 16 * 9 + 4 * 4),
        (10, 4, [(10, 4), (3, 16)], 10 * 4 + 3 * 12),
        (3, 1, [(3, 1), (2, 4), (2, 16)], 3 * 1 + 2 * 3 + 2 * 12),
        (1, 4, [(1, 4), (1, 16)], 16),
        (64, 16, [(64, 16)], 64 * 16),
    ],
)
def test_rungs_and_what_they_cost(
    candidates: int, first: int, expected: list[tuple[int, int]], sixteenths: int
) -> None:
    planned = rungs(candidates, first, 16)
    assert pairs(planned) == expected
    assert cost(planned, SIXTEENTHS) == pytest.approx(sixteenths / 16)


def test_the_first_share_is_the_largest_that_is_affordable() -> None:
    for candidates in (2, 5, 40):
        for also in (0, 7):
            for budget in (0.3, 1.0, 4.0, 11.0, 100.0):
                planned = widest(candidates, SIXTEENTHS, budget, also=also)
                affordable = [
                    first
                    for first in range(1, 17)
                    if cost(rungs(candidates, first, 16), SIXTEENTHS) + also * first / 16 <= budget
                ]
                assert (planned[0].parts if planned else 0) == max(affordable, default=0)


def test_the_exact_order_of_a_race() -> None:
    # part 0, part 1 to 3, parts 4 to 7: candidate 4 starts best and falls behind, 6 starts worst
    script = {
        0: [4, 3, 2],
        1: [5, 3, 3],
        2: [7, 7, 7],
        3: [8, 8, 8],
        4: [1, 5, 9],
        5: [6, 6, 6],
        6: [9, 1, 1],
    }
    asked: list[tuple[list[int], range]] = []

    def read(numbers: Sequence[int], parts: range) -> list[Sums]:
        asked.append((list(numbers), parts))
        rung = {0: 0, 1: 1, 4: 2}[parts.start]
        return [(float(script[number][rung] * len(parts)), len(parts)) for number in numbers]

    planned = [Rung(candidates=7, parts=1), Rung(candidates=3, parts=4), Rung(candidates=2, parts=8)]
    order = race(7, planned, read)
    assert asked == [([0, 1, 2, 3, 4, 5, 6], range(1)), ([0, 1, 4], range(1, 4)), ([0, 1], range(4, 8))]
    assert order == (
        Standing(number=0, parts=8, loss=(4 + 3 * 3 + 4 * 2) / 8),
        Standing(number=1, parts=8, loss=(5 + 3 * 3 + 4 * 3) / 8),
        Standing(number=4, parts=4, loss=(1 + 3 * 5) / 4),
        Standing(number=5, parts=1, loss=6.0),
        Standing(number=2, parts=1, loss=7.0),
        Standing(number=3, parts=1, loss=8.0),
        Standing(number=6, parts=1, loss=9.0),
    )


def test_of_equal_losses_the_lower_number_goes_on() -> None:
    planned = rungs(9, 1, 4)
    order = race(9, planned, lambda numbers, parts: [(1.0 * len(parts), len(parts)) for _ in numbers])
    assert [standing.number for standing in order] == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert [standing.parts for standing in order] == [4] * planned[-1].candidates + [1] * 6

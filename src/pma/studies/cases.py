"""Cases: several models at one place in training, each measured for every seed, compared by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pma.evaluation.evaluate import Evaluation
from pma.studies import seeds
from pma.studies.lab import HELD_OUT, Lab
from pma.studies.measuring import Measured, Reading
from pma.studies.presets import Preset

Key = TypeVar("Key")

# in verdicts, "about as good", "comparable" and "hardly matters" mean within a tenth of the gain at stake
MARGIN = 0.1


@dataclass(frozen=True, kw_only=True)
class Case:
    """Readings of each model by name; one a seed, in the same order."""

    readings: Mapping[str, Sequence[Reading]]

    def values(self, model: str) -> list[dict[str, float]]:
        """The model's figures, by seed: loss and what else was measured."""
        return [_values(reading) for reading in self.readings[model]]

    def gain(self, before: str, after: str, metric: str = "loss") -> dict[str, Any]:
        """What `after` gains over `before` with its interval: nats a token, or score (`cloze`, or a task)."""
        pairs = list(zip(self.readings[before], self.readings[after], strict=True))
        texts = [(a.text, b.text) for a, b in pairs]
        if metric == "loss":
            return seeds.loss_gain(texts).to_json()
        if metric == "cloze":
            return seeds.cloze_gain(texts).to_json()
        return seeds.score_gain([(a.tasks[metric], b.tasks[metric]) for a, b in pairs]).to_json()

    def gains(self, before: str, after: str) -> dict[str, Any]:
        """`gain` in each score that was measured."""
        metrics = [
            name for name in _values(self.readings[before][0]) if name not in ("loss", "bits_per_byte")
        ]
        return {metric: self.gain(before, after, metric) for metric in metrics}

    def share(self, gained: tuple[str, str], possible: tuple[str, str]) -> dict[str, Any] | None:
        """The gain in loss from the first to the second of `gained`, as a share of that of `possible`."""
        found = seeds.share(self._texts(*gained), self._texts(*possible))
        return None if found is None else found.to_json()

    def gain_beyond(self, first: tuple[str, str], second: tuple[str, str]) -> dict[str, Any]:
        """The gain in loss from one to the other of `first`, less that of `second`."""
        return seeds.gain_beyond(self._texts(*first), self._texts(*second)).to_json()

    def _texts(self, before: str, after: str) -> list[tuple[Evaluation, Evaluation]]:
        pairs = zip(self.readings[before], self.readings[after], strict=True)
        return [(a.text, b.text) for a, b in pairs]

    def with_models(self, other: Case, names: Mapping[str, str]) -> Case:
        """Also models of another case: `names` are its own by new name."""
        return Case(readings={**self.readings, **{new: other.readings[old] for new, old in names.items()}})


def _values(reading: Reading) -> dict[str, float]:
    found = {"loss": reading.text.loss.value, "bits_per_byte": reading.text.bits_per_byte}
    if reading.text.cloze_accuracy is not None:
        found["cloze"] = reading.text.cloze_accuracy
    return found | {name: float(seeds.item_scores(task).mean()) for name, task in reading.tasks.items()}


def loss_characters(preset: Preset) -> int:
    """How much of each document the losses are of. Documents are the unit of chance, and hundreds of models
    are measured: all documents are read, but less of each than by the studies of fewer models.
    """
    return preset.characters_a_document // 4


def measured(
    lab: Lab,
    wanted: Mapping[Key, Mapping[str, Sequence[Measured]]],
    *,
    where: str = HELD_OUT,
    scored: bool = False,
) -> dict[Key, Case]:
    """Measure all models of all cases: losses; or `scored`, cloze and the preset's tasks."""
    flat = [item for models in wanted.values() for by_seed in models.values() for item in by_seed]
    readings = iter(
        lab.measure(flat, where=where, tasks=True)
        if scored
        else lab.measure(flat, where=where, cloze=0, characters_a_document=loss_characters(lab.preset))
    )
    return {
        key: Case(
            readings={name: [next(readings) for _ in by_seed] for name, by_seed in models.items()},
        )
        for key, models in wanted.items()
    }

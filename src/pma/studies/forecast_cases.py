"""Decays that were carried out, and what was known before each: the ground that forecasts are tried on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pma.errors import InputError
from pma.evaluation.evaluate import loss_difference
from pma.forecast.calibration import Case, Decay
from pma.forecast.probes import Probe
from pma.forecast.windows import probe_windows
from pma.studies import tuning
from pma.studies.cases import loss_characters
from pma.studies.lab import Lab
from pma.studies.making import Anneal, Trunk
from pma.studies.measuring import Measured, Reading
from pma.studies.presets import DENSE, MIXTURE, Preset, Size


@dataclass(frozen=True, kw_only=True)
class Place:
    """A run and a step of it, with the probes there; None where they cannot be chosen or do not tell."""

    trunk: Trunk
    size: Size
    rate: float
    from_step: int
    probes: tuple[Probe, ...]

    @property
    def run(self) -> str:
        """The run's name."""
        return f"{self.group}, seed {self.trunk.recipe.run.seed}"

    @property
    def group(self) -> str:
        """Runs that differ in the seed alone."""
        return f"{self.size.name}, rate {self.rate:g}"


@dataclass(frozen=True, kw_only=True)
class Known:
    """A decay from a place, and the loss that it gave."""

    place: Place
    decay: Decay
    loss: float

    @property
    def case(self) -> Case:
        """As the calibration wants it."""
        place = self.place
        return Case(
            run=place.run,
            group=place.group,
            from_step=place.from_step,
            probes=place.probes,
            shares_T=self.decay.shares,
            loss=self.loss,
        )


def forks(preset: Preset) -> tuple[int, ...]:
    """The steps that decays start from: the last is the end of the run."""
    return (*preset.fork_steps, preset.steps)


def decays(preset: Preset) -> tuple[Decay, ...]:
    """The decays that are forecast."""
    return tuple(Decay(shape="cosine", steps=preset.anneal_steps // part) for part in (2, 1))


def probe_decay(preset: Preset) -> Decay:
    """The short one that a run may be probed with."""
    return Decay(shape="cosine", steps=max(preset.anneal_steps // 4, preset.every_steps))


def other_shapes(preset: Preset) -> tuple[Decay, ...]:
    """Forecast by what cosines taught."""
    return tuple(Decay(shape=shape, steps=preset.anneal_steps) for shape in ("linear", "1-sqrt"))


def runs(lab: Lab) -> list[tuple[Size, float, Trunk]]:
    """Each size at its tuned rate, every seed, but of the largest the first; and the middle sizes at their
    other rates, the first seed.
    """
    largest = {lab.preset.of(family)[-1].name for family in (DENSE, MIXTURE)}
    found = []
    for size in lab.preset.sizes:
        rate = tuning.tuned(lab, (size,))[size.name].rate
        seeds = lab.seeds[:1] if size.name in largest else lab.seeds
        found += [(size, rate, tuning.trunk(lab, size, rate, seed)) for seed in seeds]
        if size.name in lab.preset.middle:
            others = [other for other in size.rates if other != rate]
            found += [(size, other, tuning.trunk(lab, size, other, lab.seeds[0])) for other in others]
    return found


def places(lab: Lab) -> tuple[list[Place], list[str]]:
    """Every run at every fork with its probes, and why others have none."""
    wanted, refused = [], []
    for size, rate, trunk in runs(lab):
        for step in forks(lab.preset):
            first = size.recipe.optimizer.warmup_steps
            steps = [s for s in range(lab.preset.every_steps, step + 1, lab.preset.every_steps) if s > first]
            try:
                wanted.append((size, rate, trunk, step, probe_windows(steps, step)))
            except InputError as error:
                refused.append(f"{trunk.title} at step {step}: {error}")
    models = [_model(trunk, window) for _, _, trunk, _, windows in wanted for window in windows]
    readings = iter(_read(lab, models))
    return [
        Place(
            trunk=trunk,
            size=size,
            rate=rate,
            from_step=step,
            probes=tuple(_probes(windows, [next(readings) for _ in windows])),
        )
        for size, rate, trunk, step, windows in wanted
    ], refused


def known(lab: Lab, at: Sequence[Place], shapes: Sequence[Decay]) -> list[Known]:
    """The decays from these places, carried out and measured."""
    asked = [
        (place, decay, Anneal(trunk=place.trunk, step=place.from_step, steps=decay.steps, shape=decay.shape))
        for place in at
        for decay in shapes
    ]
    lab.make([anneal for _, _, anneal in asked])
    ends = [Measured(run=anneal, at=anneal.step + anneal.steps) for _, _, anneal in asked]
    return [
        Known(place=place, decay=decay, loss=reading.text.loss.value)
        for (place, decay, _), reading in zip(asked, _read(lab, ends), strict=True)
    ]


def _read(lab: Lab, models: Sequence[Measured]) -> list[Reading]:
    return lab.measure(models, cloze=0, characters_a_document=loss_characters(lab.preset))


def _model(trunk: Trunk, window: tuple[int, ...]) -> Measured:
    every = window[1] - window[0] if len(window) > 1 else 1
    return Measured(run=trunk, at=window[-1], last=len(window), every=every)


def _probes(windows: Sequence[tuple[int, ...]], readings: Sequence[Reading]) -> Iterator[Probe]:
    for window, reading in zip(windows, readings, strict=True):
        yield Probe(
            steps=window,
            weights=(1 / len(window),) * len(window),
            loss=reading.text.loss.value,
            error=loss_difference(reading.text, readings[0].text).standard_error,
        )

"""A trainer that writes checkpoints of one number, and an evaluation that reads that number as the loss: what
merges must come to is plain arithmetic.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from pma.evaluation.evaluate import Evaluation
from pma.evaluation.measures import TEXT, Measure
from pma.results import Store
from pma.trajectory import Growing
from pma.watch import Judge, Wanted, Watch

RATE = 1e-3


def write_weights(run: Path, step: int, loss: float) -> Path:
    """What the Trainer writes first; the checkpoint is not complete with it."""
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"w": np.full(4, loss, np.float32)}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    return folder


def land(
    run: Path,
    step: int,
    loss: float,
    *,
    logged: Mapping[int, float] | None = None,
    rates: Mapping[int, float] | None = None,
    entries: int = 1000,
) -> Path:
    """A complete checkpoint. `logged`, `rates`: what the log says otherwise than step / 1000 and RATE."""
    folder = write_weights(run, step, loss)
    steps = range(10, step + 1, 10)[-entries:]
    history = [
        {"step": s, "loss": (logged or {}).get(s, s / 1000), "learning_rate": (rates or {}).get(s, RATE)}
        for s in steps
    ]
    state = {"global_step": step, "num_input_tokens_seen": step * 100, "log_history": history}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


def _evaluation(name: str, tensors: Any) -> Evaluation:
    loss = float(tensors["w"].double().mean())
    nats = (loss - 0.25, loss, loss + 0.25)
    return Evaluation(name=name, text_digest="", context_tokens=1, text_bytes=3, nats=nats, tokens=(1, 1, 1))


def judge(seen: list[str] | None = None) -> Judge:
    """Reads the loss off the weights. `seen` hears of each model that is evaluated."""

    def run(name: str, tensors: Any) -> Evaluation:
        if seen is not None:
            seen.append(name)
        return _evaluation(name, tensors)

    measure = Measure(name=TEXT, key="fake", run=run, read=Evaluation.from_json)
    return Judge(measures=[measure], load=lambda tensors, like, *, context_tokens: tensors)


def watching(run: Path, wanted: Wanted | None = None, **how: Any) -> Watch:
    """A watch over `run` with the fake evaluation."""
    how.setdefault("judge", judge())
    how.setdefault("clock", count(step=10).__next__)  # nothing is put off for having been done just now
    given = {"growing": Growing(run), "store": Store(run / ".pma" / "results.sqlite"), **how}
    return Watch(wanted=wanted or Wanted(last=3), **given)


def settle(watch: Watch) -> None:
    """Look until there is nothing left to do."""
    while watch.look() or watch.unfinished:
        pass


def steps(points: Sequence[Any]) -> list[int]:
    return [point.step for point in points]

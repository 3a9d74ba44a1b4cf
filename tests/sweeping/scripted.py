"""Checkpoints of one number, and documents that say which number they like: what a merge loses on them is
plain arithmetic.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from pma import trajectory
from pma.engine import MergeOptions
from pma.evaluation.evaluate import Evaluation
from pma.evaluation.measures import TEXT, Measure
from pma.evaluation.text import Document
from pma.quantities import Tokens
from pma.results import Store, content_key
from pma.sweeping import How, Outcome, Space, field, planner, search


def write_run(run: Path, numbers: Sequence[float], rates: dict[int, float] | None = None) -> Path:
    """Checkpoints at steps 10, 20, …; `rates`: learning rates by step where they are not 1e-3."""
    for step, number in zip(range(10, 10 * len(numbers) + 1, 10), numbers, strict=True):
        folder = run / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        save_file(
            {"w": np.full(4, number, np.float32)}, folder / "model.safetensors", metadata={"format": "pt"}
        )
        (folder / "config.json").write_text('{"model_type": "tiny"}')
        history = [
            {"step": s, "loss": 1.0, "learning_rate": (rates or {}).get(s, 1e-3)}
            for s in range(10, step + 1, 10)
        ]
        state = {"global_step": step, "num_input_tokens_seen": step * 100, "log_history": history}
        (folder / "trainer_state.json").write_text(json.dumps(state))
    return run


def text(documents: int, seed: int = 0, spread: float = 0.3) -> list[Document]:
    """Documents of five to twenty tokens, each with a number it likes: about 1."""
    chance = np.random.default_rng(seed)
    likes = chance.normal(1.0, spread, documents)
    tokens = chance.integers(5, 21, documents)
    return [
        Document(name=str(d), text=f"{like:.6f} {count} " + "x" * int(count))
        for d, (like, count) in enumerate(zip(likes, tokens, strict=True))
    ]


def losses(number: float, documents: Sequence[Document]) -> tuple[list[float], list[int]]:
    """Nats and tokens of each document under the model of `number`."""
    liked = [document.text.split() for document in documents]
    tokens = [int(count) for _, count, _ in liked]
    nats = [n * (2 + (number - float(like)) ** 2) for n, (like, _, _) in zip(tokens, liked, strict=True)]
    return nats, tokens


class Reading:
    """Measures of documents, and what was measured: (the model's number, names of documents), in order."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.seen: list[tuple[float, tuple[str, ...]]] = []
        self._stop_after = stop_after

    def measure(self, documents: Sequence[Document], context_tokens: int | None) -> Measure:
        def run(name: str, tensors: Any) -> Evaluation:
            if len(self.seen) == self._stop_after:
                raise KeyboardInterrupt
            number = float(tensors["w"].double().mean())
            self.seen.append((number, tuple(document.name for document in documents)))
            nats, tokens = losses(number, documents)
            size = sum(len(document.text) for document in documents)
            return Evaluation(
                name=name,
                text_digest=content_key([document.text for document in documents]),
                context_tokens=1,
                text_bytes=size,
                nats=tuple(nats),
                tokens=tuple(tokens),
            )

        key = content_key([document.text for document in documents])
        return Measure(name=TEXT, key=key, run=run, read=Evaluation.from_json)


def searched(
    run: Path,
    documents: Sequence[Document],
    budget: float | Tokens | None,
    space: Space | None = None,
    *,
    reading: Reading | None = None,
    store: Path | None = None,
    options: MergeOptions | None = None,
) -> Outcome:
    """Search the run, with a store of its own by default."""
    reading = reading or Reading()
    how = How(measure=reading.measure, load=lambda tensors, like, *, context_tokens: tensors)
    with planner(options or MergeOptions()) as plans, Store(store or run / "store.sqlite") as opened:
        found = field(trajectory.resolve([run]), space or Space(), plans)
        return search(found, plans, documents, budget, opened, how)

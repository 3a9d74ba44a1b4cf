"""The code of docs/online.md runs as it is written."""

import re
from pathlib import Path

import pytest
import torch

from pma import verbs
from pma.engine import MergeOptions
from pma.formats import interval_mean
from pma.online import Recorder
from pma.trajectory import Window
from pma.verbs import Choice

PAGE = Path(__file__).parents[2] / "docs" / "online.md"


def test_the_loop_and_the_reconstruction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loop, reconstruction = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    exec(loop, {})
    for last in (25, 50, 75, 100):
        record = interval_mean.read_record(interval_mean.find(tmp_path / "run" / f"step-{last}"))
        assert (record.first_step, record.last_step, record.updates) == (last - 24, last, 25)
    chosen = Choice(paths=(tmp_path / "run",), window=Window(last=4))
    assert verbs.average(chosen, MergeOptions(use="interval-means")).keys() == {"weight", "bias"}
    recorder, checkpoints = Recorder(torch.nn.Linear(2, 2), tracks=(0.05, 0.1)), []
    for step in range(1, 2001):
        recorder.update(step)
        if step % 100 == 0:
            checkpoints.append(tmp_path / f"checkpoint-{step}")
            checkpoints[-1].mkdir()
            recorder.save_state(checkpoints[-1])
    names = {"recorder": recorder, "checkpoints": checkpoints}
    exec(reconstruction, names)
    assert 0.005 < names["found"].relative_error < 0.0065  # the page says 0.6%

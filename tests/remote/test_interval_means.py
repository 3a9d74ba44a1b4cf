"""Interval means of a run in a store: the same merge as on this machine."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from typer.testing import CliRunner

from pma import engine, verbs
from pma.cli import app
from pma.engine import MergeOptions
from pma.formats.interval_mean import IntervalMean
from pma.remote import location
from pma.testing import store_mean, tiny_run
from pma.testing.reference import read_all
from pma.trajectory import Window
from pma.verbs import Choice

from .conftest import Bucket

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def test_means_in_a_store(bucket: Bucket, tmp_path: Path) -> None:
    shapes = {"a": (33, 7), "b": (5,)}
    for number, path in enumerate(tiny_run(tmp_path / "run", steps=3, shapes=shapes)):
        made = torch.Generator().manual_seed(number)
        mean = {name: torch.randn(shape, generator=made) for name, shape in shapes.items()}
        if number < 2:
            store_mean(path, {name: tensor.numpy() for name, tensor in mean.items()})
            continue
        folder = path / "pma_interval_mean"
        dcp.save(mean, checkpoint_id=folder, no_dist=True)
        record = IntervalMean(first_step=21, last_step=30, updates=10, every=1, averaged="weights")
        (folder / "pma_interval_mean.json").write_text(record.to_json())
    url = bucket.put(tmp_path / "run", "run")
    window, options = Window(last=3), MergeOptions(use="interval-means")
    verbs.merge(Choice(paths=(tmp_path / "run",), window=window), tmp_path / "local", options)
    verbs.merge(Choice(paths=(location(url),), window=window), tmp_path / "out", options)
    assert read_all(tmp_path / "out") == read_all(tmp_path / "local")
    checked = engine.verify(tmp_path / "out", samples=None)
    assert (checked.findings, checked.sources_changed) == ((), ())
    assert checked.blocks_derived == checked.blocks_total
    shown = CliRunner().invoke(app, ["inspect", url, "--json"])
    assert json.loads(shown.stdout)["interval_means_beside"] == 3

"""Two processes under torchrun: FSDP2 shard by shard, DDP on rank 0; against a reference in numpy."""

from pathlib import Path

import numpy as np
import pytest
import torch

import pma
from pma.averaging.power_ema import gamma_from_sigma, power_profile
from pma.errors import MismatchError
from pma.formats import interval_mean
from pma.online import Recorder, reconstructed
from pma.testing.distributed import in_ranks, load_dcp

from .fixtures.record_distributed import STEPS, net
from .models import sequential_mean

PROGRAM = Path(__file__).parent / "fixtures" / "record_distributed.py"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program's own assertions hold: resumed and asynchronous recorders agree, `applied` is exact,
    nothing is communicated by an update.
    """
    out = tmp_path_factory.mktemp("recorded")
    in_ranks(PROGRAM, 2, out)
    return out


def steps_of(folder: Path, rank: int) -> list[dict[str, np.ndarray]]:
    return [dict(np.load(folder / f"step{step}-rank{rank}.npz")) for step in range(1, STEPS + 1)]


@pytest.mark.parametrize("rank", [0, 1])
def test_shards_of_fsdp2_are_averaged_to_the_bit(recorded: Path, rank: int) -> None:
    steps = steps_of(recorded / "fsdp", rank)
    mean = dict(np.load(recorded / "fsdp" / f"mean-rank{rank}.npz"))
    assert mean.keys() == steps[0].keys()
    assert steps[0]["embed.weight"].shape == ((4, 5), (3, 5))[rank]  # the rows do not divide evenly
    for name, found in mean.items():
        assert found.tobytes() == sequential_mean([step[name] for step in steps]).tobytes(), name


def test_fsdp2_stores_a_distributed_checkpoint(recorded: Path) -> None:
    path = interval_mean.find(recorded / "fsdp" / "checkpoint")
    assert path == recorded / "fsdp" / "checkpoint" / "pma_interval_mean"
    record = interval_mean.read_record(path)
    assert (record.first_step, record.last_step, record.updates, record.averaged) == (
        1,
        STEPS,
        STEPS,
        "weights",
    )
    whole = load_dcp(path)
    ranks = [dict(np.load(recorded / "fsdp" / f"mean-rank{rank}.npz")) for rank in (0, 1)]
    for name, tensor in whole.items():
        expected = ranks[0][name] if "bias_of" in name else np.concatenate([rank[name] for rank in ranks])
        assert tensor.dtype == torch.float32
        assert tensor.numpy().tobytes() == expected.tobytes(), name
    assert whole.keys() == ranks[0].keys()


def test_ddp_records_on_rank_0(recorded: Path) -> None:
    steps = steps_of(recorded / "ddp", 0)
    mean = dict(np.load(recorded / "ddp" / "mean-rank0.npz"))
    for name, found in mean.items():
        assert found.tobytes() == sequential_mean([step[name] for step in steps]).tobytes(), name
    assert list(np.load(recorded / "ddp" / "mean-rank1.npz")) == []
    assert interval_mean.find(recorded / "ddp" / "checkpoint").name == interval_mean.MEAN_FILE


def test_shards_of_another_number_of_processes_are_refused(recorded: Path) -> None:
    alone = Recorder(net(), window=1, tracks=(0.1,))
    with pytest.raises(MismatchError, match="cut over so many processes: 2, this recorder: 1"):
        alone.load_state(recorded / "fsdp" / "state")


def test_stored_tracks_of_shards_are_put_together_by_one_process(recorded: Path) -> None:
    target = power_profile(gamma_from_sigma(0.1), 3)
    found = reconstructed([recorded / "fsdp" / "state"], target)
    assert found.relative_error < 1e-12
    ranks = [dict(np.load(recorded / "fsdp" / f"track-rank{rank}.npz")) for rank in (0, 1)]
    for name, tensor in found.tensors.items():
        expected = ranks[0][name] if "bias_of" in name else np.concatenate([rank[name] for rank in ranks])
        assert tensor.numpy().tobytes() == expected.tobytes(), name


def test_a_merge_takes_what_two_processes_stored(recorded: Path, tmp_path: Path) -> None:
    """The merge of one checkpoint and its mean is the mean, in the checkpoint's own layout."""
    source = recorded / "fsdp" / "checkpoint"
    pma.merge(pma.Choice(paths=(source,)), tmp_path / "out", pma.MergeOptions(use="interval-means"))
    merged, mean = load_dcp(tmp_path / "out"), load_dcp(source / "pma_interval_mean")
    assert {name.removeprefix("model.") for name in merged} == mean.keys()
    for name, tensor in merged.items():
        assert torch.equal(tensor, mean[name.removeprefix("model.")]), name

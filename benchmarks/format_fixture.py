"""The benchmark's checkpoints again: as distributed checkpoints of several ranks, or as files of torch.save.

    python benchmarks/format_fixture.py dcp RUN OUT --ranks 2
    python benchmarks/format_fixture.py torch RUN OUT

RUN is what `fixture.py` made. A program of its own, so that its memory is not counted against a command that
the benchmark starts later.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

import peers
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors in the order of the model."""
    found = {}
    for shard in sorted(checkpoint.glob("*.safetensors")):
        found |= load_file(shard)
    order = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    return {name: found[name] for name in order}


def save_distributed(rank: int, ranks: int, run: str, out: str, port: int) -> None:
    """One rank's part in saving every checkpoint: each tensor cut along its first dimension, as FSDP does."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    for checkpoint in peers.in_order(Path(run)):
        state = {}
        for name, tensor in weights(checkpoint).items():
            rows = -(-tensor.shape[0] // ranks)
            local = tensor[rank * rows : (rank + 1) * rows].contiguous()
            state[name] = DTensor.from_local(
                local, mesh, [Shard(0)], run_check=False, shape=tensor.shape, stride=tensor.stride()
            )
        dcp.save(state, checkpoint_id=Path(out) / f"step-{checkpoint.name.split('-')[1]}")
    dist.destroy_process_group()


def save_files(run: Path, out: Path) -> None:
    """One `pytorch_model.bin` a checkpoint."""
    for checkpoint in peers.in_order(run):
        folder = out / checkpoint.name
        folder.mkdir(parents=True)
        torch.save(weights(checkpoint), folder / "pytorch_model.bin")
        shutil.copy2(checkpoint / "trainer_state.json", folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["dcp", "torch"])
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--port", type=int, default=29_511)
    arguments = parser.parse_args()
    if arguments.kind == "torch":
        save_files(arguments.run, arguments.out)
        return
    given = (arguments.ranks, str(arguments.run), str(arguments.out), arguments.port)
    mp.spawn(save_distributed, args=given, nprocs=arguments.ranks)


if __name__ == "__main__":
    main()

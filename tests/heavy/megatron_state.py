"""Loads what `pma init` made of Megatron's checkpoints by megatron-core and compares with the mode.

torchrun --nproc-per-node 4 megatron_state.py CHECKPOINT MODE STEP STEP ...
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

sys.path.insert(0, str(Path(__file__).parents[1] / "formats" / "fixtures"))
from save_megatron import sharded


def main() -> None:
    dist.init_process_group("gloo")
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.current_device = lambda: "cpu"
    rank, ranks = dist.get_rank(), dist.get_world_size()
    folder, mode, steps = sys.argv[1], sys.argv[2], [int(step) for step in sys.argv[3:]]
    # random states belong to the ranks that saved them, and raw buffers are not carried
    wanted = {
        key: value
        for key, value in sharded(steps[-1], rank, ranks).items()
        if not key.startswith(("rng", "optimizer.distributed")) and "_extra_state" not in key
    }
    each = [{key: value.data.clone() for key, value in sharded(s, rank, ranks).items() if key in wanted}
            for s in steps]  # fmt: skip
    for value in wanted.values():
        value.data.fill_(7)
    loaded = dist_checkpointing.load(dict(wanted), folder)
    assert loaded["iteration"] == steps[-1]
    assert loaded["opt_param_scheduler"] == {"max_lr": 3e-4, "lr_decay_steps": 100, "num_steps": steps[-1]}
    assert loaded["optimizer"]["optimizer"]["param_groups"][0]["lr"] == 2e-4
    kinds = {"exp_avg": 0, "exp_avg_sq": 0, "fp32_param": 0, "": 0}
    for key in wanted:
        kind = key.split(".")[2] if key.startswith("optimizer.state.") else ""
        kinds[kind] += 1
        newest = each[-1][key]
        averaged = kind in ("", "fp32_param") or mode == "average"
        if averaged:
            wide = torch.float32 if newest.dtype is torch.bfloat16 else torch.float64
            expected = (sum(one[key].to(wide) for one in each) / len(each)).to(newest.dtype)
        else:
            expected = torch.zeros_like(newest) if kind == "exp_avg" and mode == "second-moment" else newest
        assert torch.equal(loaded[key], expected), (mode, key)
    assert all(kinds.values())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

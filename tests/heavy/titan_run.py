"""A tiny Llama under FSDP2 with torchtitan's own checkpointer, optimizers and schedule, on the CPU.

torchrun --nproc-per-node 2 titan_run.py TOLD FOLDER [CHECKPOINT …]

Trains eight steps into FOLDER, saving every second; or goes on to step eight from each CHECKPOINT by
`checkpoint.initial_load_path`, into a folder of its own. TOLD/NAME.json gets losses and rates by step.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torchtitan.components.checkpointer.dcp import CheckpointManager
from torchtitan.components.optimizer.lr_scheduler import LRSchedulersContainer
from torchtitan.components.optimizer.optimizer import OptimizersContainer, ParamGroupConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "formats" / "fixtures"))
from train_distributed import sharded_llama, train_step

STEPS, EVERY = 8, 2


class Counted:
    """Training state or data position: one number."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": torch.tensor(self.step, dtype=torch.int32)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = int(state["step"])


def trained(folder: Path, start: str | None) -> dict[str, Any]:
    model = sharded_llama(tensor_parallel=False)
    groups = [ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 1e-3})]
    optimizers = OptimizersContainer.Config(param_groups=groups, implementation="for-loop").build(
        model_parts=[model]
    )
    schedule = LRSchedulersContainer.Config(warmup_steps=1)
    schedulers = schedule.build(optimizers=optimizers, training_steps=20)
    progress, position = Counted(), Counted()
    config = CheckpointManager.Config(
        enable=True,
        interval=EVERY,
        initial_load_path=start,
        initial_load_model_only=False,
        keep_latest_k=0,
        last_save_model_only=False,
    )
    checkpointer = config.build(
        dataloader=position,
        model_parts=[model],
        optimizers=optimizers,
        lr_schedulers=schedulers,
        states={"train_state": progress},
        sd_adapter=None,
        base_folder=str(folder),
    )
    assert checkpointer.load() == (start is not None)
    assert progress.step == position.step
    told: dict[str, Any] = {"from": progress.step, "losses": {}, "rates": {}}
    state = optimizers.optimizers[0].state
    told["counts"] = sorted({float(kept["step"]) for kept in state.values() if "step" in kept})
    while progress.step < STEPS:
        progress.step += 1
        position.step += 1
        told["rates"][progress.step] = optimizers.optimizers[0].param_groups[0]["lr"]
        told["losses"][progress.step] = train_step(model, optimizers, progress.step, False)
        schedulers.step()
        checkpointer.save(progress.step, last_step=progress.step == STEPS)
    checkpointer.close()
    return told


def main() -> None:
    dist.init_process_group("gloo")
    told, folder, starts = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    for start in starts or [None]:
        name = "run" if start is None else Path(start).name
        found = trained(folder if start is None else folder / name, start)
        if dist.get_rank() == 0:
            (told / f"{name}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)

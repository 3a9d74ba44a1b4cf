"""A run that can be killed and started again: FOLDER, and the step to die at (0: none)."""

import os
import signal
import sys
from pathlib import Path

import torch

from pma.online import Recorder

sys.path.insert(0, str(Path(__file__).parents[1]))
from online.models import Tiny, step_of


def run(out: Path, kill_at: int = 0) -> None:
    torch.manual_seed(0)
    model = Tiny()
    recorder = Recorder(model, on_cpu=True)
    start = 0
    if (out / "resume.pt").exists():
        saved = torch.load(out / "resume.pt", weights_only=True)
        start = saved["step"]
        model.load_state_dict(saved["model"])
        recorder.load_state_dict(saved["recorder"])
    for step in range(start + 1, 13):
        step_of(model, step)
        recorder.update(step)
        if step % 6 == 0:
            (out / str(step)).mkdir(exist_ok=True)
            recorder.save(out / str(step))
        if step % 4 == 0:
            state = {"step": step, "model": model.state_dict(), "recorder": recorder.state_dict()}
            torch.save(state, out / "resume.tmp")
            os.replace(out / "resume.tmp", out / "resume.pt")
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]))

"""What the merge is compared with: the loop one would write in torch, and mergekit in its own environment.

python benchmarks/peers.py naive RUN OUT
python benchmarks/peers.py naive-dcp RUN OUT
python benchmarks/peers.py compare OUT OTHER
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MERGEKIT = "mergekit==0.1.5"
HERE = Path(__file__).parent
ENVIRONMENT = HERE / ".mergekit-venv"
CONSTRAINTS = HERE / "mergekit-constraints.txt"
# mergekit reads only local folders here; without this it asks the hub about every one of them
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def in_order(run: Path, pattern: str = "checkpoint-*") -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted(run.glob(pattern), key=lambda path: int(path.name.split("-")[1]))


def naive(run: Path, out: Path) -> None:
    """Average a run shard by shard, as one would in a notebook."""
    import torch
    from safetensors.torch import load_file, save_file

    checkpoints = in_order(run)
    out.mkdir()
    for shard in sorted(checkpoints[0].glob("*.safetensors")):
        total: dict[str, torch.Tensor] = {}
        for checkpoint in checkpoints:
            for name, tensor in load_file(checkpoint / shard.name).items():
                if name in total:
                    total[name] += tensor.float()
                else:
                    total[name] = tensor.float()
        averaged = {name: (value / len(checkpoints)).bfloat16() for name, value in total.items()}
        save_file(averaged, out / shard.name, metadata={"format": "pt"})
    for name in ("model.safetensors.index.json", "config.json"):
        shutil.copy2(checkpoints[-1] / name, out / name)


def naive_dcp(run: Path, out: Path) -> None:
    """Average a run of distributed checkpoints: each loaded into a full state dict."""
    import torch
    import torch.distributed.checkpoint as dcp

    checkpoints = in_order(run, "step-*")
    metadata = dcp.FileSystemReader(checkpoints[0]).read_metadata().state_dict_metadata
    total: dict[str, torch.Tensor] = {}
    for checkpoint in checkpoints:
        state = {name: torch.empty(m.size, dtype=m.properties.dtype) for name, m in metadata.items()}
        dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
        for name, tensor in state.items():
            total[name] = total[name] + tensor.float() if name in total else tensor.float()
    averaged = {name: (value / len(checkpoints)).bfloat16() for name, value in total.items()}
    dcp.save(averaged, checkpoint_id=out, no_dist=True)


def install_mergekit() -> dict[str, str]:
    """Make mergekit's environment unless it is there; the versions that matter in it."""
    python, made = ENVIRONMENT / "bin" / "python", ENVIRONMENT / ".installed"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    if not made.exists():
        print(f"installing {MERGEKIT} into {ENVIRONMENT} (--skip-mergekit leaves it out)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)], check=True)
        subprocess.run([*pip, "install", "--quiet", "-c", str(CONSTRAINTS), MERGEKIT], check=True)
        made.touch()
    listed = subprocess.run([*pip, "list", "--format", "json"], check=True, capture_output=True, text=True)
    versions = {package["name"]: package["version"] for package in json.loads(listed.stdout)}
    return {name: versions[name] for name in ("mergekit", "torch", "transformers", "safetensors", "numpy")}


def mergekit_command(checkpoints: list[Path], config: Path, out: Path) -> list[str]:
    """Write mergekit's configuration to `config`; the command that merges by it with default options."""
    models = "".join(
        f"  - model: {json.dumps(str(path))}\n    parameters:\n      weight: 1.0\n" for path in checkpoints
    )
    config.write_text(
        f"merge_method: linear\nmodels:\n{models}parameters:\n  normalize: true\ndtype: bfloat16\n"
    )
    # the checkpoints have no tokenizer to copy
    return [str(ENVIRONMENT / "bin" / "mergekit-yaml"), str(config), str(out), "--no-copy-tokenizer"]


def compare(one: Path, other: Path) -> dict[str, Any]:
    """How many elements of two checkpoints differ in their bits, and by how much at most."""
    import torch

    ours, theirs = dict(_tensors(one)), dict(_tensors(other))
    if ours.keys() != theirs.keys():
        raise SystemExit(f"{one} and {other} hold different tensors: {sorted(ours.keys() ^ theirs.keys())}")
    elements = differing = 0
    largest = 0.0
    for name, (file, handle) in ours.items():
        a, b = handle.get_tensor(name), theirs[name][1].get_tensor(name)
        if a.dtype != b.dtype or a.shape != b.shape:
            raise SystemExit(f"{name} in {file}: {a.dtype} {a.shape}, in {other}: {b.dtype} {b.shape}")
        elements += a.numel()
        differing += int((a.view(torch.int16) != b.view(torch.int16)).sum())
        largest = max(largest, float((a.float() - b.float()).abs().max()))
    return {
        "elements": elements,
        "elements_that_differ": differing,
        "share_that_differs": differing / elements,
        "largest_difference": largest,
    }


def _tensors(checkpoint: Path) -> Iterator[tuple[str, tuple[Path, Any]]]:
    from safetensors import safe_open

    for file in sorted(checkpoint.glob("*.safetensors")):
        handle = safe_open(file, framework="pt")
        for name in handle.keys():  # noqa: SIM118  # a safe_open is not a mapping
            yield name, (file, handle)


def main() -> None:
    verb, one, other = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if verb == "naive":
        naive(one, other)
    elif verb == "naive-dcp":
        naive_dcp(one, other)
    else:
        print(json.dumps(compare(one, other)))


if __name__ == "__main__":
    main()

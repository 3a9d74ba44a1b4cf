"""megatron-core's own GPT under tensor parallelism on CPU: trained and saved, or loaded and trained on.

    torchrun --nproc-per-node 2 megatron_fixture.py train RUN STEP...
    torchrun --nproc-per-node 2 megatron_fixture.py resume REPORT.json MERGE SOURCE...

Model, gradient buffers, optimizer, loss and checkpoints are megatron-core's. Its code asks for a GPU in
places that need none; there it gets the CPU. Weights are fp32, because its optimizer of masters asks for a
GPU's tensors by type, and so does its clipping, which is off.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import TransformerConfig
from torch import Tensor

VOCABULARY, LENGTH, SAMPLES, RATE = 64, 16, 4, 1e-2


def on_the_cpu(function: Any) -> Any:
    """`function` of torch's, making tensors on the CPU where it is told to make them on a GPU."""

    def made(*arguments: Any, **options: Any) -> Any:
        return function(*arguments, **{k: "cpu" if k == "device" else v for k, v in options.items()})

    return made


def prepared() -> None:
    """This process's groups, and the GPU out of the way."""
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    tracker = SimpleNamespace(fork=nullcontext, is_initialized=lambda: True)
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.empty_cache = lambda: None
    torch.tensor, torch.zeros = on_the_cpu(torch.tensor), on_the_cpu(torch.zeros)
    tensor_parallel.get_cuda_rng_tracker = lambda *_: tracker


def trainer() -> SimpleNamespace:
    """A small Llama in Megatron's gradient buffers, and its optimizer."""
    torch.manual_seed(3)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=48,
        use_cpu_initialization=True,
        tensor_model_parallel_size=dist.get_world_size(),
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    buffered = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=RATE, clip_grad=0.0), [buffered])
    return SimpleNamespace(model=model, buffered=buffered, optimizer=optimizer)


def loss_of(state: SimpleNamespace, step: int) -> Tensor:
    """Mean loss on tokens that count up, from starts of that step: soon learnt."""
    starts = torch.randint(VOCABULARY, (SAMPLES, 1), generator=torch.Generator().manual_seed(step))
    tokens = (starts + torch.arange(LENGTH + 1)) % VOCABULARY
    future = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)[None, None]
    positions = torch.arange(LENGTH).expand(SAMPLES, -1)
    found: Tensor = state.buffered(tokens[:, :-1], positions, future, labels=tokens[:, 1:])
    return found.float().mean()


def train_step(state: SimpleNamespace, step: int) -> float:
    state.buffered.zero_grad_buffer()
    state.optimizer.zero_grad()
    loss = loss_of(state, step)
    loss.backward()
    state.buffered.finish_grad_sync()
    updated, _, _ = state.optimizer.step()
    assert updated
    return float(loss.detach())


def shards(state: SimpleNamespace, *, optimizer: bool, loading: bool = False) -> dict[str, Any]:
    """What Megatron's training loop hands to its checkpointing, beside the common state."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    model = state.model.sharded_state_dict(metadata={"dp_cp_group": group})
    if not optimizer:
        return {"model": model}
    return {"model": model, "optimizer": state.optimizer.sharded_state_dict(model, is_loading=loading)}


def train(run: Path, steps: list[int]) -> None:
    state = trainer()
    for step in range(1, max(steps) + 1):
        loss = train_step(state, step)
        if step not in steps:
            continue
        folder = run / f"iter_{step:07}"
        if dist.get_rank() == 0:
            folder.mkdir(parents=True)
        dist.barrier()
        arguments = Namespace(seq_length=LENGTH, consumed_train_samples=step * SAMPLES, lr=RATE)
        common = {"args": arguments, "checkpoint_version": 3.0, "iteration": step, "loss": loss}
        dist_checkpointing.save({**common, **shards(state, optimizer=True)}, str(folder))
        dist.barrier()
        if dist.get_rank() == 0:
            (run / "latest_checkpointed_iteration.txt").write_text(str(step))


def loaded(state: SimpleNamespace, folder: Path, *, optimizer: bool = False) -> dict[str, Any]:
    found: dict[str, Any] = dist_checkpointing.load(
        shards(state, optimizer=optimizer, loading=True), str(folder)
    )
    state.model.load_state_dict(found["model"])
    if optimizer:
        state.optimizer.load_state_dict(found["optimizer"])
    return found


def weights(state: SimpleNamespace) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.model.named_parameters()}


def moments(state: SimpleNamespace) -> list[Tensor]:
    (inner,) = state.optimizer.chained_optimizers
    held = [inner.optimizer.state[parameter] for parameter in state.model.parameters()]
    return [one[kind].clone() for one in held if one for kind in ("exp_avg", "exp_avg_sq")]


def resume(report: Path, merge: Path, sources: list[Path]) -> None:
    """Load the merge, compare it with the mean of the sources, take a step."""
    state, each, losses = trainer(), [], []
    for source in sources:
        loaded(state, source)
        each.append(weights(state))
        losses.append(float(loss_of(state, 99).detach()))
    mean = {name: torch.stack([one[name].double() for one in each]).mean(0) for name in each[0]}
    with torch.no_grad():
        for name, parameter in state.model.named_parameters():
            parameter.copy_(mean[name])
    expected = float(loss_of(state, 99).detach())
    fresh = trainer()
    carried = any("optimizer.state." in key for key in dist_checkpointing.load_tensors_metadata(str(merge)))
    found = loaded(fresh, merge, optimizer=carried)
    if carried:
        loaded(state, sources[-1], optimizer=True)
    before = weights(fresh)
    told = {
        "iteration": found["iteration"],
        "carried": carried,
        "moments": [torch.equal(*pair) for pair in zip(moments(fresh), moments(state), strict=True)],
        "source_losses": losses,
        "expected_loss": expected,
        "loss": float(loss_of(fresh, 99).detach()),
        "equal": all(torch.equal(before[name], mean[name].float()) for name in mean),
        "step_loss": train_step(fresh, 99),
        "moved": sum(not torch.equal(before[name], value) for name, value in weights(fresh).items()),
        "parameters": len(mean),
        "loss_after": float(loss_of(fresh, 99).detach()),
    }
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, told)
    if dist.get_rank() == 0:
        report.write_text(json.dumps(every))


if __name__ == "__main__":
    prepared()
    if sys.argv[1] == "train":
        train(Path(sys.argv[2]), [int(step) for step in sys.argv[3:]])
    else:
        resume(Path(sys.argv[2]), Path(sys.argv[3]), [Path(source) for source in sys.argv[4:]])
    dist.destroy_process_group()

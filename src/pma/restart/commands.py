"""The command by which each trainer goes on from a checkpoint, or starts another stage from its weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePosixPath

from pma.engine import Plan, is_mixture_of_experts
from pma.formats.dcp_checkpoint import DcpReader
from pma.formats.hf_trainer import STATE_FILE
from pma.formats.state_beside import WithState

_RUN_FILE = "run.json"  # a run of `pma pretrain`
_EXPERTS = (
    "the Trainer of transformers 5 loads a mixture's experts by names that it does not find, and silently "
    "keeps freshly drawn ones: load the model by from_pretrained first, as the command does"
)
_NEW_FOLDER = "with a folder for checkpoints that is still empty: one that holds any goes on from its own"

Answer = tuple[str, tuple[str, ...]]  # command, what to mind


def how_to_go_on(plan: Plan, out: str, *, resuming: bool) -> Answer:
    """The trainer's own command that resumes from `out` (a path as a shell takes it), or begins with its
    weights.
    """
    return (_RESUME if resuming else _START).get(plan.newest.format, _plain_torch)(plan, out)


def _hugging_face(plan: Plan, out: str) -> Answer:
    if (plan.sources[-1].point.folder.parent / _RUN_FILE).is_file():
        return (
            f"pma pretrain --resume-from {out} -o NEW_RUN",
            ("--skip-steps N or --skip-tokens N leaves out the data that come next",),
        )
    if isinstance(plan.newest, WithState) and STATE_FILE not in plan.newest.copied:
        return f'accelerator.load_state("{out}")', ()
    resume = f'resume_from_checkpoint="{out}"'
    if is_mixture_of_experts(plan.tensors):
        model = f'AutoModelForCausalLM.from_pretrained("{out}")'
        return f"Trainer(model={model}, …).train({resume})", (_EXPERTS,)
    return f"trainer.train({resume})", ()


def _dcp(plan: Plan, out: str) -> Answer:
    profile = plan.newest.profile.name if isinstance(plan.newest, DcpReader) else "plain"
    if profile == "torchtitan":
        return (
            f"torchtitan … --checkpoint.initial_load_path $(realpath {out}) "
            "--checkpoint.no-initial-load-model-only",
            (_NEW_FOLDER,),
        )
    if profile == "OLMo-core":
        return f'trainer.load_checkpoint("{out}")', (f"or load_path={out}, {_NEW_FOLDER}",)
    if profile == "Composer":
        return f'Trainer(load_path="{out}", …)', ()
    if profile == "accelerate":
        has_state = any(name.endswith(STATE_FILE) for name in plan.layout.records)
        return (_hugging_face(plan, out)) if has_state else (f'accelerator.load_state("{out}")', ())
    return f'torch.distributed.checkpoint.load(states, checkpoint_id="{out}")', ()


def _megatron(_: Plan, out: str) -> Answer:
    return f"pretrain_gpt.py … --load {out}", ("with the same --optimizer flags as the run",)


def _deepspeed(_: Plan, out: str) -> Answer:
    return (
        f'engine.load_checkpoint("{out}")',
        ('with "checkpoint": {"load_universal": true} in the configuration, or it silently loads nothing',),
    )


def _plain_torch(plan: Plan, out: str) -> Answer:
    file = PurePosixPath(plan.layout.files[0].name)
    path = f"{out}/{file}"
    if file.name == "lit_model.pth":
        return f"litgpt pretrain … --resume {path}", ()
    if file.suffix == ".ckpt":
        return f'trainer.fit(model, ckpt_path="{path}")', ()
    if file.name.startswith("model_"):
        step = plan.sources[-1].point.step
        return (
            f"python -m scripts.base_train … --resume-from-step={step} --model-tag=TAG",
            (f"nanochat looks in base_checkpoints/TAG of its folder: move {out} there as TAG",),
        )
    if file.name.startswith("pytorch_model"):
        return _hugging_face(plan, out)
    return f'torch.load("{path}", weights_only=True)', ()


def _start_hugging_face(_: Plan, out: str) -> Answer:
    return f'AutoModelForCausalLM.from_pretrained("{out}")', ()


def _start_dcp(plan: Plan, out: str) -> Answer:
    if isinstance(plan.newest, DcpReader) and plan.newest.profile.name == "torchtitan":
        return f"torchtitan … --checkpoint.initial_load_path $(realpath {out})", (_NEW_FOLDER,)
    return f'torch.distributed.checkpoint.load(model_state, checkpoint_id="{out}")', ()


def _start_megatron(_: Plan, out: str) -> Answer:
    return f"pretrain_gpt.py … --load {out} --finetune", ()


def _start_torch(plan: Plan, out: str) -> Answer:
    return f'torch.load("{out}/{plan.layout.files[0].name}", weights_only=True)', ()


_RESUME: dict[str, Callable[[Plan, str], Answer]] = {
    "safetensors": _hugging_face,
    "dcp": _dcp,
    "megatron": _megatron,
    "deepspeed": _deepspeed,
    "deepspeed-universal": _deepspeed,
}
_START: dict[str, Callable[[Plan, str], Answer]] = {
    "safetensors": _start_hugging_face,
    "dcp": _start_dcp,
    "megatron": _start_megatron,
    "torch": _start_torch,
    "deepspeed": _deepspeed,
    "deepspeed-universal": _deepspeed,
}

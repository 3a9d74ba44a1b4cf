"""The command by which each trainer goes on from a checkpoint, or starts another stage from its weights."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pma.engine import Plan, is_mixture_of_experts
from pma.formats import nanochat
from pma.formats.dcp_checkpoint import DcpReader
from pma.formats.hf_trainer import STATE_FILE
from pma.formats.state_beside import WithState
from pma.remote import RemotePath

_RUN_FILE = "run.json"  # a run of `pma pretrain`
_EXPERTS = (
    "the Trainer of transformers 5 loads a mixture's experts by names that it does not find, and silently "
    "keeps freshly drawn ones: load the model by from_pretrained first, as the command does"
)
_NEW_FOLDER = "with a folder for checkpoints that is still empty: one that holds any goes on from its own"

Answer = tuple[str, tuple[str, ...]]  # command, what to mind


@dataclass(frozen=True, kw_only=True)
class _Out:
    """The output, or a file of it, as a shell and as Python take it."""

    path: Path

    @property
    def shell(self) -> str:
        return shlex.quote(str(self.path))

    @property
    def python(self) -> str:
        return json.dumps(str(self.path), ensure_ascii=False)

    @property
    def absolute(self) -> _Out:
        """Torchtitan takes no other."""
        return _Out(path=self.path if isinstance(self.path, RemotePath) else self.path.absolute())

    def file(self, name: str) -> _Out:
        return _Out(path=self.path / name)


def how_to_go_on(plan: Plan, path: Path, *, resuming: bool) -> Answer:
    """The trainer's own command that resumes from the output at `path`, or begins with its weights."""
    known = _RESUME if resuming else _START
    return known[plan.newest.format](plan, _Out(path=path)) if plan.newest.format in known else ("", ())


def _is_ours(plan: Plan) -> bool:
    return bool((plan.sources[-1].point.folder.parent / _RUN_FILE).is_file())


def _hugging_face(plan: Plan, out: _Out) -> Answer:
    if _is_ours(plan):
        return (
            f"pma pretrain --resume-from {out.shell} -o NEW_RUN",
            ("--skip-steps N or --skip-tokens N leaves out the data that come next",),
        )
    if isinstance(plan.newest, WithState) and STATE_FILE not in plan.newest.copied:
        return f"accelerator.load_state({out.python})", ()
    resume = f"resume_from_checkpoint={out.python}"
    if is_mixture_of_experts(plan.tensors):
        model = f"AutoModelForCausalLM.from_pretrained({out.python})"
        return f"Trainer(model={model}, …).train({resume})", (_EXPERTS,)
    return f"trainer.train({resume})", ()


def _dcp(plan: Plan, out: _Out) -> Answer:
    profile = plan.newest.profile.name if isinstance(plan.newest, DcpReader) else "plain"
    if profile == "torchtitan":
        return (
            f"torchtitan … --checkpoint.initial_load_path {out.absolute.shell} "
            "--checkpoint.no-initial-load-model-only",
            (_NEW_FOLDER,),
        )
    if profile == "OLMo-core":
        return f"trainer.load_checkpoint({out.python})", (f"or load_path={out.python}, {_NEW_FOLDER}",)
    if profile == "Composer":
        return f"Trainer(load_path={out.python}, …)", ()
    if profile == "accelerate":
        of_trainer = any(name.endswith(STATE_FILE) for name in plan.layout.records)
        return (
            f"trainer.train(resume_from_checkpoint={out.python})"
            if of_trainer
            else f"accelerator.load_state({out.python})",
            (),
        )
    return f"torch.distributed.checkpoint.load(states, checkpoint_id={out.python})", ()


def _megatron(_: Plan, out: _Out) -> Answer:
    return f"pretrain_gpt.py … --load {out.shell}", ("with the same --optimizer flags as the run",)


def _deepspeed(_: Plan, out: _Out) -> Answer:
    return (
        f"engine.load_checkpoint({out.python})",
        ('with "checkpoint": {"load_universal": true} in the configuration, or it silently loads nothing',),
    )


def _torch(plan: Plan, out: _Out) -> Answer:
    name = plan.layout.files[0].name
    file = out.file(name)
    if name == "lit_model.pth":
        return f"litgpt pretrain … --resume {file.shell}", ()
    if name.endswith(".ckpt"):
        return f"trainer.fit(model, ckpt_path={file.python})", ()
    if nanochat.is_model(name):
        step = plan.sources[-1].point.step
        return (
            f"python -m scripts.base_train … --resume-from-step={step} --model-tag=TAG",
            (f"nanochat looks in base_checkpoints/TAG of its folder: move {out.shell} there as TAG",),
        )
    if name.startswith("pytorch_model"):
        return _hugging_face(plan, out)
    return f"torch.load({file.python}, weights_only=True)", ()


def _start_hugging_face(plan: Plan, out: _Out) -> Answer:
    if _is_ours(plan):
        return (
            f"pma pretrain --start-from {out.shell} --text TEXT --tokens N --learning-rate RATE -o NEW_RUN",
            (
                "--instructions ROWS.jsonl instead of --text fine-tunes on prompts and responses",
                f"in transformers: AutoModelForCausalLM.from_pretrained({out.python})",
            ),
        )
    return f"AutoModelForCausalLM.from_pretrained({out.python})", ()


def _start_dcp(plan: Plan, out: _Out) -> Answer:
    if isinstance(plan.newest, DcpReader) and plan.newest.profile.name == "torchtitan":
        return f"torchtitan … --checkpoint.initial_load_path {out.absolute.shell}", (_NEW_FOLDER,)
    return f"torch.distributed.checkpoint.load(model_state, checkpoint_id={out.python})", ()


def _start_megatron(_: Plan, out: _Out) -> Answer:
    return f"pretrain_gpt.py … --load {out.shell} --finetune", ()


def _start_torch(plan: Plan, out: _Out) -> Answer:
    return f"torch.load({out.file(plan.layout.files[0].name).python}, weights_only=True)", ()


_RESUME: dict[str, Callable[[Plan, _Out], Answer]] = {
    "safetensors": _hugging_face,
    "dcp": _dcp,
    "megatron": _megatron,
    "torch": _torch,
    "deepspeed": _deepspeed,
    "deepspeed-universal": _deepspeed,
}
_START: dict[str, Callable[[Plan, _Out], Answer]] = {
    "safetensors": _start_hugging_face,
    "dcp": _start_dcp,
    "megatron": _start_megatron,
    "torch": _start_torch,
    "deepspeed": _deepspeed,
    "deepspeed-universal": _deepspeed,
}

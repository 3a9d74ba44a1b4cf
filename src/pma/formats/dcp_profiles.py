"""Who wrote a distributed checkpoint: which of its names are weights, which the optimizer's, and where the
step, tokens and learning rate are recorded.

torch keeps whatever nested dictionary a trainer hands over; only the trainer's habits tell what is what.
Sources: torchtitan `components/checkpoint.py`, OLMo-core 3.0 `train/checkpoint.py`, accelerate 1.15
`utils/fsdp_utils.py`, Composer 0.2x `utils/checkpoint.py`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from re import Pattern

from pma.formats.optimizer_kinds import MASTERS
from pma.types import DType, Role, TensorSpec


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The habits of a trainer.

    `weights`: what begins the names of weights, which are the other way round recognised by not being
    `training` where there is no such beginning. `optimizer`: matches what an optimizer keeps beside a
    parameter, with the groups `parameter` and `kind`. `opaque`: matches entries of bytes that belong with
    the weights. `step`, `tokens`, `learning_rate`: names of entries that record them, in order of
    preference; `tokens_unreliable` says why a record of tokens is not used.
    """

    name: str
    weights: str = ""
    training: Pattern[str]
    optimizer: Pattern[str]
    opaque: Pattern[str]
    step: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    learning_rate: tuple[Pattern[str], ...] = ()
    tokens_unreliable: str | None = None

    def spec(
        self, name: str, dtype: DType, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]
    ) -> TensorSpec:
        """A stored tensor with its role. `shapes`: of every tensor of the checkpoint."""
        kept = self.optimizer.fullmatch(name)
        if kept is not None:
            parameter = self.weights + kept["parameter"]
            # a step or a factored moment does not lie over its parameter element by element
            if shapes.get(parameter) == shape and dtype.kind == "float" and shape:
                role = Role.MASTER if kept["kind"] in MASTERS else Role.MOMENT
                return TensorSpec(
                    name=name, dtype=dtype, shape=shape, role=role, parameter=parameter, kind=kept["kind"]
                )
            return TensorSpec(name=name, dtype=dtype, shape=shape, role=Role.OTHER, kind=kept["kind"])
        role = Role.PARAMETER if self.is_weight(name) else Role.OTHER
        return TensorSpec(name=name, dtype=dtype, shape=shape, role=role)

    def entry(self, name: str, length_bytes: int) -> TensorSpec:
        """Stored bytes with their role."""
        role = Role.OPAQUE if self.opaque.fullmatch(name) else Role.OTHER
        kept = self.optimizer.fullmatch(name)
        kind = kept["kind"] if kept is not None and role is Role.OTHER else None
        return TensorSpec(name=name, dtype=DType.U8, shape=(length_bytes,), role=role, kind=kind)

    def is_weight(self, name: str) -> bool:
        """Whether a name is one of the model's."""
        return name.startswith(self.weights) and self.training.match(name) is None

    def rates(self, names: Collection[str]) -> list[str]:
        """Names of entries that hold the learning rate, best first."""
        return [name for pattern in self.learning_rate for name in names if pattern.fullmatch(name)]


def _optimizer(prefix: str) -> Pattern[str]:
    return re.compile(rf"{prefix}\.state\.(?P<parameter>.+)\.(?P<kind>[^.]+)")


def _rates(scheduler: str, optimizer: str) -> tuple[Pattern[str], ...]:
    return (
        re.compile(rf"{scheduler}\._last_lr(\.0)?"),
        re.compile(rf"{optimizer}\.param_groups\.(.+\.)?lr"),
    )


_NEVER = re.compile(r"(?!)")
_EXTRA_STATE = re.compile(r"(.*\.)?_extra_state([./].*)?")
TORCHTITAN = Profile(
    name="torchtitan",
    training=re.compile(r"(optimizer|lr_scheduler|dataloader|train_state)(\.|$)"),
    optimizer=_optimizer("optimizer"),
    opaque=_EXTRA_STATE,
    step=("train_state.step",),
    learning_rate=_rates("lr_scheduler", "optimizer"),
    tokens_unreliable="train_state.ntokens_seen counts one rank's tokens",
)
OLMO_CORE = Profile(
    name="OLMo-core",
    weights="model.",
    training=_NEVER,
    optimizer=_optimizer("optim"),
    opaque=re.compile(r"model\..+"),
    learning_rate=_rates("scheduler", "optim"),
)
ACCELERATE = Profile(
    name="accelerate",
    weights="model.",
    training=_NEVER,
    optimizer=_optimizer("optimizer"),
    opaque=re.compile(r"model\..+"),
    learning_rate=_rates("lr_scheduler", "optimizer"),
)
COMPOSER = Profile(
    name="Composer",
    weights="state.model.",
    training=_NEVER,
    optimizer=_optimizer(r"(?:state\.)?optimizers\.[^.]+"),
    opaque=re.compile(r"state\.model\..+"),
    step=("state.timestamp.Timestamp.batch",),
    tokens=("state.timestamp.Timestamp.token",),
    learning_rate=_rates(r"state\.schedulers\.[^.]+", r"(?:state\.)?optimizers\.[^.]+"),
)
MEGATRON = Profile(
    name="Megatron",
    training=re.compile(
        r"(chained_\d+\.)?optimizer\.|(rng_state|rerun_state_machine_state|opt_param_scheduler)(\W|$)"
    ),
    optimizer=re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(?P<kind>[^.]+)\.(?P<parameter>.+)"),
    # without the common state Megatron loads nothing
    opaque=re.compile(r".+\._extra_state(/.*)?|common_state(/.*)?"),
)
_TRAINING_KEYS = (
    r"(optim|optimizer|optimizers|optimizer_state|lr_scheduler|lr_schedulers|scheduler|schedulers|dataloader|"
    r"data_loader|train_state|trainer|rng|rng_state|step|epoch|global_step)(\.|$)"
)
PLAIN = Profile(
    name="plain",
    training=re.compile(_TRAINING_KEYS),
    optimizer=_optimizer("(?:optim|optimizer)"),
    opaque=_EXTRA_STATE,
    step=("step", "train_state.step", "trainer.step", "global_step"),
    learning_rate=_rates("(?:lr_)?scheduler", "(?:optim|optimizer)"),
)


def _nested(outer: str) -> Profile:
    """A dictionary with `model` and `optimizer` in it, perhaps in another one, as torch's tutorial makes
    it.
    """
    optimizer = rf"{re.escape(outer)}(?:optim|optimizer)"
    return Profile(
        name="plain",
        weights=f"{outer}model.",
        training=_NEVER,
        optimizer=_optimizer(optimizer),
        opaque=re.compile(rf"{re.escape(outer)}model\..+"),
        step=tuple(outer + name for name in PLAIN.step),
        learning_rate=_rates(rf"{re.escape(outer)}(?:lr_)?scheduler", optimizer),
    )


def recognised(names: Collection[str]) -> Profile:
    """The profile of a folder's names, where its place does not tell."""
    if any(name.startswith(COMPOSER.weights) for name in names):
        return COMPOSER
    if any(name.startswith(("train_state.", "lr_scheduler.", "dataloader.")) for name in names):
        return TORCHTITAN
    # Hugging Face's names begin with `model.` too, but not all of them: `lm_head` does not
    weights = [name for name in names if PLAIN.training.match(name) is None]
    if weights and all(name.startswith("model.") for name in weights):
        return _nested("")
    outer = {name.partition(".")[0] for name in names}
    if len(outer) == 1 and any(name.startswith(f"{min(outer)}.model.") for name in names):
        return _nested(f"{outer.pop()}.")
    return PLAIN

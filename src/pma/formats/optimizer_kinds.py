"""What optimizers call what they keep for a parameter: which of it is a first moment, which a second, which a
count of steps, which an fp32 copy of the weights.

Source: torch 2.13 `torch/optim`, transformers 5.23 `optimization.py`, nanochat's optimizers as of 2026,
deepspeed 0.19.8, megatron-core 0.16.
"""

from __future__ import annotations

STEP = "step"
#: means of gradients: zero in a fresh optimizer, and what carries on in the direction of the last updates
FIRST_MOMENTS = frozenset({"exp_avg", "m", "momentum_buffer"})
#: means of squares, whole or factored: what scales updates
SECOND_MOMENTS = frozenset(
    {
        "exp_avg_sq",
        "exp_avg_sq_col",
        "exp_avg_sq_row",
        "max_exp_avg_sq",
        "second_momentum_buffer",
        "square_avg",
        "v",
    }
)
MASTERS = frozenset({"fp32_param", "main", "main_param", "master", "master_param", "param"})

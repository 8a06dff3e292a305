"""What the tests of losses between two models share: sequences of every kind, both passes, gradients, comparison."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from distill.batch import Batch
from distill.forward import Forward, read_head, run
from distill.losses import Inner, LossMode, LossOutput
from distill.render import Example

TOKENS = 259


def examples(count: int = 4, seed: int = 0) -> list[Example]:
    """Sequences of different lengths; a prompt of weight 0, then weights of 1, 0 and 0.5."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        prompt, length = int(rng.integers(1, 6)), int(rng.integers(10, 20))
        weights = rng.choice([1.0, 1.0, 0.0, 0.5], size=length).astype(np.float32)
        weights[:prompt], weights[-1] = 0.0, 1.0
        made.append(Example(rng.integers(0, TOKENS, size=length).astype(np.int32), weights))
    return made


def passes(student: Any, teacher: Any, inner: Inner, batch: Batch) -> tuple[Forward, Forward]:
    """Run both models, the teacher without gradients, and keep what `inner` asks for."""
    ours = run(student, read_head(student, "student"), batch, inner.student)
    with torch.no_grad():
        return ours, run(teacher, read_head(teacher, "teacher"), batch, inner.teacher)


def evaluate(mode: LossMode, student: Any, teacher: Any, inner: Inner, batch: Batch, **options: Any) -> LossOutput:
    return mode.fn(*passes(student, teacher, inner, batch), batch, inner=inner, **options)


def gradients(output: LossOutput, student: Any, inner: Inner) -> dict[str, torch.Tensor]:
    """The mean loss's gradients, of the student's parameters and of the mode's own, by name."""
    both = torch.nn.ModuleDict({"student": student} | ({} if inner.modules is None else {"own": inner.modules}))
    both.zero_grad()
    (output.total / output.weight).backward()
    return {name: weight.grad.clone() for name, weight in both.named_parameters() if weight.grad is not None}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], atol: float = 1e-6) -> None:
    assert left.keys() == right.keys()
    for key in left:
        torch.testing.assert_close(left[key], right[key], atol=atol, rtol=1e-4, msg=lambda text, k=key: f"{k}: {text}")

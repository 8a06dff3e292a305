"""What is trained beside the student: projectors, with an optimizer of their own.

They are no part of the model that is saved, wrapped for distributed training or quantised, so they neither travel in it
nor depend on how it is sharded: every rank holds them whole, gradients are averaged over ranks before each step, and
they step with the student at its learning rate. They are saved in every checkpoint, and beside the trained model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainingArguments

FOLDER = "beside"  # not in the model's own folder: engines load every .safetensors file they find there
WEIGHTS, STATE = "projectors.safetensors", "optimizer.pt"


class Beside(TrainerCallback):
    """Modules, their AdamW, and the place of both in a training loop.

    Args:
        modules: float32 parameters; may be empty, and then nothing happens.
        args: learning rate, betas and weight decay are the student's.
        accelerator: averages gradients over ranks.
    """

    def __init__(self, modules: nn.ModuleDict, args: TrainingArguments, accelerator: Any) -> None:
        self.modules = modules.to(args.device)
        self.parameters = list(self.modules.parameters())
        self.accelerator = accelerator
        self.max_norm = args.max_grad_norm
        self.optimizer = (
            torch.optim.AdamW(
                self.parameters,
                lr=args.learning_rate,
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
                weight_decay=args.weight_decay,
            )
            if self.parameters
            else None
        )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Step with the learning rate that the student steps with, its gradients clipped by themselves."""
        if self.optimizer is None:
            return
        for parameter in self.parameters:
            if parameter.grad is None:  # a batch without trained tokens on this rank
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        if self.max_norm:
            nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = kwargs["lr_scheduler"].get_last_lr()[0]
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, folder: Path) -> None:
        """Write weights and optimizer state into a checkpoint's folder."""
        if self.optimizer is not None:
            self.save_weights(folder)
            torch.save(self.optimizer.state_dict(), folder / FOLDER / STATE)

    def save_weights(self, folder: Path) -> None:
        """Write the weights alone, beside a trained model."""
        if self.optimizer is not None:
            (folder / FOLDER).mkdir(exist_ok=True)
            weights = {name: value.contiguous() for name, value in self.modules.state_dict().items()}
            save_file(weights, folder / FOLDER / WEIGHTS)

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint."""
        if self.optimizer is not None:
            self.modules.load_state_dict(load_file(folder / FOLDER / WEIGHTS))
            self.optimizer.load_state_dict(torch.load(folder / FOLDER / STATE, weights_only=True))

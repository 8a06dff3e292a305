"""Published settings of GRPO and its successors, under TRL's names; `--preset` names one.

| preset | source |
|---|---|
| (none) | TRL's defaults |
| `grpo-r1` | DeepSeek-R1, arXiv 2501.12948, and its supplement: GRPO with a KL, wide clipping, 16 updates a sampling |
| `dapo` | arXiv 2503.14476: clip-higher, dynamic sampling, token-level loss, overlong filtering and shaping, no KL |
| `dr-grpo` | arXiv 2503.20783: no division by a group's deviation or a completion's length |
| `gspo` | arXiv 2507.18071: ratios of whole completions, clipped narrowly, 4 updates a sampling |
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from distill.config import TrainConfig
from distill.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a student learns from rewards: see the flags of the same names.

    `updates` are optimizer steps from one sampling (before `num_iterations` repeats them), which a number of
    `steps_per_generation` replaces; `rewards` are NAME=WEIGHT.
    """

    num_generations: int = 8
    beta: float = 0.0
    use_bias_correction_kl: bool = True
    epsilon: float = 0.2
    epsilon_high: float | None = None
    loss_type: str = "dapo"
    scale_rewards: str = "group"
    importance_sampling_level: str = "token"
    num_iterations: int = 1
    updates: int = 1
    mask_truncated_completions: bool = False
    dynamic_sampling: int = 0
    ref_model_sync_steps: int | None = None
    rewards: tuple[str, ...] = ("accuracy=1",)


PRESETS: dict[str, Recipe] = {
    "grpo-r1": Recipe(
        num_generations=16,
        loss_type="grpo",
        beta=0.001,
        use_bias_correction_kl=False,
        epsilon=10.0,
        updates=16,
        ref_model_sync_steps=400,
        rewards=("accuracy=1", "format=1"),
    ),
    "dapo": Recipe(
        num_generations=16,
        loss_type="dapo",
        epsilon=0.2,
        epsilon_high=0.28,
        mask_truncated_completions=True,
        dynamic_sampling=10,
        rewards=("accuracy=1", "soft_overlong=1"),
    ),
    "dr-grpo": Recipe(loss_type="dr_grpo", scale_rewards="none"),
    "gspo": Recipe(loss_type="grpo", importance_sampling_level="sequence", epsilon=3e-4, epsilon_high=4e-4, updates=4),
}
RECIPE = tuple(each.name for each in fields(Recipe) if each.name not in ("updates", "rewards"))  # that are flags, too
LOSS_OPTIONS = (
    "epsilon",
    "epsilon_high",
    "beta",
    "use_bias_correction_kl",
    "importance_sampling_level",
)  # what the loss itself asks


def recipe_of(config: TrainConfig) -> Recipe:
    """Return the settings of a run: the preset's, where nothing else is said.

    Raises:
        UserError: micro-batches of one sampling that are no whole optimizer steps; a reference that cannot be moved.
    """
    recipe = PRESETS[config.preset] if config.preset else Recipe()
    given: dict[str, Any] = {name: value for name in RECIPE if (value := getattr(config, name)) is not None}
    if config.reward:
        given["rewards"] = tuple(part.strip() for words in config.reward for part in words.split(","))
    if config.steps_per_generation is not None:
        updates, rest = divmod(config.steps_per_generation, config.gradient_accumulation_steps)
        if rest or not updates:
            raise UserError(
                f"--steps-per-generation {config.steps_per_generation} is no multiple of "
                f"--gradient-accumulation-steps {config.gradient_accumulation_steps}: sample for whole optimizer steps"
            )
        given["updates"] = updates
    recipe = replace(recipe, **given)
    if config.lora_r is not None and recipe.beta and recipe.ref_model_sync_steps is not None:
        raise UserError(
            "with LoRA the reference is the student without its adapters, and --ref-model-sync-steps cannot move it: "
            "train all weights, or give --beta 0"
        )
    return recipe

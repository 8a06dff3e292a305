"""Reinforcement learning: what `--mode grpo` asks beside what every training is asked.

Names and meanings are those of TRL's `GRPOConfig`. None leaves a setting to the preset (`distill.reinforce.recipes`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from distill.config.section import Count, Section

NotNegative = Annotated[float, Field(ge=0)]


class Reinforcing(Section):
    """What a student's own completions are worth, and how it learns from that."""

    preset: Literal["grpo-r1", "dapo", "dr-grpo", "gspo"] | None = Field(
        None, description="grpo: published settings for all that follows; what is given beside it beats it."
    )
    reward: list[str] = Field(
        default_factory=list,
        description="grpo: NAME=WEIGHT of accuracy (the verifier), format, language_consistency, length, repetition, "
        "soft_overlong, or pkg.mod:function with TRL's signature (repeatable, or with commas) [accuracy=1].",
    )
    reward_option: list[str] = Field(
        default_factory=list, description="grpo: REWARD.NAME=VALUE, e.g. soft_overlong.cache=64 (repeatable)."
    )
    verifier: str = Field("auto", description="grpo: what the reward accuracy asks, as in generate.")
    verifier_option: list[str] = Field(default_factory=list, description="grpo: name=value for it (repeatable).")
    verifier_workers: Count = Field(1, description="grpo: processes that verify.")
    verifier_seconds: Annotated[float, Field(gt=0)] = Field(10.0, description="grpo: wall-clock limit of one verdict.")
    num_generations: Annotated[int, Field(ge=2)] | None = Field(None, description="grpo: completions of a prompt.")
    beta: NotNegative | None = Field(None, description="grpo: weight of the KL to the reference, the first student.")
    use_bias_correction_kl: bool | None = Field(
        None, description="grpo: weight the KL's estimate by the ratio, so that its gradient is the KL's [on]."
    )
    epsilon: Annotated[float, Field(gt=0)] | None = Field(None, description="grpo: ratios are clipped at 1 - this ...")
    epsilon_high: Annotated[float, Field(gt=0)] | None = Field(
        None, description="grpo: ... and at 1 + this; default: epsilon."
    )
    loss_type: Literal["grpo", "dapo", "dr_grpo"] | None = Field(
        None,
        description="grpo: a mean over completions of means over tokens, over all tokens, or over completions of "
        "max-completion-length tokens.",
    )
    scale_rewards: Literal["group", "batch", "none"] | None = Field(
        None, description="grpo: whose standard deviation advantages are divided by."
    )
    importance_sampling_level: Literal["token", "sequence"] | None = Field(
        None, description="grpo: ratios of tokens, or of completions (GSPO)."
    )
    num_iterations: Count | None = Field(None, description="grpo: passes over what was sampled.")
    steps_per_generation: Count | None = Field(
        None, description="grpo: micro-batches sampled at once; default: those of one optimizer step."
    )
    mask_truncated_completions: bool | None = Field(None, description="grpo: completions that were cut teach nothing.")
    dynamic_sampling: Annotated[int, Field(ge=0)] | None = Field(
        None, description="grpo: rounds in which prompts whose completions are all worth the same are replaced (DAPO)."
    )
    ref_model_sync_steps: Count | None = Field(
        None, description="grpo: the reference becomes the student every so many steps; default: never."
    )
    rollout_batch_size: Count | None = Field(
        None, description="grpo: completions written side by side; default: all that are sampled at once."
    )
    log_completions: Annotated[int, Field(ge=0)] = Field(
        8, description="grpo: completions of each sampling that are kept in rollouts.jsonl, with their rewards."
    )

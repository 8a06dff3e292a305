"""Reinforcement learning from rewards: what a student writes, what it is worth, and batches made of that.

`recipes` holds the published settings, `rewards` what a reward is, `advantages` turns rewards into advantages, and
`experience` samples, scores and cuts into batches; the loss itself is `distill.losses.grpo`. The reward functions are
not here: they look at answers as verifiers do, and the caller brings them.
"""

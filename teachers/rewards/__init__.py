"""Reward functions: what an answer of a student under reinforcement is worth beside being right.

A reward is `f(trace, *, ...) -> Reward`, a value and a reason; its keyword-only arguments are its options. One that
compares the answers to one question has the attribute `unit = "group"` and is `f(traces, right, *, ...) -> rewards`,
where `right` holds the verifier's scores. `accuracy` is the verifier itself and not in this table. A user's own is
named `pkg.mod:function` and has TRL's signature (teachers/rewards/scorer.py).
"""

from __future__ import annotations

ACCURACY = "accuracy"
REWARDS = {
    "format": "teachers.rewards.shape:format",
    "soft_overlong": "teachers.rewards.shape:soft_overlong",
    "repetition": "teachers.rewards.shape:repetition",
    "language_consistency": "teachers.rewards.language:language_consistency",
    "length": "teachers.rewards.length:length",
}

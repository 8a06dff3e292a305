"""The tensors of one forward pass, with one mask.

`weights[b, t]` is the weight of *predicting token t* of sequence b; 0 means untrained (prompt, padding). Every loss
reads this one mask through `Batch.trained`; nobody re-derives it from labels or padding. Sequences are padded on the
right, where causal attention cannot see the padding.

Several sequences may be packed into one row: `position_ids` then begin again at 0 with each of them, attention stays
within each, and no prediction is trained across a border. What a stored signal says of the trained tokens travels along
as `TeacherRows`; what a teacher of another tokenizer reads, as `OtherTokens`; what the student's own completions are
worth, as `PolicyRows`. Tokenising is `distill.render`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distill.render import Example, Other

if TYPE_CHECKING:
    from distill.signal_data import SignalData


@dataclass(frozen=True, slots=True)
class Batch:
    """B sequences of up to T tokens.

    Attributes:
        input_ids: (B, T) int64.
        attention_mask: (B, T) int64, 1 on tokens, 0 on padding.
        weights: (B, T) float32, the weight of predicting token t; column 0 is always 0.
        position_ids: (B, T) int64, each token's place in its own sequence, where rows are packed; else None. What pads
            a packed row counts as one more sequence, masked in `attention_mask` and without weight.
        signal: what a teacher said of the trained predictions, in the order of `trained()`, where it was stored. With
            `other` of the tokens in its spans instead, span after span.
        other: the same texts in the tokens of a teacher with another tokenizer; None where both read the same ids.
        policy: what the completions are worth, where the student wrote them and they were rewarded.
    """

    input_ids: Tensor
    attention_mask: Tensor
    weights: Tensor
    position_ids: Tensor | None = None
    signal: TeacherRows | None = None
    other: OtherTokens | None = None
    policy: PolicyRows | None = None

    def trained(self) -> Trained:
        """Return where predictions are trained, what they should be and how much each counts."""
        weights = self.weights[:, 1:]
        rows = weights > 0
        return Trained(rows, self.input_ids[:, 1:][rows], weights[rows])

    def lengths(self) -> Tensor:
        """Return the tokens of each sequence, int64: (B,), or one number per sequence of every packed row."""
        if self.position_ids is None:
            return self.attention_mask.sum(1)
        borders = _borders(self.position_ids)
        begins, ends = borders[:-1], borders[1:]
        return (ends - begins)[self.attention_mask.flatten()[begins] > 0]

    def model_inputs(self) -> dict[str, Any]:
        """Return what a transformers model is called with.

        Packed rows come without a mask. transformers then keeps attention within each sequence by the positions (a
        block-diagonal mask, since 4.54). Flash attention has no mask and reads positions of a single row only, so the
        borders of all rows, laid end to end, are given as well; no sequence is longer than a row.
        """
        if self.position_ids is None:
            return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        borders, longest = _borders(self.position_ids).to(torch.int32), self.input_ids.shape[1]
        varlen = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": longest, "max_length_k": longest}
        return {"input_ids": self.input_ids, "position_ids": self.position_ids, **varlen}

    def to(self, device: torch.device) -> Batch:
        """Return the batch on another device."""
        return Batch.from_tensors({name: value.to(device) for name, value in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, as a `transformers.Trainer` moves them between devices."""
        own = {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "weights": self.weights}
        if self.position_ids is not None:
            own["position_ids"] = self.position_ids
        for prefix, part in (("signal_", self.signal), ("other_", self.other), ("policy_", self.policy)):
            known = {} if part is None else part._asdict()
            own |= {prefix + name: value for name, value in known.items() if value is not None}
        return own

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Batch:
        """Undo `tensors`."""
        parts: dict[str, dict[str, Tensor]] = {"signal_": {}, "other_": {}, "policy_": {}, "": {}}
        for name, value in tensors.items():
            prefix = next(each for each in parts if name.startswith(each))
            parts[prefix][name.removeprefix(prefix)] = value
        signal = TeacherRows(**parts["signal_"]) if parts["signal_"] else None
        other = OtherTokens(**parts["other_"]) if parts["other_"] else None
        policy = PolicyRows(**parts["policy_"]) if parts["policy_"] else None
        return cls(**parts[""], signal=signal, other=other, policy=policy)


class TeacherRows(NamedTuple):
    """What a teacher said at N predictions: see `distill.token_signal.TokenSignal`.

    Attributes:
        ids: (N, K) int64 outcomes, -1 in empty places.
        logprobs: (N, K) float32, nats, at temperature 1; -inf in empty places; None where only counts were kept.
        counts: (N, K) int64 how often each outcome was drawn; None where the outcomes are the K most likely.
        tail: (N,) float32 log-probability of all other outcomes together; None where the outcomes are draws.
        realised: (N,) float32 log-probability of the token that came, where a teacher of another tokenizer said it.
    """

    ids: Tensor
    logprobs: Tensor | None = None
    counts: Tensor | None = None
    tail: Tensor | None = None
    realised: Tensor | None = None


class OtherTokens(NamedTuple):
    """The texts of a batch as a teacher of another tokenizer reads them: see `distill.render.Other`.

    Attributes:
        input_ids: (B, U) int64, padded on the right.
        attention_mask: (B, U) int64, 1 on tokens, 0 on padding.
        begins: (B,) int64 where each completion begins.
        spans: (S, 5) int64 row, student begin, end, teacher begin, end; by row, ascending within.
    """

    input_ids: Tensor
    attention_mask: Tensor
    begins: Tensor
    spans: Tensor

    def batch(self) -> Batch:
        """Return the teacher's side as a batch that trains nothing."""
        untrained = torch.zeros(self.input_ids.shape, device=self.input_ids.device)
        return Batch(self.input_ids, self.attention_mask, untrained)


class PolicyRows(NamedTuple):
    """What B completions of the student's own are worth, and how likely their tokens were.

    Attributes:
        advantages: (B,) float32.
        old: (B, T) float32 log-probability of each trained token when it was drawn, nats, laid out as `input_ids`; None
            where the student has not changed since.
        reference: (B, T) float32, the same by the reference model; None where none is asked.
    """

    advantages: Tensor
    old: Tensor | None = None
    reference: Tensor | None = None


class Trained(NamedTuple):
    """N trained predictions: `rows` (B, T-1) bool selects hidden states, `labels` (N,), `weights` (N,) float32."""

    rows: Tensor
    labels: Tensor
    weights: Tensor


def collate(
    examples: Sequence[Example] | Sequence[Sequence[Example]], *, pad_id: int, signals: SignalData | None = None
) -> Batch:
    """Lay examples into rows, padded on the right to the longest row.

    Args:
        examples: one sequence per row; or groups of them (`distill.packing.pack`), one group per row, end to end.
        signals: gives what a teacher said of the trained tokens.

    Raises:
        ValueError: an example is empty, its weights do not match its tokens, or it trains its first token, which
            nothing predicts; only some have `other`, or packed ones do.
        RunError: the numbers on disk are no longer those of these examples.
    """
    packed = not isinstance(examples[0], Example)
    rows: list[Sequence[Example]] = [[row] if isinstance(row, Example) else row for row in examples]
    flat = [example for row in rows for example in row]
    for example in flat:
        if len(example.input_ids) == 0 or len(example.input_ids) != len(example.weights):
            raise ValueError(f"an example has {len(example.input_ids)} tokens and {len(example.weights)} weights")
        if example.weights[0] != 0:
            raise ValueError("an example gives weight to its first token, which nothing predicts")
    others = [example.other for example in flat if example.other is not None]
    if others and (packed or len(others) < len(flat)):
        raise ValueError(f"{len(others)} of {len(flat)} examples have a teacher's own tokens: all or none, unpacked")
    shape = (len(rows), max(sum(map(len, row)) for row in rows))
    input_ids = np.full(shape, pad_id, np.int64)
    attention_mask, position_ids, weights = (np.zeros(shape, kind) for kind in (np.int64, np.int64, np.float32))
    for number, row in enumerate(rows):
        end = 0
        for example in row:
            here = (number, slice(end, end := end + len(example)))
            input_ids[here], weights[here] = example.input_ids, example.weights
            attention_mask[here], position_ids[here] = 1, np.arange(len(example))
        position_ids[number, end:] = np.arange(shape[1] - end)
    return Batch(
        torch.from_numpy(input_ids),
        torch.from_numpy(attention_mask),
        torch.from_numpy(weights),
        torch.from_numpy(position_ids) if packed else None,
        None if signals is None else signals.rows(flat),
        collate_others(others, pad_id=0) if others else None,
    )


def collate_others(others: Sequence[Other], *, pad_id: int) -> OtherTokens:
    """Lay what a teacher of another tokenizer reads into rows, padded on the right to the longest."""
    shape = (len(others), max(1, *(len(other.input_ids) for other in others)))
    input_ids, attention_mask = np.full(shape, pad_id, np.int64), np.zeros(shape, np.int64)
    spans = []
    for row, other in enumerate(others):
        input_ids[row, : len(other.input_ids)] = other.input_ids
        attention_mask[row, : len(other.input_ids)] = 1
        spans.append(np.insert(other.spans.astype(np.int64).reshape(-1, 4), 0, row, axis=1))
    begins = np.array([other.begin for other in others], np.int64)
    return OtherTokens(*map(torch.from_numpy, (input_ids, attention_mask, begins, np.concatenate(spans))))


def _borders(position_ids: Tensor) -> Tensor:
    """Return where each sequence begins when all rows are laid end to end, and the end of the last, int64."""
    flat = position_ids.flatten()
    return torch.cat([(flat == 0).nonzero().flatten(), torch.tensor([len(flat)], device=flat.device)])

"""Several sequences in one row, so that short ones do not wait for long ones: which go together, and whether they may.

`pack` groups whole sequences; none is split or cut. `distill.batch.collate` lays a group into one row. A model must
then keep them apart, and not every one does: one that carries a state along the row (mamba, linear attention), or that
makes positions of its own, would let a sequence read its neighbour and train on without a word. So `check_packing`
proves it on the model itself instead of keeping a list of architectures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.batch import collate
from distill.errors import UserError
from distill.render import Example


def pack(examples: Sequence[Example], length: int) -> list[list[Example]]:
    """Group examples into rows of at most `length` tokens.

    Best fit decreasing: the longest first, each into the fullest row that still has room. It needs at most 11/9 of the
    fewest possible rows, plus 4 (Johnson et al., SIAM J. Comput. 1974), and in practice leaves next to nothing empty.
    Equal lengths are taken in the order given, so the result depends on nothing else; a row keeps that order, too.

    Raises:
        ValueError: an example is longer than a row.
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # room left -> rows, the latest last
    rooms = 0  # bit r is set where some row has r tokens left: the least room that suffices is one shift away
    for index in sorted(range(len(examples)), key=lambda index: -len(examples[index])):
        need = len(examples[index])
        if need > length:
            raise ValueError(f"an example of {need} tokens does not fit into rows of {length}")
        if enough := rooms >> need:
            room = need + (enough & -enough).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, row = length, len(rows)
            rows.append([])
        rows[row].append(index)
        left = room - need
        by_room.setdefault(left, []).append(row)
        rooms |= 1 << left
    return [[examples[index] for index in sorted(row)] for row in rows]


def check_packing(model: Any, length: int) -> None:
    """Prove on a few tokens that `model` keeps sequences apart that are packed into rows of `length` tokens.

    Two rows of several sequences are run packed. Each sequence must have the logits that it has alone; and those of a
    row's last one must not move when its neighbours' tokens are others, not more than causality lets those of its
    first one move (which is by rounding, in a mixture of experts).

    Raises:
        UserError: the model does not keep them apart, or cannot be called with packed rows.
    """
    # The one border that a few tokens cannot show: chunks are counted from the row's beginning, not a sequence's.
    chunk = getattr(model.config.get_text_config(), "attention_chunk_size", None)
    if chunk and length > chunk:
        raise UserError(
            f"--packing: {type(model).__name__} attends in chunks of {chunk} tokens, which would begin elsewhere in "
            f"rows of {length}: train without --packing, or lower --max-length"
        )
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            apart = _keeps_apart(model)
    except TypeError as error:
        raise UserError(f"--packing: {type(model).__name__} cannot be called with packed rows ({error})") from error
    finally:
        model.train(was_training)
    if not apart:
        raise UserError(
            f"--packing: {type(model).__name__} lets packed sequences see each other (it carries a state along the "
            "row, or ignores position_ids): train without --packing"
        )


def _keeps_apart(model: Any) -> bool:
    embedding = model.get_input_embeddings().weight
    vocabulary, device = model.config.get_text_config().vocab_size, embedding.device
    rng = np.random.default_rng(0)

    def sequences() -> list[list[Example]]:
        return [
            [Example(rng.integers(0, vocabulary, size).astype(np.int32), np.zeros(size, np.float32)) for size in sizes]
            for sizes in ((7, 1, 5), (4, 6))
        ]

    def logits(groups: list[list[Example]]) -> list[Tensor]:
        inputs = collate(groups, pad_id=0).model_inputs()
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        rows = model(**moved, use_cache=False).logits.float()
        return [
            part
            for row, group in zip(rows, groups, strict=True)
            for part in row[: sum(map(len, group))].split([len(example) for example in group])
        ]

    groups, others = sequences(), sequences()
    packed = logits(groups)
    alone = [logits([[example]])[0] for group in groups for example in group]
    tolerance = 1e-4 if embedding.dtype in (torch.float32, torch.float64) else 3e-2
    if any(_moved(there, here) > tolerance for there, here in zip(packed, alone, strict=True)):
        return False
    first, last = [0, 3], [2, 4]  # of each row
    behind = logits([[group[0], *other[1:]] for group, other in zip(groups, others, strict=True)])
    before = logits([[*other[:-1], group[-1]] for group, other in zip(groups, others, strict=True)])
    rounding = max(_moved(behind[place], packed[place]) for place in first)
    return max(_moved(before[place], packed[place]) for place in last) <= 4 * rounding + 1e-6


def _moved(logits: Tensor, reference: Tensor) -> float:
    return float((logits - reference).abs().max() / (1 + reference.abs().max()))

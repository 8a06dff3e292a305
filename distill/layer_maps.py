"""Which layer of the student is compared with which layer of the teacher.

Layers are counted as `distill.forward.Capture` counts them: 0 is the embeddings, i the output of decoder block i, so a
model of L blocks has layers 0 to L. A map is a list of (student layer, teacher layer); several pairs are deep
supervision.

    uniform       N pairs at equal shares of the depth, N the smaller depth: pair i of N is (i Ls // N, i Lt // N)
    uniform-N     the same for a chosen N
    last-N        the last N blocks of both, in order
    all           every block with the block of its number; needs equal depths
    1:2,4:8       the pairs themselves, student first

`uniform` is TinyBERT's map (arXiv 1909.10351: block m of the student learns from block m Lt / Ls) for any
two depths. Its last pair is always (Ls, Lt): the layer that the head reads has a counterpart. The embeddings take
part only where they are named (``0:0``).
"""

from __future__ import annotations

import re

from distill.errors import UserError

ALLOWED = "uniform, uniform-N, last-N, all, or pairs such as 1:2,4:8 (student:teacher)"


def layer_map(spec: str, student_depth: int, teacher_depth: int, *, lowest: int = 0) -> list[tuple[int, int]]:
    """Return the pairs (student layer, teacher layer) that `spec` stands for.

    Args:
        spec: see the module; ``last:N`` and ``uniform:N`` may be written too.
        student_depth, teacher_depth: decoder blocks, Ls and Lt.
        lowest: the first number a pair may name: 0, or 1 where only blocks have what is compared.

    Raises:
        UserError: an unknown spec, a pair outside a model or named twice, or a map that these depths do not allow.
    """
    if not isinstance(spec, str):
        raise UserError(f"layers must be text, not {spec!r}: {ALLOWED}; in YAML put pairs in quotes ('1:2')")
    depths = f"the student has {student_depth} blocks, the teacher {teacher_depth}"
    shallow = min(student_depth, teacher_depth)
    if spec == "all":
        if student_depth != teacher_depth:
            raise UserError(f"layers 'all' needs models of equal depth: {depths}; take 'uniform'")
        return [(number, number) for number in range(1, shallow + 1)]
    if found := re.fullmatch(r"(uniform|last)(?:[-:](\d+))?", spec):
        name, digits = found.groups()
        if name == "last" and digits is None:
            raise UserError("layers 'last' needs a number of blocks, such as 'last-2'")
        count = shallow if digits is None else int(digits)
        if not 1 <= count <= shallow:
            raise UserError(f"layers {spec!r} must name 1 to {shallow} blocks: {depths}")
        if name == "uniform":
            return [(i * student_depth // count, i * teacher_depth // count) for i in range(1, count + 1)]
        return [(student_depth - back, teacher_depth - back) for back in reversed(range(count))]
    if not re.fullmatch(r"\s*\d+\s*:\s*\d+\s*(,\s*\d+\s*:\s*\d+\s*)*", spec):
        raise UserError(f"unknown layers {spec!r}: allowed are {ALLOWED}")
    pairs = [(int(left), int(right)) for left, right in re.findall(r"(\d+)\s*:\s*(\d+)", spec)]
    for student_layer, teacher_layer in pairs:
        if not (lowest <= student_layer <= student_depth and lowest <= teacher_layer <= teacher_depth):
            raise UserError(f"layers {student_layer}:{teacher_layer} must be numbers from {lowest} on; {depths}")
    if len(set(pairs)) < len(pairs):
        raise UserError(f"layers {spec!r} names a pair twice")
    return pairs

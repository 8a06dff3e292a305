"""Relations between the tokens of one sequence, and how far a student's are from a teacher's.

Every function compares how n tokens lie to each other in the student's space, (n, Ds), with how they lie in the
teacher's, (n, Dt), and returns a (): not negative, 0 where the relations are equal. Nothing is learned, and widths,
depths, head counts and architectures need not agree. Turning either space changes no value; nor does scaling it, but
for `attention_relations`, nor, in `rkd_distance`, `rkd_angle` and `cka`, shifting it.

Everything is made of the n x n inner products, so beside n^2 D multiplications cost and memory are n^2, whatever the
width (n^3 in `rkd_angle`). Inputs should be float32 or wider. Which tokens are compared is `distill.losses.relations`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from distill.divergences import forward_kl


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Compare the distances between tokens, each in units of its model's mean distance (RKD-D, arXiv 1904.05068).

    The mean over pairs of the Huber loss with delta 1; needs n >= 2.
    """
    first, second = torch.triu_indices(len(student), len(student), offset=1, device=student.device)
    ours, theirs = (_distances(_products(states))[first, second] for states in (student, teacher))
    return functional.smooth_l1_loss(_over_mean(ours), _over_mean(theirs))


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Compare the cosines of the angles that pairs of tokens form at a third (RKD-A, arXiv 1904.05068).

    The mean over such triples of the Huber loss with delta 1; needs n >= 3. Holds n^3 cosines.
    """
    first, second = torch.triu_indices(len(student), len(student), offset=1, device=student.device)
    at = torch.arange(len(student), device=student.device)[:, None]
    proper = (at != first) & (at != second)
    ours, theirs = (_cosines_at(states)[:, first, second][proper] for states in (student, teacher))
    return functional.smooth_l1_loss(ours, theirs)


def cosine_grams(
    student: Tensor, student_others: Tensor, teacher: Tensor, teacher_others: Tensor, visible: Tensor
) -> Tensor:
    """Compare the cosines between n tokens and m others: the mean squared difference over the `visible` (n, m) pairs.

    Similarity-preserving distillation (Tung and Mori 2019, arXiv 1907.09682) with tokens in place of images, and
    cosines in place of its rows of inner products at unit length.
    """
    ours, theirs = (
        functional.normalize(rows, dim=-1) @ functional.normalize(others, dim=-1).T
        for rows, others in ((student, student_others), (teacher, teacher_others))
    )
    return (ours - theirs).square()[visible].mean()


def cka(student: Tensor, teacher: Tensor, *, debiased: bool = False) -> Tensor:
    """Return ``1 - CKA`` with a linear kernel (Kornblith et al. 2019, arXiv 1905.00414), in [0, 1].

    Computed as half the squared distance between the two centred Gram matrices at unit length, which is 1 - CKA, and
    never below 0 by rounding. The Gram form is the cheaper one wherever there are fewer tokens than channels.

    Args:
        debiased: centre so that the inner product of two Gram matrices is the unbiased estimate of HSIC (Song et al.
            2012, *Feature selection via dependence maximization*; the U-centring of Székely and Rizzo 2014). Few
            tokens in many channels look alike to CKA by chance; this takes the chance off. Then in [0, 2]; needs
            n >= 4.
    """
    grams = (_products(states) for states in (student, teacher))
    ours, theirs = (functional.normalize((_u_centred(k) if debiased else k).flatten(), dim=0) for k in grams)
    return (ours - theirs).square().sum() / 2


def attention_relations(
    student: Tensor, student_others: Tensor, teacher: Tensor, teacher_others: Tensor, visible: Tensor, *, heads: int
) -> Tensor:
    """Return KL(teacher || student), in nats, between softmaxes of scaled inner products (MiniLMv2, arXiv 2012.15828).

    The mean over tokens and relation heads. Rows are n tokens' queries (or keys, or values), (n, heads * dim), and
    `student_others` the same vectors of the m tokens that `visible` (n, m) lets them see. Each model's width is cut
    into the same number of relation heads, whatever its own number was.
    """
    relations = []
    for rows, others in ((student, student_others), (teacher, teacher_others)):
        queries, keys = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (rows, others))
        scores = queries @ keys.transpose(1, 2) / queries.shape[-1] ** 0.5
        relations.append(scores.masked_fill(~visible, -torch.inf).log_softmax(-1))
    return forward_kl(*relations).mean()


def _products(states: Tensor) -> Tensor:
    """Return inner products (n, n) about the tokens' mean: what all share would only cost digits."""
    states = states - states.mean(0)
    return states @ states.T


def _distances(products: Tensor) -> Tensor:
    """Return distances (n, n); one that is lost in rounding is 0, without a gradient."""
    squares = products.diagonal()
    scale = squares[:, None] + squares
    squared = scale - 2 * products
    apart = squared > 16 * torch.finfo(products.dtype).eps * scale
    return torch.where(apart, squared, 1.0).sqrt() * apart


def _over_mean(distances: Tensor) -> Tensor:
    mean = distances.mean()
    return distances / torch.where(mean > 0, mean, 1.0)


def _cosines_at(states: Tensor) -> Tensor:
    """Return [j, i, k] = cosine of the angle that tokens i and k form at token j, (n, n, n)."""
    products = _products(states)
    distances = _distances(products)
    inverse = torch.where(distances > 0, distances, torch.inf).reciprocal()
    at = products.diagonal()[:, None, None] - products[:, :, None] - products[:, None, :] + products
    return at * inverse[:, :, None] * inverse[:, None, :]


def _u_centred(products: Tensor) -> Tensor:
    count = len(products)
    off = 1 - torch.eye(count, dtype=products.dtype, device=products.device)
    products = products * off
    means = products.sum(0) / (count - 2)
    return (products - means[:, None] - means + means.sum() / (count - 1)) * off

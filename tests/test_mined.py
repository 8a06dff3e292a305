"""MinED: nearest spellings by brute force, plain KL over one vocabulary, hard labels where the sides do not meet."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.byte_view import ByteView, byte_view
from align.kernels.string_maps import nearest_by_edits
from align.kernels.teacher_rows import Teacher
from align.methods.mined import mined, spelling_map
from distill.batch import TeacherRows
from distill.divergences import forward_kl

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "tokenizers"
STUDENT = (b"the", b" cat", b"c", b"a", b"t", b"\xe4\xbd\xa0", None)
TEACHER = (b"t", b"then", b" car", b"\xe4\xbd\xa0\xe5\xa5\xbd", None, b"a", b"\xe5")


def view(pieces: tuple[bytes | None, ...], special: dict[int, str] | None = None) -> ByteView:
    return ByteView(pieces, special or {}, "byte-level", False)


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense(rows: torch.Tensor) -> Teacher:
    return Teacher.dense(rows, num_outcomes=rows.shape[-1])


def everywhere(student: torch.Tensor, teacher: Teacher, tables: torch.Tensor, width: int) -> torch.Tensor:
    """Compare rows that are all one to one, with a token that counts for itself."""
    theirs = (tables >= 0).nonzero()[0].expand(len(student))
    spans = torch.ones(len(student), dtype=torch.bool)
    return mined(student, teacher, tables, width=width, labels=tables[theirs], teacher_labels=theirs, one_to_one=spans)


def edits(one: str, other: str) -> int:
    row = list(range(len(other) + 1))
    for a, first in enumerate(one, 1):
        last, row[0] = row[0], a
        for b, second in enumerate(other, 1):
            last, row[b] = row[b], min(row[b] + 1, row[b - 1] + 1, last + (first != second))
    return row[-1]


WORDS = st.text("ab é你", min_size=1, max_size=6).map(str.encode) | st.sampled_from([b"\xe4", b"a\xff", b"\xe5\xa5"])


@given(pieces=st.lists(WORDS, max_size=6), words=st.lists(WORDS, min_size=1, max_size=12))
def test_the_nearest_token_has_the_fewest_edits_then_the_nearest_length_then_the_lowest_id(pieces, words):
    found = nearest_by_edits(pieces, view(tuple(words)))
    known = {word: token for token, word in enumerate(words)}  # of doubles the highest id
    for piece, token in zip(pieces, found.tolist(), strict=True):
        own = piece.decode(errors="surrogateescape")
        ranked = [
            (edits(own, text), abs(len(own) - len(text)), number)
            for word, number in known.items()
            for text in [word.decode(errors="surrogateescape")]
        ]
        assert token == min(ranked)[2]


def test_a_vocabulary_without_text_has_no_nearest_token():
    with pytest.raises(ValueError, match="stands for text"):
        nearest_by_edits([b"a"], view((None,)))


def test_exact_tokens_count_for_themselves_and_special_ones_for_their_partner_or_nobody():
    found = spelling_map(view(STUDENT, {6: "</s>"}), view(TEACHER, {4: "<|end|>"}))
    assert found.tolist() == [4, 0, 1, 5, -1, 3, 2]
    assert spelling_map(view(STUDENT, {6: "</s>"}), view(TEACHER, {4: "<|end|>"}), specials={6: 4})[4] == 6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_equal_student_has_no_loss_and_no_gradient(dtype):
    rows = logits(4, 6).to(dtype).requires_grad_()
    value = everywhere(rows, dense(rows), torch.arange(6), 6)
    assert value.abs().max() < 1e-6
    assert torch.autograd.grad(value.sum(), rows)[0].abs().max() < 1e-6


def test_a_permuted_and_padded_teacher_is_plain_kl():
    letters = tuple(bytes([97 + letter]) for letter in range(6))
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    tables = spelling_map(view(letters), view(tuple(letters[letter] for letter in order)))
    assert tables.tolist() == order.tolist()
    student, teacher = logits(4, 6).requires_grad_(), logits(4, 6, seed=1)
    wide = torch.cat([student, torch.full((4, 2), 9.0, dtype=torch.float64)], -1)
    value = everywhere(wide, dense(teacher[:, order]), tables, 6)
    plain = forward_kl(student.log_softmax(-1), teacher.log_softmax(-1))
    torch.testing.assert_close(value, plain)
    slopes = [torch.autograd.grad(each.sum(), student)[0] for each in (value, plain)]
    torch.testing.assert_close(*slopes)
    assert slopes[0].sum(-1).abs().max() < 1e-12


def test_where_the_sides_do_not_meet_the_realised_token_is_the_target():
    tables = spelling_map(view(STUDENT), view(TEACHER))
    student = logits(4, len(STUDENT)).requires_grad_()
    teacher_logits = logits(4, len(TEACHER), seed=1).requires_grad_()
    labels, theirs = torch.tensor([4, 4, 3, 3]), torch.tensor([0, 0, 5, 0])
    value = mined(
        student,
        dense(teacher_logits),
        tables,
        width=len(STUDENT),
        labels=labels,
        teacher_labels=theirs,
        one_to_one=torch.tensor([True, False, True, True]),  # the last one's tokens do not count for each other
    )
    target = torch.zeros(4, len(STUDENT), dtype=torch.float64)
    for token, own in enumerate(tables.tolist()):
        if own >= 0:
            target[:, own] += teacher_logits.detach().softmax(-1)[:, token]
    target = (target / target.sum(-1, keepdim=True)).log()
    own = student.log_softmax(-1)
    taught = forward_kl(own, target)
    hard = torch.nn.functional.cross_entropy(student, labels, reduction="none")
    torch.testing.assert_close(value, torch.stack([taught[0], hard[1], taught[2], hard[3]]))
    slopes = torch.autograd.grad(value.sum(), [student, teacher_logits], allow_unused=True)
    assert slopes[0].sum(-1).abs().max() < 1e-12
    assert slopes[1] is None


def test_certain_models_score_zero_unless_a_row_off():
    text = torch.tensor([0, 4, 1, 3])
    rows = torch.full((4, 6), -1e3).scatter(1, text[:, None], 1e3)

    def loss(student, teacher, labels):
        every = torch.ones(len(labels), dtype=torch.bool)
        return mined(
            student, dense(teacher), torch.arange(6), width=6, labels=labels, teacher_labels=labels, one_to_one=every
        )

    assert loss(rows, rows, text).max() == 0
    assert (loss(rows[1:], rows[:-1], text[:-1]) > 1e3).all()


def test_of_a_top_k_teacher_what_is_listed_is_renormalised_and_all_of_it_is_the_dense_one():
    tables = spelling_map(view(STUDENT), view(TEACHER))
    student, teacher = logits(3, len(STUDENT)), logits(3, len(TEACHER), seed=1)

    def listed(kept: int) -> torch.Tensor:
        best, ids = teacher.log_softmax(-1).topk(kept)
        rows = TeacherRows(ids, logprobs=best)
        return everywhere(student, Teacher.stored(rows, num_outcomes=len(TEACHER)), tables, len(STUDENT))

    torch.testing.assert_close(listed(len(TEACHER)), everywhere(student, dense(teacher), tables, len(STUDENT)))
    best, ids = teacher.softmax(-1).topk(2)
    target = torch.zeros(3, len(STUDENT) + 1, dtype=torch.float64).scatter_add(1, tables[ids] % 8, best)[:, :-1]
    target = (target / target.sum(-1, keepdim=True)).log()
    torch.testing.assert_close(listed(2), forward_kl(student.log_softmax(-1), target))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_certainty_and_impossibility_are_finite(dtype):
    student = torch.zeros(2, 6).index_fill_(1, torch.tensor([1]), -60000.0).to(dtype).requires_grad_()
    sure = torch.full((2, 6), -math.inf).index_fill_(1, torch.tensor([0]), 0.0).to(dtype)
    value = everywhere(student, dense(sure), torch.arange(6), 6)
    assert value.dtype == torch.float32
    assert value.isfinite().all()
    assert torch.autograd.grad(value.sum(), student)[0].isfinite().all()


def test_a_teacher_that_only_lists_tokens_without_a_counterpart_leaves_the_realised_token():
    tables = torch.tensor([0, 1, -1])
    sure = torch.tensor([[-math.inf, -math.inf, 0.0]])
    student = logits(1, 2).float()
    value = everywhere(student, dense(sure), tables, 2)
    torch.testing.assert_close(value, torch.nn.functional.cross_entropy(student, torch.tensor([0]), reduction="none"))


def test_nearest_spellings_of_real_tokens():
    if not (SHARED / "smollm2" / "tokenizer.json").exists():
        pytest.skip("the tokenizer is not here")
    from tokenizers import Tokenizer

    tokens = byte_view(Tokenizer.from_file(str(SHARED / "smollm2" / "tokenizer.json")))
    near = [tokens.tokens[token] for token in nearest_by_edits([b"Reuters", b" vuel"], tokens).tolist()]
    assert near[0] == b" Reuters"
    assert edits(" vuel", near[1].decode()) == 1
    assert len(near[1]) == len(" vuel")

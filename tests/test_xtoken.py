"""X-Token: its matrix against a dense one, both losses over one vocabulary, and the bias that the matrix brings."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.byte_view import ByteView, byte_view
from align.kernels.string_maps import exact_matching, matching, tokenised_again
from align.kernels.teacher_rows import Teacher
from align.methods.xtoken import Projection, choose, h_kl, p_kl, projection
from distill.batch import TeacherRows
from distill.divergences import forward_kl
from distill.errors import UserError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "tokenizers"
STUDENT = (b"2", b"0", b"1", b"201", b"a", b"the", None)
TEACHER = (b"1", b"0", b"2", b"a", b"then", b"t", b"h", b"e", b"n", None)


def view(pieces: tuple[bytes | None, ...], special: dict[int, str] | None = None) -> ByteView:
    return ByteView(pieces, special or {}, "byte-level", False)


TABLES = projection(view(STUDENT, {6: "</s>"}), view(TEACHER, {9: "<|end|>"}), specials={6: 9})
LETTERS = tuple(bytes([97 + letter]) for letter in range(6))
SAME = projection(view(LETTERS), view(LETTERS))
LOSSES = {"p_kl": p_kl, "h_kl": h_kl}
EACH = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense(rows: torch.Tensor, num_outcomes: int | None = None) -> Teacher:
    return Teacher.dense(rows, num_outcomes=num_outcomes or rows.shape[-1])


def value_and_gradient(loss, student, teacher, tables, **options):
    student = student.detach().clone().requires_grad_()
    value = loss(student, teacher, tables, **options)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    return value.detach(), gradient


def as_matrix(tables: Projection) -> torch.Tensor:
    matrix = torch.zeros(tables.common.student_size, tables.common.teacher_size, dtype=torch.float64)
    moved = tables.map
    matrix[moved.sources, moved.reached[moved.targets]] = moved.log_weights.double().exp()
    return matrix


def test_w_is_the_exact_tokens_and_the_shares_of_the_others():
    matrix = as_matrix(TABLES)
    for token in (b"2", b"0", b"1", b"a"):
        assert matrix[STUDENT.index(token)].tolist() == [float(other == token) for other in TEACHER]
    expected = {b"2": 0.9009, b"0": 0.0901, b"1": 0.0090}
    row = matrix[STUDENT.index(b"201")]
    assert row.tolist() == pytest.approx([expected.get(token, 0.0) for token in TEACHER], abs=1e-4)
    assert matrix[6].nonzero().tolist() == [[9]]
    expected = {b"t": 0.9009, b"h": 0.0901, b"e": 0.0090}
    row = matrix[STUDENT.index(b"the")]
    assert row.tolist() == pytest.approx([expected.get(token, 0.0) for token in TEACHER], abs=1e-4)
    assert TEACHER.index(b"then") not in TABLES.map.reached  # the student has no "n" to write it with


def test_tokens_of_the_teacher_count_the_other_way_too():
    tables = projection(view((b"the", b"n", b"x")), view((b"then", b"t", b"h", b"e", b"n", b"x")))
    # "the" is t, h, e; "then" is the, n.
    weights = torch.tensor([0.9 / 0.99, 0.9 / 0.999, 0.09 / 0.999, 0.009 / 0.999], dtype=torch.float64)
    torch.testing.assert_close(as_matrix(tables)[0, :4], weights / weights.sum(), atol=1e-6, rtol=0)
    assert as_matrix(tables)[1].tolist() == [0, 0, 0, 0, 1, 0]  # an exact match takes all: "then" has no part of "n"


def test_of_several_students_tokens_with_one_target_the_heaviest_is_common():
    tables = projection(view((b"ab", b"abb", b"c")), view((b"a", b"b", b"c")))
    pairs = set(zip(tables.common.student.tolist(), tables.common.teacher.tolist(), strict=True))
    # a, b is .909 and .091; a, b, b is .9009 and .0991
    assert pairs == {(0, 0), (2, 2)}


PIECES = st.lists(st.text("abc", min_size=1, max_size=4).map(str.encode), min_size=1, max_size=8, unique=True)


@given(student=PIECES, teacher=PIECES, kept=st.integers(1, 4))
def test_w_is_what_is_said_of_it(student, teacher, kept):
    own, theirs = ([*dict.fromkeys([*pieces, b"a", b"b", b"c"])] for pieces in (student, teacher))
    forth = tokenised_again(own, view(tuple(theirs)))
    back = tokenised_again(theirs, view(tuple(own)))
    shares = {n: [0.9 * 0.1**i / sum(0.9 * 0.1**k for k in range(n)) for i in range(n)] for n in range(1, kept + 1)}
    expected = torch.zeros(len(own), len(theirs), dtype=torch.float64)
    for token, text in enumerate(own):
        if text in theirs:
            expected[token, theirs.index(text)] = 1.0
            continue
        row = [0.0] * len(theirs)
        for other, share in zip(forth[token], shares[min(kept, len(forth[token]))], strict=False):
            row[other] += share
        for other, parts in enumerate(back):
            if theirs[other] not in own:
                for part, share in zip(parts, shares[min(kept, len(parts))], strict=False):
                    row[other] += share * (part == token)
        best = sorted(range(len(theirs)), key=lambda other: (-row[other], other))[:kept]
        for other in best:
            expected[token, other] = row[other] / sum(row[each] for each in best)
    found = as_matrix(projection(view(tuple(own)), view(tuple(theirs)), kept=kept))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@given(student=PIECES, teacher=PIECES, seed=st.integers(0, 99), kept=st.integers(1, 4))
def test_pushing_is_multiplying_by_a_matrix_whose_rows_add_up_to_one(student, teacher, seed, kept):
    own, theirs = ([*dict.fromkeys([*pieces, b"a", b"b", b"c"])] for pieces in (student, teacher))
    tables = projection(view(tuple(own)), view(tuple(theirs)), kept=kept)
    matrix = as_matrix(tables)
    torch.testing.assert_close(matrix.sum(-1), torch.ones(len(own), dtype=torch.float64))
    assert ((matrix > 0).sum(-1) <= kept).all()
    logp = logits(3, len(own), seed=seed).log_softmax(-1)
    torch.testing.assert_close(tables.map.push(logp).exp(), (logp.exp() @ matrix)[:, tables.map.reached])
    target = logits(3, len(theirs), seed=seed + 1)
    brute = [side[:, tables.map.reached].log() for side in (logp.exp() @ matrix, target.softmax(-1))]
    torch.testing.assert_close(
        p_kl(logp, dense(target), tables), forward_kl(*(side.log_softmax(-1) for side in brute)), atol=1e-9, rtol=1e-6
    )


@EACH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_equal_student_has_no_loss_and_no_gradient(loss, dtype):
    rows = logits(4, 6).to(dtype)
    value, gradient = value_and_gradient(loss, rows, dense(rows), SAME)
    assert value.abs().max() < 1e-6
    assert gradient.abs().max() < 1e-6


@EACH
def test_a_permuted_and_padded_teacher_is_plain_kl(loss):
    student, teacher = logits(4, 6), logits(4, 6, seed=1)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    tables = projection(view(LETTERS), view(tuple(LETTERS[letter] for letter in order)))
    permuted, wide = (
        torch.cat([rows, torch.full((4, 2), 9.0, dtype=torch.float64)], -1) for rows in (teacher[:, order], student)
    )
    value, gradient = value_and_gradient(loss, wide, dense(permuted, 6), tables)
    own = student.clone().requires_grad_()
    plain = forward_kl(own.log_softmax(-1), teacher.log_softmax(-1))
    torch.testing.assert_close(value, plain.detach(), atol=1e-9, rtol=1e-6)
    torch.testing.assert_close(gradient[:, :6], torch.autograd.grad(plain.sum(), own)[0], atol=1e-9, rtol=1e-6)
    assert (gradient[:, 6:] == 0).all()


@EACH
def test_only_the_student_learns_and_a_rows_gradient_sums_to_zero(loss):
    teacher = logits(5, len(TEACHER), seed=1).requires_grad_()
    value, gradient = value_and_gradient(loss, logits(5, len(STUDENT)), dense(teacher), TABLES)
    assert (value > 0).all()
    assert gradient.abs().max() > 1e-3
    assert gradient.sum(-1).abs().max() < 1e-9


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_certainty_and_impossibility_are_finite(loss, dtype):
    far = torch.zeros(1, len(STUDENT)).index_fill_(1, torch.tensor([1, 3]), -60000.0)
    sure = torch.full((1, len(STUDENT)), -60000.0).index_fill_(1, torch.tensor([3]), 0.0)
    theirs = torch.full((1, len(TEACHER)), -math.inf).index_fill_(1, torch.tensor([2]), 0.0)
    student, teacher = torch.cat([far, sure, far]).to(dtype), torch.cat([theirs, theirs, 0 * theirs.nan_to_num()])
    value, gradient = value_and_gradient(loss, student, dense(teacher.to(dtype)), TABLES)
    assert value.isfinite().all()
    assert gradient.isfinite().all()


@EACH
def test_rows_know_nothing_of_each_other(loss):
    student, teacher = logits(5, len(STUDENT)), logits(5, len(TEACHER), seed=1)
    some = torch.tensor([3, 0, 3])
    part = loss(student[some], dense(teacher[some]), TABLES)
    torch.testing.assert_close(part, loss(student, dense(teacher), TABLES)[some])


def test_a_perfect_students_bias_on_numerals():
    """Invariant 12 fails: "201", one token for the student and three for the teacher. H-KL's is far worse."""
    teacher = torch.full((1, len(TEACHER)), -1e3, dtype=torch.float64).index_fill_(1, torch.tensor([2]), 0.0)
    sure = torch.full((1, len(STUDENT)), -1e3, dtype=torch.float64)
    sure[0, STUDENT.index(b"201")] = 0.0
    value, _ = value_and_gradient(p_kl, sure, dense(teacher), TABLES)
    assert float(value) == pytest.approx(0.104, abs=5e-4)
    assert float(value) == pytest.approx(-math.log(0.9 / 0.999))
    nearly = torch.tensor([[0.01, 1e-9, 1e-9, 0.99, 1e-9, 1e-9, 1e-9]], dtype=torch.float64).log()
    value, gradient = value_and_gradient(p_kl, nearly, dense(teacher), TABLES)
    assert gradient[0, STUDENT.index(b"2")] < -1e-4  # downhill is towards "2"
    assert gradient[0, STUDENT.index(b"201")] > 1e-4
    assert h_kl(nearly, dense(teacher), TABLES) > 4


@EACH
def test_certain_models_score_zero_unless_a_row_off(loss):
    text = torch.tensor([0, 4, 1, 3])
    rows = torch.full((4, 6), -1e3, dtype=torch.float64)
    rows[torch.arange(4), text] = 1e3
    assert loss(rows, dense(rows), SAME).abs().max() < 1e-9
    assert (loss(rows[1:], dense(rows[:-1]), SAME) > 1e3 - 1).all()


def test_half_the_probability_of_a_span_changes_h_kl_and_not_p_kl():
    """Invariant 15 fails for P-KL as published: renormalising takes the earlier tokens' probability out again."""
    student, teacher = logits(4, len(STUDENT)), dense(logits(4, len(TEACHER), seed=1))
    prior = torch.full((4,), -0.7, dtype=torch.float64)
    whole, half = (
        h_kl(student, teacher, TABLES, student_prior=prior - gone, teacher_prior=prior) for gone in (0.0, math.log(2))
    )
    assert ((whole - half).abs() > 1e-2).all()
    with pytest.raises(TypeError):
        p_kl(student, teacher, TABLES, student_prior=prior)


def test_h_kl_is_still_where_all_that_it_compares_is_equal():
    """Where its own partial sum would drain the tokens that are not common."""
    pieces = ((b"a", b"b", b"cd"), (b"b", b"a", b"ca"))
    tables = projection(view(pieces[0]), view(pieces[1]))
    assert tables.common.student.tolist() == [0, 1]
    student = torch.tensor([[0.5, 0.2, 0.3]], dtype=torch.float64).log().requires_grad_()
    value, gradient = value_and_gradient(h_kl, student, dense(student[:, [1, 0, 2]]), tables)
    assert value.abs().max() < 1e-12
    kl_only = value_and_gradient(h_kl, student, dense(student[:, [1, 0, 2]]), tables, uncommon_weight=0.0)[1]
    assert kl_only.abs().max() < 1e-12
    partial = forward_kl(student.log_softmax(-1)[:, :2], student.detach()[:, :2])
    assert torch.autograd.grad(partial.sum(), student)[0].abs().max() > 0.1
    assert gradient.abs().max() <= 0.3


def test_temperatures_go_before_the_matrix():
    student, teacher = logits(3, len(STUDENT)), logits(3, len(TEACHER), seed=1)
    tempered = p_kl(student / 2, Teacher.dense(teacher, num_outcomes=len(TEACHER), temperature=2.0), TABLES)
    matrix = as_matrix(TABLES)[:, TABLES.map.reached]
    own, theirs = (student / 2).softmax(-1) @ matrix, (teacher / 2).softmax(-1)[:, TABLES.map.reached]
    torch.testing.assert_close(tempered, forward_kl(*(side.log().log_softmax(-1) for side in (own, theirs))))


def stored(rows: torch.Tensor, kept: int) -> Teacher:
    best, ids = rows.log_softmax(-1).topk(kept)
    tail = torch.log1p(-best.exp().sum(-1).clamp(max=1.0))
    return Teacher.stored(TeacherRows(ids, logprobs=best, tail=tail), num_outcomes=rows.shape[-1])


def test_p_kl_of_a_top_k_teacher_is_that_of_what_is_listed_and_of_all_the_dense_one():
    student, teacher = logits(4, len(STUDENT)), logits(4, len(TEACHER), seed=1)
    value, gradient = value_and_gradient(p_kl, student, stored(teacher, len(TEACHER)), TABLES)
    whole, slope = value_and_gradient(p_kl, student, dense(teacher), TABLES)
    torch.testing.assert_close(value, whole, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(gradient, slope, atol=1e-6, rtol=1e-6)
    three = stored(teacher, 3)
    value, gradient = value_and_gradient(p_kl, student, three, TABLES)
    pushed = TABLES.map.push(student.log_softmax(-1))
    for row in range(4):
        listed = [token for token in three.listed[0][row].tolist() if TABLES.column[token] >= 0]
        own = pushed[row, TABLES.column[torch.tensor(listed, dtype=torch.int64)]].log_softmax(-1)
        theirs = teacher[row, listed].log_softmax(-1)
        torch.testing.assert_close(value[row], forward_kl(own, theirs))
    assert gradient.isfinite().all()


def test_a_row_of_which_nothing_is_reached_is_left_out_and_h_kl_refuses_top_k():
    unreached = TEACHER.index(b"then")
    ids = torch.tensor([[unreached, -1]])
    teacher = Teacher.stored(
        TeacherRows(ids, logprobs=torch.tensor([[-0.1, -math.inf]]), tail=torch.tensor([-2.4])), num_outcomes=10
    )
    value, gradient = value_and_gradient(p_kl, logits(1, len(STUDENT)), teacher, TABLES)
    assert value.tolist() == [0.0]
    assert (gradient == 0).all()
    sure = torch.full((1, len(TEACHER)), -math.inf).index_fill_(1, torch.tensor([unreached]), 0.0)
    assert p_kl(logits(1, len(STUDENT)), dense(sure), TABLES).abs().max() < 1e-6
    with pytest.raises(UserError, match="whole distribution"):
        h_kl(logits(1, len(STUDENT)), teacher, TABLES)


def test_the_loss_is_chosen_by_what_becomes_of_numerals():
    assert choose(TABLES, view(STUDENT)) == ("p_kl", 0.0)
    numerals = (b"1", b"12", b"123", b"a")
    assert choose(projection(view(numerals), view(numerals)), view(numerals)) == ("h_kl", 1.0)
    single = (b"1", b"2", b"a")
    assert choose(projection(view(single), view(numerals)), view(single)) == ("h_kl", 1.0)


def test_byte_pieces_and_their_doubles_are_paired_one_to_one_and_special_tokens_never_by_text():
    twice = view((b"A", b"<s>", b"A", b"B"))
    found = exact_matching(twice, view((b"A", None, b"B"), {1: "<s>"}))
    assert (found.student.tolist(), found.teacher.tolist()) == ([2, 3], [0, 2])
    assert (found.student_alone.tolist(), found.teacher_alone.tolist()) == ([0, 1], [1])
    same = exact_matching(twice, twice)
    assert same.student.tolist() == same.teacher.tolist() == [0, 1, 2, 3]
    named = exact_matching(twice, twice, specials={0: 2})
    assert (named.student.tolist(), named.teacher.tolist()) == ([0, 1, 2, 3], [2, 1, 0, 3])
    with pytest.raises(AssertionError, match="two pairs"):
        matching([(0, 1), (2, 1)], 3, 3)


def test_what_has_no_tokens_is_empty():
    assert tokenised_again([b"abc", b"ab", b"", b"\xff"], view((b"a", b"ab", b"b"))) == [[], [1], [], []]


def test_a_real_pair():
    """GPT-2 has numerals of many digits, SmolLM2 digits alone, and lacks 21 of the 256 bytes."""
    if not all((SHARED / name / "tokenizer.json").exists() for name in ("gpt2", "smollm2")):
        pytest.skip("the tokenizers are not here")
    from tokenizers import Tokenizer

    tokenizers = [Tokenizer.from_file(str(SHARED / name / "tokenizer.json")) for name in ("gpt2", "smollm2")]
    views = [byte_view(tokenizer) for tokenizer in tokenizers]
    tables = projection(*views, student_tokenizer=tokenizers[0], teacher_tokenizer=tokenizers[1])
    sums = torch.zeros(len(views[0])).index_add(0, tables.map.sources, tables.map.log_weights.exp())
    missing = set(views[1].missing_bytes())
    written = torch.tensor([bool(token) and missing.isdisjoint(token) for token in views[0].tokens])
    torch.testing.assert_close(sums[written], torch.ones(int(written.sum())), atol=1e-5, rtol=0)
    loss, share = choose(tables, views[0])
    assert loss == "p_kl"
    assert share < 0.01
    value = p_kl(torch.zeros(2, len(views[0])), dense(torch.zeros(2, len(views[1]))), tables)
    assert (value > 0).all()
    assert value.isfinite().all()

from itertools import pairwise

import pytest
import torch
from byte_oracle import END, random_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cells import bpe

from align.byte_view import byte_view
from align.kernels.cell_rows import Came, Tables, interior_rows, root_rows
from align.kernels.covered_rows import Covered, covered_rows
from align.kernels.pooling import pool, pool_flat
from align.kernels.prefixes import Pairs
from align.kernels.teacher_rows import Teacher
from align.methods import bpm, cspc, shared_kl
from align.spans import spans_of
from distill.batch import TeacherRows
from distill.divergences import COARSENING, DIVERGENCES
from distill.errors import UserError

TABLES = {"shared_kl": shared_kl.tables, "bpm": bpm.tables, "cspc": cspc.tables}
methods = pytest.mark.parametrize("tables_of", TABLES.values(), ids=TABLES)
divergences = pytest.mark.parametrize("divergence", DIVERGENCES)
N = 5


def pair(seed: int = 0):
    return random_tokenizer("abc", 7, seed), random_tokenizer("abcd", 8, seed + 1)


def tables_for(tables_of, student, teacher) -> Tables:
    return tables_of(student, teacher, stops=([student.token_to_id(END)], [teacher.token_to_id(END)]))


def logits_of(tokenizer, seed: int, *, scale: float = 2.0, padding: int = 0, dtype=torch.float64) -> torch.Tensor:
    width = tokenizer.get_vocab_size() + padding
    return (scale * torch.randn(N, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)).requires_grad_()


def dense(logits: torch.Tensor, tokenizer) -> Teacher:
    return Teacher.dense(logits, num_outcomes=tokenizer.get_vocab_size())


def listed(logits: torch.Tensor, top_k: int) -> TeacherRows:
    logp, ids = logits.detach().log_softmax(-1).sort(descending=True)
    return TeacherRows(ids[:, :top_k], logp[:, :top_k], tail=logp[:, top_k:].logsumexp(-1))


def boundaries(tables: Tables, student, teacher) -> Pairs:
    """Return every boundary that a token of either side can run over, at rows taken in turn."""
    found = []
    for coarser, inside, tokenizer in ((False, tables.finer, teacher), (True, tables.coarser, student)):
        if inside is not None:
            for token, text in enumerate(byte_view(tokenizer).tokens):
                found += [(token, cut, coarser) for cut in range(1, len(text or b""))]
    row = torch.arange(len(found))
    token, cut, coarser = (torch.tensor(part) for part in zip(*found, strict=True))
    return Pairs(row % N, (row + 1) % N, token, cut, coarser)


@methods
@divergences
def test_a_permuted_and_padded_vocabulary_is_compared_exactly(tables_of, divergence):
    tokens, merges = ["a", "b", "c", "ab", "abc", "cc"], [("a", "b"), ("ab", "c"), ("c", "c")]
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    student, teacher = bpe(tokens, merges, [END]), bpe(tokens, merges, [END], order=order)
    own, others = logits_of(student, 0, padding=3), logits_of(student, 1)
    placed = torch.cat([torch.empty_like(others).index_copy(1, order, others), torch.full((N, 9), 5.0)], -1)
    tables = tables_for(tables_of, student, teacher)
    value = root_rows(own, dense(placed, teacher), tables, divergence=divergence)
    plain = DIVERGENCES[divergence](own[:, :7].log_softmax(-1), others.log_softmax(-1))
    torch.testing.assert_close(value, plain, rtol=1e-9, atol=1e-12)
    gradients = [torch.autograd.grad(each.sum(), own, retain_graph=True)[0] for each in (value, plain)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@methods
@divergences
def test_equal_models_are_0_without_a_slope(tables_of, divergence):
    student, _ = pair()
    logits = logits_of(student, 3)
    tables = tables_for(tables_of, student, student)
    value = root_rows(logits, dense(logits, student), tables, divergence=divergence)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-12)
    if divergence != "tvd":  # which has a kink there
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


@methods
@divergences
def test_only_the_student_gets_a_slope_and_it_sums_to_0(tables_of, divergence):
    student, teacher = pair()
    own, others = logits_of(student, 4, padding=2), logits_of(teacher, 5)
    tables, who = tables_for(tables_of, student, teacher), dense(others, teacher)
    value = root_rows(own, who, tables, divergence=divergence).sum()
    if tables.finer is not None:
        value = (
            value + interior_rows(own, who, tables, boundaries(tables, student, teacher), divergence=divergence).sum()
        )
    value.backward()
    assert others.grad is None
    assert own.grad.abs().max() > 1e-3
    torch.testing.assert_close(own.grad.sum(-1), own.new_zeros(N), rtol=0, atol=1e-12)
    assert (own.grad[:, -2:] == 0).all()


@pytest.mark.parametrize("method", ["bpm", "cspc"])
@pytest.mark.parametrize("divergence", sorted(COARSENING))
def test_slopes_inside_tokens_are_those_of_the_values(method, divergence):
    student, teacher = pair()
    own, who = logits_of(student, 4), dense(logits_of(teacher, 5), teacher)
    tables = tables_for(TABLES[method], student, teacher)
    pairs = Pairs(*(part[::5] for part in boundaries(tables, student, teacher)))
    options = {"divergence": divergence}
    assert torch.autograd.gradcheck(lambda x: interior_rows(x, who, tables, pairs, **options), own)
    assert torch.autograd.gradcheck(lambda x: root_rows(x, who, tables, **options), own)


@methods
@divergences
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_certain_models_have_finite_slopes(tables_of, divergence, dtype):
    student, teacher = pair()
    own = logits_of(student, 6, scale=3000.0, dtype=torch.float32).detach().to(dtype).requires_grad_()
    who = dense(logits_of(teacher, 7, scale=3000.0, dtype=torch.float32), teacher)
    tables = tables_for(tables_of, student, teacher)
    value = root_rows(own, who, tables, divergence=divergence)
    if tables.finer is not None:
        pairs = boundaries(tables, student, teacher)
        value = torch.cat([value, interior_rows(own, who, tables, pairs, divergence=divergence)])
    assert value.dtype == torch.float32
    assert value.isfinite().all()
    value.sum().backward()
    assert own.grad.isfinite().all()


@methods
@pytest.mark.parametrize("top_k", [1, 3, 100])
def test_the_mass_of_every_row_is_1(tables_of, top_k):
    student, teacher = pair()
    own, others = logits_of(student, 8), logits_of(teacher, 9)
    cells = tables_for(tables_of, student, teacher).cells
    rows = (dense(others, teacher), Teacher.stored(listed(others, top_k), num_outcomes=others.shape[-1]))
    for who in rows:
        left_out = who.masses((cells.teacher < 0).long(), 2)[:, 1]
        total = who.masses(cells.teacher, cells.count).sum(-1) + who.rest + left_out
        torch.testing.assert_close(total, torch.ones_like(total))
    total = pool(own, cells.student, cells.count).logsumexp(-1)
    torch.testing.assert_close(
        total, own[:, : len(cells.student)].masked_fill(cells.student < 0, -torch.inf).logsumexp(-1)
    )


@methods
@pytest.mark.parametrize("divergence", sorted(COARSENING))
@given(seed=st.integers(0, 10_000))
@settings(max_examples=10, deadline=None)
def test_a_coarsened_value_is_a_lower_bound(tables_of, divergence, seed):
    # One vocabulary on both sides, compared in the cells that a pair of different ones has.
    student, teacher = pair(seed)
    cells = tables_for(tables_of, student, teacher).cells
    own, others = logits_of(student, seed), logits_of(student, seed + 1)
    kept = cells.student >= 0
    sides = [side[:, kept].log_softmax(-1) for side in (own, others)]
    full = DIVERGENCES[divergence](*sides)
    coarse = DIVERGENCES[divergence](*(pool(side, cells.student[kept], cells.count) for side in sides))
    assert (coarse >= -1e-12).all()
    assert (coarse <= full + 1e-12).all()


@methods
@divergences
def test_all_outcomes_listed_are_the_dense_value(tables_of, divergence):
    student, teacher = pair()
    own, others = logits_of(student, 10), logits_of(teacher, 11)
    tables = tables_for(tables_of, student, teacher)
    stored = Teacher.stored(listed(others, others.shape[-1]), num_outcomes=others.shape[-1])
    options = {"divergence": divergence}
    torch.testing.assert_close(
        root_rows(own, stored, tables, **options), root_rows(own, dense(others, teacher), tables, **options)
    )
    if tables.finer is not None:
        pairs = boundaries(tables, student, teacher)
        values = [interior_rows(own, who, tables, pairs, **options) for who in (stored, dense(others, teacher))]
        torch.testing.assert_close(*values)


@methods
@pytest.mark.parametrize("divergence", sorted(COARSENING))
def test_listing_more_never_hides_more_where_cells_are_single_tokens(tables_of, divergence):
    student, _ = pair()
    own, others = logits_of(student, 12), logits_of(student, 13)
    tables = tables_for(tables_of, student, student)
    values = [
        root_rows(own, Teacher.stored(listed(others, k), num_outcomes=others.shape[-1]), tables, divergence=divergence)
        for k in range(1, others.shape[-1] + 1)
    ]
    for fewer, more in pairwise(values):
        assert (more >= fewer - 1e-9).all()


@given(seed=st.integers(0, 10_000), top_k=st.integers(1, 9))
@settings(max_examples=20, deadline=None)
def test_the_token_that_came_is_always_listed(seed, top_k):
    _, teacher = pair()
    others = logits_of(teacher, seed).detach()
    logp, width = others.log_softmax(-1), others.shape[-1]
    came = torch.randint(width, (N,), generator=torch.Generator().manual_seed(seed))
    rows = listed(others, top_k)
    realised = logp.gather(1, came[:, None])[:, 0]
    who = Teacher.stored(rows._replace(realised=realised), num_outcomes=width, came=came)
    ids, known = who.listed
    there = (ids == came[:, None]) & (known > -torch.inf)
    assert (there.sum(-1) == 1).all()
    torch.testing.assert_close(known[there], realised)
    torch.testing.assert_close(known.exp().sum(-1) + who.rest, torch.ones(N, dtype=torch.float64))
    without = Teacher.stored(rows, num_outcomes=width)
    assert (who.rest <= without.rest + 1e-12).all()
    # Stored numbers are rounded: a token may seem to have more than all that was left.
    rounded = rows._replace(realised=torch.zeros(N, dtype=torch.float64))
    again = Teacher.stored(rounded, num_outcomes=width, came=came)
    total = again.listed[1].exp().sum(-1) + again.rest
    torch.testing.assert_close(total, torch.ones(N, dtype=torch.float64))


def test_draws_are_refused():
    ids = torch.tensor([[1, 2]])
    for rows in (TeacherRows(ids, counts=torch.ones_like(ids)), TeacherRows(ids, ids * -1.0, counts=ids)):
        with pytest.raises(UserError, match="random draws"):
            Teacher.stored(rows, num_outcomes=3)
    with pytest.raises(UserError, match="the teacher has 3 logits"):
        Teacher.dense(torch.zeros(1, 3), num_outcomes=4)


@methods
def test_a_student_that_is_right_is_better_than_one_that_is_a_row_late(tables_of):
    student, teacher = pair()
    tables = tables_for(tables_of, student, teacher)
    text = "abcabacbcabccba"
    ids = [torch.tensor([token.id for token in tokenizer.model.tokenize(text)]) for tokenizer in (student, teacher)]
    pieces = [byte_view(side).of(own.tolist()) for side, own in zip((student, teacher), ids, strict=True)]
    roots = [torch.from_numpy(side[:, 0]) for side in spans_of(*pieces)]
    right, others = (
        torch.full((len(own), tokenizer.get_vocab_size()), -30.0).scatter(1, own[:, None], 30.0)
        for own, tokenizer in zip(ids, (student, teacher), strict=True)
    )
    who = dense(others, teacher).rows(roots[1])
    agrees = tables.cells.student[ids[0]][roots[0]] == tables.cells.teacher[ids[1]][roots[1]]
    exact, late = (root_rows(own[roots[0]], who, tables) for own in (right, right.roll(1, 0)))
    assert agrees.sum() > 2
    assert (exact[agrees] < 1e-9).all()
    assert late[agrees].mean() > 10


def neighbours(student, teacher) -> Covered:
    """Return every pair of texts of tokens of both sides, at rows taken in turn."""
    texts = [
        torch.tensor([index for index, token in enumerate(byte_view(side).tokens) if token])
        for side in (student, teacher)
    ]
    own, others = (part.flatten() for part in torch.meshgrid(*texts, indexing="ij"))
    row = torch.arange(len(own)) % (N - 1)
    return Covered(row + 1, row + 1, row, row, own, others)


@divergences
def test_one_tokenizer_has_nothing_to_cover(divergence):
    student, _ = pair()
    tables = tables_for(cspc.tables, student, student)
    assert tables.cells.exact
    own, who = logits_of(student, 20), dense(logits_of(student, 21), student)
    places = neighbours(student, student)
    places = Covered(*(part[places.student_token == places.teacher_token] for part in places))
    value = covered_rows(own, who, tables, places, divergence=divergence)
    plain = root_rows(own[places.student], who.rows(places.teacher), tables, divergence=divergence)
    torch.testing.assert_close(value, plain, rtol=1e-9, atol=1e-12)
    gradients = [torch.autograd.grad(each.sum(), own, retain_graph=True)[0] for each in (value, plain)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@divergences
def test_covered_rows_have_sound_slopes(divergence):
    student, teacher = pair()
    own, others = logits_of(student, 22, padding=2), logits_of(teacher, 23)
    tables, who = tables_for(cspc.tables, student, teacher), dense(others, teacher)
    places = Covered(*(part[::7] for part in neighbours(student, teacher)))
    value = covered_rows(own, who, tables, places, divergence=divergence)
    value.sum().backward()
    assert others.grad is None
    assert (own.grad[:, -2:] == 0).all()
    torch.testing.assert_close(own.grad.sum(-1), own.new_zeros(N), rtol=0, atol=1e-9)
    if divergence in COARSENING:
        assert (value > -1e-12).all()
        some = Covered(*(part[:2] for part in places))
        assert torch.autograd.gradcheck(lambda x: covered_rows(x, who, tables, some, divergence=divergence), own)
    stored = Teacher.stored(listed(others, others.shape[-1]), num_outcomes=others.shape[-1])
    torch.testing.assert_close(covered_rows(own, stored, tables, places, divergence=divergence), value)


@divergences
@pytest.mark.parametrize("top_k", [None, 2])
def test_covered_rows_of_certain_models_are_finite(divergence, top_k):
    student, teacher = pair()
    scale = 3000.0 if top_k is None else 3.0
    own = logits_of(student, 24, scale=3000.0, dtype=torch.float32)
    others = logits_of(teacher, 25, scale=scale, dtype=torch.float32)
    width = others.shape[-1]
    who = dense(others, teacher) if top_k is None else Teacher.stored(listed(others, top_k), num_outcomes=width)
    value = covered_rows(
        own, who, tables_for(cspc.tables, student, teacher), neighbours(student, teacher), divergence=divergence
    )
    assert value.isfinite().all()
    value.sum().backward()
    assert own.grad.isfinite().all()


def all_that_may_come(student, teacher, tables) -> dict:
    """Return the three kinds of rows with their places, and every pair of tokens that may come there."""
    own, others = (torch.arange(len(byte_view(side))) for side in (student, teacher))
    pairs, places = boundaries(tables, student, teacher), neighbours(student, teacher)
    after = Covered(*(part[::3] for part in places))
    both = [part.flatten() for part in torch.meshgrid(own, others, indexing="ij")]
    size = max(len(own), len(others))  # of the side that stands at a boundary; the other's token runs over it
    inside = Pairs(*(part.repeat_interleave(size) for part in pairs))
    standing = torch.arange(size).repeat(len(pairs.cut))
    came = Came(
        torch.where(inside.coarser, inside.token, standing % len(own)),
        torch.where(inside.coarser, standing % len(others), inside.token),
    )
    spread = [step * torch.arange(len(after.student)) % len(side) for step, side in ((1, own), (5, others))]
    return {
        "roots": (root_rows, (), Came(*both), torch.arange(len(both[0])) % N),
        "inside": (interior_rows, (inside,), came, None),
        "covered": (covered_rows, (after,), Came(*spread), None),
    }


@pytest.mark.parametrize("kind", ["roots", "inside", "covered"])
@pytest.mark.parametrize("top_k", [None, 5])
def test_what_came_adds_its_cells_log_probability_or_takes_the_row_out(kind, top_k):
    digits, numbers = [*"0125."], ["20", "201", "205", "21"]
    merges = [("2", "0"), ("20", "1"), ("20", "5"), ("2", "1")]
    student, teacher = bpe([*digits, *numbers], merges, [END]), bpe([*digits, "5."], [("5", ".")], [END])
    for first, second in ((student, teacher), (teacher, student)):
        tables = tables_for(cspc.tables, first, second)
        own, others = logits_of(first, 30), logits_of(second, 31)
        who = dense(others, second)
        if top_k is not None:
            who = Teacher.stored(listed(others, top_k), num_outcomes=others.shape[-1])
        rows, where, came, take = all_that_may_come(first, second, tables)[kind]
        teachers = who if take is None else who.rows(take)

        def value(logits, came=None, rows=rows, where=where, take=take, teachers=teachers, tables=tables):
            return rows(logits if take is None else logits[take], teachers, tables, *where, came=came)

        plain, beside = value(own), value(own, came)
        out = beside == 0
        assert 0 < out.sum() < len(out)
        assert (beside[~out] < plain[~out]).all()  # a log-probability is negative
        assert torch.autograd.gradcheck(lambda x, value=value, came=came: value(x, came)[::17], own)


def test_what_came_at_a_root_is_the_cell_that_both_sides_took():
    student, teacher = pair()
    tables = tables_for(cspc.tables, student, teacher)
    own, who = logits_of(student, 30), dense(logits_of(teacher, 31), teacher)
    _, _, came, take = all_that_may_come(student, teacher, tables)["roots"]
    cells = tables.cells
    took = cells.student[came.student]
    logp = pool(own, cells.student, cells.count).log_softmax(-1)[take]
    expected = root_rows(own, who, tables)[take] + logp.gather(1, took.clamp(min=0)[:, None])[:, 0]
    agrees = took == cells.teacher[came.teacher]
    assert agrees.any()
    value = root_rows(own[take], who.rows(take), tables, came=came)
    torch.testing.assert_close(value, torch.where(agrees, expected, 0.0))


def test_digits_are_compared_one_by_one_inside_a_longer_number():
    digits = [str(digit) for digit in range(10)]
    numbers = ["20", "201", "205", "21"]
    merges = [("2", "0"), ("20", "1"), ("20", "5"), ("2", "1")]
    student, teacher = bpe([*digits, *numbers, "."], merges, [END]), bpe([*digits, "."], [], [END])
    tables = tables_for(cspc.tables, student, teacher)
    token = {text: student.token_to_id(text) for text in (*digits, *numbers, ".")}

    def probabilities(tokenizer, **masses: float) -> torch.Tensor:
        row = torch.zeros(1, tokenizer.get_vocab_size(), dtype=torch.float64)
        for text, mass in masses.items():
            row[0, tokenizer.token_to_id(text.strip("_"))] = mass
        return row.log()

    own = probabilities(student, _2=0.1, _20=0.1, _201=0.5, _205=0.2, _21=0.1)
    pairs = [torch.tensor([part]) for part in (0, 0, token["201"], 1, True)]
    # Behind "2" the student ends the number with 0.1, goes on with "0" with 0.8 and with "1" with 0.1.
    same = probabilities(teacher, _0=0.8, _1=0.1, **{".": 0.06, "7": 0.04})
    assert abs(interior_rows(own, Teacher(logp=same), tables, Pairs(*pairs)).item()) < 1e-12
    other = probabilities(teacher, _0=0.5, _1=0.4, **{".": 0.1})
    value = interior_rows(own, Teacher(logp=other), tables, Pairs(*pairs)).item()
    sides = [torch.tensor(side, dtype=torch.float64).log() for side in ([0.8, 0.1, 0.1], [0.5, 0.4, 0.1])]
    assert value == pytest.approx(DIVERGENCES["forward_kl"](*sides).item())
    # Behind "20": 1 with 5/8, 5 with 2/8, the end with 1/8; "3" and "." are all the same to a token that ends there.
    pairs[3] = torch.tensor([2])
    same = probabilities(teacher, _1=5 / 8, _5=2 / 8, **{"3": 1 / 16, ".": 1 / 16})
    assert abs(interior_rows(own, Teacher(logp=same), tables, Pairs(*pairs)).item()) < 1e-12


def test_strict_top_k_compares_what_the_student_finds_likeliest():
    student, teacher = bpe(["a", "b", "c", "x"], [], ["<s>"]), bpe(["c", "b", "a", "y"], [], ["<s>"])
    tables = shared_kl.tables(student, teacher)
    own = torch.tensor([[5.0, 0.1, 0.2, 0.3, 9.0]]).requires_grad_()
    others = torch.tensor([[4.0, 1.0, 2.0, 3.0, 0.0]])
    value = shared_kl.strict_rows(own, dense(others, teacher), tables, top_k=2)
    sides = [torch.tensor([0.2, 0.3]).log_softmax(-1), torch.tensor([2.0, 1.0]).log_softmax(-1)]
    torch.testing.assert_close(value, DIVERGENCES["reverse_kl"](*sides)[None])
    with pytest.raises(UserError, match="running teacher"):
        shared_kl.strict_rows(own, Teacher.stored(listed(others, 2), num_outcomes=5), tables)
    with pytest.raises(UserError, match="top_k must be 2"):
        shared_kl.strict_rows(own, dense(others, teacher), tables, top_k=1)


def test_bpm_by_hand():
    student = bpe(["a", "b", "c", "ab"], [("a", "b")], ["<s>", END])
    teacher = bpe(["a", "b", "c", "abc", "abb", "ac"], [], ["<s>", END])
    tables = bpm.tables(student, teacher, stops=([1], [1]))
    q = torch.tensor([[0.02, 0.08, 0.1, 0.2, 0.1, 0.25, 0.15, 0.1]], dtype=torch.float64).log()
    p = torch.tensor([[0.1, 0.1, 0.2, 0.1, 0.2, 0.3]], dtype=torch.float64).log()
    sides = [
        torch.tensor(side, dtype=torch.float64)
        for side in ([0.1, 0.1, 0.2, 0.1, 0.2, 0.3], [0.02, 0.08, 0.2, 0.2, 0.1, 0.4])
    ]
    value = root_rows(p, Teacher(logp=q), tables)
    assert value.item() == pytest.approx((sides[1] * (sides[1] / sides[0]).log()).sum().item())
    # Behind "a" of "abc": "bc" and "bb" lead to "b", "c" to "c", and "a" itself ends there.
    pairs = Pairs(*(torch.tensor([part]) for part in (0, 0, teacher.token_to_id("abc"), 1, False)))
    mass = torch.tensor([0.4, 0.1, 0.1], dtype=torch.float64) / 0.6
    own = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
    value = interior_rows(p, Teacher(logp=q), tables, pairs)
    assert value.item() == pytest.approx((mass * (mass / own).log()).sum().item())


def test_completion_by_hand():
    student = bpe(["a", "b", "c", "bc"], [("b", "c")], [END])
    teacher = bpe(["a", "b", "c", "ab", "abc", "ac", "abcb"], [], [END])
    tables = bpm.Completion(byte_view(student), byte_view(teacher))
    q = torch.tensor([[0.1, 0.1, 0.1, 0.1, 0.2, 0.15, 0.2, 0.05]]).log()
    p = torch.tensor([[0.1, 0.2, 0.3, 0.1, 0.3]]).log().requires_grad_()
    # The teacher's tokens that the student lacks: "ab" with "abc" and "abcb", together 0.4, and "ac" with 0.2.
    value = bpm.completion_rows(p, Teacher(logp=q), tables, student_tokens=torch.tensor([student.token_to_id("a")]))
    wanted = -(0.4 * torch.tensor(0.3 + 0.3).log() + 0.2 * torch.tensor(0.1).log())
    torch.testing.assert_close(value, wanted[None])
    value.sum().backward()
    assert p.grad.isfinite().all()
    nothing = bpm.completion_rows(p, Teacher(logp=q), tables, student_tokens=torch.tensor([student.token_to_id("c")]))
    assert nothing.item() == 0
    assert nothing.requires_grad


def test_white_space_is_spaces_and_tabs():
    tokenizer = bpe(["Ġ", "ĠĠ", "ĉ", "Ġa", "Ċ", "a"], [], [END])
    assert bpm.whitespace(byte_view(tokenizer)).tolist() == [False, True, True, True, False, False, False]


@given(seed=st.integers(0, 10_000), shift=st.floats(-500, 500))
@settings(max_examples=25, deadline=None)
def test_pooling_is_a_logsumexp_whatever_the_scale(seed, shift):
    draw = torch.Generator().manual_seed(seed)
    logits = (200 * torch.randn(3, 9, generator=draw, dtype=torch.float32) + shift).requires_grad_()
    index = torch.randint(-1, 4, (9,), generator=draw)
    found = pool(logits, index, 4)
    places = (index >= 0).nonzero().flatten()
    row = torch.arange(3).repeat_interleave(len(places))
    flat = pool_flat(logits[:, places].flatten(), row, index[places].repeat(3), 3, 4)
    for cell in range(4):
        members = logits[:, index == cell]
        if members.shape[-1]:
            torch.testing.assert_close(found[:, cell], members.logsumexp(-1))
            torch.testing.assert_close(flat[:, cell], members.logsumexp(-1))
        else:
            assert (found[:, cell] == -torch.inf).all()
    (slope,) = torch.autograd.grad(found.masked_fill(found == -torch.inf, 0).sum(), logits)
    counted = index.unique()[index.unique() >= 0]
    assert slope.isfinite().all()
    torch.testing.assert_close(slope.sum(-1), torch.full((3,), float(len(counted))))

"""The kernels against probabilities that are known exactly: every text of a small world is enumerated."""

import math
from collections import defaultdict
from itertools import pairwise

import numpy as np
import pytest
import torch
from byte_oracle import Aligned, ExactModel, aligned, bias, random_texts, random_tokenizer
from test_cells import KINDS, bpe
from tokenizers import Tokenizer

from align.kernels.cell_rows import Came, Tables, interior_rows, root_rows
from align.kernels.covered_rows import covered_rows
from align.kernels.prefixes import Pairs
from align.kernels.teacher_rows import Teacher
from align.methods import bpm, cspc, shared_kl

WORLDS = [(0, 6, 6), (1, 3, 9), (2, 9, 3), (3, 0, 6), (4, 6, 0)]
worlds = pytest.mark.parametrize(("seed", "merges", "teacher_merges"), WORLDS)


def world(seed: int, merges: int, teacher_merges: int) -> tuple[ExactModel, ExactModel]:
    texts = random_texts("abc", 4, seed)
    tokenizers = random_tokenizer("abc", merges, seed + 100), random_tokenizer("abc", teacher_merges, seed + 200)
    return ExactModel(tokenizers[0], texts), ExactModel(tokenizers[1], texts)


def tables_for(tables_of, student: ExactModel, teacher: ExactModel) -> Tables:
    return tables_of(student.tokenizer, teacher.tokenizer, stops=([student.end], [teacher.end]))


@worlds
def test_spans_are_equally_likely_where_both_sides_are_sure_of_the_same(seed, merges, teacher_merges):
    student, teacher = world(seed, merges, teacher_merges)
    compared = 0
    for each in aligned(student, teacher):
        sides = []
        for model, rows, spans in (
            (student, each.student, each.spans.student),
            (teacher, each.teacher, each.spans.teacher),
        ):
            ids = (*model.ids(each.text), model.end)
            own = rows.gather(1, torch.tensor(ids)[:, None])[:, 0]
            edges = [*spans[:, 0].tolist(), len(ids) - 1, len(ids)]
            likelihoods = [own[a:b].sum().item() for a, b in pairwise(edges)]
            assert math.isclose(sum(likelihoods), math.log(each.mass), abs_tol=1e-9)
            sides.append((likelihoods, [model.mass(ids[:edge]) for edge in edges]))
        (own, met), (others, other_met) = sides
        for n, (one, other) in enumerate(zip(own, others, strict=True)):
            if math.isclose(met[n], other_met[n]) and math.isclose(met[n + 1], other_met[n + 1]):
                compared += 1
                assert math.isclose(one, other, abs_tol=1e-6)
    assert compared > 20


@worlds
@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_student_is_off_by_at_most_how_often_cells_disagree(kind, seed, merges, teacher_merges):
    # At the beginning of a text neither side knows anything that the other does not.
    student, teacher = world(seed, merges, teacher_merges)
    cells = KINDS[kind](student.tokenizer, teacher.tokenizer, stops=([student.end], [teacher.end]))
    apart = sum(
        mass
        for text, mass in student.texts.items()
        if cells.student[(*student.ids(text), student.end)[0]] != cells.teacher[(*teacher.ids(text), teacher.end)[0]]
    )
    first = [model.rows("")[:1] for model in (student, teacher)]
    value = root_rows(first[0], Teacher(logp=first[1]), Tables(cells), divergence="tvd").item()
    assert value <= apart + 1e-9


def reference(each: Aligned, number: int, student: ExactModel, teacher: ExactModel, tables: Tables, method: str):
    """Return KL(teacher || student) at a boundary inside a token, from the masses of texts alone."""
    pairs = each.pairs
    coarser, cut = bool(pairs.coarser[number]), int(pairs.cut[number])
    rows = (int(pairs.student[number]), int(pairs.teacher[number]))
    sides = [(student, tables.cells.student, rows[0]), (teacher, tables.cells.teacher, rows[1])]
    running, standing = sides if coarser else sides[::-1]
    begun = (running[0].view.tokens[int(pairs.token[number])] or b"").decode()[:cut]
    masses: list[dict[int | None, float]] = [defaultdict(float), defaultdict(float)]

    def begins(model: ExactModel, text: str, place: int) -> int | None:
        """Return the token of a piece of text that begins at a letter."""
        begin = 0
        for token in model.ids(text):
            if begin == place:
                return token
            begin += len(model.view.tokens[token])
        return None

    def runs_over(text: str) -> bool:
        return len(running[0].view.tokens[running[0].ids(text)[0]]) > cut

    def longest(text: str) -> int | None:
        ids = {token: index for index, token in enumerate(student.view.tokens)}
        return next((ids[text[:n].encode()] for n in range(len(text), 0, -1) if text[:n].encode() in ids), None)

    for text, mass in student.texts.items():
        for place, (model, table, row) in enumerate((running, standing)):
            ids = (*model.ids(text), model.end)
            if ids[:row] != model.ids(each.text)[:row]:
                continue
            token = (model.view.tokens[ids[row]] or b"").decode()
            cell = None
            if place == 0:
                if not token.startswith(begun):
                    continue
                if token != begun:
                    there = longest(token[cut:]) if method == "bpm" else begins(standing[0], token, cut)
                    if there is None:
                        continue
                    cell = int(standing[1][there])
            elif table[ids[row]] < 0:
                continue
            elif token and (method == "bpm" or runs_over(begun + token)):
                cell = int(table[ids[row]])
            masses[place][cell if cell != tables.cells.bottom else None] += mass
    shared = {cell for cell in masses[0] if cell is not None and masses[0][cell] > 0 and masses[1].get(cell, 0) > 0}
    known = [{cell: side[cell] for cell in shared} for side in masses]
    rests = [sum(mass for cell, mass in side.items() if cell not in shared) for side in masses]
    if min(rests) > 0:
        for side, rest in zip(known, rests, strict=True):
            side[None] = rest
    own, others = known if coarser else known[::-1]
    totals = sum(own.values()), sum(others.values())
    return sum(m / totals[1] * math.log(m / totals[1] / (own[c] / totals[0])) for c, m in others.items())


@worlds
@pytest.mark.parametrize(("method", "tables_of"), [("bpm", bpm.tables), ("cspc", cspc.tables)])
def test_rows_inside_tokens_are_what_counting_texts_gives(method, tables_of, seed, merges, teacher_merges):
    student, teacher = world(seed, merges, teacher_merges)
    tables = tables_for(tables_of, student, teacher)
    compared = 0
    for each in aligned(student, teacher):
        known = ~each.pairs.coarser if tables.coarser is None else torch.ones_like(each.pairs.coarser)
        for number in known.nonzero().flatten().tolist()[:1]:
            pair = Pairs(*(part[number : number + 1] for part in each.pairs))
            value = interior_rows(each.student, Teacher(logp=each.teacher), tables, pair).item()
            wanted = reference(each, number, student, teacher, tables, method)
            assert math.isclose(value, wanted, abs_tol=1e-6), (each.text, pair)
            compared += 1
        if compared >= 12:
            return
    assert compared or merges >= teacher_merges == 0


def test_a_perfect_student_is_right_where_merges_do_not_meet():
    # What is known of a text is then in the last token alone, and the cells are the same events.
    texts = random_texts("abcd", 4, 5)
    models = [
        ExactModel(bpe([*"abcd", "ab", "cd"], [("a", "b"), ("c", "d")], ["<end>"]), texts),
        ExactModel(bpe([*"dcba"], [], ["<end>"]), texts),
    ]
    for student, teacher in (models, models[::-1]):
        tables = tables_for(cspc.tables, student, teacher)
        inside = 0
        for each in aligned(student, teacher):
            who = Teacher(logp=each.teacher)
            first = root_rows(each.student[:1], who.rows(slice(0, 1)), tables)
            later = covered_rows(each.student, who, tables, each.covered)
            torch.testing.assert_close(first, torch.zeros_like(first), rtol=0, atol=1e-9)
            torch.testing.assert_close(later, torch.zeros_like(later), rtol=0, atol=1e-9)
            first = (each.pairs.student == 0) & (each.pairs.teacher <= 1) | (each.pairs.teacher == 0)
            pairs = Pairs(*(part[first & (each.pairs.cut == 1)] for part in each.pairs))
            value = interior_rows(each.student, who, tables, pairs)
            inside += len(value)
            torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-9)
        assert inside > 20


Slopes = dict[tuple[int, ...], torch.Tensor]


def slopes(student: ExactModel, teacher: ExactModel, logits: Slopes, *, soft: bool) -> tuple[Slopes, float]:
    """Return the mean gradient over all texts by a student's table of logits, and the mean of its square's sum.

    Args:
        logits: (V,) of each beginning, the student's whole model.
        soft: CSPC's loss with the text's tokens for what cells leave open; else the tokens alone.
    """
    tables = tables_for(cspc.tables, student, teacher)
    mean, square = {begun: torch.zeros_like(row) for begun, row in logits.items()}, 0.0
    for each in aligned(student, teacher):
        ids, theirs = ((*model.ids(each.text), model.end) for model in (student, teacher))
        begun = [ids[:place] for place in range(len(ids))]
        leaves = [logits[each].clone().requires_grad_() for each in begun]
        rows, who = torch.stack(leaves), Teacher(logp=each.teacher)
        loss = torch.nn.functional.cross_entropy(rows, torch.tensor(ids), reduction="sum")
        if soft:
            own, others = torch.tensor(ids), torch.tensor(theirs)
            covered, pairs = each.covered, each.pairs
            first = root_rows(rows[:1], who.rows(slice(0, 1)), tables, came=Came(own[:1], others[:1]))
            after = Came(own[covered.student], others[covered.teacher])
            inside = Came(own[pairs.student], others[pairs.teacher])
            loss = loss + first.sum() + covered_rows(rows, who, tables, covered, came=after).sum()
            loss = loss + interior_rows(rows, who, tables, pairs, came=inside).sum()
        for place, slope in zip(begun, torch.autograd.grad(loss, leaves), strict=True):
            mean[place] += each.mass * slope
            square += each.mass * slope.square().sum().item()
    return mean, square


@pytest.mark.parametrize("turned", [False, True])
def test_tokens_for_what_cells_leave_open_pull_a_perfect_student_nowhere(turned):
    """The mean gradient is 0 at the truth, that of one text is much smaller than hard labels', and it leads there."""
    texts, others = random_texts("abcd", 4, 5), random_texts("abcd", 4, 6)
    tokenizers = [
        bpe([*"abcd", "ab", "cd"], [("a", "b"), ("c", "d")], ["<end>"]),
        bpe([*"dcba", "bc"], [("b", "c")], ["<end>"]),
    ]
    own, theirs = tokenizers[::-1] if turned else tokenizers
    student, teacher, wrong = ExactModel(own, texts), ExactModel(theirs, texts), ExactModel(own, others)
    assert max(len(side.view.tokens) for side in (student, teacher)) > 5

    def table(model: ExactModel) -> Slopes:
        return {begun: row.clamp(min=1e-12).log() for begun, row in model.probabilities()}

    mean, soft = slopes(student, teacher, table(student), soft=True)
    _, hard = slopes(student, teacher, table(student), soft=False)
    assert max(each.abs().max().item() for each in mean.values()) < 0.02 * hard
    assert soft < hard / 4
    away, _ = slopes(student, teacher, table(wrong), soft=True)
    labels, _ = slopes(student, teacher, table(wrong), soft=False)
    norms = [sum(each.square().sum().item() for each in side.values()) for side in (away, labels)]
    dot = sum((away[begun] * labels[begun]).sum().item() for begun in away)
    assert dot > 0.9 * math.sqrt(norms[0] * norms[1])


def test_consistent_cells_are_nearest_to_the_truth():
    found: dict[str, list] = defaultdict(list)
    for seed in range(2):
        student, teacher = world(seed, 6, 6)
        wrong = ExactModel(student.tokenizer, random_texts("abc", 4, seed + 50))
        for name, tables_of in (("shared_kl", shared_kl.tables), ("bpm", bpm.tables), ("cspc", cspc.tables)):
            found[name].append(bias(student, teacher, wrong, tables_for(tables_of, student, teacher)))
    means = {name: np.mean(each, 0) for name, each in found.items()}
    assert means["cspc"][0] < means["bpm"][0] < means["shared_kl"][0]
    assert means["cspc"][1] < means["bpm"][1]


def test_covered_rows_take_away_most_of_what_is_left():
    found = []
    for merges, teacher_merges in ((6, 6), (2, 9), (9, 2)):
        student, teacher = world(7, merges, teacher_merges)
        wrong = ExactModel(student.tokenizer, random_texts("abc", 4, 50))
        tables = tables_for(cspc.tables, student, teacher)
        found.append([bias(student, teacher, wrong, tables, covered=covered) for covered in (False, True)])
    plain, covered = np.mean(found, 0)
    assert covered[0] < plain[0] / 3
    assert covered[2] > plain[2] / 2


def test_one_tokenizer_has_no_bias_and_hides_nothing():
    student, _ = world(0, 6, 6)
    wrong = ExactModel(student.tokenizer, random_texts("abc", 4, 50))
    for tables_of in (shared_kl.tables, bpm.tables, cspc.tables):
        found = bias(student, student, wrong, tables_for(tables_of, student, student))
        assert found.root == pytest.approx(0, abs=1e-12)
        assert found.wrong == pytest.approx(found.exact)
        assert found.exact > 0.1
    covered = bias(student, student, wrong, tables_for(cspc.tables, student, student), covered=True)
    assert covered == pytest.approx(found)


def test_the_worlds_are_distributions():
    for seed, merges, teacher_merges in WORLDS:
        for model in world(seed, merges, teacher_merges):
            assert math.isclose(sum(model.texts.values()), 1)
            assert isinstance(model.tokenizer, Tokenizer)
            for text in ("", "ab", "cab"):
                total = model.rows(text).exp().sum(-1)
                torch.testing.assert_close(total, torch.ones_like(total))

import numpy as np
import pytest
import torch
from byte_oracle import END, random_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_shelf import REAL, SMALL, real_tokenizer, small_tokenizer
from tokenizers import Tokenizer, decoders, models

from align.byte_view import byte_view, encode
from align.kernels.cells import Cells, consistent_cells, prefix_cells, shared_cells
from align.kernels.first_tokens import Splits, longest_prefixes
from align.kernels.prefixes import interior_rows
from align.methods import cspc
from distill.errors import UserError


def consistent(student, teacher, **options) -> Cells:
    views = byte_view(student), byte_view(teacher)
    splits = Splits(student, views[0]), Splits(teacher, views[1])
    return consistent_cells(*views, student_splits=splits[0], teacher_splits=splits[1], **options)


def finest(student, teacher, **options) -> Cells:
    return consistent(student, teacher, longest=False, **options)


def shared(student, teacher, **options) -> Cells:
    return shared_cells(byte_view(student), byte_view(teacher), **options)


def prefix(student, teacher, **options) -> Cells:
    return prefix_cells(byte_view(student), byte_view(teacher), **options)


KINDS = {"shared": shared, "prefix": prefix, "consistent": consistent, "finest": finest}
kinds = pytest.mark.parametrize("cells_of", KINDS.values(), ids=KINDS)


def bpe(tokens: list[str], merges: list[tuple[str, str]] = (), special: list[str] = (), order=None) -> Tokenizer:
    spelled = [*special, *tokens]
    order = range(len(spelled)) if order is None else order
    tokenizer = Tokenizer(models.BPE({token: int(i) for token, i in zip(spelled, order, strict=True)}, list(merges)))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def ends(*tokenizers) -> tuple[list[int], ...]:
    return tuple([tokenizer.token_to_id(END)] for tokenizer in tokenizers)


def cell(cells: Cells, side: str, tokenizer, token: str) -> int:
    return int(getattr(cells, side)[tokenizer.token_to_id(token)])


@kinds
@given(seed=st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_every_cell_has_a_token_on_both_sides_and_every_token_of_text_a_cell(cells_of, seed):
    student, teacher = random_tokenizer("abc", 6, seed), random_tokenizer("abcd", 5, seed + 1)
    cells = cells_of(student, teacher, stops=ends(student, teacher))
    for side in (cells.student, cells.teacher):
        assert sorted(set(side[side >= 0].tolist())) == list(range(cells.count))
    assert cells.student[student.token_to_id(END)] == cells.teacher[teacher.token_to_id(END)] == cells.stop
    assert (cells.student >= 0).all() or cells.bottom == -1
    again = cells_of(student, teacher, stops=ends(student, teacher))
    assert torch.equal(cells.student, again.student)
    assert torch.equal(cells.teacher, again.teacher)


@kinds
def test_a_permuted_vocabulary_is_exact(cells_of):
    merges = [("a", "b"), ("ab", "c"), ("c", "c")]
    tokens = ["a", "b", "c", "ab", "abc", "cc"]
    student = bpe(tokens, merges, [END, "<pad>"])
    teacher = bpe(tokens, merges, [END, "<pad>"], order=np.random.default_rng(0).permutation(8))
    pads = {student.token_to_id("<pad>"): teacher.token_to_id("<pad>")}
    cells = cells_of(student, teacher, stops=ends(student, teacher), specials=pads)
    assert cells.exact
    assert cells.bottom == -1
    for token in (*tokens, END, "<pad>"):
        assert cell(cells, "student", student, token) == cell(cells, "teacher", teacher, token)
    assert not cells_of(student, bpe(tokens[:-1], merges[:-1], [END, "<pad>"]), stops=([0], [0])).exact


@given(seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_what_may_begin_the_same_text_is_one_consistent_cell(seed):
    student, teacher = random_tokenizer("abc", 7, seed), random_tokenizer("abc", 7, seed + 1)
    for cells_of in (consistent, finest):
        cells = cells_of(student, teacher, stops=ends(student, teacher))
        sides = [(student, cells.student), (teacher, cells.teacher)]
        for (own, table), (other, others) in (sides, sides[::-1]):
            for token, index in own.get_vocab(with_added_tokens=False).items():
                if token != END:
                    assert table[index] == others[other.model.tokenize(token)[0].id]


def test_shared_cells_are_equal_bytes():
    student = bpe(["a", "b", "ab"], [("a", "b")], ["<pad>"])
    teacher = bpe(["b", "a", "ba", "c"], [("b", "a")], ["<pad>"])
    cells = shared(student, teacher)
    assert cells.count == 3
    assert [cell(cells, "student", student, token) for token in ("a", "b", "ab", "<pad>")] == [0, 1, 2, 2]
    assert [cell(cells, "teacher", teacher, token) for token in ("a", "b", "ba", "c", "<pad>")] == [0, 1, 2, 2, 2]
    assert cells.bottom == 2


def test_a_teacher_token_counts_for_the_longest_student_token_it_begins_with():
    # The student's own merges write "tring" as "t", "ring": phi does not ask them.
    student = bpe([*"tring", "tr", "tri", "ri", "rin", "ring"], [], [END])
    teacher = bpe([*"tring", "tring", "ting", "x"], [], [END])
    cells = prefix(student, teacher, stops=([0], [0]))
    assert cell(cells, "teacher", teacher, "tring") == cell(cells, "student", student, "tri")
    assert cell(cells, "teacher", teacher, "ting") == cell(cells, "student", student, "t")
    # Nothing of the teacher's begins with "ring": such tokens of the student have no cell to be compared in,
    # and neither has what the student cannot write.
    assert cell(cells, "student", student, "ring") == cell(cells, "teacher", teacher, "x") == cells.bottom


def test_numbers_of_several_digits_are_one_cell_with_their_first_digit():
    digits = [str(digit) for digit in range(10)]
    student = bpe([*digits, "20", "201", "5x", "x"], [("2", "0"), ("20", "1"), ("5", "x")], [END])
    teacher = bpe([*digits, "x"], [], [END])
    cells = consistent(student, teacher, stops=([0], [0]))
    assert len({cell(cells, "student", student, number) for number in ("2", "20", "201")}) == 1
    assert cell(cells, "student", student, "201") == cell(cells, "teacher", teacher, "2")
    assert cell(cells, "student", student, "5x") == cell(cells, "teacher", teacher, "5")
    assert cells.count == len(digits) + 2


@kinds
def test_special_tokens_never_match_by_their_spelling(cells_of):
    text = bpe([*"<end>", "<e", "nd>", "<end>"], [], ["<pad>"])
    special = bpe([*"<end>"[:-1], ">"], [], [END, "<pad>"])
    cells = cells_of(text, special)
    assert cell(cells, "teacher", special, END) == cell(cells, "teacher", special, "<pad>") == cells.bottom
    assert cells.stop == -1
    assert cell(cells, "student", text, "<") != cells.bottom


@kinds
def test_what_only_one_side_has_is_left_out_where_the_other_has_nothing_like_it(cells_of):
    student, teacher = bpe(["a", "b"], [], ["<pad>"]), bpe(["b", "a"])
    cells = cells_of(student, teacher)
    assert cells.bottom == -1
    assert cells.student[student.token_to_id("<pad>")] == -1


def test_ids_that_nothing_has_are_no_tokens():
    student = bpe(["a", "b"], [], ["<pad>"], order=[7, 2, 5])
    cells = shared(student, bpe(["a", "c"], [], [END]))
    assert [place for place, each in enumerate(cells.student.tolist()) if each < 0] == [0, 1, 3, 4, 6]


@kinds
def test_wrong_ids_are_refused(cells_of):
    student, teacher = bpe(["a", "b"], [], [END]), bpe(["a", "c"], [], [END])
    with pytest.raises(UserError, match="only one side has tokens that end an answer"):
        cells_of(student, teacher, stops=([0], []))
    with pytest.raises(UserError, match="student's vocabulary has ids up to 2, and not 3"):
        cells_of(student, teacher, stops=([3], [0]))
    with pytest.raises(UserError, match="teacher's vocabulary has ids up to 2, and not -1"):
        cells_of(student, teacher, specials={0: -1})
    with pytest.raises(UserError, match="no token in common"):
        cells_of(student, bpe(["x"]))


def test_bytes_without_a_token_end_a_split():
    tokenizer = bpe(["a", "b", "ab"], [("a", "b")])
    splits = Splits(tokenizer, byte_view(tokenizer))
    assert [splits.view.tokens[token] for token in splits.split(b"abab\xffa")] == [b"ab", b"ab"]
    assert splits.first([b"", b"\xff", b"ba"]).tolist() == [-1, -1, tokenizer.token_to_id("b")]
    assert splits.at([b"aba", b"aab"], 2).tolist() == [tokenizer.token_to_id("a"), -1]


@given(st.lists(st.binary(max_size=6), max_size=8), st.sets(st.binary(min_size=1, max_size=4), max_size=8))
def test_longest_prefixes_are_the_longest(texts, known):
    wanted = [max((each for each in known if text.startswith(each)), key=len, default=None) for text in texts]
    assert longest_prefixes(texts, known) == wanted


@given(
    st.lists(st.tuples(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.randoms()), max_size=6),
    st.integers(0, 3),
)
def test_interior_rows_are_the_boundaries_of_one_side_inside_a_token_of_the_other(chunks, skipped):
    spans, lengths, wanted = ([], []), ([1] * skipped, [1] * (2 * skipped)), []
    for sizes, random in chunks:
        total, other = sum(sizes), []
        while sum(other) < total:
            other.append(random.randint(1, total - sum(other)))
        for side, parts in zip((0, 1), (sizes, other), strict=True):
            spans[side].append((len(lengths[side]), len(lengths[side]) + len(parts)))
            lengths[side].extend(parts)
        starts = [np.cumsum([0, *parts]) for parts in (sizes, other)]
        for coarser, own, running in ((False, 0, 1), (True, 1, 0)):
            for number, begin in enumerate(starts[own][:-1]):
                token = int(np.searchsorted(starts[running], begin, side="right")) - 1
                if starts[running][token] < begin:
                    rows = [spans[own][-1][0] + number, spans[running][-1][0] + token]
                    wanted.append((*(rows[::-1] if coarser else rows), begin - starts[running][token], coarser))
    found = interior_rows(*(np.array(side).reshape(-1, 2) for side in spans), *map(np.array, lengths))
    assert sorted(zip(*(part.tolist() for part in found), strict=True)) == sorted(wanted)


@pytest.mark.parametrize("name", SMALL)
def test_pieces_are_split_by_every_kind_of_tokenizer(name):
    tokenizer = small_tokenizer(name)
    view = byte_view(tokenizer)
    splits = Splits(tokenizer, view)
    for token in view.tokens:
        if token:
            pieces = view.of(splits.split(token))
            assert pieces
            assert token.startswith(b"".join(pieces))
    text = "Natalia sold 48/2 = 24 clips"
    ids = encode(tokenizer, view, text, continued=True)
    if ids is not None:
        assert splits.first([view.tokens[ids[0]]]).tolist() == ids[:1]


@pytest.mark.parametrize("name", SMALL)
def test_tables_are_made_for_every_kind_of_tokenizer(name):
    student, teacher = small_tokenizer(next(iter(SMALL))), small_tokenizer(name)
    tables = cspc.tables(student, teacher)
    assert tables.cells.count > 30
    for token in (" ", "a", "4"):
        ids = [byte_view(side).tokens.index(token.encode()) for side in (student, teacher)]
        assert tables.cells.student[ids[0]] == tables.cells.teacher[ids[1]]


@kinds
@pytest.mark.parametrize("name", SMALL)
def test_a_tokenizer_beside_itself_has_one_table(cells_of, name):
    tokenizer = small_tokenizer(name)
    cells = cells_of(tokenizer, tokenizer)
    assert torch.equal(cells.student, cells.teacher)
    assert cells.count > 30


@pytest.mark.skipif(not {"tokenizers/qwen2.5", "tokenizers/gpt2"} <= set(REAL), reason="no shared/data here")
def test_real_vocabularies_share_what_was_counted():
    # Counted by an independent script over the two tokenizer.json files.
    gpt2, qwen = (byte_view(real_tokenizer(f"tokenizers/{name}")) for name in ("gpt2", "qwen2.5"))
    cells = shared_cells(gpt2, qwen)
    assert cells.count == 42_256 + 1
    assert cells.bottom == 42_256
    # Several digits are one token of GPT-2's and several of Qwen's.
    place = gpt2.tokens.index
    assert cells.student[place(b"7")] != cells.bottom
    assert cells.student[place(b"201")] == cells.bottom
    assert prefix_cells(qwen, gpt2).teacher[place(b"201")] == prefix_cells(qwen, gpt2).student[qwen.tokens.index(b"2")]


def test_a_token_that_runs_into_a_mark_of_reasoning_is_what_stands_before_it():
    """Where one side has added `</think>`, it never writes the "." before it as ".</", even if it has that token."""
    tokens = [*"abc.</>tink ", ".<", ".</", "a."]
    merges = [(".", "<"), (".<", "/"), ("a", ".")]
    plain, marked = bpe(tokens, merges), bpe(tokens, merges)
    marked.add_tokens(["</think>", "</tool>"])
    for student, teacher in ((plain, marked), (marked, plain)):
        cells = consistent(student, teacher)
        own, other = ("student", "teacher") if student is plain else ("teacher", "student")
        assert cell(cells, own, plain, ".</") == cell(cells, other, marked, ".")
        assert cell(cells, own, plain, "<") == cell(cells, other, marked, "</think>")
        assert cell(cells, own, plain, "a.") != cell(cells, own, plain, "a")
    alone = consistent(plain, plain)
    assert cell(alone, "student", plain, ".</") != cell(alone, "student", plain, ".")

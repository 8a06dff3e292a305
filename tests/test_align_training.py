"""Training across tokenizers: under other ids it is plain distillation, and nothing depends on the batch."""

from __future__ import annotations

import copy
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, tiny_model
from two_models import assert_same
from two_tokenizers import aligned, answers, bpe, merged, pair_of_models, permuted, rows

from align import METHODS
from align.byte_view import byte_view
from align.engine.places import places
from align.kernels.cell_rows import Came, interior_rows, root_rows
from align.kernels.covered_rows import Covered, covered_rows
from align.kernels.prefixes import Pairs
from align.kernels.teacher_rows import Teacher
from distill.batch import Batch, collate
from distill.config import TrainConfig
from distill.dataset import load_examples
from distill.errors import UserError
from distill.forward import read_head, run
from distill.losses import LOSSES, LossMode
from distill.losses.mixture import Mixture
from distill.render import Example
from distill.tables import bind
from distill.train import run_training

EXACT = ("cspc", "shared_kl", "bpm", "xtoken", "mined")  # with a permuted vocabulary they are the KL of whole rows
PLAIN = {"bpm": ["soft_logits.skip_whitespace=false", "soft_logits.completion=false"]}
OFF_POLICY = [name for name, method in METHODS.items() if method.kind != "advantages"]


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "data.jsonl").write_text(rows(answers()), encoding="utf-8")

    def make(out: str, mode: str = "soft-logits", **overrides: Any) -> TrainConfig:
        values = {"learning_rate": 1e-3, "max_steps": 3, "logging_steps": 1, "save_steps": 100, "max_length": 256}
        values |= {"per_device_train_batch_size": 4, "max_completion_length": 24, "teacher": "t", **overrides}
        return TrainConfig(mode=mode, student="s", data=tmp_path / "data.jsonl", out=tmp_path / out, **values)

    return make


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def trained(config: TrainConfig, teacher: Any, alignment: Any = None, tokenizer: Any = None) -> dict[str, torch.Tensor]:
    student = tiny_model(seed=0)
    own = tokenizer or byte_tokenizer()
    run_training(config, model=student, tokenizer=own, teacher=copy.deepcopy(teacher), alignment=alignment)
    return weights(student)


# -- one vocabulary under other ids


@pytest.mark.parametrize("method", EXACT)
def test_a_permuted_vocabulary_is_plain_distillation(recipe, method):
    teacher = tiny_model(seed=9, hidden_size=48)
    tokenizer, other = permuted(byte_tokenizer(), teacher)
    plain = trained(recipe("plain"), teacher)
    across = trained(recipe("across", set=PLAIN.get(method, [])), other, aligned(method, byte_tokenizer(), tokenizer))
    start = weights(tiny_model(seed=0))
    assert any((plain[name] - start[name]).abs().max() > 1e-3 for name in plain)
    assert_same(across, plain)
    ours, whole = metrics(recipe("across").out), metrics(recipe("plain").out)
    for line, expected in zip(ours, whole, strict=True):
        assert line["divergence"] == pytest.approx(expected["divergence"], rel=1e-4)
        assert line["aligned"] == 1.0
        assert line["flops"] == pytest.approx(expected["flops"])


@pytest.mark.parametrize("mode", ["features", "relations"])
def test_states_of_a_permuted_vocabulary_are_the_same_states(recipe, mode):
    teacher = tiny_model(seed=9, hidden_size=48)
    tokenizer, other = permuted(byte_tokenizer(), teacher)
    plain = trained(recipe("plain", mode), teacher)
    across = trained(recipe("across", mode), other, aligned("auto", byte_tokenizer(), tokenizer))
    assert_same(across, plain)


@pytest.mark.parametrize("method", METHODS)
def test_no_method_looks_at_ids(recipe, method):
    """The same method gives the same weights, whatever the ids of the teacher's tokens."""
    mode = "on-policy" if METHODS[method].kind == "advantages" else "soft-logits"
    teacher = tiny_model(seed=9, hidden_size=48, vocab_size=len(merged()))
    results = []
    for out, (tokenizer, model) in (("one", (merged(), teacher)), ("other", permuted(merged(), teacher))):
        results.append(trained(recipe(out, mode, max_steps=2), model, aligned(method, byte_tokenizer(), tokenizer)))
    assert_same(*results)


def test_on_policy_with_a_permuted_vocabulary_is_plain_on_policy(recipe):
    teacher = tiny_model(seed=9, hidden_size=48)
    tokenizer, other = permuted(byte_tokenizer(), teacher)
    settings = {"mode": "on-policy", "max_steps": 2, "rollout_top_p": 0.5}
    plain = trained(recipe("plain", **settings), teacher)
    across = trained(recipe("across", **settings), other, aligned("auto", byte_tokenizer(), tokenizer))
    assert [line["aligned"] for line in metrics(recipe("across").out)] == [1.0, 1.0]
    assert_same(across, plain)


def test_what_is_clamped_or_left_out_is_counted(tmp_path):
    student, own, teacher, theirs = pair_of_models()
    alignment = aligned("opd_scalar", own, theirs)
    batch = collate(examples(alignment, tmp_path), pad_id=3)
    mode = alignment.modes["on_policy"]
    _, free = gradients(mode, student, teacher, batch, limit=None, longest=None)
    assert (float(free["limited"][0]), float(free["left_out"][0])) == (0, 0)
    _, tight = gradients(mode, student, teacher, batch, limit=1e-6, longest=1)
    assert 0 < float(tight["limited"][0]) <= float(tight["limited"][1])
    assert 0 < float(tight["left_out"][0]) < float(tight["left_out"][1])


def weak_folder(tmp_path: Path, tokenizer: Any, **shape: Any) -> Path:
    folder = tmp_path / "weak"
    tiny_model(seed=4, vocab_size=len(tokenizer), **shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_weak_reference_gives_compass_opds_advantage(tmp_path):
    student, own, teacher, theirs = pair_of_models()
    alignment = aligned("opd_scalar", own, theirs)
    batch = collate(examples(alignment, tmp_path), pad_id=3)
    mode = alignment.modes["on_policy"]
    folder = weak_folder(tmp_path, theirs)
    inner = mode.inner(student, teacher, weak_reference=str(folder), alpha=0.3)
    initial = copy.deepcopy(student)
    with torch.no_grad():  # the student has moved since
        for weight in student.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    options = {"alpha": 0.3, "limit": None, "longest": None, "spread": "whole"}
    passed = run(student, read_head(student, "student"), batch)
    with torch.no_grad():
        said = run(teacher, read_head(teacher, "teacher"), batch.other.batch())
    (mode.fn(passed, said, batch, inner=inner, **options).total / 100).backward()
    found = {name: weight.grad.clone() for name, weight in student.named_parameters() if weight.grad is not None}
    student.zero_grad()
    # The same from whole logits, span by span.
    weak = tiny_model(seed=4, vocab_size=len(theirs))

    def likelihoods(model: Any, ids: torch.Tensor, mask: torch.Tensor, width: int) -> torch.Tensor:
        logp = model(input_ids=ids, attention_mask=mask).logits[:, :-1, :width].log_softmax(-1)
        return torch.nn.functional.pad(logp.gather(-1, ids[:, 1:, None])[..., 0], (1, 0))

    other = batch.other
    mine = likelihoods(student, batch.input_ids, batch.attention_mask, len(own))
    with torch.no_grad():
        first = likelihoods(initial, batch.input_ids, batch.attention_mask, len(own))
        strong, small = (
            likelihoods(model, other.input_ids, other.attention_mask, len(theirs)) for model in (teacher, weak)
        )
    total = 0.0
    for row, begin, end, theirs_begin, theirs_end in other.spans.tolist():
        there = slice(theirs_begin, theirs_end)
        gain = (strong[row, there] - small[row, there]).sum()
        held = (mine[row, begin:end].detach() - first[row, begin:end]).sum()
        total = total - (gain - 0.3 * held) * mine[row, begin:end].sum()
    (total / 100).backward()
    assert_same(found, {name: weight.grad for name, weight in student.named_parameters()})


def test_a_weak_reference_is_held_through_a_resume_and_refused_where_it_reads_other_tokens(recipe, tmp_path):
    _, own, teacher, theirs = pair_of_models()
    folder = weak_folder(tmp_path, theirs)
    chosen = {"set": [f"on_policy.weak_reference={folder}", "on_policy.alpha=0.5"], "max_steps": 4, "save_steps": 2}
    alignment = aligned("opd_scalar", own, theirs)
    whole = recipe("whole", "on-policy", **chosen)
    expected = trained(whole, teacher, alignment)
    stopped = recipe("stopped", "on-policy", resume=True, **chosen)
    shutil.copytree(whole.out, stopped.out)
    (stopped.out / "run.json").unlink()
    shutil.rmtree(stopped.out / "checkpoints/checkpoint-4")
    again = trained(stopped, teacher, alignment)
    assert all(torch.equal(again[name], expected[name]) for name in expected)
    plain = recipe("without", "on-policy", max_steps=4)
    without = trained(plain, teacher, alignment)
    costs = [metrics(config.out)[0] for config in (whole, plain)]  # one step: both drew the same completions
    assert costs[0]["tokens"] == costs[1]["tokens"]
    assert costs[0]["flops"] > 1.1 * costs[1]["flops"]  # the two further models' passes are counted
    assert any(not torch.equal(without[name], expected[name]) for name in expected)
    mode = alignment.modes["on_policy"]
    own.save_pretrained(folder)
    with pytest.raises(UserError, match=r"the weak reference .* has another tokenizer than the teacher"):
        mode.inner(tiny_model(), teacher, weak_reference=str(folder))
    with pytest.raises(UserError, match=r"alpha=0.5 weighs what weak_reference=MODEL is compared with"):
        trained(recipe("alone", "on-policy", set=["on_policy.alpha=0.5"]), teacher, alignment)


# -- nothing depends on the batch


def examples(alignment: Any, tmp_path: Path) -> list[Example]:
    file = tmp_path / "examples.jsonl"
    file.write_text(rows(answers(5)), encoding="utf-8")
    return load_examples(file, alignment.student.tokenizer, alignment=alignment).examples


def gradients(
    mode: LossMode, student: Any, teacher: Any, batch: Batch, **options: Any
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    inner = mode.inner(student, teacher, **{k: v for k, v in options.items() if k != "chunk_tokens"})
    own = run(student, read_head(student, "student"), batch, inner.student)
    with torch.no_grad():
        theirs = run(teacher, read_head(teacher, "teacher"), batch.other.batch(), inner.teacher)
    both = torch.nn.ModuleDict({"student": student} | ({} if inner.modules is None else {"own": inner.modules}))
    both.zero_grad()
    output = mode.fn(own, theirs, batch, inner=inner, **options)
    (output.total / 100).backward()
    found = {name: weight.grad.clone() for name, weight in both.named_parameters() if weight.grad is not None}
    return found, {"total": output.total.detach(), "weight": output.weight, **output.metrics}


def every_mode() -> list[tuple[str, str]]:
    found = [(name, "soft_logits") for name in OFF_POLICY] + [("cspc", "features"), ("cspc", "relations")]
    return [*found, ("opd_scalar", "on_policy")]


@pytest.mark.parametrize(("method", "name"), every_mode())
def test_batch_padding_and_chunks_change_no_gradient(tmp_path, method, name):
    student, own, teacher, theirs = pair_of_models()
    alignment = aligned(method, own, theirs)
    mode = alignment.modes[name]
    data = examples(alignment, tmp_path)
    whole, numbers = gradients(mode, student, teacher, collate(data, pad_id=3))
    parts = [gradients(mode, student, teacher, collate([example], pad_id=0)) for example in data]
    assert float(numbers["total"]) == pytest.approx(sum(float(n["total"]) for _, n in parts), rel=1e-4)
    assert float(numbers["weight"]) == sum(float(n["weight"]) for _, n in parts)
    summed = {key: sum(part[key] for part, _ in parts) for key in whole}
    assert_same(summed, whole)
    turned, _ = gradients(mode, student, teacher, collate(data[::-1], pad_id=3))
    assert_same(turned, whole)
    if name == "soft_logits":
        for chunk_tokens in (1, 7):
            some, again = gradients(mode, student, teacher, collate(data, pad_id=3), chunk_tokens=chunk_tokens)
            assert_same(some, whole)
            assert float(again["total"]) == pytest.approx(float(numbers["total"]), rel=1e-5)


def widened(model: Any) -> Any:
    """A copy whose head has rows that no token has, and which are likely."""
    wide, width = copy.deepcopy(model), model.get_output_embeddings().weight.shape[0]
    wide.resize_token_embeddings(width + 7, mean_resizing=False)
    with torch.no_grad():
        head = wide.get_output_embeddings().weight
        head[width:] = 2 * head[:7]
    return wide


@pytest.mark.parametrize("method", OFF_POLICY)
def test_padding_of_a_vocabulary_counts_nowhere(tmp_path, method):
    student, own, teacher, theirs = pair_of_models()
    alignment = aligned(method, own, theirs)
    batch = collate(examples(alignment, tmp_path), pad_id=3)
    mode = alignment.modes["soft_logits"]
    plain, numbers = gradients(mode, student, teacher, batch)
    padded, again = gradients(mode, widened(student), widened(teacher), batch)
    assert float(again["total"]) == pytest.approx(float(numbers["total"]), rel=1e-5)
    assert_same({name: padded[name][: len(value)] for name, value in plain.items()}, plain)


@pytest.mark.parametrize("method", OFF_POLICY)
def test_hard_labels_ride_along(tmp_path, method):
    student, own, teacher, theirs = pair_of_models()
    alignment = aligned(method, own, theirs)
    batch = collate(examples(alignment, tmp_path), pad_id=3)
    mode = alignment.modes["soft_logits"]
    soft, _ = gradients(mode, student, teacher, batch)
    both, numbers = gradients(mode, student, teacher, batch, hard_label_weight=0.5)
    student.zero_grad()
    output = LOSSES["hard_labels"].fn(run(student, read_head(student, "student"), batch), None, batch)
    (0.5 * output.total / 100).backward()
    total = float(output.total.detach())
    hard = {f"student.{name}": weight.grad for name, weight in student.named_parameters()}
    assert_same(both, {name: soft[name] + hard.get(name, 0) for name in soft})
    assert float(numbers["cross_entropy"]) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("turned", [False, True])
def test_the_target_is_the_kernels_under_autograd(tmp_path, divergence, turned):
    """All rows of CSPC over all logits at once, differentiated by autograd; with forward KL those of labels, too."""
    student, own, teacher, theirs = pair_of_models()
    if turned:
        student, own, teacher, theirs = teacher, theirs, student, own
    alignment = aligned("cspc", own, theirs)
    batch = collate(examples(alignment, tmp_path), pad_id=3)
    mode = alignment.modes["soft_logits"]
    found, numbers = gradients(mode, student, teacher, batch, interior_weight=0.5, divergence=divergence)
    tables = mode.inner(student, teacher).plan
    met, trained_rows = places(batch, lengths=(_lengths(own), _lengths(theirs))), batch.trained()
    assert len(met.interior.cut) > 10
    assert (met.interior.coarser == turned).all()  # bytes are finer than anything
    student.zero_grad()
    logits = student(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1][trained_rows.rows]
    with torch.no_grad():
        said = teacher(input_ids=batch.other.input_ids, attention_mask=batch.other.attention_mask).logits
    who = Teacher.dense(said[met.teacher_rows, met.teacher_positions - 1], num_outcomes=len(theirs))
    came = Came(trained_rows.labels, batch.other.input_ids[met.teacher_rows, met.teacher_positions])

    def at(own_rows: torch.Tensor, others: torch.Tensor) -> dict[str, Any]:
        next_ = Came(came.student[own_rows], came.teacher[others]) if divergence == "forward_kl" else None
        return {"divergence": divergence, "came": next_}

    first, later = ~met.behind, met.behind
    assert first.sum() == len(batch.input_ids)  # the first of every answer
    one, other = met.student[first], met.teacher[first]
    total = root_rows(logits[one], who.rows(other), tables, **at(one, other)).sum()
    one, other = met.student[later], met.teacher[later]
    tokens = came.student[one - 1], came.teacher[other - 1]
    covered = Covered(one, other, one - 1, other - 1, *tokens)
    total = total + covered_rows(logits, who, tables, covered, **at(one, other)).sum()
    inside = met.interior
    pairs = Pairs(inside.student, inside.teacher, inside.token, inside.cut, inside.coarser)
    total = total + 0.5 * interior_rows(logits, who, tables, pairs, **at(pairs.student, pairs.teacher)).sum()
    if divergence == "forward_kl":
        width = len(own)
        total = total + torch.nn.functional.cross_entropy(logits[:, :width], trained_rows.labels, reduction="sum")
    (total / 100).backward()
    assert float(numbers["total"]) == pytest.approx(float(total.detach()), rel=1e-4)
    assert_same(found, {f"student.{name}": weight.grad for name, weight in student.named_parameters()})


def test_labels_stand_for_forward_kl_alone(tmp_path):
    student, own, teacher, theirs = pair_of_models()
    alignment = aligned("cspc", own, theirs)
    batch = collate(examples(alignment, tmp_path), pad_id=3)
    mode = alignment.modes["soft_logits"]
    for options in ({"divergence": "reverse_kl"}, {"temperature": 2.0}):
        plain, _ = gradients(mode, student, teacher, batch, **options)
        without, _ = gradients(mode, student, teacher, batch, labels=False, **options)
        assert_same(plain, without)
        with pytest.raises(UserError, match=r"labels=true with .* at temperature .*take labels=false"):
            gradients(mode, student, teacher, batch, labels=True, **options)
    bind(mode.fn, {"temperature": 2.0, "labels": False, "chunk_tokens": 3}, "soft_logits")  # options that it names
    default, _ = gradients(mode, student, teacher, batch)
    without, _ = gradients(mode, student, teacher, batch, labels=False)
    assert max(float((default[name] - without[name]).abs().max()) for name in default) > 1e-3


def _lengths(tokenizer: Any) -> Any:
    return np.array([len(token or b"") for token in byte_view(tokenizer).tokens])


# -- from end to end


@pytest.mark.parametrize("mode", ["soft-logits", "on-policy", "features", "relations"])
def test_training_across_tokenizers_learns(recipe, mode):
    """From a teacher that writes as its tokenizer splits, which one of random weights does not."""
    _, own, teacher, theirs = pair_of_models()
    run_training(recipe("teacher", "hard-labels", learning_rate=1e-2, max_steps=30), model=teacher, tokenizer=theirs)
    settings = {"max_steps": 16, "max_completion_length": 12}
    config = recipe("learns", mode, learning_rate=1e-2, **settings)
    trained(config, teacher, aligned("auto", own, theirs))
    lines = metrics(config.out)
    assert sum(line["loss"] for line in lines[-3:]) < 0.75 * sum(line["loss"] for line in lines[:3])


@pytest.mark.parametrize("mode", ["soft-logits", "on-policy"])
def test_a_resumed_run_is_the_uninterrupted_one(recipe, mode):
    _, own, teacher, theirs = pair_of_models()
    whole = recipe("whole", mode, max_steps=4, save_steps=2)
    expected = trained(whole, teacher, aligned("auto", own, theirs))
    stopped = recipe("stopped", mode, max_steps=4, save_steps=2, resume=True)
    shutil.copytree(whole.out, stopped.out)
    (stopped.out / "run.json").unlink()
    shutil.rmtree(stopped.out / "checkpoints/checkpoint-4")
    again = trained(stopped, teacher, aligned("auto", own, theirs))
    assert all(torch.equal(again[name], expected[name]) for name in expected)
    assert metrics(stopped.out)[-1]["loss"] == metrics(whole.out)[-1]["loss"]
    assert json.loads((stopped.out / "run.json").read_text())["ledger"]["flops"] == pytest.approx(
        json.loads((whole.out / "run.json").read_text())["ledger"]["flops"]
    )


def test_the_run_says_how_it_was_aligned(recipe, capsys):
    _, own, teacher, theirs = pair_of_models()
    config = recipe("said")
    trained(config, teacher, aligned("auto", own, theirs))
    run_file = json.loads((config.out / "run.json").read_text())
    assert run_file["alignment"]["method"] == "cspc"
    assert run_file["alignment"]["why"] in capsys.readouterr().err
    assert run_file["ledger"]["tokens"] > run_file["ledger"]["teacher_tokens"] > 0  # the teacher's are longer


@pytest.mark.parametrize("method", ["cspc", "alm", "bpm"])
def test_a_loss_that_forgets_the_students_own_tokens_is_said(recipe, capsys, method):
    _, own, teacher, theirs = pair_of_models()
    for hard in (0.0, 0.5):
        config = recipe(f"hint{hard}", max_steps=1, hard_label_weight=hard)
        trained(config, teacher, aligned(method, own, theirs))
        assert ("give hard labels beside it" in capsys.readouterr().err) == (method != "cspc" and not hard)


def test_the_command_line_trains_across_tokenizers(tmp_path, capsys):
    """The embedded teacher and a student of other tokens, while it runs and from what it said."""
    from cli import app

    def command(line: str) -> str:
        with pytest.raises(SystemExit) as stop:
            app(line.format(w=tmp_path).split())
        error = capsys.readouterr().err
        return error if not stop.value.code else error.splitlines()[-1]

    bpe(["Start 40. Mon, 40+7=47. Tue, 47+2=49.", "\\boxed{32}", "<think> </think>"]).save_pretrained(tmp_path / "own")
    command("generate --prompts nano --limit 16 --max-completion-length 40 --keep any --drop none --top-logprobs 64 "
            "--out {w}/traces")  # fmt: skip
    train = "train --mode soft-logits --student llama-nano --tokenizer {w}/own --data {w}/traces --max-steps 8 "
    train += "--learning-rate 5e-3 --logging-steps 1 "
    for out, further in (("runs", "--teacher nano"), ("stored", ""), ("named", "--teacher-tokenizer nano --align alm")):
        said = command(f"{train} --out {{w}}/{out} {further}")
        assert f"have different tokenizers: {'alm' if out == 'named' else 'cspc'}" in said
        lines = metrics(tmp_path / out)
        assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    assert "--teacher-tokenizer" in command(f"{train} --out {{w}}/a --teacher-tokenizer {{w}}/own")
    assert "different vocabularies" in command(f"{train} --out {{w}}/b --teacher nano --align identity")
    assert "did you mean 'cspc'" in command(f"{train} --out {{w}}/c --teacher nano --align cspcs")
    assert "mean 'interior'" in command(f"{train} --out {{w}}/d --teacher nano --set soft_logits.interio=false")
    assert "needs a teacher that runs" in command(f"{train} --out {{w}}/e --align gold")


# -- refusals


def test_a_mode_of_one_vocabulary_is_refused(monkeypatch):
    student, own, teacher, theirs = pair_of_models()
    alignment = aligned("auto", own, theirs)
    monkeypatch.setitem(LOSSES, "theirs", LossMode(lambda *_: None, needs=frozenset({"teacher"})))
    build = partial(Mixture, student=student, teacher=teacher, num_outcomes=259, stand_ins=alignment.modes)
    with pytest.raises(UserError, match=r"theirs compares tokens of one vocabulary.*soft_logits.*hard_labels"):
        build({"theirs": 1.0}, {})
    with pytest.raises(UserError, match=r"takes no option 'support': accepted are .*interior_weight"):
        build({"soft_logits": 1.0}, {"soft_logits": {"support": "dense"}})
    with pytest.raises(UserError, match="gram_prompt compares with the prompt"):
        build({"relations": 1.0}, {"relations": {"kind": "gram_prompt"}})


def test_rows_of_several_sequences_are_refused(recipe):
    _, own, teacher, theirs = pair_of_models()
    with pytest.raises(UserError, match="--packing needs one tokenizer"):
        trained(recipe("packed", packing=True), teacher, aligned("auto", own, theirs))

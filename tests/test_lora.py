"""LoRA: nothing changes at the start, only adapters learn, and what is saved is a plain model of the same outputs."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from torch import nn

from distill.batch import Batch, collate
from distill.config import TrainConfig
from distill.errors import UserError
from distill.forward import read_head, run
from distill.lora import ADAPTER, add_lora, is_lora, merged, save_merged
from distill.packing import check_packing
from distill.quantisation import quantisation
from distill.render import Example
from distill.train import run_training

FAMILIES = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": True},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},  # its linear layers are (in, out)
}
IDS = torch.arange(24).reshape(2, 12) * 5 % 259


@pytest.fixture(params=FAMILIES)
def base(request, make_model):
    return make_model(request.param, **FAMILIES[request.param]).eval()


def learnt(model, **options):
    """A model with adapters that do something, as after training."""
    model = add_lora(model, **{"r": 4, "alpha": 8, **options})
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def loss(model) -> torch.Tensor:
    return model(input_ids=IDS).logits.float().log_softmax(-1)[..., 0].mean()


def test_at_the_start_the_student_is_what_it_was(base):
    before = logits(base)
    assert not is_lora(base)
    model = add_lora(base, r=4, alpha=8, dropout=0.5).eval()
    assert is_lora(model)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_adapters_learn_and_all_of_them_with_the_gradients_of_the_merged_weights(make_model, checkpointing):
    model = learnt(make_model()).train()
    plain = merged(model).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    frozen = {name: value.clone() for name, value in model.state_dict().items() if "lora_" not in name}
    loss(model).backward()
    loss(plain).backward()
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            adapted = model.get_base_model().get_submodule(name)
            down, up = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
            gradient = 2 * module.weight.grad  # alpha / r
            torch.testing.assert_close(up.grad, gradient @ down.T, rtol=1e-4, atol=1e-7)
            torch.testing.assert_close(down.grad, up.T @ gradient, rtol=1e-4, atol=1e-7)
    assert all((p.grad is not None) == ("lora_" in name) for name, p in model.named_parameters())
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in frozen.items())


def test_the_merged_model_is_plain_and_computes_the_same(base):
    kind = type(base)
    model = learnt(base)
    before = logits(model)
    plain = merged(model)
    assert type(plain) is kind
    assert not any("lora" in name for name, _ in plain.named_modules())
    torch.testing.assert_close(logits(plain), before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(model.merge_and_unload()), before, rtol=1e-5, atol=1e-5)  # PEFT's own


def test_merging_changes_nothing_in_the_model_that_trains(base):
    model = learnt(base)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    merged(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_is_saved_loads_as_a_plain_model_and_the_adapter_loads_onto_the_base(base, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base.save_pretrained(tmp_path / "base")
    model = learnt(base)
    save_merged(model, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-5, atol=1e-5)
    assert plain.config.tie_word_embeddings == model.config.tie_word_embeddings
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(again, tmp_path / "out" / ADAPTER).eval()
    assert torch.equal(logits(again), logits(model))


def test_a_state_gathered_elsewhere_can_be_merged_and_saved(make_model, tmp_path):
    model = learnt(make_model())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = logits(model)
    nn.init.zeros_(model.get_base_model().model.layers[0].mlp.up_proj.lora_B["default"].weight)  # no longer those
    torch.testing.assert_close(logits(merged(model, state)), before, rtol=1e-5, atol=1e-5)
    save_merged(model, tmp_path, state)
    torch.testing.assert_close(logits(type(merged(model)).from_pretrained(tmp_path)), before, rtol=1e-5, atol=1e-5)


def test_bfloat16_weights_are_rounded_once(make_model):
    model = learnt(make_model().to(torch.bfloat16))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    exact = layer.base_layer.weight.double() + 2 * (up.double() @ down.double())
    saved = merged(model).model.layers[0].mlp.up_proj.weight
    assert saved.dtype == torch.bfloat16
    assert ((saved.double() - exact).abs() <= exact.abs() * (2**-8 + 1e-6)).all()  # half of the last of 8 bits


def test_named_layers_alone_get_adapters(make_model):
    model = learnt(make_model(), target_modules=["q_proj", "v_proj"])
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name, _ in model.named_parameters() if "lora_" in name}
    assert adapted == {"q_proj", "v_proj"}
    torch.testing.assert_close(logits(merged(model)), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("q_prj", "'q_prj': known are down_proj, .*did you mean 'q_proj'"),
        ("lm_head", "embeddings are not adapted"),
        ("embed_tokens", "embeddings are not adapted"),
    ],
)
def test_layers_that_cannot_be_adapted_are_refused(make_model, name, said):
    with pytest.raises(UserError, match=f"--lora-target-modules .*{said}"):
        add_lora(make_model(), r=4, alpha=8, target_modules=["v_proj", name])


def test_all_linear_leaves_the_head_alone(base):
    head = base.get_output_embeddings()
    model = add_lora(base, r=4, alpha=8)
    assert model.get_output_embeddings() is head


def test_a_loss_sees_an_adapted_student_as_any_other(make_model):
    model = learnt(make_model())
    plain = merged(model)
    batch = Batch(IDS, torch.ones_like(IDS), torch.zeros(IDS.shape))
    heads = [read_head(each, "student") for each in (model, plain)]
    widths = []
    model.get_output_embeddings().register_forward_hook(lambda _, args, output: widths.append(output.shape[1]))
    with torch.no_grad():
        seen, expected = (run(each, head, batch) for each, head in zip((model, plain), heads, strict=True))
    assert widths == [1], "the student's own logits of every position would be calculated, and thrown away"
    torch.testing.assert_close(seen.hidden, expected.hidden, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen.head(seen.hidden), logits(model), rtol=1e-5, atol=1e-5)


def test_packed_rows_stay_apart_under_adapters(make_model):
    model = learnt(make_model())
    check_packing(model, 64)
    parts = [IDS[0, :7], IDS[1]]
    examples = [Example(part.numpy().astype(np.int32), np.zeros(len(part), np.float32)) for part in parts]
    packed = model(**collate([examples], pad_id=0).model_inputs(), use_cache=False).logits[0]
    alone = torch.cat([model(input_ids=part[None]).logits[0] for part in parts])
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


def test_checkpoints_hold_adapters_alone_and_a_resumed_run_is_the_uninterrupted_one(
    make_model, tokenizer, write_jsonl, tmp_path
):
    turns = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "x" * n}] for n in range(1, 9)]
    data = write_jsonl("d.jsonl", [{"messages": each} for each in turns])
    length = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2}
    lora = {"lora_r": 2, "lora_dropout": 0.2, "gradient_checkpointing": True, "per_device_train_batch_size": 2}

    def train(name: str, **changed) -> None:
        torch.manual_seed(0)  # of the adapters' first values
        out = tmp_path / name
        config = TrainConfig(mode="hard-labels", student="tiny", data=data, out=out, **length, **lora, **changed)
        run_training(config, model=make_model(), tokenizer=tokenizer)

    train("whole")
    train("resumed")
    for file in ("run.json", "model.safetensors", "adapter", "checkpoints/checkpoint-4"):
        path = tmp_path / "resumed" / file
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    kept = tmp_path / "resumed" / "checkpoints" / "checkpoint-2"
    assert [path.name for path in kept.glob("*.safetensors")] == ["adapter_model.safetensors"]
    train("resumed", resume=True)
    for file in ("model.safetensors", f"{ADAPTER}/adapter_model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "resumed" / file).read_bytes()


@pytest.fixture
def four_bits(make_model, tmp_path):
    """A student in 4 bits, on a GPU where there is one."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    make_model(hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(tmp_path / "base")
    setting = quantisation("4bit", "float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="float32", quantization_config=setting)
    return model.train()


def test_a_four_bit_base_is_merged_as_training_saw_it(four_bits, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    settings = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(four_bits, settings)  # as `add_lora` does, wherever it is
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        seen = model(input_ids=IDS.to(model.device)).logits.cpu()
    save_merged(model, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not hasattr(plain.config, "quantization_config")
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(plain), seen, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it trains there")
def test_four_bits_do_not_train_on_a_cpu(four_bits):
    with pytest.raises(UserError, match="--load-in-4bit trains on a GPU only"):
        add_lora(four_bits, r=4, alpha=8)

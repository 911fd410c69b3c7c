"""A student is cut as it should be, follows its teacher, and leaves everything else alone."""

from __future__ import annotations

import os
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
)

from mutirao.compress.compression import compress_model
from mutirao.compress.config import CompressConfig, DistillConfig
from mutirao.compress.loss import measure_loss
from mutirao.compress.training import following
from mutirao.compress.training.distillation import distill
from mutirao.compress.training.students import (
    check_student,
    cut_model,
    largest_channels,
    spread_blocks,
)
from mutirao.errors import DataError, InputError

VOCABULARY = 50


def make_teacher(num_blocks=4, seed=0, **changes):
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": num_blocks,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**values | changes)).eval()


def make_windows(num, length=24, seed=0):
    return torch.randint(
        3, VOCABULARY, (num, length), generator=torch.Generator().manual_seed(seed)
    )


def make_config(**changes):
    values = {"layers": 2, "hidden": None, "steps": 40, "learning_rate": 1e-2}
    return SimpleNamespace(**values | {"temperature": 1.0, "windows_per_step": 8} | changes)


def copied(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def is_same(model, before):
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[n], before[n]) for n in before)


def divergence(teacher, student, ids):
    return measure_loss(teacher, student, ids).divergence


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_student_learns_and_reopens(dtype, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    teacher = make_teacher().to(dtype)
    before, settings = copied(teacher), teacher.config.to_dict()
    heldout = make_windows(16, seed=1)
    untrained = cut_model(teacher, spread_blocks(4, 2))
    student = distill(teacher, None, make_windows(64), make_config())
    start, end = (divergence(teacher, each, heldout) for each in (untrained, student))
    assert end < 0.5 * start
    assert is_same(teacher, before)
    assert teacher.config.to_dict() == settings
    assert not teacher.training
    assert not student.training
    assert {each.dtype for each in student.parameters()} == {dtype}
    assert student.config.to_dict() == settings | {"num_hidden_layers": 2}
    assert os.listdir(tmp_path) == []
    assert capfd.readouterr().out == ""
    student.save_pretrained(str(tmp_path / "student"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=dtype)
    with torch.inference_mode():
        assert torch.equal(again(heldout).logits, student(heldout).logits)


def test_repeats_to_the_bit_and_leaves_the_generators_alone():
    def once():
        return distill(make_teacher(), None, make_windows(24), make_config(steps=3), seed=5)

    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    first = copied(once())
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    torch.manual_seed(99)
    assert is_same(once(), first)
    other = distill(make_teacher(), None, make_windows(24), make_config(steps=3), seed=6)
    assert not is_same(other, first)


def test_first_step_is_of_the_divergence_from_the_teacher(monkeypatch):
    """One plain step of AdamW, written here in float64, leads to the same place."""
    monkeypatch.setattr("mutirao.train.loop.fast_dtype", lambda _: "float32")
    monkeypatch.setattr(following, "TOKENS_PER_PASS", 24)  # four passes for the step
    teacher, student = make_teacher(seed=0), make_teacher(2, seed=1)
    ids = make_windows(4)
    naive = make_teacher(2, seed=1).double()
    optimizer = torch.optim.AdamW(naive.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0)
    want = (teacher.double()(ids).logits[:, :-1] / 2).log_softmax(2).detach()
    got = (naive(ids).logits[:, :-1] / 2).log_softmax(2)
    (want.exp() * (want - got)).sum(2).mean().backward()
    torch.nn.utils.clip_grad_norm_(naive.parameters(), 1.0)
    gradients = {name: each.grad.clone() for name, each in naive.named_parameters()}
    optimizer.step()
    config = make_config(steps=1, learning_rate=1e-3, temperature=2.0, windows_per_step=4)
    distill(teacher.float(), None, ids, config, student=student)
    trained = dict(student.named_parameters())
    for name, parameter in naive.named_parameters():
        # Adam's first step is the gradient's sign: only where that is no rounding error.
        is_clear = gradients[name].abs() > 1e-4 * gradients[name].abs().max()
        assert is_clear.double().mean() > 0.5
        difference = (trained[name] - parameter).detach()[is_clear].abs().max()
        assert float(difference) < 2e-5, name


def test_shared_weights_heal_and_stay_shared():
    teacher = make_teacher()
    student = make_teacher()
    for first, second in ((0, 1), (2, 3)):
        for layer, other in zip(
            student.model.layers[first].modules(),
            student.model.layers[second].modules(),
            strict=True,
        ):
            if isinstance(layer, torch.nn.Linear):
                other.weight = layer.weight
    heldout = make_windows(16, seed=1)
    start = divergence(teacher, student, heldout)
    healed = distill(teacher, None, make_windows(64), make_config(layers=None), student=student)
    assert healed is student
    assert divergence(teacher, student, heldout) < 0.7 * start
    layers = student.model.layers
    assert layers[0].mlp.up_proj.weight is layers[1].mlp.up_proj.weight
    assert layers[2].self_attn.q_proj.weight is layers[3].self_attn.q_proj.weight
    assert layers[1].mlp.up_proj.weight is not layers[2].mlp.up_proj.weight


def test_tied_embeddings_stay_tied_and_pruned_weights_zero():
    teacher = make_teacher(tie_word_embeddings=True)
    student = make_teacher(tie_word_embeddings=True)
    pruned = student.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        pruned[:, ::2] = 0
    before = pruned.clone()
    distill(teacher, None, make_windows(8), make_config(steps=2), student=student)
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert torch.equal(pruned == 0, before == 0)
    assert not torch.equal(pruned, before)


def test_narrower_student_learns_and_reopens(tmp_path):
    teacher = make_teacher(initializer_range=0.2)
    config = make_config(layers=4, hidden=16)
    student = distill(teacher, None, make_windows(64), config)
    assert student.model.layers[0].self_attn.q_proj.weight.shape == (32, 16)
    heldout = make_windows(16, seed=1)
    channels = largest_channels(teacher, make_windows(64), 16)
    start = divergence(teacher, cut_model(teacher, range(4), channels), heldout)
    assert divergence(teacher, student, heldout) < 0.8 * start
    student.save_pretrained(str(tmp_path))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.inference_mode():
        assert torch.equal(again(heldout).logits, student(heldout).logits)


def test_channels_are_those_that_matter():
    teacher = make_teacher()
    loud = torch.tensor([3, 4, 11, 30])
    with torch.no_grad():
        for name, each in teacher.named_parameters():
            if name.endswith(("embed_tokens.weight",)):
                each[:, loud] *= 20
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                each.zero_()
    assert torch.equal(largest_channels(teacher, make_windows(2), 4), loud)


@pytest.mark.parametrize(
    ("num_blocks", "kept", "expected"),
    [(30, 3, (0, 14, 29)), (12, 6, (0, 2, 4, 7, 9, 11)), (5, 1, (0,)), (3, 2, (0, 2))],
)
def test_blocks_are_spread_evenly(num_blocks, kept, expected):
    assert spread_blocks(num_blocks, kept) == expected


def test_lists_of_layers_follow_the_blocks():
    """A block with a sliding window keeps it: the student is the teacher without some blocks."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=4,
        layer_types=kinds,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = Gemma3ForCausalLM(config).eval()
    student = cut_model(teacher, (0, 3))
    assert student.config.layer_types == ["sliding_attention", "full_attention"]
    ids = make_windows(2)
    with torch.inference_mode():
        got = student(ids).logits
        teacher.model.layers = torch.nn.ModuleList(
            [teacher.model.layers[0], teacher.model.layers[3]]
        )
        teacher.config.num_hidden_layers = 2
        teacher.config.layer_types = ["sliding_attention", "full_attention"]
        torch.testing.assert_close(got, teacher(ids, use_cache=False).logits)


@pytest.mark.parametrize(
    ("changes", "num_windows", "error", "sentence"),
    [
        ({"layers": 4}, 8, InputError, "layers=4 is not accepted for a teacher of 4 blocks"),
        ({"layers": 9}, 8, InputError, "from 1 to 3"),
        ({"layers": 0}, 8, InputError, "layers=0 is not accepted"),
        ({"hidden": 32}, 8, InputError, "hidden=32 is not accepted for a teacher of 32 channels"),
        ({"steps": 0}, 8, InputError, "steps=0 with windows_per_step=8 trains nothing"),
        ({"windows_per_step": 0}, 8, InputError, "trains nothing"),
        ({}, 7, DataError, r"shape \(7, 24\) are too few to train on \(expected at least 8"),
    ],
)
def test_refuses_in_a_sentence(changes, num_windows, error, sentence):
    teacher = make_teacher()
    before = copied(teacher)
    with pytest.raises(error, match=sentence):
        distill(teacher, None, make_windows(num_windows), make_config(**changes))
    assert is_same(teacher, before)


@pytest.mark.parametrize(
    ("method", "sizes", "sentence"),
    [
        ("distill", {"layers": 4}, "layers=4 is not accepted for a teacher of 4 blocks"),
        ("distill", {"layers": 9, "hidden": 16}, r"layers=9 is not accepted .* from 1 to 4\)"),
        ("distill", {"hidden": 64}, "hidden=64 is not accepted for a teacher of 32 channels"),
        (
            "distill",
            {"hidden": 26},
            r"hidden=26 is not accepted for a student of type 'llama' \(expected a multiple of "
            r"its 4 attention heads\)$",
        ),
        ("distill,gptq", {"hidden": 24}, "group_size=16 does not divide the student's hidden=24"),
    ],
)
def test_students_that_cannot_be_are_refused_before_anything_is_loaded(
    method, sizes, sentence, tmp_path, monkeypatch
):
    def refuse(*_, **__):
        raise AssertionError("loaded")

    make_teacher().config.save_pretrained(tmp_path / "teacher")
    monkeypatch.setattr("mutirao.compress.compression.load_causal_lm", refuse)
    settings = {"group_size": 16} if "gptq" in method else {}
    config = CompressConfig(method=method, distillation=DistillConfig(**sizes), **settings)
    with pytest.raises(InputError, match=sentence):
        compress_model(tmp_path / "teacher", tmp_path / "out", config, text=tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "sizes"),
    [
        ("distill", {}),
        ("distill,gptq", {"layers": 4, "hidden": 16}),
        ("share,distill", {}),
        ("rtn", None),
    ],
)
def test_students_that_can_be_are_not(method, sizes, tmp_path):
    make_teacher().config.save_pretrained(tmp_path)
    distillation = None if sizes is None else DistillConfig(**sizes)
    settings = {"group_size": 16} if "gptq" in method else {}
    check_student(tmp_path, CompressConfig(method=method, distillation=distillation, **settings))
    check_student(tmp_path / "none", CompressConfig(method=method, distillation=distillation))


def test_widths_need_be_multiples_of_heads_only_where_the_model_says_so(tmp_path):
    Qwen3Config(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=2, head_dim=16
    ).save_pretrained(tmp_path)
    sizes = DistillConfig(layers=2, hidden=26)
    check_student(tmp_path, CompressConfig(method="distill", distillation=sizes))


def test_without_trl_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "trl", None)
    name = "mutirao.compress.training.teacher_trainer"
    monkeypatch.delitem(__import__("sys").modules, name, raising=False)
    with pytest.raises(InputError, match=r"pip install \"mutirao\[compress\]\""):
        distill(make_teacher(), None, make_windows(8), make_config())


def test_a_failure_leaves_teacher_and_settings_as_they_were():
    teacher, student = make_teacher().bfloat16(), make_teacher(2).bfloat16()
    with torch.no_grad():
        student.model.embed_tokens.weight[5] = torch.inf
    before, settings = copied(teacher), student.config.to_dict()
    with pytest.raises(DataError, match="not finite; lower learning_rate"):
        distill(teacher, None, make_windows(64), make_config(), student=student)
    assert is_same(teacher, before)
    assert student.config.to_dict() == settings
    assert student.dtype == torch.bfloat16
    assert all(each.grad is None for each in [*student.parameters(), *teacher.parameters()])
    good = distill(teacher, None, make_windows(8), make_config(steps=1))
    assert torch.isfinite(good.lm_head.weight).all()

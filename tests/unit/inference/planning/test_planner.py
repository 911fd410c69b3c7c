"""Plans of real models' shapes: what fits, what is chosen, and what is said of it."""

import dataclasses
import json

import pytest
from small_machine import small_machine
from small_stores import SPECS, make_store, mixed_formats

from mutirao.errors import FormatError, InputError, MissingKernelError, SourceError
from mutirao.inference.architecture.architectures import spec_from_config
from mutirao.inference.architecture.model_spec import matrix_shapes
from mutirao.inference.architecture.program import compile_program
from mutirao.inference.calibration import Calibration
from mutirao.inference.native.backend import NOTHING, NativeBackend, Placement
from mutirao.inference.planning import model_plans
from mutirao.inference.planning.machine import DiskSpeed, MemoryLimits
from mutirao.inference.planning.memory_use import (
    kv_cache_bytes,
    least_ring_bytes,
    memory_besides_weights,
    memory_needed,
    resident_bytes,
)
from mutirao.inference.planning.model_plans import plan_model
from mutirao.inference.planning.placement import multiplied
from mutirao.inference.planning.plan_source import planned_models
from mutirao.inference.planning.planner import (
    ALL_RESIDENT,
    PINNED,
    SPECULATION,
    TooLittleMemoryError,
    assumed_acceptance,
    make_plans,
)
from mutirao.inference.planning.quantization_mixes import MIXES, USUAL, assumed_formats
from mutirao.inference.store.store_index import plan_layout

QWEN_CONFIG = {
    "model_type": "qwen2",
    "hidden_size": 1536,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "num_hidden_layers": 28,
    "intermediate_size": 8960,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}
LLAMA_70B_CONFIG = {
    "model_type": "llama",
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_hidden_layers": 80,
    "intermediate_size": 28672,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "tie_word_embeddings": False,
}
QWEN_Q4_K_M_BYTES = 1_110_790_656
"""All matrices of the published Qwen2.5-Coder-1.5B-Instruct Q4_K_M GGUF, as converted."""

SPEC = spec_from_config(QWEN_CONFIG)
TENSORS = plan_layout(SPEC, assumed_formats(SPEC, "Q4_K_M")).tensors
SLOW = small_machine(
    s_per_weight=2e-11,
    reads=tuple(
        DiskSpeed(chunk, readers, 2e8, 0.0) for chunk in (1 << 16, 1 << 20) for readers in (1, 8)
    ),
)


def _plans(megabytes, **settings):
    return make_plans(SLOW, SPEC, TENSORS, megabytes * 10**6, **{"context": 2048, **settings})


# ---- Memory -------------------------------------------------------------------------------------


def test_the_cache_holds_a_key_and_a_value_of_two_bytes_for_each_head_of_each_layer():
    assert kv_cache_bytes(SPEC, 2048) == 2 * 28 * 2 * 128 * 2 * 2048
    assert kv_cache_bytes(SPEC, 1) == kv_cache_bytes(SPEC, 16)
    odd = dataclasses.replace(SPEC, head_dim=20, rope=None)
    assert kv_cache_bytes(odd, 16) == 16 * 28 * 2 * (20 + 32) * 2


def test_parts_of_the_memory_add_up():
    place = Placement({"token_embd": NOTHING}, context=512)
    use = memory_needed(SPEC, TENSORS, place)
    assert use.total == sum(dataclasses.asdict(use).values())
    expected = sum(each.num_bytes for name, each in TENSORS.items() if name != "token_embd")
    assert expected <= use.weights <= expected + (2 << 20)
    assert use.kv_cache == kv_cache_bytes(SPEC, 512)


def test_a_ring_is_counted_where_something_is_streamed():
    place = Placement({"token_embd": NOTHING}, num_readers=1, context=16, ring_bytes=1 << 30)
    assert memory_needed(SPEC, TENSORS, place).reading < 1 << 25
    streaming = dataclasses.replace(place, resident={"token_embd": NOTHING, "output": 2})
    assert memory_needed(SPEC, TENSORS, streaming).reading == 1 << 30
    assert memory_besides_weights(SPEC, TENSORS, place).reading == 1 << 30


def test_planes_take_their_share_of_a_matrix():
    tensor = TENSORS["blk.0.attn_q"]  # Q4_K: half a bit of scales, planes of 2, 1 and 1
    weights = tensor.num_rows * tensor.num_columns
    assert resident_bytes(tensor, NOTHING) == 0
    assert resident_bytes(tensor, 0) == weights // 16
    assert resident_bytes(tensor, 1) == weights * 5 // 16
    assert resident_bytes(tensor, 3) == tensor.num_bytes == weights * 9 // 16


def test_the_least_ring_is_one_that_the_engine_takes(tmp_path):
    spec = SPECS["llama"]
    try:
        store = make_store(tmp_path, spec, mixed_formats(spec))
        nothing = dict.fromkeys(store.tensors, NOTHING)
        for piece_bytes in (0, 1 << 14, 1 << 20):
            ring = least_ring_bytes(spec, store.tensors, piece_bytes)
            place = Placement(
                nothing, direct=False, context=32, ring_bytes=ring, piece_bytes=piece_bytes
            )
            with NativeBackend(store, place) as backend:
                assert backend.run([1, 2], 0).shape == (1, spec.vocab_size)
    except MissingKernelError as error:
        pytest.skip(str(error))


# ---- Formats ------------------------------------------------------------------------------------


def test_an_assumed_mix_has_the_bytes_of_the_published_file():
    assert sum(each.num_bytes for each in TENSORS.values()) == QWEN_Q4_K_M_BYTES


def test_mixes_grow_with_their_bits():
    sizes = [
        sum(t.num_bytes for t in plan_layout(SPEC, assumed_formats(SPEC, mix)).tensors.values())
        for mix in USUAL
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] / sizes[-1] == pytest.approx(14.25 / 4.6, rel=0.05)


def test_rows_that_are_no_whole_superblocks_get_formats_of_small_blocks():
    narrow = dataclasses.replace(SPEC, d_model=288, embedding_dim=288, ffn_dim=512)
    formats = assumed_formats(narrow, "Q4_K_M")
    assert formats["blk.0.attn_q"] == "Q5_0"  # 288 columns
    assert formats["blk.0.ffn_down"] == "Q6_K"  # 512 columns, among the raised
    assert formats["output"] == "Q8_0"
    odd = dataclasses.replace(SPEC, ffn_dim=1000)
    assert assumed_formats(odd, "Q4_K_M")["blk.0.ffn_down"] == "F16"
    plan_layout(narrow, formats)


def test_an_unknown_quantization_is_refused():
    with pytest.raises(InputError, match=r"'Q3_X' is not known.*Q4_K_M"):
        assumed_formats(SPEC, "Q3_X")


# ---- Plans --------------------------------------------------------------------------------------


def test_what_fits_is_all_resident():
    found = _plans(2000)
    assert [plan.name for plan in found.plans] == [ALL_RESIDENT]
    assert found.best.fits
    assert found.best.prediction.bytes_per_token == 0


def test_what_does_not_fit_is_streamed_or_split_and_the_fastest_is_chosen():
    found = _plans(900)
    assert [(plan.name, plan.fits) for plan in found.plans] == [
        (ALL_RESIDENT, False),
        (PINNED, True),
        (SPECULATION, True),
    ]
    speeds = {plan.name: plan.prediction.tokens_per_s for plan in found.plans}
    assert found.best.name == SPECULATION
    assert speeds[SPECULATION] > speeds[PINNED]


@pytest.mark.parametrize("megabytes", [160, 300, 500, 700, 900, 1050])
def test_plans_keep_within_the_memory_and_use_it(megabytes):
    found = _plans(megabytes)
    for plan in found.plans[1:]:
        assert plan.fits
        assert plan.memory.total <= megabytes * 10**6
    assert found.best.memory.total > 0.9 * megabytes * 10**6


def test_more_memory_is_never_slower():
    speeds = [_plans(megabytes).best.prediction.tokens_per_s for megabytes in range(200, 1200, 100)]
    assert speeds == sorted(speeds)


def test_the_least_memory_that_is_told_works_and_less_does_not():
    with pytest.raises(TooLittleMemoryError, match=r"50 MB is too small.*context of 2048") as error:
        _plans(50)
    least = error.value.least_bytes
    found = make_plans(SLOW, SPEC, TENSORS, least, context=2048)
    assert found.least_bytes == least
    assert found.best.choice.resident_bytes == 0
    with pytest.raises(TooLittleMemoryError, match="at least"):
        make_plans(SLOW, SPEC, TENSORS, least - 1, context=2048)


def test_a_shorter_context_needs_less():
    assert _plans(900, context=256).least_bytes < _plans(900, context=2048).least_bytes


def test_acceptance_is_assumed_until_it_is_calibrated():
    assumed = _plans(900).plans[-1]
    assert assumed.acceptance_from == "assumption"
    calibration = Calibration(
        {name: {1: 0.2, 2: 0.1, 3: 0.05, 4: 0.01} for name in TENSORS}, [(100.0, 0.1)], 96
    )
    measured = _plans(900, calibration=calibration).plans[-1]
    assert measured.acceptance_from == "calibration"
    expected = calibration.expected_agreement(measured.choice.loss)
    assert measured.prediction.acceptance == pytest.approx(expected)


def test_assumed_acceptance_falls_with_what_is_left_out():
    assert assumed_acceptance(0.0) == 1.0
    assert assumed_acceptance(0.149) == pytest.approx(0.93)
    values = [assumed_acceptance(share / 100) for share in range(101)]
    assert values == sorted(values, reverse=True)
    assert values[-1] == 0.0


def test_float_weights_have_no_planes_to_split():
    tensors = plan_layout(SPEC, dict.fromkeys(matrix_shapes(SPEC), "F32")).tensors
    found = make_plans(SLOW, SPEC, tensors, 2 * 10**9, context=256)
    assert [plan.name for plan in found.plans] == [ALL_RESIDENT, PINNED]


def test_split_floats_are_joined_where_there_is_room():
    """As plain floats they take 16 bits, else 14.25; then they are streamed, and can draft."""
    tensors = plan_layout(SPEC, assumed_formats(SPEC, "BF16")).tensors
    plain = plan_layout(SPEC, dict.fromkeys(matrix_shapes(SPEC), "BF16")).tensors
    most, least = (sum(t.num_bytes for t in each.values()) for each in (plain, tensors))
    assert least / most == pytest.approx(14.25 / 16)
    joined = make_plans(SLOW, SPEC, tensors, 2 * most, context=256, looks_up=False)
    assert joined.best.placement.joined
    assert joined.best.memory.weights >= plain_multiplied(plain)
    tight = joined.best.memory.total - 10**6
    split = make_plans(SLOW, SPEC, tensors, tight, context=256, looks_up=False)
    assert split.best.name == ALL_RESIDENT
    assert not split.best.placement.joined
    assert split.best.memory.total < tight
    tighter = split.best.memory.total - 10**6
    streamed = make_plans(SLOW, SPEC, tensors, tighter, context=256, looks_up=False)
    assert [plan.name for plan in streamed.plans] == [ALL_RESIDENT, PINNED, SPECULATION]


def plain_multiplied(tensors):
    return sum(each.num_bytes for each in multiplied(compile_program(SPEC), tensors))


def test_seventy_billion_weights_are_planned():
    spec = spec_from_config(LLAMA_70B_CONFIG)
    tensors = plan_layout(spec, assumed_formats(spec, "Q4_K_M")).tensors
    found = make_plans(SLOW, spec, tensors, 32 * 10**9, context=2048)
    pinned = found.plans[1]
    weights = sum(each.num_bytes for each in tensors.values()) - tensors["token_embd"].num_bytes
    assert pinned.prediction.bytes_per_token >= weights - 32 * 10**9
    assert pinned.prediction.bytes_per_token == pytest.approx(weights - 31e9, rel=0.05)
    assert pinned.prediction.seconds_per_token >= pinned.prediction.bytes_per_token / 2e8


# ---- Models by name -----------------------------------------------------------------------------


@pytest.fixture
def planned(monkeypatch, tmp_path):
    """Plan on the slow machine, with 3 GB available."""
    monkeypatch.setenv("MUTIRAO_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(
        model_plans,
        "probe",
        lambda _, num_threads, refresh: dataclasses.replace(SLOW, num_threads=num_threads),
    )
    monkeypatch.setattr(model_plans, "memory_limits", lambda: MemoryLimits(4 * 10**9, 3 * 10**9))
    return plan_model


def _write_config(folder, config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_configuration_alone_is_planned_in_the_usual_quantizations(planned, tmp_path):
    folder = _write_config(tmp_path / "Qwen", QWEN_CONFIG)
    found = planned(str(folder), memory_bytes=900 * 10**6)
    assert found.name == "Qwen"
    assert tuple(found.models) == USUAL
    assert found.models["BF16"][1].best.name in (PINNED, SPECULATION)
    assert "* an assumption" in " ".join(found.notes())
    assert any("assumed, as llama.cpp" in note for note in found.notes())
    json.dumps(found.to_json())
    by_file = planned(str(folder / "config.json"), memory_bytes=900 * 10**6, quantizations=["Q8_0"])
    assert by_file.name == "Qwen"
    assert by_file.models["Q8_0"] == found.models["Q8_0"]
    assert by_file.notes()[0] in found.notes()


def test_what_does_not_run_in_the_memory_is_told_beside_what_does(planned, tmp_path):
    folder = _write_config(tmp_path / "big", LLAMA_70B_CONFIG)
    memory = {"memory_bytes": 830 * 10**6}
    found = planned(str(folder), **memory, quantizations=["BF16", "Q4_0"])
    by_name = {each["quantization"]: each for each in found.to_json()["quantizations"]}
    assert by_name["BF16"]["chosen"] is None
    assert by_name["BF16"]["least_memory_bytes"] > memory["memory_bytes"]
    assert by_name["Q4_0"]["chosen"] == PINNED
    with pytest.raises(TooLittleMemoryError):
        planned(str(folder), **memory, quantizations=["BF16"])


def test_one_quantization_can_be_asked_for(planned, tmp_path):
    folder = _write_config(tmp_path / "Qwen", QWEN_CONFIG)
    found = planned(str(folder), quantizations=["Q8_0"], context=100_000, num_threads=1)
    assert list(found.models) == ["Q8_0"]
    assert found.memory_bytes == 3 * 10**9
    assert found.context == 32768  # the model's own
    assert found.machine.num_threads == 1


def test_more_memory_than_is_there_is_told(planned, tmp_path):
    folder = _write_config(tmp_path / "Qwen", QWEN_CONFIG)
    found = planned(str(folder), memory_bytes=5 * 10**9)
    assert "Only 3000 MB are available here at this moment." in found.notes()


def test_a_weight_store_and_a_model_are_planned_as_they_are(
    planned, tmp_path, tiny_model_directory
):
    found = planned(str(tiny_model_directory))
    (model, plans), *others = found.models.values()
    assert not others
    assert {each.format for each in model.tensors.values()} == {"BF16_SPLIT"}
    assert plans.best.name == ALL_RESIDENT
    from mutirao.inference.store.weight_store import WeightStore

    store = WeightStore.build(tiny_model_directory, tmp_path / "store", lambda *_: None)
    (of_store,) = planned_models(str(store.directory))
    assert of_store.tensors == model.tensors == store.tensors
    assert of_store.store == store.directory


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ('{"model_type": "mamba"}', "mamba.*is not supported"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_bad_configuration_is_refused(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(FormatError, match=message):
        planned_models(str(tmp_path))


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(FormatError, match=r"config\.json cannot be read.*a GGUF file"):
        planned_models(str(tmp_path))
    with pytest.raises(SourceError, match="does not exist"):
        planned_models(str(tmp_path / "nothing"))


def test_of_a_hub_repository_only_the_configuration_is_downloaded(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setenv("MUTIRAO_HOME", str(tmp_path / "home"))
    folder = _write_config(tmp_path / "snapshot", QWEN_CONFIG)
    asked = []

    def download(repository, **options):
        asked.append((repository, options["allow_patterns"]))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    models = planned_models("hf:org/name", ["Q4_K_M"])
    assert [model.quantization for model in models] == ["Q4_K_M"]
    assert asked == [("org/name", ["config.json"])]
    (folder / "config.json").unlink()
    with pytest.raises(SourceError, match=r"hf:org/name has no config\.json.*GGUF"):
        planned_models("hf:org/name")


def test_every_mix_is_of_formats_that_are_computed_with():
    for name in MIXES:
        formats = assumed_formats(SPEC, name)
        assert set(formats) == set(matrix_shapes(SPEC))
        plan_layout(SPEC, formats)

"""An advice from end to end, on a tiny model that was trained for some seconds."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from tiny_trained import make_text, write_trained

from mutirao.advise import advice as advice_module
from mutirao.advise import measuring
from mutirao.advise import ways as ways_module
from mutirao.advise.advice import advise
from mutirao.advise.choosing import Speed
from mutirao.advise.config import AdviseConfig, Budget, Outlook
from mutirao.advise.kept import KeptLines
from mutirao.advise.measuring import Bench, measure_ways, read_measured
from mutirao.advise.noises import Noises
from mutirao.advise.ways import Shape, Way, relative_noise
from mutirao.artifact import open_artifact
from mutirao.compress.compression import compress_model
from mutirao.compress.config import CompressConfig, TextConfig
from mutirao.compress.rounding.grid import quantize_weight
from mutirao.compress.windows import Windows, read_windows
from mutirao.errors import DataError, DiskFullError, InputError, ShapeError
from mutirao.formats.huggingface import load_causal_lm
from mutirao.models.causal import CausalModel

TEXT = TextConfig(window_tokens=32, calibration_windows=16, heldout_windows=96)
CONFIG = AdviseConfig(group_sizes=(16, 32), text=TEXT)


@pytest.fixture(scope="module")
def model(tiny_model_directory, tmp_path_factory):
    return write_trained(tiny_model_directory, tmp_path_factory.mktemp("trained") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(make_text(3600))
    return path


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MUTIRAO_HOME", str(tmp_path_factory.mktemp("home")))
        speed = Speed("Q4_0", 10_000_000, 5_000_000, 12.0)
        patch.setattr(advice_module, "predict_speeds", lambda path, memory: {4: speed})
        yield


@pytest.fixture(scope="module")
def found(model, text, home, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "advice"
    outlook = Outlook(training_tokens=1e6, num_requests=1e6)
    return advise(model, text, config=CONFIG, outlook=outlook, out=out), out


def test_what_is_written_is_what_is_said(found):
    advice, out = found
    open_artifact(out, "advice")
    kept = json.loads((out / "advice.json").read_text())
    assert kept == json.loads(json.dumps(advice.to_json()))
    assert kept["candidates"][kept["recommended"]]["bits"] == advice.chosen.way.bits
    assert kept["sentence"].startswith("Take ")


def test_a_candidate_is_what_compress_makes_of_it(found, model, text, tmp_path):
    advice, _ = found
    candidate = next(
        each for each in advice.candidates if each.way == Way("rtn", 3, 16) and each.measured
    )
    config = CompressConfig(method="rtn", bits=3, group_size=16)
    metrics = compress_model(model, tmp_path / "small", config, text=text, text_config=TEXT)
    assert metrics["total_bytes"] == candidate.total_bytes
    assert metrics["bits_per_weight"] == pytest.approx(candidate.bits_per_weight)
    rise = candidate.measured.loss.rise
    assert metrics["heldout.rise"] == pytest.approx(rise, abs=0.02 * abs(rise) + 1e-3)


def test_rises_that_were_measured_lie_where_the_law_says(found):
    advice, _ = found
    both = [each for each in advice.candidates if each.predicted and each.measured]
    assert len(both) >= 3
    for each in both:
        assert each.predicted.low / 2 < each.measured.loss.rise < each.predicted.high * 2


def test_a_second_advice_measures_nothing_again(found, model, text, monkeypatch):
    def refuse(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(Bench, "measure", refuse)
    budget = Budget(loss_share=0.5)
    again = advise(
        model, text, config=CONFIG.model_copy(update={"sensitivity_windows": 0}), budget=budget
    )
    assert again.parts == ()
    assert again.chosen.total_bytes <= found[0].chosen.total_bytes


def test_a_second_advice_rounds_nothing_again(found, model, text, monkeypatch):
    """Neither to measure, nor for noise, nor part by part, nor for the mix."""

    def refuse(*_, **__):
        raise AssertionError("rounded again")

    assert found[0].parts
    budget = Budget(disk_bytes=_bytes(model, 4))
    first = advise(model, text, config=CONFIG, budget=budget)
    assert first.mix is not None
    monkeypatch.setattr(measuring, "quantize_weight", refuse)
    monkeypatch.setattr(measuring, "round_by_blocks", refuse)
    monkeypatch.setattr(ways_module, "quantize_weight", refuse)
    monkeypatch.setattr(Bench, "probe", refuse)
    monkeypatch.setattr(Bench, "score", refuse)
    again = advise(model, text, config=CONFIG, budget=budget)
    assert again.to_json() == first.to_json()


def test_a_grid_is_rounded_once_whatever_asks_for_it(tmp_path, monkeypatch):
    torch.manual_seed(0)
    layers = {name: torch.nn.Linear(64, 32, bias=False) for name in "abc"}
    rounded = []

    def count(weight_OI, *others):
        rounded.append(others)
        return quantize_weight(weight_OI, *others)

    expected = relative_noise(layers, 3, 16)
    alone = relative_noise({"b": layers["b"]}, 3, 16)
    monkeypatch.setattr(ways_module, "quantize_weight", count)
    kept = KeptLines(tmp_path / "noises.jsonl")
    for _ in range(2):
        noises = Noises(layers, kept)
        assert noises.find(3, 16) == expected
        assert noises.find(3, 16, ["b"]) == alone
        with kept.path.open("a") as file:
            file.write('\n{"bits": 3, "gro')  # cut by a kill
    assert rounded == [(3, 16)] * 3


def test_parts_and_a_mix_within_the_bytes(model, text):
    budget = Budget(disk_bytes=_bytes(model, 4))
    advice = advise(model, text, config=CONFIG, budget=budget)
    assert {each.name for each in advice.parts} == {
        f"model.layers.{index}.{kind}" for index in (0, 1) for kind in ("self_attn", "mlp")
    }
    assert all(each.divergence > 0 for each in advice.parts)
    assert advice.mix is not None
    assert advice.mix.total_bytes <= _bytes(model, advice.chosen.way.bits, advice.chosen.way)
    assert any("layer by layer" in sentence for sentence in advice.remarks())


def _bytes(model, bits, way=None):
    loaded, _ = load_causal_lm(model)
    shape = Shape.of(loaded, {n: m for n, m in loaded.named_modules() if _is_block(n, m)})
    return shape.count_bytes(bits, 16 if way is None else way.group_size)


def _is_block(name, module):
    return isinstance(module, torch.nn.Linear) and ".layers." in name


def test_the_model_is_as_it_was(model):
    loaded, _ = load_causal_lm(model, dtype="float32")
    before = {name: each.clone() for name, each in loaded.named_parameters()}
    ids_WT = torch.randint(0, loaded.config.vocab_size, (6, 32))
    bench = Bench(loaded, Windows(ids_WT[:3], ids_WT[3:]))
    for way in (Way("rtn", 2, 16), Way("gptq", 2, 32), Way("awq", 3, 32)):
        bench.measure(way)
        after = dict(loaded.named_parameters())
        assert all(torch.equal(after[name], each) for name, each in before.items())


def test_tuned_codes_are_measured_as_compress_measures_them(model, text, tmp_path):
    opened = CausalModel(*load_causal_lm(model, dtype="float32"), name="tiny")
    bench = Bench(opened.model, read_windows(text, opened, TEXT))
    before = {name: each.clone() for name, each in opened.model.named_parameters()}
    plain, tuned = (bench.measure(Way(method, 2, 16)).loss for method in ("gptq", "gptq,tune"))
    for name, each in opened.model.named_parameters():
        assert torch.equal(each, before[name])
    assert tuned != plain
    config = CompressConfig(method="gptq,tune", bits=2, group_size=16)
    metrics = compress_model(model, tmp_path / "small", config, text=text, text_config=TEXT)
    assert metrics["heldout.rise"] == pytest.approx(tuned.rise, abs=0.02 * abs(tuned.rise) + 1e-3)


def test_what_tunes_needs_its_package_before_anything_is_loaded(monkeypatch, text, tmp_path):
    def refuse(*_):
        raise InputError("TRL is not installed")

    monkeypatch.setattr(advice_module, "import_optional", refuse)
    monkeypatch.setattr(advice_module, "refuse_quantized", lambda _: None)
    with pytest.raises(InputError, match="TRL"):
        advise(tmp_path / "nothing", text, config=AdviseConfig(methods=("rtn", "gptq,tune")))


def test_noise_is_the_squared_error_over_the_squared_weights():
    torch.manual_seed(0)
    layers = {name: torch.nn.Linear(64, 32, bias=False) for name in "ab"}
    weights = torch.cat([each.weight.detach() for each in layers.values()]).double()
    rounded = torch.cat(
        [quantize_weight(each.weight.detach(), 3, 16).expand() for each in layers.values()]
    )
    expected = ((rounded.double() - weights) ** 2).sum() / (weights**2).sum()
    assert relative_noise(layers, 3, 16) == pytest.approx(float(expected), rel=1e-6)


def test_a_cut_line_of_measures_is_left_out(tmp_path):
    path = tmp_path / "measured.jsonl"
    line = {"method": "rtn", "bits": 4, "group_size": None, "original": 1.0, "compressed": 2.0}
    line |= {"rise": 1.0, "standard_error": 0.1, "divergence": 1.0, "num_tokens": 5}
    path.write_text("\n" + json.dumps(line) + '\n{"method": "gptq", "bi')
    assert [each.way for each in read_measured(path)] == [Way("rtn", 4, None)]


def test_bad_input_is_told_in_one_sentence(model, text, tmp_path):
    with pytest.raises(InputError, match="no way of rounding keeps to 10 B of disk"):
        advise(model, text, config=CONFIG, budget=Budget(disk_bytes=10))
    narrow = CONFIG.model_copy(update={"half_width": 1e-5})
    with pytest.raises(DataError, match=r"an interval of ± 0.00% .* takes about [\d,]+ held-out"):
        advise(model, text, config=narrow)
    with pytest.raises(ShapeError, match="none of the group sizes 48"):
        advise(model, text, config=CONFIG.model_copy(update={"group_sizes": (48,)}))
    compress_model(model, tmp_path / "small", CompressConfig())
    with pytest.raises(InputError, match="compressed already"):
        advise(tmp_path / "small", text, config=CONFIG)


def test_numbers_that_are_none_are_refused_wherever_they_are(model, text, tmp_path):
    damaged, tokenizer = load_causal_lm(model)
    with torch.no_grad():
        damaged.model.norm.weight[3] = torch.nan
    damaged.save_pretrained(str(tmp_path / "damaged"))
    tokenizer.save_pretrained(str(tmp_path / "damaged"))
    with pytest.raises(DataError, match=r"weights of model\.norm are not finite"):
        advise(tmp_path / "damaged", text, config=CONFIG)
    with pytest.raises(DataError, match=r"weights of model\.norm are not finite"):
        compress_model(tmp_path / "damaged", tmp_path / "small", CompressConfig())
    assert not (tmp_path / "small").exists()


def test_weights_that_were_rounded_before_are_pointed_out(model, text, tmp_path):
    rounded, tokenizer = load_causal_lm(model)
    with torch.no_grad():
        for name, layer in rounded.named_modules():
            if _is_block(name, layer):
                layer.weight.copy_(quantize_weight(layer.weight, 4, 32).expand())
    rounded.save_pretrained(str(tmp_path / "rounded"))
    tokenizer.save_pretrained(str(tmp_path / "rounded"))
    found = advise(
        tmp_path / "rounded", text, config=CONFIG.model_copy(update={"sensitivity_windows": 0})
    )
    assert "the model was rounded before" in found.remarks()[0]


def test_an_interval_that_is_asked_for_takes_more_windows(model, text):
    loaded, tokenizer = load_causal_lm(model, dtype="float32")
    encoder = CausalModel(loaded, tokenizer, name="model")
    bench = Bench(loaded, read_windows(text, encoder, TEXT))
    way = Way("rtn", 4, 16)
    loss = bench.measure(way).loss
    half = 1.96 * loss.standard_error / loss.original
    for share, expected in ((1.5, 96), (1 / 1.2, 139)):  # 96 windows times 1.2 squared
        config = CONFIG.model_copy(update={"half_width": half * share})
        windows = advice_module._enough(bench, way, model, text, encoder, config)
        assert len(windows.heldout) == expected


def _bench(model):
    loaded, _ = load_causal_lm(model, dtype="float32")
    ids_WT = torch.randint(0, loaded.config.vocab_size, (6, 32))
    return Bench(loaded, Windows(ids_WT[:3], ids_WT[3:]))


def test_measures_go_on_after_a_kill(model, tmp_path, monkeypatch):
    bench, path = _bench(model), tmp_path / "kept" / "measured.jsonl"
    ways = [Way("rtn", bits, 16) for bits in (2, 3, 4)]
    whole = list(measure_ways(bench, ways, tmp_path / "whole.jsonl"))
    assert next(measure_ways(bench, ways, path)) == whole[0]  # killed after the first
    with path.open("a") as file:
        file.write('\n{"method": "rtn", "bi')  # and in the middle of the second
    asked = []
    measure = Bench.measure
    monkeypatch.setattr(Bench, "measure", lambda self, way: asked.append(way) or measure(self, way))
    assert list(measure_ways(bench, ways, path)) == whole
    assert asked == ways[1:]
    assert read_measured(path) == whole


def test_a_disk_without_room_for_the_cache_is_told(model, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    bench = _bench(model)
    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(DiskFullError, match=r"no room left to write .*measured\.jsonl: free some"):
        next(measure_ways(bench, [Way("rtn", 2, 16)], tmp_path / "none" / "measured.jsonl"))
    noises = Noises(bench.layers, KeptLines(tmp_path / "none" / "noises.jsonl"))
    with pytest.raises(DiskFullError, match=r"no room left to write .*noises\.jsonl"):
        noises.find(2, 16)


def test_a_full_disk_keeps_what_was_measured(model, tmp_path, monkeypatch):
    bench, path = _bench(model), tmp_path / "measured.jsonl"
    ways = [Way("rtn", bits, 16) for bits in (2, 3)]
    found = measure_ways(bench, ways, path)
    first = next(found)

    def fail(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DiskFullError, match="no room left"):
        next(found)
    assert read_measured(path)[0] == first
    loaded, _ = load_causal_lm(model, dtype="float32")
    after = dict(bench.model.named_parameters())
    assert all(torch.equal(after[name], each) for name, each in loaded.named_parameters())

"""The arithmetic of the quantizers' table, and one setting of ours through the whole of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_trained import make_text

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

import bench_quantizers
from quantizers.ours import OurSetting, stored_figures
from quantizers.peers import PeerError
from quantizers.picture import draw
from quantizers.settings import choose
from quantizers.table import ORIGINAL, compare, markdown, summarize

from mutirao.compress.compression import compress_model
from mutirao.compress.config import CompressConfig, TextConfig
from mutirao.compress.windows import read_windows
from mutirao.errors import InputError
from mutirao.models.causal import CausalModel

WINDOWS = ["--window-tokens", "32", "--calibration-windows", "4", "--heldout-windows", "8"]


def make_row(name, tool, bits, losses):
    return {
        "name": name,
        "tool": tool,
        "state": "ok",
        "bits_per_weight": bits,
        "window_losses": list(losses),
        "window_divergences": [1.0] * len(losses),
        "window_tokens": 10,
        "method": "gptq",
        "symmetric": False,
        "options": {},
    }


@pytest.fixture
def rows():
    """A hard window has the same loss added in all settings, which pairing takes out."""
    draw = np.random.default_rng(0)
    hard = draw.normal(30.0, 20.0, size=40)
    noise = draw.normal(0.0, 0.1, size=(2, 40))
    return [
        make_row(ORIGINAL, ORIGINAL, 16.0, hard),
        make_row("ours-gptq-3-g32", "ours", 3.59, hard + 1.0 + noise[0]),
        make_row("worse", "peer", 3.59, hard + 1.2),
        make_row("better", "peer", 3.599, hard + 0.8),
        make_row("larger", "peer", 3.7, hard + 0.5 + noise[1]),
        make_row("of-four", "peer", 4.5, hard + 0.1),
        make_row("of-two", "peer", 2.6, hard + 1.0),
        {"name": "dead", "tool": "peer", "state": "failed", "reason": "no words"},
    ]


def test_differences_are_paired_by_window(rows):
    found = {row["name"]: row for row in summarize(rows)}
    ours = found["ours-gptq-3-g32"]
    gaps = (np.array(ours["window_losses"]) - np.array(rows[0]["window_losses"])) / 10
    assert ours["rise"] == pytest.approx(gaps.mean(), abs=1e-6)
    assert ours["rise_standard_error"] == pytest.approx(gaps.std(ddof=1) / 40**0.5, abs=1e-6)
    assert ours["rise_standard_error"] < 0.003  # windows differ by 2 nats per token
    assert found[ORIGINAL]["rise"] == 0
    assert ours["perplexity"] == pytest.approx(np.exp(np.sum(ours["window_losses"]) / 400))


def test_only_peers_with_at_most_as_many_bits_are_judged(rows):
    pairs = {pair["peer"]: pair for pair in compare(summarize(rows))}
    verdicts = {name: pair["is_no_worse"] for name, pair in pairs.items()}
    assert verdicts == {"worse": True, "better": False, "larger": None, "of-two": True}
    assert pairs["better"]["difference"] == pytest.approx(0.02, abs=0.005)
    assert pairs["larger"]["difference"] > 0


def test_the_table_names_who_is_better_and_what_failed(rows):
    found = summarize(rows)
    text = markdown(found, compare(found), [rows[-1]])
    verdict = next(line for line in text.splitlines() if "no: better (3.599)" in line)
    assert verdict.startswith("| ours-gptq-3-g32 | 3.590 | 3 | better (3.599) | +0.02")
    assert "larger (3.700) +0.0" in verdict.split("|")[-2]
    assert "failed: dead: no words" in text


def test_the_figure_has_every_tool(rows, tmp_path):
    rows[2]["tool"] = "llm-compressor"
    draw(summarize(rows), "a model", tmp_path / "figure.svg")
    picture = (tmp_path / "figure.svg").read_text(encoding="utf-8")
    assert "Mutirão gptq" in picture
    assert "llm-compressor gptq" in picture


def test_bits_are_codes_scales_and_zero_points(tiny_model_directory, tmp_path):
    for bits, size in ((3, 32), (4, 16)):
        out = tmp_path / f"{bits}"
        compress_model(tiny_model_directory, out, CompressConfig(bits=bits, group_size=size))
        found = stored_figures(out)
        assert found["linear"]["bits_per_weight"] == bits + (16 + bits) / size
        assert found["linear"]["num_weights"] == 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96)
        gap = found["linear"]["stored_bits_per_weight"] - found["linear"]["bits_per_weight"]
        assert 0 < gap < 0.1  # shapes, and zero points that do not fill a word


def test_calibration_is_the_same_however_much_is_held_out(tiny_model_directory, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(make_text(300), encoding="utf-8")
    model = CausalModel.open(tiny_model_directory)
    few, many = (
        read_windows(
            text,
            model,
            TextConfig(window_tokens=32, calibration_windows=4, heldout_windows=number),
        )
        for number in (2, 8)
    )
    assert torch.equal(few.calibration, many.calibration)


def test_names_and_patterns_choose_settings():
    assert list(choose(["ours-wanda+gptq-3-g16"], 50).values()) == [OurSetting("wanda,gptq", 3, 16)]
    chosen = choose(["auto-round-*-3-g32-iters*", "llama.cpp-Q3_K*"], 7)
    assert list(chosen) == [
        "auto-round-signround-3-g32-iters7",
        "llama.cpp-Q3_K",
        "llama.cpp-Q3_K-folded",
    ]
    assert chosen["llama.cpp-Q3_K-folded"].results == ("Q3_K",)
    with pytest.raises(InputError, match="--only gptq is no setting"):
        choose(["gptq"], 50)


def test_what_is_done_is_not_run_again_and_a_failure_stops_nothing(
    tiny_model_directory, tmp_path, monkeypatch, capsys
):
    text = tmp_path / "text.txt"
    text.write_text(make_text(300), encoding="utf-8")

    def fail(setting, model, calibration, place, **_):
        assert np.load(calibration).shape == (4, 32)
        (place / "log.txt").write_text("much")
        raise PeerError(f"a peer ended with 1: much\nValueError: {Path.home()}/place is no place\n")

    monkeypatch.setattr(bench_quantizers.peers, "quantize", fail)
    names = "llama.cpp-Q4_0,ours-rtn-3-g32"
    arguments = [
        str(tiny_model_directory),
        str(text),
        "--only",
        names,
        "--dtype",
        "float32",
        *WINDOWS,
    ]
    arguments += ["--work", str(tmp_path / "work"), "--docs", str(tmp_path / "docs")]
    monkeypatch.setattr(sys, "argv", ["bench_quantizers.py", *arguments])
    bench_quantizers.main()
    (place,) = (tmp_path / "work").iterdir()
    before = (place / "rows.jsonl").read_bytes()
    with (place / "rows.jsonl").open("a") as file:
        file.write('{"name": "cut')
    monkeypatch.setattr(bench_quantizers.ours, "run", None)  # would fail, and add a row
    bench_quantizers.main()
    assert (place / "rows.jsonl").read_bytes() == before + b'{"name": "cut'
    assert not list((place / "models").iterdir())
    assert (place / "logs" / "llama.cpp-Q4_0.txt").read_text() == "much"
    content = json.loads((tmp_path / "docs" / "data" / "quantizers-tiny.json").read_bytes())
    original, rounded = content["settings"]
    assert original["bits_per_weight"] == 16
    assert rounded["bits_per_weight"] == 3 + 19 / 32
    assert rounded["divergence"] > 0
    assert rounded["peak_bytes"] > 50e6
    assert content["failed"][0]["reason"] == "ValueError: ~/place is no place"
    assert (tmp_path / "docs" / "quantizers-tiny.svg").is_file()
    assert "ours-rtn-3-g32" in capsys.readouterr().out

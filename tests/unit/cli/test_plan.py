"""``mutirao plan``: its table, its JSON, its errors."""

import json

import pytest
from small_machine import small_machine
from typer.testing import CliRunner

from mutirao.cli.app import app
from mutirao.errors import InputError
from mutirao.inference.planning import model_plans
from mutirao.inference.planning.machine import MemoryLimits

CONFIG = {
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


@pytest.fixture
def plan(monkeypatch, tmp_path):
    probes = []

    def probed(directory, num_threads, *, refresh):
        probes.append(refresh)
        return small_machine(s_per_weight=2e-11, num_threads=num_threads)

    monkeypatch.setenv("MUTIRAO_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setattr(model_plans, "probe", probed)
    monkeypatch.setattr(model_plans, "memory_limits", lambda: MemoryLimits(4 * 10**9, 3 * 10**9))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))

    def run(*arguments):
        result = CliRunner().invoke(app, ["plan", str(tmp_path / "config.json"), *arguments])
        result.probes = probes
        return result

    return run


def test_plans_of_one_quantization_are_compared_and_one_is_chosen(plan):
    result = plan("--memory", "900MB", "--quantization", "Q4_K_M")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    (chosen,) = (line for line in lines if "← run" in line)
    assert "self-speculation" in chosen
    assert "%*" in chosen  # nobody calibrated this model
    assert any(line.startswith("pin and stream") for line in lines)
    assert any(line.startswith("all resident") and "too large" in line for line in lines)
    assert "* an assumption" in result.output
    assert "Q4_K_M runs in" in result.output


def test_quantizations_are_compared_where_there_are_no_weights(plan):
    result = plan("--memory", "900MB")
    assert result.exit_code == 0, result.output
    for name in ("BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0"):
        assert any(line.startswith(name) for line in result.output.splitlines())


@pytest.mark.parametrize("how", [(), ("--json",)])
def test_nothing_that_runs_is_bad_input(plan, how):
    result = plan("--memory", "5MB", *how)
    assert result.exit_code == 2
    assert ("none: too large" in result.output) == (how == ())
    assert how or "MB or more" in result.output


def test_json_is_one_object_with_the_chosen_plan(plan):
    result = plan("--memory", "900MB", "--quantization", "Q4_K_M", "--json", "--threads", "1")
    found = json.loads(result.output)
    assert found["memory_bytes"] == 900_000_000
    assert found["machine"]["num_threads"] == 1
    (model,) = found["quantizations"]
    plans = {each["name"]: each for each in model["plans"]}
    assert model["chosen"] in plans
    assert plans["all resident"]["fits"] is False
    pinned = plans["pin and stream"]
    assert pinned["tokens_per_s"] == pytest.approx(1 / pinned["seconds_per_token"])
    assert pinned["memory_bytes"] <= 900_000_000
    assert 0 < pinned["bytes_per_token"] < model["weights_bytes"]
    assert pinned["time_to_first_token_s"] > 0
    assert plans["self-speculation"]["acceptance_from"] == "assumption"
    assert model["least_memory_bytes"] < 900_000_000


def test_the_machine_is_probed_again_on_request_only(plan):
    assert plan().probes == [False]
    assert plan("--probe").probes[-1] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "20MB", "--quantization", "Q4_0"], "20 MB is too small.*at least [0-9]+ MB"),
        (["--memory", "lots"], "'lots' is not understood"),
        (["--memory", "0"], "'0' is not understood"),
        (["--memory", "-5MB"], "'-5MB' is not understood"),
        (["--quantization", "Q9"], "'Q9' is not known"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(plan, arguments, message):
    result = plan(*arguments)
    assert isinstance(result.exception, InputError)
    assert result.exception.exit_code == 2
    with pytest.raises(InputError, match=message):
        raise result.exception

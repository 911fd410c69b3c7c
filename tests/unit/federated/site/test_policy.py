"""The site policy: each limit refuses in one sentence, and a restart resets nothing."""

import hashlib
import logging
import time

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mutirao.errors import PolicyError, RecipeError
from mutirao.federated.audit import log as audit_log_module
from mutirao.federated.audit.check import verify_log
from mutirao.federated.audit.log import AuditLog
from mutirao.federated.audit.record import Mask, Noise, Release, Request
from mutirao.federated.site.policy import load_policy

RECIPE, BUNDLE, COORDINATOR = "a" * 64, "b" * 64, "c" * 64
STRICT = f"""\
recipes = ["{RECIPE}"]
app_bundles = ["{BUNDLE}"]
coordinators = ["{COORDINATOR}"]
kinds = ["adapter update"]
codecs = ["int8", "bf16"]
tensors = ["*.lora_B.*"]
max_bytes_per_day = 1000
max_bytes_per_run = 1500
min_cohort = 3

[differential_privacy]
max_epsilon = 2
"""
OPEN = """\
recipes = ["any"]
app_bundles = ["any"]
coordinators = ["any"]
kinds = ["adapter update"]
codecs = ["int8"]
tensors = ["*"]
max_bytes_per_day = 1000
max_bytes_per_run = 1500
"""
NOISE = Noise(noise_multiplier=1.0, clip_norm=1.0, epsilon=1.5, delta=1e-5)
KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))


@pytest.fixture
def policy_of(tmp_path):
    def write(text):
        path = tmp_path / "policy.toml"
        path.write_text(text)
        return load_policy(path)

    return write


def allowed(form=Release, **fields):
    """A request that the strict policy allows, with some fields of it changed."""
    values = {
        "run": "run-a",
        "round": 1,
        "recipient": "coordinator",
        "recipient_key": COORDINATOR,
        "recipe_sha256": RECIPE,
        "bundle_sha256": BUNDLE,
        "kind": "adapter update",
        "codec": "int8",
        "tensors": ("layers.0.lora_B.weight",),
        "mask": Mask(cohort_size=3),
        "noise": NOISE,
    }
    if form is Release:
        values |= {"payload_bytes": 400, "payload_sha256": "d" * 64}
    return form(**{**values, **fields})


def test_what_is_allowed_passes(policy_of):
    policy = policy_of(STRICT)
    policy.check(allowed())
    policy.check(allowed(Request, tensors=()))


@pytest.mark.parametrize(
    ("fields", "asked", "listed"),
    [
        ({"recipe_sha256": "e" * 64}, f"recipe {'e' * 64} came", f"only {RECIPE}"),
        ({"recipe_sha256": None}, "an unknown recipe came", f"only {RECIPE}"),
        ({"bundle_sha256": "e" * 64}, "app bundle", f"only {BUNDLE}"),
        ({"bundle_sha256": None}, "an unknown app bundle", f"only {BUNDLE}"),
        ({"recipient_key": "e" * 64}, "coordinator's key", f"only {COORDINATOR}"),
        ({"recipient_key": None}, "an unknown coordinator's key", f"only {COORDINATOR}"),
        ({"kind": "gradient"}, "kind of message 'gradient'", "only adapter update"),
        ({"codec": "fp32"}, "codec 'fp32'", "only int8, bf16"),
        ({"tensors": ("x.lora_B.w", "embed")}, "tensor 'embed'", r"only \*\.lora_B\.\*"),
        ({"tensors": ()}, "does not name its tensors", r"only \*\.lora_B\.\*"),
        ({"mask": Mask(cohort_size=2)}, "over 2 sites", "only sums over at least 3 sites"),
        ({"mask": None}, "an update in clear", "only sums over at least 3 sites"),
        ({"noise": None}, "round 1 was asked for without noise", "0 such rounds"),
        (
            {"noise": NOISE.model_copy(update={"noise_multiplier": 0.0})},
            "without noise",
            "0 such rounds",
        ),
        (
            {"noise": NOISE.model_copy(update={"epsilon": 2.01})},
            r"epsilon 2\.01",
            "at most 2",
        ),
        ({"payload_bytes": 1001}, "1001 bytes was to leave after 0", "1000 bytes a day"),
    ],
)
def test_each_limit_refuses_in_one_sentence(policy_of, fields, asked, listed):
    policy = policy_of(STRICT)
    with pytest.raises(PolicyError, match=f"{asked}.*policy.toml allows {listed}") as caught:
        policy.check(allowed(**fields))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1


def test_a_long_list_is_not_told_in_full(policy_of):
    names = ", ".join(f'"codec-{number}"' for number in range(20))
    policy = policy_of(STRICT.replace('"int8", "bf16"', names))
    with pytest.raises(PolicyError, match="codec-7 and 12 more"):
        policy.check(allowed())


def log_at(path):
    return AuditLog(path, KEY, site="north")


def send(path, policy, **fields):
    """What a process does that was started anew for this message."""
    told = allowed(**fields)
    return log_at(path).append(told, check=lambda records: policy.check(told, records))


def test_bytes_of_a_day_are_counted_over_restarts_and_runs(policy_of, tmp_path):
    policy = policy_of(STRICT)
    path = tmp_path / "audit.jsonl"
    send(path, policy)
    send(path, policy, round=2, run="run-b")
    with pytest.raises(PolicyError, match="400 bytes was to leave after 800 in the same day"):
        send(path, policy, round=3, run="run-c")
    send(path, policy, round=3, run="run-c", payload_bytes=200)
    assert len(verify_log(path, KEY.public_key()).records) == 4


def test_yesterdays_bytes_count_for_the_run_but_not_for_the_day(policy_of, tmp_path, monkeypatch):
    policy = policy_of(STRICT)
    path = tmp_path / "audit.jsonl"
    yesterday = time.gmtime(time.time() - 86_400)
    with monkeypatch.context() as patch:
        patch.setattr(audit_log_module.time, "gmtime", lambda: yesterday)
        send(path, policy, payload_bytes=900)
    send(path, policy, round=2, payload_bytes=600)
    with pytest.raises(PolicyError, match=r"after 1500 in the same run.*1500 bytes a run"):
        send(path, policy, round=3, payload_bytes=1)


def test_an_answer_that_is_sent_again_counts_again(policy_of, tmp_path):
    policy = policy_of(STRICT)
    path = tmp_path / "audit.jsonl"
    send(path, policy, payload_bytes=600)
    with pytest.raises(PolicyError, match="after 600"):
        send(path, policy, payload_bytes=600)


def test_rounds_without_noise_are_counted_over_restarts(policy_of, tmp_path):
    policy = policy_of(STRICT + "max_noise_free_rounds = 1\n")
    path = tmp_path / "audit.jsonl"
    send(path, policy, payload_bytes=1, noise=None)
    send(path, policy, payload_bytes=1, noise=None)  # the same round, sent again
    send(path, policy, payload_bytes=1, round=2)
    log_at(path).append(allowed(kind="error"))
    with pytest.raises(PolicyError, match="round 3 was asked for without noise"):
        send(path, policy, payload_bytes=1, round=3, noise=None)


def test_the_hash_is_that_of_the_file(policy_of, tmp_path):
    policy = policy_of(STRICT)
    assert policy.sha256 == hashlib.sha256(STRICT.encode()).hexdigest()
    assert policy.path == tmp_path / "policy.toml"


def test_what_a_policy_leaves_open_is_told_loudly(policy_of, caplog):
    with caplog.at_level(logging.WARNING):
        policy_of(STRICT)
        assert caplog.messages == []
        policy = policy_of(OPEN)
    for words in ("any recipe", "any app bundle", "any coordinator", "in clear", "privacy"):
        assert any(words in message for message in caplog.messages)
    policy.check(allowed(recipe_sha256=None, bundle_sha256=None, recipient_key=None, mask=None))
    policy.check(allowed(noise=None, tensors=()))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("max_bytes_per_dy = 1", r"unknown key max_bytes_per_dy \(did you mean max_bytes_per_day"),
        (f'recipes = ["any", "{RECIPE}"]', '"any"] alone'),
        ('recipes = ["a1"]', "'a1' is not accepted"),
        ('recipes = "any"', "recipes"),
        ("max_bytes_per_day = -1", "max_bytes_per_day=-1 is not accepted"),
        ("min_cohort = 1", "a cohort of 1 hides nothing"),
        ("[differential_privacy]\nmax_epsilon = inf", "max_epsilon"),
        ("[differential_privacy]\nmax_epsilon = 1\nmax_epsilons = 1", "did you mean max_epsilon"),
        ("recipes = [", "not valid TOML"),
    ],
)
def test_a_bad_policy_is_refused_with_its_name(policy_of, line, message):
    key = line.partition(" ")[0]
    kept = "".join(each + "\n" for each in OPEN.splitlines() if not each.startswith(f"{key} "))
    with pytest.raises(RecipeError, match=message) as caught:
        policy_of(kept + line + "\n")
    assert "policy.toml" in str(caught.value)


def test_nothing_is_allowed_by_leaving_it_out(policy_of):
    with pytest.raises(RecipeError, match=r"recipes is missing.*max_bytes_per_run is missing"):
        policy_of("")


def test_a_missing_or_binary_policy_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        load_policy(tmp_path / "nowhere.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="not valid TOML"):
        load_policy(tmp_path / "binary.toml")

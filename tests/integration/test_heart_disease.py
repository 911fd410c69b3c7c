"""Four real hospitals' records, told as text, scored for their outcome.

The tables are not part of the project; without them these tests are skipped.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from heart_disease import HOSPITALS, data_folder, read_patients, tell, write_hospital

pytestmark = pytest.mark.skipif(
    not data_folder().is_dir(),
    reason=f"{data_folder()} is missing; name its parent in MUTIRAO_TEST_DATA",
)
NUM_PATIENTS = {"cleveland": 303, "hungarian": 294, "switzerland": 123, "va": 200}
NUM_DISEASED = {"cleveland": 139, "hungarian": 106, "switzerland": 115, "va": 149}


@pytest.mark.parametrize("hospital", HOSPITALS)
def test_every_patient_is_told(hospital):
    patients = read_patients(hospital)
    assert len(patients) == NUM_PATIENTS[hospital]
    assert sum((patient["num"] or 0) > 0 for patient in patients) == NUM_DISEASED[hospital]
    for patient in patients:
        sentence = tell(patient)
        assert "None" not in sentence
        assert "?" not in sentence
        assert ("cholesterol" in sentence) == (patient["chol"] not in (None, 0))


def test_outcomes_of_all_hospitals_are_scored(tmp_path, tiny_model_directory):
    from mutirao.data.config import DataConfig
    from mutirao.data.prepare import load_records, prepare_silo
    from mutirao.evaluate.config import EvaluationConfig
    from mutirao.evaluate.evaluation import evaluate_silos
    from mutirao.models.causal import CausalModel

    held_out = {}
    for hospital in HOSPITALS:
        write_hospital(hospital, tmp_path / hospital)
        out = tmp_path / "data" / hospital
        report = prepare_silo(hospital, tmp_path / hospital, out, DataConfig(heldout_share=0.3))
        assert report.num_kept >= 0.95 * NUM_PATIENTS[hospital], report.dropped
        held_out[hospital] = load_records(out, "heldout")
    model = CausalModel.open(tiny_model_directory, dtype="float32")
    config = EvaluationConfig(num_questions=0, num_outcomes=500, max_tokens=120)
    evaluation = evaluate_silos(model, held_out, config, label="tiny")
    for hospital in HOSPITALS:
        outcomes = evaluation.silos[hospital].outcomes
        assert outcomes is not None
        assert outcomes.num == len(held_out[hospital])
        assert 0 < outcomes.num_positive < outcomes.num
        assert outcomes.auroc_low <= outcomes.auroc <= outcomes.auroc_high

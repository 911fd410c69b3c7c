from __future__ import annotations

from pathlib import Path

import pytest
from synthetic_run import write_synthetic_run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete synthetic run; tests must not change it."""
    return write_synthetic_run(tmp_path_factory.mktemp("runs") / "synthetic")

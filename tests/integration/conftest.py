"""The small road, shared by the parts of a test module in their order."""

import pytest
from small_road import SmallRoad


@pytest.fixture(scope="module")
def small_road(tmp_path_factory, tiny_model_directory) -> SmallRoad:
    return SmallRoad(tmp_path_factory.mktemp("road"), tiny_model_directory)

import pytest
from study_cases import tiny_study


@pytest.fixture
def study(tmp_path):
    made = tiny_study(tmp_path / "out")
    made.start()
    return made

import pytest

from tests.callbacks import runs


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """The reference: three epochs in one go, a checkpoint every second step."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, runs.fit(folder, every_steps=2)

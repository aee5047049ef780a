"""What tests of whole commands share."""

import contextlib
import io

import pytest


@pytest.fixture(scope="module")
def as_users_run_it(as_users_run_it):
    """Also without what takes seconds and writes nothing but figures and a number."""
    from sape2.inspect import pictures
    from sape2.studies.run import StepMemory

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "pictures", lambda *_: {})
        patch.setattr(StepMemory, "after_step", lambda *_: {})
        yield


@pytest.fixture(scope="module")
def finished(request, tmp_path_factory, as_users_run_it):
    """What the module's TRAIN makes: a finished run."""
    from sape2.cli import main

    folder = tmp_path_factory.mktemp("runs") / "run"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert main([*request.module.TRAIN, str(folder)]) == 0
    return folder

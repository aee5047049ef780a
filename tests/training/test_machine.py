"""What is asked of the C library about memory."""

import ctypes
import types

import pytest

from sape2 import machine


@pytest.mark.parametrize(("taken", "answer"), [(1, True), (0, False)])
def test_the_allocator_is_asked_to_keep_memory(taken, answer, monkeypatch):
    asked = []
    library = types.SimpleNamespace(mallopt=lambda name, value: asked.append((name, value)) or taken)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert machine.keep_freed_memory() is answer
    assert dict(asked) == {machine.M_MMAP_THRESHOLD: 2**30, machine.M_TRIM_THRESHOLD: 2**31 - 1}


@pytest.mark.parametrize("error", [OSError, TypeError])
def test_another_c_library_is_left_alone(error, monkeypatch):
    def refuse(name):
        raise error

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert machine.keep_freed_memory() is False
    monkeypatch.setattr(ctypes, "CDLL", lambda name: types.SimpleNamespace())
    assert machine.keep_freed_memory() is False

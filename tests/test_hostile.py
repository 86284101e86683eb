"""Some of the hostile inputs of benchmarks/hostile.py, of each kind: none ends in a traceback, and none passes in silence."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

hostile = pytest.importorskip("hostile", reason="the benchmarks are no part of the installed package")

CASES = hostile.cases()
KINDS = sorted({case.kind for case in CASES})
EVERY = 20  # of the cases of a kind


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return hostile.make_parts(tmp_path_factory.mktemp("parts"))


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_inputs(kind, parts, tmp_path):
    some = [case for case in CASES if case.kind == kind][::EVERY]
    found = [(case, hostile.run_one(case, parts, tmp_path / str(number))) for number, case in enumerate(some)]
    assert {case.name: (outcome.faults, outcome.lines) for case, outcome in found if outcome.faults} == {}


@pytest.mark.parametrize(
    ("case", "fault"),
    [
        ({"call": lambda home: {}["x"]}, "traceback"),
        ({"call": lambda home: None}, "silent"),
        ({"call": lambda home: (home.parent / "canary").touch()}, "EXECUTED"),
        ({"call": lambda home: (home / "a.png").write_bytes(b"\x89PNG"), "wanted": "work"}, "half-written a.png"),
        ({"call": lambda home: (home / "dog.png").resolve(), "make": lambda home: (home / "x").touch()}, "silent"),
        ({"words": ("sample", "--count", "0"), "wanted": "work"}, "refused what is right"),
        ({"words": ("sample", "--count", "0"), "says": "nothing of the kind"}, "does not say"),
    ],
)
def test_faults_are_seen(case, fault, parts, tmp_path):
    outcome = hostile.run_one(hostile.Case("test", "test", **case), parts, tmp_path)
    assert any(fault in found for found in outcome.faults), outcome


def test_too_much_memory_is_seen(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(hostile, "MOST_BYTES", 10**6)
    outcome = hostile.run_one(hostile.Case("test", "test", call=lambda home: None, wanted="work"), parts, tmp_path)
    assert outcome.faults[0].startswith("takes")


def test_there_are_enough_cases():
    assert len(CASES) >= 500

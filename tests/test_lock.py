"""The locks of the dependencies, without the network: whole, hashed, and in step with pyproject.toml."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

SCRIPT = Path(__file__).parent.parent / "scripts" / "lock.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lock", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["lock"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_the_locks_satisfy_pyproject(script: ModuleType, python: str) -> None:
    """Catches a dependency that was added or raised without `scripts/lock.py`, and a line without a hash."""
    assert script.check(python) == []
    assert len(script.locked(script.lock_path(python, ""))) > 50


def test_the_check_sees_what_is_missing(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One package gone, one too old, one that differs between the two locks, one without its hash."""
    good = {suffix: script.lock_path("3.12", suffix).read_text() for suffix in ("", "-test")}
    monkeypatch.setattr(script, "FOLDER", tmp_path)

    def put(runtime: str, test: str) -> None:
        script.lock_path("3.12", "").write_text(runtime)
        script.lock_path("3.12", "-test").write_text(test)

    put(*good.values())
    assert script.check("3.12") == []
    lines = good[""].splitlines(keepends=True)
    numpy = next(line for line in lines if line.startswith("numpy=="))
    put(good[""].replace(numpy, ""), good["-test"])
    assert [one for one in script.check("3.12") if "numpy" in one and "has None" in one]
    old = numpy.replace(numpy.split()[0], "numpy==1.26.0")
    put(good[""].replace(numpy, old), good["-test"])
    assert any("has 1.26.0" in one for one in script.check("3.12"))
    assert any("numpy is 1.26.0 in the one lock" in one for one in script.check("3.12"))
    put(good[""].replace(numpy, numpy.split()[0] + "\n"), good["-test"])
    with pytest.raises(ValueError, match="hash"):
        script.check("3.12")


def test_packages_are_reached_through_markers_and_extras(script: ModuleType) -> None:
    """b only before 3.12, c by an extra of a, d through c; e is asked for by nobody."""
    metadata = {
        "a": {"requires_dist": ["b; python_version < '3.12'", "c; extra == 'more'"]},
        "b": {}, "c": {"requires_dist": ["D-d"]}, "d-d": {}, "e": {},
    }  # fmt: skip
    for text, python, wanted in (("a", "3.11", "a b"), ("a", "3.12", "a"), ("a[more]", "3.12", "a c d-d")):
        assert script.reached([Requirement(text)], metadata, script.environment(python)) == set(wanted.split())

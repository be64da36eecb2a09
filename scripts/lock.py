"""Write the locks of the dependencies: requirements/python3.11.txt, python3.12.txt, and the same with -test.

    python3.11 scripts/lock.py && python3.12 scripts/lock.py   # each writes the two of its own version
    python scripts/lock.py --check                             # no network: do the locks satisfy pyproject.toml?

A lock names every package that pip would install, at one version and with the hashes of its files, so that

    pip install --require-hashes -r requirements/python3.12.txt && pip install --no-deps .

installs these, or fails. It is resolved by pip itself (23.1 or newer) from PyPI alone, whatever the machine is set to,
and is for Linux on x86-64: elsewhere other files are wanted, whose hashes are not in it. The extras gpu, tpu and parity
are not locked. Exit code 1 where --check found something, 2 where pip found no solution.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

REPOSITORY = Path(__file__).parent.parent
FOLDER = REPOSITORY / "requirements"
PYTHONS = ("3.11", "3.12")
INDEX = "https://pypi.org/simple"
# Pip's own settings name mirrors and folders, whose files may be others.
IGNORED = ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL", "PIP_CONSTRAINT", "PIP_REQUIRE_VIRTUALENV")
LINE = re.compile(r"(?P<name>[a-z0-9-]+)==(?P<version>\S+) --hash=sha256:[0-9a-f]{64}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with pyproject.toml, without the network")
    options = parser.parse_args()
    if options.check:
        problems = [problem for python in PYTHONS for problem in check(python)]
        print("\n".join(problems) or "the locks satisfy pyproject.toml")
        return int(bool(problems))
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    if python not in PYTHONS:
        print(f"wanted Python {' or '.join(PYTHONS)}, this is {python}", file=sys.stderr)
        return 2
    found = resolve(wanted(("test",)))
    if found is None:
        return 2
    runtime = reached(wanted(), {name: one["metadata"] for name, one in found.items()}, environment(python))
    FOLDER.mkdir(exist_ok=True)
    for path, names in ((lock_path(python, ""), runtime), (lock_path(python, "-test"), found)):
        path.write_text(heading(path) + "".join(line_of(found[name]) for name in sorted(names)))
        print(f"{path}: {len(names)} packages")
    return 0


def lock_path(python: str, suffix: str) -> Path:
    return FOLDER / f"python{python}{suffix}.txt"


def heading(path: Path) -> str:
    extra = " and the extra `test`" if path.stem.endswith("-test") else ""
    return f"# Written by scripts/lock.py: all that pyproject.toml{extra} needs on Linux, x86-64. Do not edit.\n"


def wanted(extras: Sequence[str] = ()) -> list[Requirement]:
    """The requirements of pyproject.toml."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    texts = [*project["dependencies"], *(text for extra in extras for text in project["optional-dependencies"][extra])]
    return [Requirement(text) for text in texts]


def resolve(requirements: Iterable[Requirement]) -> dict[str, dict[str, Any]] | None:
    """Name → what pip would install into an empty environment of this Python; None where it found no solution."""
    clean = {name: value for name, value in os.environ.items() if name not in IGNORED}
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        command += [
            "--no-cache-dir",
            "--only-binary",
            ":all:",
            "--index-url",
            INDEX,
            "--report",
            str(report),
            *map(str, requirements),
        ]
        done = subprocess.run(command, env=clean | {"PIP_CONFIG_FILE": os.devnull}, check=False)
        if done.returncode:
            return None
        return {canonicalize_name(one["metadata"]["name"]): one for one in json.loads(report.read_text())["install"]}


def reached(
    requirements: Iterable[Requirement], metadata: Mapping[str, Mapping[str, Any]], where: Mapping[str, str]
) -> set[str]:
    """The packages that requirements lead to, through those of the packages themselves."""
    found: set[tuple[str, str]] = set()
    pending = [(one, "") for one in requirements]
    while pending:
        one, extra = pending.pop()
        if one.marker is not None and not holds(one.marker, where, extra):
            continue
        name = canonicalize_name(one.name)
        for asked in ("", *one.extras):
            if (name, asked) not in found:
                found.add((name, asked))
                pending += [(Requirement(text), asked) for text in metadata[name].get("requires_dist", [])]
    return {name for name, _ in found}


def holds(marker: Marker, where: Mapping[str, str], extra: str = "") -> bool:
    return marker.evaluate({**where, "extra": extra})


def environment(python: str) -> dict[str, str]:
    """What markers ask for, on the machine that the locks are for."""
    return {
        "python_version": python, "python_full_version": f"{python}.1", "implementation_name": "cpython",
        "platform_python_implementation": "CPython", "sys_platform": "linux", "platform_system": "Linux",
        "platform_machine": "x86_64", "os_name": "posix",
    }  # fmt: skip


def line_of(one: Mapping[str, Any]) -> str:
    name = canonicalize_name(one["metadata"]["name"])
    hashes = one["download_info"]["archive_info"]["hashes"]
    return f"{name}=={one['metadata']['version']} --hash=sha256:{hashes['sha256']}\n"


def locked(path: Path) -> dict[str, Version]:
    """Name → version. Raises ValueError for a line without a hash and for a name that stands there twice."""
    found: dict[str, Version] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        match = LINE.fullmatch(line)
        if match is None or match["name"] in found:
            raise ValueError(f"{path}: wanted NAME==VERSION --hash=sha256:..., each name once: {line!r}")
        found[match["name"]] = Version(match["version"])
    return found


def check(python: str) -> list[str]:
    """What pyproject.toml asks for and the locks of a Python do not give, and where these differ; a sentence each."""
    problems, where = [], environment(python)
    locks = {suffix: locked(lock_path(python, suffix)) for suffix in ("", "-test")}
    for suffix, extras in (("", ()), ("-test", ("test",))):
        for one in wanted(extras):
            if one.marker is not None and not holds(one.marker, where):
                continue
            version = locks[suffix].get(canonicalize_name(one.name))
            if version is None or version not in one.specifier:
                problems.append(f"{lock_path(python, suffix).name}: wanted {one}, has {version}; run scripts/lock.py")
    return problems + [
        f"python{python}: {name} is {version} in the one lock and {locks['-test'].get(name)} in the other"
        for name, version in locks[""].items()
        if locks["-test"].get(name) != version
    ]


if __name__ == "__main__":
    sys.exit(main())

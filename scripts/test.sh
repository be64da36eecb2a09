#!/usr/bin/env bash
# Makes .venv, installs the test extra, and runs the checks and the tests. Arguments go to pytest.
# RETHINKER_EXTRA=parity also installs torch, which the parity tests need; PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
make_venv ".[test${RETHINKER_EXTRA:+,$RETHINKER_EXTRA}]"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/ty check --python .venv
# The tests start some hundred processes; each would compile the package's modules again.
unset PYTHONDONTWRITEBYTECODE
# In the order of tests/conftest.py, which has the long files first.
exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"

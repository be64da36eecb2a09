#!/usr/bin/env bash
# Makes .venv, installs, and runs the embedded example: minutes on two CPU cores. Arguments go to the program.
# RETHINKER_EXTRA=gpu or tpu installs jax for that hardware; PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
make_venv ".${RETHINKER_EXTRA:+[$RETHINKER_EXTRA]}"
exec .venv/bin/python -m rethinker_jax.main --mesh "$@"

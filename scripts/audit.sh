#!/usr/bin/env bash
# Looks up every locked package in the database of known vulnerabilities; fails where one is found or not looked up.
# Needs the network and pip-audit: python -m pip install pip-audit (into an environment of its own).
#
#   scripts/audit.sh [LOCK...]      # by default all of requirements/
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- requirements/*.txt
status=0
for lock in "$@"; do
    echo "$lock"
    # Without --strict, what could not be looked up would pass.
    pip-audit --strict --require-hashes --disable-pip --progress-spinner off --requirement "$lock" || status=1
done
exit "$status"

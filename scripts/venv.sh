# Sourced by demo.sh and test.sh. `make_venv PACKAGE` makes .venv where it is missing and installs PACKAGE ("." or
# ".[test]") into it; what is installed already is left alone.

make_venv() {
    local python="" candidate
    if [ ! -x .venv/bin/python ] || ! .venv/bin/python -c 'import pip' 2>/dev/null; then
        for candidate in "${PYTHON:-python3.12}" python3.12 python3.11 python3; do
            # Some systems have a python without ensurepip (Debian: package python3-venv), or a shim that points nowhere.
            if "$candidate" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
                python=$candidate
                break
            fi
        done
        if [ -z "$python" ]; then
            echo "error: wanted Python 3.11 or newer with venv (Debian: apt-get install python3-venv), found none." >&2
            echo "Set PYTHON=/path/to/python3 to name one." >&2
            return 2
        fi
        rm -rf .venv
        "$python" -m venv .venv
    fi
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "$1"
}

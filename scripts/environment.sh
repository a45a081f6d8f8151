# Sourced by the other scripts: makes .venv in the project's folder once, and installs the project into it.
# PYTHON picks the interpreter (3.11 or 3.12); VENV another place for the environment.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="${VENV:-.venv}"

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3 python}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "No Python 3.11 or 3.12 was found (tried: ${PYTHON:-python3.11 python3.12 python3 python}). Install one, or name one with PYTHON=..." >&2
    return 1
}

# install_environment [EXTRA]: the project with the extra `pictures` or, for developers, `test`, which includes it.
# The environment is reused until setup.cfg, pyproject.toml, constraints.txt, the interpreter or its place changes.
install_environment() {
    local python stamp extra="${1:-pictures}"
    python="$(find_python)"
    stamp="$({ cat setup.cfg pyproject.toml constraints.txt; "$python" --version; pwd; } | cksum)"
    if [ -x "$VENV/bin/python" ] && [ "$(head -n 1 "$VENV/.installed" 2>/dev/null)" = "$stamp" ]; then
        grep -qx -e "$extra" -e test "$VENV/.installed" && return
    elif [ -e "$VENV" ] && [ ! -f "$VENV/pyvenv.cfg" ]; then
        echo "$VENV exists and is no virtual environment, so it is not replaced. Name another place with VENV=..." >&2
        return 1
    else
        rm -rf "$VENV"
        "$python" -m venv "$VENV"
    fi
    echo "Installing into $VENV ..."
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$extra]"
    printf '%s\n' "$stamp" "$extra" >"$VENV/.installed"
}

# Sourced by the other scripts: makes .venv in the project's folder once, and installs the project into it.
# PYTHON picks the interpreter (3.11 or newer); VENV another place for the environment.
# An environment that these scripts did not make (no .installed in it) is never changed or removed.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="${VENV:-.venv}"

find_python() {
    local candidate candidates="${PYTHON:-python3.11 python3.12 python3.13 python3 python}"
    for candidate in $candidates; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "No Python 3.11 or newer was found (tried: $candidates). Install one, or name one with PYTHON=..." >&2
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
    elif [ ! -f "$VENV/.installed" ] && [ -n "$(ls -A "$VENV" 2>/dev/null || [ ! -e "$VENV" ] || echo file)" ]; then
        echo "$VENV was not made by this script, so it is not changed. Name another place with VENV=..." >&2
        return 1
    else
        rm -rf "$VENV"
        mkdir -p "$VENV"
        echo incomplete >"$VENV/.installed"
        "$python" -m venv "$VENV"
    fi
    echo "Installing into $VENV ..."
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$extra]"
    printf '%s\n' "$stamp" "$extra" >"$VENV/.installed"
}

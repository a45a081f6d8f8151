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

# install_environment [EXTRA]: the project with the extra `plots` or, for developers, `test`, which includes it.
# The environment is reused until setup.cfg, pyproject.toml, constraints.txt, the interpreter or its place changes.
install_environment() {
    local python stamp extra="${1:-plots}"
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

# install_folder FOLDER REQUIREMENT...: the packages, without what they require, in a folder of their own.
# Returns 1 where PyPI cannot be reached, and ends the script at any other failure.
install_folder() {
    local folder="$1" python="$VENV/bin/python"
    shift
    [ "$(cat "$folder/.installed" 2>/dev/null)" = "$*" ] && return
    rm -rf "$folder"
    if "$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder" "$@"; then
        echo "$*" >"$folder/.installed"
    elif "$python" -m pip index versions --disable-pip-version-check --retries 0 transformers >/dev/null 2>&1; then
        echo "Could not install $*." >&2
        exit 1
    else
        return 1
    fi
}

# install_kvpress: what tests/methods compares the eviction methods with. kvpress requires an older transformers than
# this project, so it lies in a folder of its own (see tests/methods/presses.py). The tests are skipped without it.
install_kvpress() {
    install_folder "$VENV/kvpress" kvpress==0.5.5 cachetools==5.5.2 ||
        echo "Skipped: PyPI cannot be reached, so the eviction methods are not compared with kvpress."
}

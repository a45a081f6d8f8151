#!/usr/bin/env bash
# Runs the tests of tokenization and of parity with transformers under its oldest and its newest tested release.
# Each release lies in a folder of its own below $VENV/versions, installed once, over the torch of the environment.
# Skips a release, and says so, where PyPI cannot be reached. Arguments go to pytest.
set -euo pipefail
. "$(dirname "$0")/environment.sh"
install_environment test
python="$VENV/bin/python"

# The releases of sparsecache/versions.py, with what they need beside the environment's packages.
oldest=(transformers==5.10.1 tokenizers==0.22.2 huggingface_hub==1.33.0 httpx==0.28.1 httpcore==1.0.9 sentencepiece==0.2.1)
newest=(transformers==5.24.0 tokenizers==0.23.3)
tests=(tests/tokenization tests/longbench/test_prompts.py tests/engine/test_parity.py)

for release in oldest newest; do
    declare -n requirements="$release"
    folder="$VENV/versions/$release"
    if ! install_folder "$folder" "${requirements[@]}"; then
        echo "Skipped: PyPI cannot be reached, so ${requirements[0]} is not tested."
        continue
    fi
    echo "With ${requirements[0]}:"
    PYTHONPATH="$folder${PYTHONPATH:+:$PYTHONPATH}" "$python" -c \
        "import transformers; assert 'transformers==' + transformers.__version__ == '${requirements[0]}'"
    PYTHONPATH="$folder${PYTHONPATH:+:$PYTHONPATH}" "$python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "${tests[@]}" "$@"
done

#!/usr/bin/env bash
# Checks the code with ruff and runs the tests, in an environment that it makes itself.
# Arguments go to pytest, e.g. ./tests/run.sh -k ring
set -euo pipefail

repo=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=setup_env.sh
source "$repo/setup_env.sh"
setup_env "$repo/.venv-test" all,test

cd -- "$repo"
status=0
.venv-test/bin/python -m ruff check . || status=$?
# Last, whatever ruff said, so that the output ends with pytest's summary.
.venv-test/bin/python -m pytest "$@" || status=$?
exit "$status"

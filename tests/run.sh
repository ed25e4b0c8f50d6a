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
# All of them on two processors at once, a file a worker. Each computes with one thread: those of
# OpenMP wait for each other by spinning.
if [ $# -eq 0 ]; then
  set -- -n 2 --dist loadfile --durations 15
  export OMP_NUM_THREADS=1
fi
# Last, whatever ruff said, so that the output ends with pytest's summary.
.venv-test/bin/python -m pytest "$@" || status=$?
exit "$status"

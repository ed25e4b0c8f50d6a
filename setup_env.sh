# shellcheck shell=bash
# Sourced by run_main.sh and tests/run.sh: the one place where a virtual environment is made.
#
#   setup_env VENV EXTRAS        e.g. setup_env "$repo/.venv" all
#
# VENV/setup.stamp says what a finished environment was made from. It is removed before anything is
# touched and written last, so an environment without one is half-made, and is made again from
# nothing. Where the stamp still fits, nothing is done. What pip says goes to VENV/setup.log.

setup_root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

setup_env() {
  local venv=$1 extras=$2 lock
  _stamp_fits && return

  # Two starts at once must not work on the same folder. The lock goes when the last process that
  # holds it ends, so a pip that outlived its parent keeps newcomers out.
  exec {lock}>>"$setup_root/.venv.lock"
  if ! flock --nonblock "$lock"; then
    echo "waiting for another set-up to finish" >&2
    flock "$lock"
  fi
  _stamp_fits || _make_env
  exec {lock}>&- # the run must not inherit it
}

# What the environment should be made from. The first lines say where it stands and which Python it
# has (its scripts name the one, its packages belong to the other), the last ones what is in it.
_stamp() {
  echo "folder $venv"
  "$venv/bin/python" -c 'import sys; print("python %d.%d" % sys.version_info[:2])' 2>&1
  echo "extras $extras"
  (cd -- "$setup_root" && sha256sum pyproject.toml setup.cfg constraints.txt)
}

_stamp_fits() {
  [[ -f $venv/setup.stamp && $(<"$venv/setup.stamp") == "$(_stamp)" ]]
}

_make_env() {
  local log=$venv/setup.log python
  # A finished environment in its place, with its Python, is only brought up to date: it may hold
  # packages that the user has added. Any other is made from nothing.
  if [[ ! -f $venv/setup.stamp || $(head -n 2 "$venv/setup.stamp") != "$(_stamp | head -n 2)" ]]; then
    python=$(_find_python)
    _is_ours || _refuse_foreign
    echo "setting up $venv with $python; this takes some minutes (log: $log)" >&2
    mkdir -p -- "$venv"
    : >"$log" # which stays while the rest goes: it says whose this is
    find "$venv/" -mindepth 1 -maxdepth 1 ! -name setup.log -exec rm -rf -- {} +
    _logged "$python" -m venv "$venv"
  else
    echo "bringing $venv up to date (log: $log)" >&2
    rm -- "$venv/setup.stamp"
    : >"$log"
  fi
  _logged "$venv/bin/python" -m pip install \
    --constraint "$setup_root/constraints.txt" --editable "${setup_root}[$extras]"
  _stamp >"$venv/setup.stamp"
}

# Whether what lies in the place was made here, finished or not, or nothing does.
_is_ours() {
  [[ -f $venv/setup.log || -f $venv/setup.stamp || ! -e $venv ]] && return
  [[ -d $venv && ! $(find "$venv/" -mindepth 1 -print -quit) ]]
}

_refuse_foreign() {
  {
    echo "expected: nothing in $venv, or an environment that was made here"
    echo "got:      one that was made by somebody else (it has no setup.log)"
    echo "to do:    move it away, and start again; or install asyncrl into it and do without this script:"
    echo "          pip install -c $setup_root/constraints.txt -e '${setup_root}[$extras]'"
  } >&2
  exit 2
}

# The name of the first Python on PATH that is new enough.
_find_python() {
  local name
  for name in python3 python3.13 python3.12 python3.11 python3.10; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  {
    echo "expected: Python 3.10 or newer on PATH"
    echo "got:      python3 is $(python3 --version 2>&1 || true)"
    echo "to do:    install a newer Python, with its venv module, and start again"
  } >&2
  exit 2
}

# Runs a command with its output in the log. A signal that ends this shell ends the command too:
# bash by itself would go and leave it working.
_logged() {
  local child='' status=0
  trap 'kill $child 2>/dev/null; exit 130' INT
  trap 'kill $child 2>/dev/null; exit 143' TERM
  "$@" >>"$log" 2>&1 &
  child=$!
  wait "$child" || status=$?
  trap - INT TERM
  if ((status != 0)); then
    tail -n 20 "$log" >&2
    echo "the set-up of $venv failed; the last lines of $log are above" >&2
    exit 1
  fi
}

#!/usr/bin/env bash
# Starts a run, or resumes it: in nvidia-docker where that is configured, else in a local .venv.
set -euo pipefail

repo=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")

usage() {
  cat <<'EOF'
usage: ./run_main.sh RUN_ID [LAUNCH_FILE] [--option value ...]

Starts the run RUN_ID, or resumes it if it exists, and does all the set-up that it needs.

  RUN_ID        the name of the run; its files go to runs/RUN_ID
  LAUNCH_FILE   the experiment; if not given, the one that the run was begun with, and for a new
                run launch/breakout_dqn.py. A relative path is taken from the current
                folder first, then from this repository.
  --option      an option of the launch file's config, e.g. --seed 1 --total-env-steps 20000

environment:
  ASYNCRL_RUNTIME   docker or local forces one; otherwise docker where it has the nvidia runtime
  ASYNCRL_RUNS      the folder that holds the runs, instead of runs/ in this repository

exit status: 0 finished, 1 failed, 2 refused, 130 after SIGINT, 143 after SIGTERM,
             129 after SIGHUP
EOF
}

# Every refusal says what is wrong, what was expected, what came and what to do, a line each.
refuse() {
  printf '%s\n' "$@" >&2
  exit 2
}

check_run_id() {
  local LC_ALL=C # a-z means the 26 letters, in every language
  [[ $1 =~ ^[A-Za-z0-9_][A-Za-z0-9_.-]*$ ]] || refuse "bad RUN_ID" \
    "expected: letters, digits, '_', '.' and '-', not beginning with '.' or '-'" \
    "got:      '$1'" \
    "to do:    choose a name such as breakout_1; it stands before the launch file" \
    "          (./run_main.sh --help tells the rest)"
}

# The absolute path of a launch file, as it was named by the caller.
find_launch_file() {
  local place
  local -a places=("$PWD/$1" "$repo/$1")
  [[ $1 == /* ]] && places=("$1")
  for place in "${places[@]}"; do
    if [[ -f $place ]]; then
      readlink -f -- "$place"
      return
    fi
  done
  refuse "no such launch file" \
    "expected: a Python file in the current folder or in $repo, or an absolute path" \
    "got:      '$1'" \
    "to do:    name one of your own, or one of these:" \
    "$(cd -- "$repo" && find launch -name '*.py' | LC_ALL=C sort | sed 's/^/          /')"
}

# Names the runtimes that docker has. Fails where no daemon answers, and soon: one that hangs must
# not hold up a run that can do without it.
docker_runtimes() {
  timeout --kill-after=1 5 docker info --format '{{json .Runtimes}}' </dev/null 2>/dev/null
}

choose_runtime() {
  case ${ASYNCRL_RUNTIME:-} in
    '')
      if [[ $(docker_runtimes) == *'"nvidia"'* ]]; then echo docker; else echo local; fi
      ;;
    docker)
      docker_runtimes >/dev/null || refuse "ASYNCRL_RUNTIME=docker, but docker cannot be used" \
        "expected: a docker daemon that answers 'docker info' within 5 seconds" \
        "got:      none" \
        "to do:    start it, or allow this user to use it, or set ASYNCRL_RUNTIME=local"
      echo docker
      ;;
    local) echo local ;;
    *)
      refuse "bad ASYNCRL_RUNTIME" \
        "expected: docker or local" \
        "got:      '$ASYNCRL_RUNTIME'" \
        "to do:    unset it to let the machine decide"
      ;;
  esac
}

run_local() {
  # shellcheck source=setup_env.sh
  source "$repo/setup_env.sh"
  setup_env "$repo/.venv" all
  echo "run $run_id: with $repo/.venv, in $ASYNCRL_RUNS/$run_id" >&2
  # exec: signals go to asyncrl itself, and its exit status is ours.
  exec "$repo/.venv/bin/asyncrl" train "$launch_file" "$run_id" "$@"
}

# A name for what is in the image: it changes with every file that goes into it, and with no other.
image_name() {
  local digest
  digest=$(cd -- "$repo" && find docker/Dockerfile .dockerignore pyproject.toml setup.cfg \
    constraints.txt asyncrl -type f -not -path '*/__pycache__/*' -print0 |
    LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum)
  echo "asyncrl:${digest:0:12}"
}

# What this host calls the folder that a launch file of this content came from, the last one if
# there are several. The container knows it as /launch, so it is noted here, beside the digest of
# the file: a start with another file that is then refused changes nothing.
noted_folder() {
  local line folder=''
  [[ -f $folders ]] || return 0
  while IFS= read -r line; do
    if [[ $line == "$1 "* ]]; then folder=${line#* }; fi
  done <"$folders"
  echo "$folder"
}

# For docker's --mount, which reads a line of CSV: within quotes a path may hold commas and quotes.
mounted() {
  echo "type=bind,\"source=${1//\"/\"\"}\",target=$2"
}

run_docker() {
  local image container=asyncrl-$run_id
  local run_folder=$ASYNCRL_RUNS/$run_id folders=$ASYNCRL_RUNS/$run_id/launch_folders
  local launch_folder inside digest noted revision
  local -a terminal=() gpus=() git=()

  case $(docker container inspect --format '{{.State.Running}}' "$container" 2>/dev/null) in
    true)
      refuse "run $run_id is already going, in container $container" \
        "to watch it:  docker logs --follow $container" \
        "to end it:    docker stop $container"
      ;;
    false) docker container rm "$container" >/dev/null ;; # left by a daemon that was killed
  esac

  image=$(image_name)
  if ! docker image inspect "$image" >/dev/null 2>&1; then
    echo "building the image $image; this takes some minutes" >&2
    docker build --file "$repo/docker/Dockerfile" --tag "$image" "$repo" >&2 || exit 1
  fi

  # Made here, or docker would make it, and it would belong to root.
  mkdir -p -- "$run_folder" ||
    refuse "expected to make the run folder $run_folder, could not" \
      "give permission, make room, or set ASYNCRL_RUNS to a folder elsewhere"

  # What the launch file imports may lie beside it. A resumed run reads its own copy of the file,
  # and finds the rest where it was when the run began.
  launch_folder=$(dirname -- "$launch_file")
  inside=/launch/$(basename -- "$launch_file")
  digest=$(sha256sum <"$launch_file")
  digest=${digest%% *}
  noted=$(noted_folder "$digest")
  if [[ $launch_file -ef $run_folder/launch.py ]]; then
    inside=/runs/$run_id/launch.py
    if [[ -d $noted ]]; then
      launch_folder=$noted
    elif [[ $noted ]]; then
      echo "run $run_id: $noted, where its launch file was, is gone, with all that lay there" >&2
    fi
  elif [[ $noted != "$launch_folder" ]]; then
    # Should it fail, asyncrl says what is wrong with the folder.
    echo "$digest $launch_folder" 2>/dev/null >>"$folders" || true
  fi

  # The image has neither git nor the history.
  revision=$(timeout --kill-after=1 5 git -C "$repo" describe --always --dirty 2>/dev/null) || true
  [[ ! $revision ]] || git=(--env "ASYNCRL_GIT=$revision")

  [[ -t 0 && -t 1 ]] && terminal=(--interactive --tty)
  if [[ $(docker_runtimes) == *'"nvidia"'* ]]; then
    gpus=(--gpus all)
  else
    echo "run $run_id: docker has no nvidia runtime, so the container gets no GPU" >&2
  fi
  echo "run $run_id: with the image $image, in $run_folder" >&2

  # exec: docker passes signals on to the container, and the exit status back. A trap here that did
  # the same would make two signals of one, and the second means "stop now, save nothing".
  exec docker run --rm --init ${gpus[@]+"${gpus[@]}"} --stop-timeout 60 --shm-size 1g --name "$container" \
    ${terminal[@]+"${terminal[@]}"} --user "$(id -u):$(id -g)" ${git[@]+"${git[@]}"} \
    --mount "$(mounted "$run_folder" "/runs/$run_id")" \
    --mount "$(mounted "$launch_folder" /launch,readonly)" \
    "$image" train "$inside" "$run_id" "$@"
}

if (($# == 0)); then
  usage >&2
  exit 2
fi
if [[ $1 == -h || $1 == --help ]]; then
  usage
  exit
fi

run_id=$1
shift
check_run_id "$run_id"

ASYNCRL_RUNS=${ASYNCRL_RUNS:-$repo/runs}
[[ $ASYNCRL_RUNS == /* ]] || ASYNCRL_RUNS=$PWD/$ASYNCRL_RUNS
export ASYNCRL_RUNS

launch_file=$repo/launch/breakout_dqn.py
if (($# > 0)) && [[ $1 != -* ]]; then
  launch_file=$1
  shift
elif [[ -f $ASYNCRL_RUNS/$run_id/launch.py ]]; then
  launch_file=$ASYNCRL_RUNS/$run_id/launch.py # a resumed run goes on with its own
fi
launch_file=$(find_launch_file "$launch_file")

runtime=$(choose_runtime)
"run_$runtime" "$@"

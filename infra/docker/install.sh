#!/usr/bin/env bash
# Install distill-jobs into a virtual environment as it runs: at the versions of requirements.lock, and without what only
# development needs. Run in a folder with requirements.lock and pyproject.toml.
#
#   install.sh packages VENV [TORCH_INDEX]   what it depends on; torch from that package index
#   install.sh project VENV                  its own code, from this folder
#   install.sh these VENV REQUIREMENT...     other packages that the lock pins, alone (needs no pyproject.toml)
#
# The lock pins everything, development's packages too. pip takes it as constraints, which install nothing by themselves:
# pyproject.toml's dependencies say what is wanted, so that there is no second lock to drift.
set -euo pipefail

# Of torch's CUDA build alone, and so not in the lock: torch itself asks for one exact version of each.
readonly OF_TORCH='^(cuda|nvidia|triton)'

packages() {
  local venv=$1 index=${2:-} bare
  python3 -m venv "$venv"
  if [[ -n $index ]]; then
    # Without its dependencies, which the next step takes from the ordinary index.
    "$venv/bin/pip" install --quiet --no-deps --index-url "$index" "$(grep '^torch==' requirements.lock)"
  fi
  # The project without its code, and with empty files in place of those that its metadata name: no change of either
  # makes all this be installed anew.
  bare=$(mktemp -d)
  cp pyproject.toml "$bare/"
  touch "$bare/README.md" "$bare/LICENSE"
  # In the environment, and not as an option, so that it holds for the tools that build the project, too.
  PIP_CONSTRAINT=$PWD/requirements.lock "$venv/bin/pip" install --quiet "$bare"
  rm -rf "$bare"
  all_pinned "$venv"
}

these() {
  local venv=$1
  shift
  python3 -m venv "$venv"
  # setuptools comes with a new environment, at a version of its own.
  PIP_CONSTRAINT=$PWD/requirements.lock "$venv/bin/pip" install --quiet setuptools "$@"
  all_pinned "$venv"
  finish "$venv"
}

# Constraints leave free what they don't name. A build tells torch's local version apart (2.13.0+cpu); the lock doesn't.
all_pinned() {
  local unpinned
  unpinned=$("$1/bin/pip" freeze --all --exclude distill-jobs --exclude pip | sed 's/+[a-z0-9.]*$//' |
    { grep -vixFf requirements.lock || true; } | { grep -vE "$OF_TORCH" || true; })
  if [[ -n $unpinned ]]; then
    echo "install.sh: not pinned by requirements.lock: ${unpinned//$'\n'/, }; run make lock" >&2
    return 1
  fi
}

project() {
  local venv=$1
  PIP_CONSTRAINT=$PWD/requirements.lock "$venv/bin/pip" install --quiet --no-deps --force-reinstall .
  finish "$venv"
}

# What runs installs nothing.
finish() {
  "$1/bin/pip" check
  "$1/bin/pip" uninstall --quiet --yes pip
}

case ${1:-} in
  packages | project | these) "$@" ;;
  *) echo "usage: install.sh packages VENV [TORCH_INDEX] | project VENV | these VENV REQUIREMENT..." >&2; exit 2 ;;
esac

#!/usr/bin/env bash
# Makes .venv with everything that demo, tests and checks need on a Linux machine without a GPU.
# Quick when nothing changed: a stamp holds the digest of the files that decide what is installed.
#
#   PYTHON=python3.12 scripts/setup.sh     another interpreter (3.11 is what the lock was made with)
set -euo pipefail
cd "$(dirname "$0")/.."

lock=constraints/cpu.txt
stamp=.venv/.setup-stamp
say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

# A real etcd for the tests. Tried once: without one they are skipped and say why.
get_etcd() {
  [ -e .tools/etcd-unavailable ] || scripts/etcd.sh ||
    say "the tests that need etcd will be skipped; scripts/etcd.sh tries again" >&2
}

want=$(cat pyproject.toml setup.py "$lock" scripts/setup.sh cache_service/native/*.?pp | sha256sum | cut -d' ' -f1)
if [ "$(cat "$stamp" 2>/dev/null || true)" = "$want" ]; then
  get_etcd
  exit 0
fi

python=${PYTHON:-}
if [ -z "$python" ]; then
  for candidate in python3.11 python3; do
    if command -v "$candidate" >/dev/null 2>&1 && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      python=$candidate
      break
    fi
  done
fi
[ -n "$python" ] || fail "no Python >= 3.11 found; install python3.11 and python3.11-venv, or set PYTHON=/path/to/python"
"$python" -c 'import venv, ensurepip' 2>/dev/null || fail "$python has no venv module; on Debian: apt-get install python3-venv"
[ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] || fail "the CPU engine is locked for Linux x86-64, this is $(uname -s) $(uname -m)"

started=$SECONDS
[ -x .venv/bin/python ] || { say "creating .venv with $("$python" --version)"; "$python" -m venv .venv; }
pip() { .venv/bin/python -m pip --disable-pip-version-check --quiet "$@"; }

# torch, torchvision and triton in one command: asked for apart, another torch with a CUDA stack would follow.
say "1/4 torch (CPU build where one is offered)"
pip install --constraint "$lock" torch==2.13.0 torchvision==0.28.0 triton==3.7.1
say "2/4 libraries of the engine and of this project"
grep -vE '^(#|sglang==|mooncake-|openai|anthropic==|apache-tvm-ffi==|xgrammar==|torch|triton==)' "$lock" > .venv/libraries.txt
pip install setuptools==84.2.1 --requirement .venv/libraries.txt
# These name CUDA packages as requirements; their needs are in the lock already.
say "3/4 SGLang 0.5.21 and the Mooncake transfer engine (the stock peer)"
grep -E '^(sglang==|mooncake-|openai|anthropic==|apache-tvm-ffi==|xgrammar==)' "$lock" > .venv/no-deps.txt
pip install --no-deps --requirement .venv/no-deps.txt
say "4/4 prfaas-sglang itself"
rm -f cache_service/native/_index.*.so  # of other sources, if this build fails
pip install --no-deps --no-build-isolation --editable .
core=$(env -u PRFAAS_INDEX .venv/bin/python -c 'from cache_service.native import core_name; print(core_name())')
[ "$core" = native ] || say "no C++ compiler here: the prefix index runs in Python (apt-get install g++ for the native one)"

# Mooncake's library needs libibverbs.so.1, even for TCP. Only the side-by-side runs need it.
if ! ldconfig -p 2>/dev/null | grep -q libibverbs.so.1; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    say "installing libibverbs1 (Debian) for the Mooncake peer"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends libibverbs1; } \
      >.venv/apt.log 2>&1 || say "could not install libibverbs1 (see .venv/apt.log); only the mooncake_tcp backend needs it"
  else
    say "for the mooncake_tcp backend, run as root: apt-get install libibverbs1"
  fi
fi

get_etcd

printf '%s\n' "$want" > "$stamp"
say "done in $((SECONDS - started)) s"

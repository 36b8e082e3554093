#!/usr/bin/env bash
# Puts an etcd server at .tools/etcd, for tests and for running several sites on one machine.
#
#   PRFAAS_ETCD=/path/to/etcd   one you have; nothing is fetched
#
# Where none can be fetched, it says so, leaves .tools/etcd-unavailable with the reason, and fails.
#
# Tried in this order: the upstream release, checked against the digest below; the package of Debian 13, fetched from
# the mirror that this machine's apt uses, its signature checked by apt, unpacked without installing it.
# etcd 3.5.0 to 3.5.5 can lose data when a member dies: refused.
set -euo pipefail
cd "$(dirname "$0")/.."

version=3.5.16
release_sha256=b414b27a5ad05f7cb01395c447c85d3227e3fb1c176e51757a283b817f645ccc # linux-amd64 tar.gz
target=.tools/etcd

say() { printf 'etcd: %s\n' "$*"; }

sound() { # a path: runs, and is none of the releases that lose data
  local found
  found=$("$1" --version 2>/dev/null | sed -n 's/^etcd Version: //p') || return 1
  case $found in
    3.5.[0-5] | '') return 1 ;;
    3.4.* | 3.5.* | 3.6.*) ;;
    *) return 1 ;;
  esac
}

if [ -n "${PRFAAS_ETCD:-}" ]; then
  sound "$PRFAAS_ETCD" || { say "PRFAAS_ETCD: $PRFAAS_ETCD is no etcd 3.4, 3.5.6 or later" >&2; exit 1; }
  exit 0
fi
if [ -x "$target" ] && sound "$target"; then
  exit 0
fi

rm -f "$target-unavailable"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

from_release() {
  [ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] && command -v curl >/dev/null || return 1
  local name=etcd-v$version-linux-amd64
  curl --fail --silent --location --connect-timeout 5 --max-time 300 --output "$work/etcd.tar.gz" \
    "https://github.com/etcd-io/etcd/releases/download/v$version/$name.tar.gz" || return 1
  printf '%s  %s\n' "$release_sha256" "$work/etcd.tar.gz" | sha256sum --check --status || {
    say "the upstream release does not have the expected digest" >&2
    return 1
  }
  tar -xzf "$work/etcd.tar.gz" -C "$work" --strip-components=1 "$name/etcd"
}

from_debian() {
  local keys=/usr/share/keyrings/debian-archive-keyring.gpg mirror
  command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null && [ -r "$keys" ] || return 1
  mirror=$(
    . /etc/os-release
    [ "$ID" = debian ] || exit 0
    apt-get update --print-uris 2>/dev/null |
      sed -n "s#^'\(.*/\)dists/$VERSION_CODENAME/InRelease'.*#\1#p" | head -1
  )
  [ -n "$mirror" ] || return 1
  mkdir -p "$work"/lists/partial "$work"/archives/partial "$work"/parts "$work"/unpacked
  printf 'deb [signed-by=%s] %s trixie main\n' "$keys" "$mirror" >"$work/sources.list"
  # Lists and cache of its own: nothing of the system's apt is touched.
  local options=(-qq -o "Dir::Etc::SourceList=$work/sources.list" -o "Dir::Etc::SourceParts=$work/parts"
    -o "Dir::State::Lists=$work/lists" -o "Dir::Cache=$work" -o Acquire::Languages=none -o APT::Sandbox::User=root)
  apt-get "${options[@]}" update >"$work/log" 2>&1 || return 1
  (cd "$work" && apt-get "${options[@]}" download etcd-server >>"$work/log" 2>&1) || return 1
  dpkg-deb -x "$work"/etcd-server_*.deb "$work/unpacked"
  mv "$work/unpacked/usr/bin/etcd" "$work/etcd"
}

for source in from_release from_debian; do
  if $source && sound "$work/etcd"; then
    mkdir -p "$(dirname "$target")"
    mv "$work/etcd" "$target"
    say "$("$target" --version | head -1) is at $target (${source#from_})"
    exit 0
  fi
done
reason="could not be fetched, neither from github.com nor from a Debian mirror"
mkdir -p "$(dirname "$target")"
printf '%s\n' "$reason" >"$target-unavailable"
say "$reason: put an etcd 3.5.6 or later at $target, or name one in PRFAAS_ETCD" >&2
exit 1

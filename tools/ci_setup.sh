#!/bin/sh
# Installs what the tests use and uv cannot bring. For CI on Debian, as root; run again, it finds everything in place.
set -eu

missing=
command -v bwrap >/dev/null || missing="$missing bubblewrap"
command -v ps >/dev/null || missing="$missing procps"
command -v dockerd >/dev/null || missing="$missing docker.io"
command -v docker-compose >/dev/null || missing="$missing docker-compose"
command -v debootstrap >/dev/null || missing="$missing debootstrap"
command -v chromium >/dev/null || missing="$missing chromium fonts-liberation"
command -v curl >/dev/null || missing="$missing curl"
command -v npm >/dev/null || missing="$missing nodejs npm" # brings the Node that tools/node locks
command -v redis-server >/dev/null || missing="$missing redis-server"

if [ -z "$missing" ]; then
    echo "ci_setup: everything is here"
    exit 0
fi
echo "ci_setup: apt-get install$missing"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# shellcheck disable=SC2086 # a list of words
apt-get install -y -qq --no-install-recommends $missing

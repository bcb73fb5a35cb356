#!/bin/sh
# A Docker Engine for the tests of providers/docker, and the base of their image. For CI on Debian, as root.
#
# An engine that answers is used, and none is ever stopped. Without a registry there is no python:slim to build on, so the
# base is made here from Debian's packages; it is named after this file's hash, and made again only when the file changes.
set -eu

if ! docker version >/dev/null 2>&1; then
    log="${TMPDIR:-/tmp}/sandboxes-dockerd.log"
    echo "docker_engine: starting dockerd, its log is $log"
    # The address is given because a first start without it leaves the default bridge without a gateway.
    setsid dockerd --bip 172.17.0.1/16 >>"$log" 2>&1 </dev/null &
    engine=$!
    waited=0
    until docker version >/dev/null 2>&1; do
        if ! kill -0 "$engine" 2>/dev/null || [ "$waited" -ge 60 ]; then
            echo "docker_engine: dockerd does not answer; the end of $log:" >&2
            tail -n 20 "$log" >&2
            exit 1
        fi
        sleep 1
        waited=$((waited + 1))
    done
fi

# What this machine trusts, its images trust: it may reach the package index through a proxy with its own certificate.
bundle=/etc/ssl/certs/ca-certificates.crt
make_base() {
    root=$(mktemp -d)
    trap 'rm -rf "$root" "$root.log"' EXIT
    if ! debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$root" >"$root.log" 2>&1; then
        tail -n 20 "$root.log" >&2
        exit 1
    fi
    rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
    cp "$bundle" "$root$bundle"
    path=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
    tar -C "$root" -c . | docker import --change "ENV PATH=$path PIP_CERT=$bundle SSL_CERT_FILE=$bundle" - "$1" >/dev/null
}

base="sandboxes-test-base:$(sha256sum "$0" | cut -c1-12)"
if ! docker image inspect "$base" >/dev/null 2>&1; then
    echo "docker_engine: making $base from Debian's packages (about a minute)"
    make_base "$base"
fi
echo "docker_engine: building the images of providers/docker on $base"
for file in Dockerfile Dockerfile.worker; do # the tests find their layers
    folder=$(dirname "$0")/../providers/docker
    docker build -q --build-arg "BASE_IMAGE=$base" --file "$folder/$file" "$folder" >/dev/null
done

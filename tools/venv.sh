#!/bin/sh
# Makes .venv from uv.lock. Needs uv, or Python 3.11+ to fetch the uv that uv.lock pins. Called by make.
set -eu

python=
for candidate in python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate
        break
    fi
done

if uv --version >/dev/null 2>&1; then
    uv=uv
else
    if [ -z "$python" ]; then
        echo "make: no Python 3.11 or newer here. Install one (apt-get install python3, brew install python)" >&2
        echo "      and run make again." >&2
        exit 1
    fi
    uv=.tools/uv
    [ "$uv" -nt uv.lock ] || "$python" tools/bootstrap_uv.py "$uv"
fi

"$uv" sync --frozen || {
    echo "make: uv could not make .venv; its message above says why. No network? Behind a proxy that signs its own" >&2
    echo "      certificates? Set HTTPS_PROXY and SSL_CERT_FILE, and run make again." >&2
    exit 1
}

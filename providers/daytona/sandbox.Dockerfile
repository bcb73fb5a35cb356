# The image of the sandboxes. Add what your agents need, then run `python bake.py`, which adds the runner.
# Without sudo: the agent's shell stays the user that the runner is, and cannot look into it.
FROM python:3.12-slim-bookworm
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates curl git procps && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir anthropic==2.12.0
RUN useradd --uid 10001 --create-home --shell /bin/bash sandbox && mkdir /workspace && chown sandbox: /workspace
WORKDIR /workspace

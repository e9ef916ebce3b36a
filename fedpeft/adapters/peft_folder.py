"""The PEFT folder on disk, rewritten: adapter_model.safetensors and adapter_config.json."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedpeft.records import Arrays


def rewrite(folder: pathlib.Path, tensors: Arrays, settings: Mapping[str, Any]) -> None:
    """Let the folder hold exactly these tensors, and these settings beside those it has."""
    from safetensors.numpy import save_file

    held = {name: np.array(array, order="C") for name, array in tensors.items()}
    save_file(held, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | dict(settings)
    file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")

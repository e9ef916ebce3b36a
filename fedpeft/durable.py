"""Files that are there whole or not at all, whatever moment the process or the machine dies at."""

from __future__ import annotations

import os
import pathlib

import numpy as np
from safetensors.numpy import save

from fedpeft.records import Arrays


def write(path: pathlib.Path, data: bytes) -> None:
    """Put `data` on disk and return when it is there; for a file inside a folder that is renamed when it is complete."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace(path: pathlib.Path, data: bytes) -> None:
    """Put `data` in the place of whatever was there."""
    beside = path.with_name(f".{path.name}.new")
    write(beside, data)
    os.replace(beside, path)
    sync(path.parent)


def sync(folder: pathlib.Path) -> None:
    """Make what was renamed in `folder` last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def tensors(arrays: Arrays) -> bytes:
    """Named arrays in safetensors' form."""
    # safetensors 0.8 writes the memory of a column-major array as if it were row-major; ascontiguousarray would make a number a vector
    data: bytes = save({name: np.array(array, order="C") for name, array in arrays.items()})
    return data

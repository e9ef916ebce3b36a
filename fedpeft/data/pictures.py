"""Pictures as data: what a cell may hold, and folders of picture files."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from fedpeft.errors import Problem, UserError

ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"})
ALLOWED = "a folder with a folder a class, or one a domain with a folder a class in each; beside each other, or below train and test"


def opened(cell: Any) -> Any:
    """The picture of a cell, in RGB: bytes, a path, a dict with either (as parquet and the Hub have it), or a PIL image.

    Raises OSError, SyntaxError or ValueError, as PIL does, for what is no picture.
    """
    from PIL import Image

    if isinstance(cell, Mapping):
        cell = cell["bytes"] if cell.get("bytes") is not None else cell["path"]
    if isinstance(cell, Image.Image):
        return cell.convert("RGB")
    with Image.open(io.BytesIO(cell) if isinstance(cell, bytes | bytearray) else cell) as picture:
        return picture.convert("RGB")


def is_picture(cell: Any) -> bool:
    """Whether a cell has the form of one; whether it can be decoded is another matter."""
    if isinstance(cell, Mapping):
        return isinstance(cell.get("bytes"), bytes) or isinstance(cell.get("path"), str)
    return isinstance(cell, bytes | bytearray | str) or hasattr(cell, "convert")


def holds_pictures(folder: pathlib.Path) -> bool:
    """Whether picture files lie below `folder`, in folders."""
    return any(folder in file.parent.parents for file in _files(folder))


def read_folder(folder: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
    """Rows by split: image (a path), label (the folder it lies in), and domain and client where a folder lies between.

    Raises UserError when the files do not lie alike deep.
    """
    tops = {"train": folder / "train", "test": folder / "test"}
    if not tops["train"].is_dir():
        return {"train": _rows(folder)}
    return {split: _rows(top) for split, top in tops.items() if top.is_dir()}


def _rows(top: pathlib.Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    depths: dict[int, pathlib.Path] = {}  # folders between the top and the class -> a file there
    for file in _files(top):
        *above, label = file.relative_to(top).parts[:-1] or ("",)
        depths.setdefault(len(above) if label else -1, file)
        rows.append({"image": str(file), "label": label} | ({"domain": above[-1], "client": above[-1]} if above else {}))
    if len(depths) != 1 or not depths.keys() <= {0, 1}:
        got = f"the pictures below {top} do not lie alike: {', '.join(str(file) for file in list(depths.values())[:2]) or 'there are none'}"
        raise UserError(Problem("data.name", got, ALLOWED))
    return rows


def _files(top: pathlib.Path) -> Iterator[pathlib.Path]:
    return (file for file in sorted(top.rglob("*")) if file.suffix.lower() in ENDINGS and file.is_file())

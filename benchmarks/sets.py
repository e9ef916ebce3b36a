"""The part of a real data set that a benchmark of many runs can afford."""

from __future__ import annotations

import csv
import gzip
import pathlib

import numpy as np

TRAIN, TEST = 4000, 500  # examples kept of a set, drawn once; of SST-2 the test part is GLUE's validation split


def subset(source: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    """A folder with TRAIN and TEST rows of `source`."""
    out.mkdir(parents=True, exist_ok=True)
    for part, size in (("train", TRAIN), ("test", TEST)):
        with gzip.open(source / f"{part}.csv.gz", "rt", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        kept = np.sort(np.random.default_rng(0).permutation(len(rows))[:size])
        with (out / f"{part}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows[row] for row in kept)
    return out

"""Every adapter that works, on the embedded default: what it trains, what travels, what it reaches.

    python benchmarks/adapters.py [--out DIR] [--only lora fora ...]

Each row is `fedpeft simulate adapter.name=NAME`, with the keys that the table shows. Its learning rate is picked between two
on a validation split of the first seed with three rounds of training; then it runs on the test part, over three seeds for the
adapters that the project is named for and one for the others. Trials and runs are kept in DIR: a stopped benchmark goes on
where it was. Writes benchmarks/results/adapters.json and adapters.md.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import re
from typing import Any

from fedpeft import environment

environment.prepare()

import numpy as np  # noqa: E402
import torch  # noqa: E402

from fedpeft import Config, UserError, simulate  # noqa: E402
from fedpeft.adapters.federable import FEDERABLE, How  # noqa: E402
from fedpeft.screen import Plain  # noqa: E402
from fedpeft.units import format_bytes  # noqa: E402

RESULTS = pathlib.Path(__file__).parent / "results"
FIRST = ["lora", "lora_fa", "fora", "frod", "miss", "lora_sb"]
SEEDS = 3
RATES = ["2e-3", "1e-2"]
FEW_NUMBERS = ["1e-2", "5e-2"]  # where a handful of scales or coefficients train
TRIAL = ["strategy.num_rounds=3", "data.evaluate_on=validation", "data.validation_fraction=0.2"]
VARIANTS = {  # rows beyond one a name: title -> adapter section
    "lora, use_rslora": "{name: lora, use_rslora: true}",
    "lora, init pissa": "{name: lora, init: pissa}",
    "lora, init olora": "{name: lora, init: olora}",
    "lora, init lora_ga": "{name: lora, init: lora_ga}",
    "miss, init_weights bat (Bone)": "{name: miss, init_weights: bat}",
    "shira, mask columns (PaCA)": "{name: shira, mask: columns}",
}
WITH_FEW = {"vera", "pvera", "unilora", "fourierft", "waveft", "ia3", "tinylora", "beft", "vblora", "c3a", "road", "lora_sb", "frod"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/adapters"))
    parser.add_argument("--only", nargs="+")
    given = parser.parse_args()
    others = [name for name, facts in FEDERABLE.items() if facts.how is not How.REFUSED and name not in FIRST]
    sections = {**{name: f"{{name: {name}}}" for name in [*FIRST, *others]}, **VARIANTS}
    rows = []
    for title, section in sections.items():
        if given.only is None or title in given.only:
            rows.append(measure(title, section, given.out / folder_of(title)))
            write(rows)
            print(line(rows[-1]), flush=True)


def folder_of(title: str) -> str:
    return re.sub(r"\W+", "-", title).strip("-")


def measure(title: str, section: str, out: pathlib.Path) -> dict[str, Any]:
    """The row of one adapter; its reason where it fails."""
    adapter = f"adapter={section}"
    rates = FEW_NUMBERS if title in WITH_FEW else RATES
    try:
        trials = [run([adapter, f"training.learning_rate={rate}", *TRIAL], out / f"trial-{rate}") for rate in rates]
        best = int(np.argmax([trial["metrics"]["accuracy"] for trial in trials]))
        seeds = range(SEEDS if title in FIRST else 1)
        runs = [run([adapter, f"training.learning_rate={rates[best]}", f"seed={seed}"], out / f"seed-{seed}") for seed in seeds]
    except UserError as error:
        return {"adapter": title, "failed": str(error)}
    rounds = runs[0]["rounds_completed"]
    return {
        "adapter": title,
        "learning rate": rates[best],
        "trials": [trial["metrics"]["accuracy"] for trial in trials],
        "parameters": runs[0]["trainable_parameters"],
        "bytes a round": (runs[0]["bytes_up"] + runs[0]["bytes_down"]) / rounds,
        "before": [one["initial"]["accuracy"] for one in runs],
        "accuracy": [one["metrics"]["accuracy"] for one in runs],
        "seconds": [one["seconds"]["total"] for one in runs],
    }


def run(overrides: list[str], out: pathlib.Path) -> dict[str, Any]:
    """The summary of a run, from its folder where it has finished before."""
    done = out / "summary.json"
    if not done.is_file():
        simulate(Config.load(None, overrides), out, screen=Plain(), resume=(out / "config.yaml").is_file())
    return dict(json.loads(done.read_text()))


def write(rows: list[dict[str, Any]]) -> None:
    facts = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "torch": torch.__version__, "threads": torch.get_num_threads()}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "adapters.json").write_text(json.dumps({**facts, "seeds": SEEDS, "trial": TRIAL, "rows": rows}, indent=1) + "\n")
    head = "| adapter | learning rate | parameters | bytes a round | before | accuracy | seconds |\n|---|---|---|---|---|---|---|\n"
    (RESULTS / "adapters.md").write_text(head + "\n".join(line(row) for row in rows) + "\n")


def line(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"| {row['adapter']} | failed: {row['failed']} |"
    before, accuracy = (float(np.mean(row[key])) for key in ("before", "accuracy"))
    each = f" ({', '.join(f'{value:.3f}' for value in row['accuracy'])})" if len(row["accuracy"]) > 1 else ""
    size, seconds = format_bytes(row["bytes a round"]), np.mean(row["seconds"])
    return f"| {row['adapter']} | {row['learning rate']} | {row['parameters']:,} | {size} | {before:.3f} | {accuracy:.3f}{each} | {seconds:.0f} |"


if __name__ == "__main__":
    main()

"""Every adapter that works, on the embedded default: what it trains, what travels, what it reaches.

    python benchmarks/adapters.py [--out DIR] [--only lora fora ...]

Each row is `fedpeft simulate adapter.name=NAME model.dtype=bfloat16`, which takes half the time of the default's float32. The
adapters that the project is named for: ten rounds, three seeds. All others: `strategy.num_rounds=3` and one seed. The learning
rates were set beforehand from the kind of adapter, for those with a file of their own after trials on this very task: the table
shows that each row learns, what it trains and sends, and ranks nothing. Runs are kept in DIR: a stopped benchmark goes on where it
was. Writes benchmarks/results/adapters.json and adapters.md.
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
NAMED = ["lora", "lora_fa", "fora", "frod", "miss", "lora_sb"]
SEEDS = 3
ROUNDS = "strategy.num_rounds=3"  # of those that are not named
DTYPE = "model.dtype=bfloat16"
WHOLE = {"ln_tuning"}  # trains the base's own layer norms, which a base in bfloat16 would round
VARIANTS = {  # rows beyond one a name: title -> adapter section
    "lora, use_rslora": "{name: lora, use_rslora: true}",
    "lora, init pissa": "{name: lora, init: pissa}",
    "lora, init olora": "{name: lora, init: olora}",
    "lora, init lora_ga": "{name: lora, init: lora_ga}",
    "miss, init_weights bat (Bone)": "{name: miss, init_weights: bat}",
    "shira, mask columns (PaCA)": "{name: shira, mask: columns}",
}
USUAL = "5e-3"
RATES = {  # where it is not the usual one
    **dict.fromkeys(["lora, use_rslora", "randlora", "oft", "psoft"], "2e-3"),  # rotations, and large factors
    **dict.fromkeys(["lora, init lora_ga", "miss", "miss, init_weights bat (Bone)"], "1e-3"),
    **dict.fromkeys(["lora_sb", "shira", "shira, mask columns (PaCA)", "boft", "hra"], "1e-2"),
    **dict.fromkeys(["ia3", "beft", "tinylora", "road", "vblora"], "2e-2"),  # a handful of numbers
    **dict.fromkeys(["hira", "adamss"], "2e-2"),
    **dict.fromkeys(["fora", "fourierft", "supertuning"], "3e-2"),
    **dict.fromkeys(["vera", "unilora", "pvera", "c3a", "lokr", "loha"], "5e-2"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/adapters"))
    parser.add_argument("--only", nargs="+")
    given = parser.parse_args()
    others = [name for name, facts in FEDERABLE.items() if facts.how is not How.REFUSED and name not in NAMED]
    sections = {**{name: f"{{name: {name}}}" for name in [*NAMED, *others]}, **VARIANTS}
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
    rate, named = RATES.get(title, USUAL), title in NAMED
    faster = [*([] if title in WHOLE else [DTYPE]), *([] if named else [ROUNDS])]
    settings = [f"adapter={section}", *faster, f"training.learning_rate={rate}"]
    try:
        runs = [run([*settings, f"seed={seed}"], out / f"seed-{seed}") for seed in range(SEEDS if named else 1)]
    except UserError as error:
        return {"adapter": title, "failed": str(error)}
    rounds = runs[0]["rounds_completed"]
    return {
        "adapter": title,
        "rounds": rounds,
        "learning rate": rate,
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
    (RESULTS / "adapters.json").write_text(json.dumps({**facts, "seeds": SEEDS, "rows": rows}, indent=1) + "\n")
    head = "| adapter | learning rate | parameters | bytes a round | before | accuracy | seconds |\n|---|---|---|---|---|---|---|\n"
    tables = [[line(row) for row in rows if (row["adapter"] in NAMED) is named] for named in (True, False)]
    (RESULTS / "adapters.md").write_text("\n\n".join(head + "\n".join(table) for table in tables if table) + "\n")


def line(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"| {row['adapter']} | failed: {row['failed']} |"
    before, accuracy = (float(np.mean(row[key])) for key in ("before", "accuracy"))
    each = f" ({', '.join(f'{value:.3f}' for value in row['accuracy'])})" if len(row["accuracy"]) > 1 else ""
    size, seconds = format_bytes(row["bytes a round"]), np.mean(row["seconds"])
    what = f"| {row['adapter']} | {row['learning rate']} | {row['parameters']:,} | {size}"
    return f"{what} | {before:.3f} | {accuracy:.3f}{each} | {seconds:.0f} |"


if __name__ == "__main__":
    main()

"""PACS by domain: six strategies on pictures whose style differs from client to client.

    python benchmarks/pacs.py --data DIR --model DIR [--out DIR]

DIR of --data holds pacs_2k/ (1,568 training and 392 test pictures of seven classes in four domains: art, cartoon, photo,
sketch), that of --model a ViT, such as benchmarks/pretrain_vit.py writes. Two splits, as in LoRA-FAIR's tables:

  domains   each domain is a client
  further   the sketches are dealt to three clients with label skew (Dirichlet 0.5); the other domains are a client each

All strategies have one learning rate; --rates with several picks one for each instead, on a validation split of `domains` at
the first seed, and uses it at both splits. A stopped benchmark goes on where it was. Writes benchmarks/results/pacs.json and
pacs.md.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
from typing import Any

from fedpeft import environment

environment.prepare()

import torch  # noqa: E402

from fedpeft.intervals import Estimate, estimate  # noqa: E402
from fedpeft.simulations.study import run  # noqa: E402
from fedpeft.simulations.study_plan import plan  # noqa: E402
from fedpeft.simulations.study_results import Cell, Results, paired  # noqa: E402

HERE = pathlib.Path(__file__).parent
STRATEGIES = ["fedavg", "ffa_lora", "flora", "flex_lora", "lora_fair", "fedsmooth_lora"]
SPLITS = {
    "domains": ["partition={name: domain, clients: 4}"],
    "further": ["partition={name: domain, clients: 6, alpha: 0.5, split: {sketch: 3}}"],
}
SEEDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/pacs"))
    parser.add_argument("--rates", nargs="*", default=["5e-3"], help="one for all, or several to pick from")
    parser.add_argument("--splits", nargs="+", choices=list(SPLITS), default=list(SPLITS))
    given = parser.parse_args()
    told = [f"model.name={given.model}", f"data.name={given.data / 'pacs_2k'}"]
    axis = [{"strategy.name": name} for name in STRATEGIES]
    rates = [{"training.learning_rate": rate} for rate in given.rates]
    first = plan(str(HERE / "pacs.yaml"), [*told, *SPLITS["domains"]], [axis], [rates], SEEDS)
    found = {"domains": run(first, given.out / "domains")}
    picked = {name_of(cell): cell.settings["training.learning_rate"] for cell in found["domains"].cells}
    if "further" in given.splits:
        axis = [{"strategy.name": name, "training.learning_rate": picked[name]} for name in STRATEGIES]
        second = plan(str(HERE / "pacs.yaml"), [*told, *SPLITS["further"]], [axis], seeds=SEEDS)
        found["further"] = run(second, given.out / "further")
    pretrained = given.model / "pretrained.json"
    write(found, json.loads(pretrained.read_text()) if pretrained.is_file() else None, given.rates)


def name_of(cell: Cell) -> str:
    return cell.settings["strategy.name"]


def write(found: dict[str, Results], pretrained: dict[str, Any] | None, rates: list[str]) -> None:
    rows = []
    for split, results in found.items():
        arms = {name_of(cells[0]): cells for cells in results.arms.values()}
        rows += [row(split, name, cells, arms["fedavg"]) for name, cells in arms.items()]
    facts = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "torch": torch.__version__, "seeds": SEEDS, "rates": rates}
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "pacs.json").write_text(json.dumps({**facts, "pretrained": pretrained, "rows": rows}, indent=1) + "\n")
    (HERE / "results" / "pacs.md").write_text(page(rows))
    print(page(rows))


def row(split: str, name: str, cells: list[Cell], reference: list[Cell]) -> dict[str, Any]:
    runs = [cell.run for cell in cells if cell.run]
    against = paired(cells, reference) if name != "fedavg" else None
    return {
        "split": split,
        "strategy": name,
        "learning rate": cells[0].settings["training.learning_rate"],
        "before": [one.summary["initial"]["accuracy"] for one in runs],
        "accuracy": [one.summary["metrics"]["accuracy"] for one in runs],
        "macro_f1": [one.summary["metrics"]["macro_f1"] for one in runs],
        "worst client": [one.summary["clients"]["worst"] for one in runs],
        "measured on": runs[0].summary["clients"]["measured_on"] if runs else None,
        "against fedavg": [against.mean, against.half_width] if against else [None, None],
        "bytes": [one.summary["bytes_up"] + one.summary["bytes_down"] for one in runs],
        "seconds": [one.summary["seconds"]["total"] for one in runs],
        "failed": [cell.reason for cell in cells if cell.reason],
    }


def page(rows: list[dict[str, Any]]) -> str:
    lines = []
    for split in dict.fromkeys(row["split"] for row in rows):
        lines += [f"### {split}", "", "| strategy | learning rate | before | accuracy | against fedavg | worst client | MB |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for row in (row for row in rows if row["split"] == split):
            before, accuracy, worst, spent = (estimate(row[key]) for key in ("before", "accuracy", "worst client", "bytes"))
            difference = signed(*row["against fedavg"])
            lines += [
                f"| {row['strategy']} | {row['learning rate']} | {said(before, False)} | {said(accuracy)} | {difference} | "
                f"{said(worst)} | {(spent.mean or 0) / 1e6:.1f} |"
            ]
        lines += [""]
    return "\n".join(lines)


def said(found: Estimate, spread: bool = True) -> str:
    if found.mean is None:
        return "failed"
    return f"{found.mean:.3f}" + (f" ± {found.half_width:.3f}" if spread and found.half_width is not None else "")


def signed(mean: float | None, half_width: float | None) -> str:
    return "-" if mean is None else f"{mean:+.3f}" + (f" ± {half_width:.3f}" if half_width is not None else "")


if __name__ == "__main__":
    main()

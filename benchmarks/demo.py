"""What does an adapter add to a frozen encoder, and what does full fine-tuning? `petune demo --compare`, three seeds.

Writes benchmarks/results/demo.json: for each seed the rows of the demo's table, with their intervals.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Literal

from petune.demo import run_demo

RESULTS = Path(__file__).parent / "results" / "demo.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    runs: dict[Literal["retrieval", "vision"], list[object]] = {"retrieval": [], "vision": []}
    with tempfile.TemporaryDirectory() as folder:
        for task, results in runs.items():
            for seed in range(args.seeds):
                result = run_demo(task, compare=True, seed=seed, output=Path(folder) / f"{task}-{seed}", quiet=True)
                row = json.loads(result.to_json())
                row.pop("adapters")  # folders that are gone by now
                results.append(row)
    args.out.write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()

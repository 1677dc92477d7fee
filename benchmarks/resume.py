"""Is a run that was killed and resumed the run that was not?

    python benchmarks/resume.py                                  # writes results/resume.json
    python benchmarks/resume.py --processes 2 --out FILE.json    # two processes on gloo, by torchrun

`petune fit` on a small BERT with LoRA and dropout, a checkpoint after every step; the uninterrupted run first. Each
point is a moment, drawn evenly over that run's steps, at which a run is killed with SIGKILL, all its processes one
after the other; it is resumed with `--ckpt_path last`, and not killed again. A kill before the first checkpoint is a
run that starts anew.

Gates: weights and optimizer state of the last checkpoint, and the exported adapter, bit-equal to the uninterrupted
run's at every point; so are the losses of all steps.
"""

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file
from torch.utils._pytree import tree_flatten
from transformers import BertConfig, BertModel, BertTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import environment, quieten

RESULTS = Path(__file__).parent / "results" / "resume.json"
POINTS = 20
EPOCHS, ROWS, BATCH_SIZE = 3, 160, 8
STEPS = EPOCHS * ROWS // BATCH_SIZE  # of one process; several take as many rows each
WORDS = [f"w{number}" for number in range(40)]


def prepare(folder: Path) -> list[str]:
    """Write model and rows; returns the arguments of fit, but for the output folder."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    base = folder / "base"
    base.mkdir()
    (base / "vocab.txt").write_text("\n".join(special + WORDS))
    BertTokenizer(vocab=str(base / "vocab.txt"), model_max_length=64).save_pretrained(base)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 128,
    }
    BertModel(BertConfig(vocab_size=len(special + WORDS), max_position_embeddings=64, **sizes)).save_pretrained(base)
    rng = random.Random(0)
    with (folder / "rows.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("text", "label"))
        for number in range(ROWS):
            table.writerow((" ".join(rng.choices(WORDS, k=rng.randint(4, 12))), "ab"[number % 2]))
    return [
        "fit",
        "--config=text_classification",
        "--config=lora",
        f"--model.model={base}",
        "--model.adapter.lora_dropout=0.1",
        f"--data.train_file={folder / 'rows.csv'}",
        "--data.validation_split=0",
        "--data.max_length=32",
        f"--data.batch_size={BATCH_SIZE}",
        f"--trainer.max_epochs={EPOCHS}",
        "--trainer.accelerator=cpu",
        "--trainer.log_every_n_steps=1",
        "--trainer.enable_progress_bar=false",
        "--trainer.callbacks+=ModelCheckpoint",
        "--trainer.callbacks.every_n_train_steps=1",
        "--trainer.callbacks.save_last=true",
        "--trainer.callbacks.enable_version_counter=false",
    ]


class Run:
    """One `petune fit`, with the processes that it starts.

    Args:
        arguments: of fit.
        output: folder of the run.
        processes: how many train; more than one are started by torchrun.
    """

    def __init__(self, arguments: list[str], output: Path, processes: int) -> None:
        self.output, self.processes = output, processes
        checkpoints = f"--trainer.callbacks.dirpath={output / 'checkpoints'}"
        self.arguments = [*arguments, f"--output={output}", checkpoints]
        if processes > 1:
            self.arguments += [f"--trainer.devices={processes}", "--trainer.strategy=ddp"]

    def start(self, *more: str) -> "subprocess.Popen[bytes]":
        """Start it, or go on with it."""
        module = ["-m", "petune"]
        if self.processes > 1:
            module = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.processes}", *module]
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}
        self.output.mkdir(parents=True, exist_ok=True)
        with (self.output.parent / f"{self.output.name}.log").open("ab") as log:
            command = [sys.executable, *module, *self.arguments, *more]
            return subprocess.Popen(command, env=environ, stdout=log, stderr=log)

    def finish(self, *more: str) -> None:
        """Start it and wait for its end.

        Raises:
            RuntimeError: it failed; with the end of its log.
        """
        if self.start(*more).wait() != 0:
            log = (self.output.parent / f"{self.output.name}.log").read_text(errors="replace")
            raise RuntimeError(f"{self.output.name} failed: {log[-2000:]}")

    @property
    def last(self) -> Path:
        """Its latest checkpoint."""
        return self.output / "checkpoints" / "last.ckpt"

    def steps(self) -> int:
        """Steps of its latest checkpoint."""
        return torch.load(self.last, weights_only=True)["global_step"] if self.last.exists() else 0

    def kill_after(self, step: int, delay_s: float) -> int:
        """Start it, kill it `delay_s` after the checkpoint of a step stands; returns the steps that were saved."""
        process = self.start()
        while process.poll() is None and (step > 0 and self.steps() < step):
            time.sleep(0.01)
        time.sleep(delay_s)
        if process.poll() is not None and process.returncode != 0:
            raise RuntimeError(f"{self.output.name} failed before it was killed; see its log.")
        if process.poll() is None:
            parent = psutil.Process(process.pid)
            family = [parent, *parent.children(recursive=True)]  # torchrun puts each worker into a group of its own
            for one in family:
                one.kill()
            psutil.wait_procs(family)
        process.wait()
        return self.steps()

    def losses(self) -> dict[int, float]:
        """Step to training loss, as logged; of a step that was logged twice, the later one."""
        found: dict[int, float] = {}
        for path in sorted(self.output.glob("logs/version_*/metrics.csv"), key=lambda path: int(path.parent.name[8:])):
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    if row.get("train/loss"):
                        found[int(row["step"])] = float(row["train/loss"])
        return found


def differences(run: Run, reference: Run) -> list[str]:
    """What of a run's end is not bit-equal to the reference's."""
    found: list[str] = []
    ours, theirs = (torch.load(one.last, weights_only=True) for one in (run, reference))
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        left, right = tree_flatten(ours[part])[0], tree_flatten(theirs[part])[0]
        if len(left) != len(right) or not all(map(_equal, left, right)):
            found.append(part)
    ours, theirs = (load_file(one.output / "adapter" / "adapter_model.safetensors") for one in (run, reference))
    if ours.keys() != theirs.keys() or not all(torch.equal(ours[key], theirs[key]) for key in theirs):
        found.append("adapter")
    losses = reference.losses()
    if any(losses.get(step) != loss for step, loss in run.losses().items()):
        found.append("losses")
    return found


def _equal(left: Any, right: Any) -> bool:
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


def measure(points: int, processes: int, seed: int, folder: Path) -> dict[str, Any]:
    """Kill and resume at every point."""
    arguments = prepare(folder)
    reference = Run(arguments, folder / "uninterrupted", processes)
    reference.finish()
    rng, steps = random.Random(seed), STEPS // processes
    rows: list[dict[str, Any]] = []
    for number in range(points):
        run = Run(arguments, folder / f"point{number}", processes)
        step, delay_s = rng.randrange(steps), rng.uniform(0, 0.1)
        saved = run.kill_after(step, delay_s)
        run.finish(*(["--ckpt_path=last"] if saved else []))
        rows.append({"asked_step": step, "saved_step": saved, "different": differences(run, reference)})
        print(
            f"point {number + 1}: killed behind step {saved} of {steps}, different: {rows[-1]['different']}",
            flush=True,
        )
    return {
        "processes": processes,
        "steps": steps,
        "points": rows,
        "gate": {"equal": sum(not row["different"] for row in rows), "of": points},
    }


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """The verdict."""
    equal, of = result["gate"]["equal"], result["gate"]["of"]
    yield f"{equal} of {of} resumed runs bit-equal to the uninterrupted one, {result['processes']} process(es)"


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 1 where a point missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--points", type=int, default=POINTS)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON to write")
    options = parser.parse_args(argv)
    if options.out == RESULTS and (options.points < POINTS or options.processes > 1):
        parser.error(f"the result is that of {POINTS} points of one process; give this one another --out")
    quieten()
    with tempfile.TemporaryDirectory() as folder:
        result = {**environment(), **measure(options.points, options.processes, options.seed, Path(folder))}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(lines(result)))
    return int(result["gate"]["equal"] < result["gate"]["of"])


if __name__ == "__main__":
    raise SystemExit(main())

"""pytest plugin for PEFT's own tests: our configs in the place of PEFT's, and hub failures told from real ones."""

import json
import os
import zlib
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

import petune
from tests.adapters.cases import CASES, Case

torch.set_num_threads(1)

CONTROL = os.environ.get("PETUNE_SUITE_CONTROL") == "1"
OWN = [case for case in CASES if case.name not in ("lora", "peft_lora")]
UNMERGED = {case.config_cls for case in OWN if not case.merges}
HUB_ERRORS = (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled)
HUB_WORDS = ("huggingface.co", "offline mode", "HF_HUB_OFFLINE", "couldn't connect", "Cannot find the requested files")

# PEFT's tests take their names from the top-level package; PEFT itself uses its own modules and is left as it is.
if not CONTROL:
    peft.LoraConfig = petune.FusedLoraConfig

passed: list[str] = []
failed: list[str] = []
skipped: Counter[str] = Counter()


class StableDiffusionPipeline:
    """Stands for the class of diffusers, which is not installed."""

    @staticmethod
    def from_pretrained(*_: Any, **__: Any) -> None:
        raise ModuleNotFoundError("No module named 'diffusers'")


def test_cases(rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """PEFT's matrix, cut down to LoRA's rows, and a few rows for each method of ours."""
    kept = [row for row in rows if row[2] is peft.LoraConfig]
    return kept if CONTROL else kept + [row for case in OWN for row in _rows(case)]


def _rows(case: Case) -> list[tuple[str, str, type, dict[str, Any]]]:
    fields: list[tuple[str, dict[str, Any]]] = [
        ("MLP", {"target_modules": "lin0"}),
        ("MLP", {"target_modules": ["lin0"]}),
        ("MLP", {"target_modules": ["lin1"]}),
        ("MLP", {"target_modules": ["lin0", "lin1"]}),
        ("MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
        ("EmbConv1D", {"target_modules": ["conv1d"]}),
        ("EmbConv1D", {"target_modules": ["conv1d"], "modules_to_save": ["emb"]}),
    ]
    if case.dropout:
        fields.append(("MLP", {"target_modules": ["lin0"], case.dropout: 0.1}))
    own = {**case.options, **case.resumable}
    return [
        (f"{model} {number} {case.name}", model, case.config_cls, {**own, **options})
        for number, (model, options) in enumerate(fields)
        if model in case.suite_models
    ]


def several_active_cases(rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """The same for the matrix of two active adapters."""
    kept = [row for row in rows if row[2] is peft.LoraConfig]
    if CONTROL:
        return kept
    for case in OWN:
        if case.several_active and "MLP" in case.suite_models:
            options = {**case.options, **case.resumable, **case.random_start}
            lin0, lin1 = ({**options, "target_modules": [name]} for name in ("lin0", "lin1"))
            kept += [(f"{case.name} same", case.name, case.config_cls, lin0, lin0)]
            kept += [(f"{case.name} different", case.name, case.config_cls, lin0, lin1)]
    return kept


def _is_hub(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, HUB_ERRORS) or (isinstance(error, OSError) and any(w in str(error) for w in HUB_WORDS)):
            return True
        error = error.__cause__ or error.__context__
    return False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    error = call.excinfo.value if call.excinfo else None
    if report.failed and (reason := _not_applicable(item, error)):
        report.outcome, report.longrepr = "skipped", (str(item.path), 0, f"Skipped: {reason}")
    return report


def _not_applicable(item: pytest.Item, error: BaseException | None) -> str:
    if _is_hub(error):
        return "needs a model of the hub"
    if isinstance(error, ModuleNotFoundError):
        return f"needs a package that is not installed: {error}"
    config_cls = item.callspec.params.get("config_cls") if hasattr(item, "callspec") else None
    if isinstance(error, NotImplementedError) and config_cls in UNMERGED:
        return "the method has no weight to merge and says so"
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One of so many tests as are asked for, by a hash: every other one would leave out one value of a parameter."""
    every = int(os.environ.get("PETUNE_SUITE_EVERY", "1"))
    items[:] = [item for item in items if zlib.crc32(item.nodeid.partition("tests/")[2].encode()) % every == 0]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count. Under xdist this runs in the controlling process for the reports of all workers."""
    if hasattr(report, "wasxfail"):
        skipped["PEFT expects it to fail"] += 1
    elif report.skipped:
        skipped[str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)] += 1
    elif report.failed:
        failed.append(report.nodeid.partition("tests/")[2] or report.nodeid)
    elif report.when == "call":
        passed.append(report.nodeid)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        failed.append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):
        summary = {"passed": len(passed), "failed": sorted(set(failed)), "not applicable": dict(skipped.most_common())}
        Path(os.environ["PETUNE_SUITE_RESULT"]).write_text(json.dumps(summary, indent=1))

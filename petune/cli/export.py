"""`petune export`: an adapter folder as an adapter, a merged model or a plain LoRA, and optionally onto the hub."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants

from petune.cli.errors import UsageError
from petune.cli.quiet import quiet
from petune.export import (
    CardInfo,
    ExportReport,
    Run,
    check_target,
    export_lora,
    export_merged,
    load_adapter,
    load_run,
    save_adapter,
)
from petune.tasks.models import load_tokenizer

_MARK = {"adapter": "adapter_config.json", "lora": "adapter_config.json", "merged": "config.json"}


def run_export(adapter: str, form: str, output: str, push: str | None) -> int:
    """Export an adapter folder and say what was written.

    Args:
        adapter: adapter folder, or the folder of a run.
        form: adapter, merged or lora.
        output: folder to write; an earlier export there is replaced.
        push: hub repository that also gets the folder.

    Raises:
        FileExistsError: output holds something else.
        UsageError: the method cannot be written in this form, or push is asked for and HF_HUB_OFFLINE is set.
    """
    if push is not None and constants.HF_HUB_OFFLINE:
        raise UsageError(f"--push={push} needs the hub, and HF_HUB_OFFLINE is set; unset it, or leave --push out.")
    with quiet():
        run, target = load_run(Path(adapter).expanduser()), Path(output).expanduser()
        check_target(target, _MARK[form])
        try:
            report = _WRITERS[form](run, target)
        except (TypeError, NotImplementedError) as error:  # the method has nothing of this form, and says so
            raise UsageError(str(error)) from error
    approximated = f" (relative error of the update {report.relative_error:.2g})" if report.relative_error else ""
    print(f"exported {report}{approximated}")
    if push is not None:
        print(f"pushed to {_push(target, push)}")
    return 0


def _write_adapter(run: Run, target: Path) -> ExportReport:
    return save_adapter(load_adapter(run.directory), target, **_described(run))


def _write_merged(run: Run, target: Path) -> ExportReport:
    return export_merged(run.directory, target, tokenizer=_tokenizer(run))


def _write_lora(run: Run, target: Path) -> ExportReport:
    return export_lora(run.directory, target, **_described(run))


_WRITERS: dict[str, Callable[[Run, Path], ExportReport]] = {
    "adapter": _write_adapter,
    "merged": _write_merged,
    "lora": _write_lora,
}


def _described(run: Run) -> dict[str, Any]:
    """What petune.yaml and the model card take over from the run."""
    card = CardInfo(metrics=run.metrics, seed=run.seed)
    return {"run_config": run.config, "tokenizer": _tokenizer(run), "card": card}


def _tokenizer(run: Run) -> Any:
    has_one = (run.directory / "tokenizer_config.json").is_file()
    return load_tokenizer(str(run.directory)) if has_one else None


def _push(folder: Path, repository: str) -> str:
    hub = HfApi()
    hub.create_repo(repository, exist_ok=True)
    return str(hub.upload_folder(repo_id=repository, folder_path=folder))

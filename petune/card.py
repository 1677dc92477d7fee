"""The README.md of an exported adapter, filled from what the run knows."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

_REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass
class CardInfo:
    """What a model card says that the model itself cannot tell."""

    task: str = ""
    """What was trained for, in words: "text classification"."""
    data: str = ""
    """What it was trained on, and how many rows."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Metric name to value, as measured on held-out data."""
    seed: int | None = None
    """Seed of the run."""
    base_model: str = ""
    """Hub id of the base; needed for a base that was loaded from a folder or built from a config."""
    license: str = ""
    """Licence of the adapter, as the hub spells it: "apache-2.0"."""
    notes: str = ""
    """Anything else, in Markdown."""


def render_card(info: CardInfo, run: Mapping[str, Any]) -> str:
    """The card's text: YAML front matter and Markdown.

    Args:
        info: what the user or the task knows.
        run: what goes into petune.yaml (base, adapter, versions, config).
    """
    sections = [
        _front_matter(info, run),
        _title(info, run),
        f"## How to load\n\n{_how_to_load(run)}",
        _metrics(info.metrics),
        f"## Training\n\n{_facts(info, run)}",
        info.notes,
        f"## Configuration\n\n```yaml\n{_yaml(run['config'])}```" if run["config"] else "",
    ]
    return "\n\n".join(section.rstrip() for section in sections if section) + "\n"


def _front_matter(info: CardInfo, run: Mapping[str, Any]) -> str:
    method = run["adapter"]["peft_type"].lower()
    data = ModelCardData(
        library_name="peft",
        base_model=base_model_id(info.base_model, run["base"]),
        tags=sorted({"peft", "petune", method, *([info.task.replace(" ", "-")] if info.task else [])}),
        license=info.license or None,
        pipeline_tag=_PIPELINES.get(run["adapter"]["task_type"]),
    )
    return f"---\n{data.to_yaml()}\n---"


_PIPELINES = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "CAUSAL_LM": "text-generation",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}


def base_model_id(wanted: str, base: Mapping[str, Any]) -> str:
    """A name for the front matter, which must look like a hub id: the given one, the recorded one, the name of the
    folder it was loaded from, or the model type of a base built from a config."""
    for name in (wanted, base["name"] or ""):
        if _REPO_ID.fullmatch(name) and not Path(name).is_dir():
            return name
    folder = re.sub(r"[^\w.-]", "-", Path(base["name"]).name) if base["name"] else ""
    return folder or f"{base['fingerprint']['model_type']}-from-config"


def _title(info: CardInfo, run: Mapping[str, Any]) -> str:
    base = base_model_id(info.base_model, run["base"])
    purpose = f" for {info.task}" if info.task else ""
    return (
        f"# {run['adapter']['peft_type']} adapter{purpose}\n\n"
        f"Trained with PETune {run['versions']['petune']} on the base model `{base}`"
        f" ({run['adapter']['parameters']:,} parameters in the adapter)."
    )


def _how_to_load(run: Mapping[str, Any]) -> str:
    """Lines that run in the adapter's folder."""
    base, plain = run["base"], not run["adapter"]["peft_type"].startswith("PETUNE_")
    if not base["name"] or not base["class"]:
        return (
            "The base had no name to load it by: build the same one as `base`, then\n\n"
            '```python\nimport petune\n\nmodel = petune.load_adapter(".", base=base)\n```'
        )
    labels = base["config"].get("id2label")
    arguments = f", num_labels={len(labels)}" if labels else ""
    if base["config"].get("add_pooling_layer") is False:
        arguments += ", add_pooling_layer=False"
    lines = [
        *([] if plain else ["import petune  # registers the method: pip install petune"]),
        "from peft import PeftModel",
        f"from transformers import {base['class']}",
        "",
        f"base = {base['class']}.from_pretrained({base['name']!r}{arguments})",
        'model = PeftModel.from_pretrained(base, ".")  # this folder',
    ]
    return "```python\n" + "\n".join(lines) + "\n```"


def _metrics(metrics: Mapping[str, float]) -> str:
    if not metrics:
        return ""
    rows = [f"| {name} | {value:.4g} |" for name, value in sorted(metrics.items())]
    return "\n".join(["## Results", "", "| metric | value |", "|---|---|", *rows])


def _facts(info: CardInfo, run: Mapping[str, Any]) -> str:
    facts = {
        "data": info.data,
        "seed": info.seed,
        "date": run["created"],
        "versions": ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
    }
    return "\n".join(f"- {name}: {value}" for name, value in facts.items() if value not in ("", None))


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)

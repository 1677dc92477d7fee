"""Writes docstring_pairs.jsonl: 200 functions of the standard library, what they are called and what they say they do.

The file is committed, because every Python version has other docstrings; run this only to change its form.
"""

import ast
import json
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

ROWS = 200
ROWS_PER_MODULE = 4
SHORTEST = 40  # characters; shorter docstrings say little more than the name
LONGEST = 300
SKIPPED = {"test", "tests", "idlelib", "idle_test", "lib2to3", "site-packages", "dist-packages", "turtledemo"}


def words(name: str) -> str:
    """``read_someThing`` -> ``read some thing``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|_+", " ", name).lower().strip()


def pairs(root: Path) -> Iterator[dict[str, str]]:
    """Every documented public function with arguments below `root`, in the order of the files and their lines."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED & set(parts) or parts[0].startswith("_"):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            arguments = [argument.arg for argument in node.args.args if argument.arg not in ("self", "cls")]
            document = " ".join((ast.get_docstring(node) or "").split())
            if arguments and len(document) >= SHORTEST:
                query = " ".join(words(name) for name in [node.name, *arguments])
                yield {"query": query, "document": document[:LONGEST], "module": ".".join(parts)}


def main() -> None:
    """Take the first few pairs of each module, then rows spread evenly over all modules."""
    kept: list[dict[str, str]] = []
    seen: set[str] = set()
    per_module: dict[str, int] = {}
    for pair in pairs(Path(sysconfig.get_path("stdlib"))):
        new = pair["query"] not in seen and pair["document"] not in seen
        if new and per_module.get(pair["module"], 0) < ROWS_PER_MODULE:
            kept.append(pair)
            seen |= {pair["query"], pair["document"]}
            per_module[pair["module"]] = per_module.get(pair["module"], 0) + 1
    chosen = [kept[i * len(kept) // ROWS] for i in range(ROWS)]
    lines = [json.dumps(pair, ensure_ascii=False) for pair in chosen]
    Path(__file__).with_name("docstring_pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Which pairs the demo reads from Python sources."""

import pytest

from petune.demo.docstrings import PAIRS_PER_FILE, collect_pairs, pairs_in, source_files
from tests.demo.library import write_library

LONG = "Describe what the function does in more than a few words."


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_tests_and_installed_packages_are_not_read(tmp_path):
    for name in ("a.py", "pkg/b.py", "test/c.py", "pkg/tests/d.py", "site-packages/e.py", "test_f.py", "g.txt"):
        write(tmp_path / name, "")
    found = [file.relative_to(tmp_path).as_posix() for file in source_files(tmp_path)]
    assert found == ["a.py", "pkg/b.py"]


def test_only_documented_functions_with_arguments_and_a_name_of_their_own_are_taken(tmp_path):
    source = f'''
class Reader:
    """{LONG}"""
    def __init__(self, path): "{LONG} One."
    def read_all(self, size, *, strict=True): "{LONG} Two."
    def close(self): "{LONG} Three."
    async def wait_for(cls, event): "{LONG} Four."
def short(a): "Too short."
def bare(a): pass
'''
    file = write(tmp_path / "reader.py", source)
    assert [(pair.signature, pair.docstring) for pair in pairs_in(file, tmp_path)] == [
        ("read_all(size, strict)", f"{LONG} Two."),
        ("wait_for(event)", f"{LONG} Four."),
    ]


def test_the_query_is_words_instead_of_identifiers(tmp_path):
    file = write(tmp_path / "a.py", f'def read_all(max_size, b): "{LONG}"')
    assert pairs_in(file, tmp_path)[0].query == "read all ( max size, b )"


def test_nothing_is_executed_and_what_is_no_python_is_passed_over(tmp_path):
    runs = write(tmp_path / "runs.py", f'raise SystemExit("executed")\ndef f(a): "{LONG}"')
    assert len(pairs_in(runs, tmp_path)) == 1
    assert pairs_in(write(tmp_path / "old.py", "print 'python 2'"), tmp_path) == []
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00")
    assert pairs_in(tmp_path / "binary.py", tmp_path) == []


def test_one_seed_gives_one_split_and_another_seed_another(tmp_path):
    root = write_library(tmp_path / "lib")
    assert collect_pairs(24, 16, seed=1, root=root) == collect_pairs(24, 16, seed=1, root=root)
    assert collect_pairs(24, 16, seed=1, root=root) != collect_pairs(24, 16, seed=2, root=root)


def test_no_file_gives_more_than_its_share(tmp_path):
    many = "\n".join(f'def f{i}(a): "{LONG} {i}"' for i in range(3 * PAIRS_PER_FILE))
    write(tmp_path / "many.py", many)
    write(tmp_path / "other.py", f'def g(b): "{LONG}"')
    split = collect_pairs(1, 1, root=tmp_path)
    assert {split.train[0].file, split.held_out[0].file} == {"many.py", "other.py"}
    with pytest.raises(ValueError, match=f"have {PAIRS_PER_FILE} and 1|have {PAIRS_PER_FILE + 1} and 0"):
        collect_pairs(10, PAIRS_PER_FILE + 1, root=tmp_path)


def test_the_real_library_fills_the_default_split_without_overlap():
    split = collect_pairs(960, 800)
    assert (len(split.train), len(split.held_out)) == (960, 800)
    everything = [*split.train, *split.held_out]
    assert len({pair.query for pair in everything}) == len({pair.docstring for pair in everything}) == 1760
    files = {pair.file for pair in split.train}, {pair.file for pair in split.held_out}
    assert files[0].isdisjoint(files[1])
    assert min(map(len, files)) > 50


def test_too_few_docstrings_are_reported_with_what_was_found(tmp_path):
    with pytest.raises(ValueError, match=r"needs 10 held-out and 100 training docstrings.* have 10 and 48; run it"):
        collect_pairs(100, 10, root=write_library(tmp_path / "lib"))

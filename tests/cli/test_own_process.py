"""Each command as the user starts it: in a process of its own, which has imported nothing before."""

import json

import pytest

from tests import fresh


def petune(*arguments: object, cwd) -> fresh.Finished:
    return fresh.run(fresh.script("petune"), *arguments, cwd=cwd)


@pytest.fixture(scope="module")
def folder(tiny_bert, reviews, tmp_path_factory):
    """Where `run` is a finished run of a method that plain PEFT does not know."""
    folder = tmp_path_factory.mktemp("processes")
    done = petune(
        *("fit", "-c", "text_classification", "-c", "bilora", "--model.adapter.r=4", "--data.max_length=16"),
        "--trainer.max_epochs=1",
        *(f"--model.model={tiny_bert}", f"--data.train_file={reviews['train']}", "--output=run"),
        cwd=folder,
    )
    assert done.code == 0, done.errors
    return folder


@pytest.mark.parametrize("form", ["adapter", "merged", "lora"])
def test_export_knows_the_methods(folder, form):
    done = petune("export", "--adapter=run", f"--format={form}", f"--output={form}", cwd=folder)
    assert done.code == 0, done.errors
    assert done.output.startswith(f"exported {form}: ")
    assert (folder / form / ("config.json" if form == "merged" else "adapter_config.json")).is_file()


def test_predict_knows_the_methods(folder):
    (folder / "new.jsonl").write_text('{"text": "the film was great"}\n')
    done = petune("predict", "--adapter=run/adapter", "--input=new.jsonl", "--output=out.jsonl", cwd=folder)
    assert done.code == 0, done.errors
    assert set(json.loads((folder / "out.jsonl").read_text())) == {"text", "label", "probabilities"}


def test_test_knows_the_methods(folder, reviews):
    done = petune("test", "--adapter=run", f"--data.test_file={reviews['test']}", cwd=folder)
    assert done.code == 0, done.errors
    assert "test/accuracy" in done.output

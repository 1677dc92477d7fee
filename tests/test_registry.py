"""Registration: PEFT's own tables hold our methods as they hold PEFT's, whatever is imported first."""

import copy
import importlib
import pickle
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import ClassVar

import pytest
from peft import LoraConfig, PeftConfig, PeftType, get_peft_config
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner

import petune
from petune import registry
from petune.config import PetuneConfig
from tests import fresh
from tests.adapters import dense_delta
from tests.adapters.dense_delta import DenseDeltaConfig, DenseDeltaModel

KIND = "PETUNE_DENSEDELTA"


def run(code: str) -> str:
    done = fresh.run(code)
    assert done.code == 0, done.errors
    return done.output.strip()


def test_a_method_is_in_each_of_pefts_tables_under_its_string_and_its_member():
    for key in (KIND, PeftType(KIND), PeftType[KIND], PeftType.PETUNE_DENSEDELTA):
        assert PEFT_TYPE_TO_CONFIG_MAPPING[key] is DenseDeltaConfig
        assert PEFT_TYPE_TO_TUNER_MAPPING[key] is DenseDeltaModel
        assert PEFT_TYPE_TO_PREFIX_MAPPING[key] == "petune_densedelta_"


def test_the_member_behaves_as_one_that_peft_wrote_itself():
    member = PeftType(KIND)
    assert member in list(PeftType)
    assert isinstance(member, PeftType)
    assert KIND in PeftType.__members__
    assert repr(member) == "<PeftType.PETUNE_DENSEDELTA: 'PETUNE_DENSEDELTA'>"
    assert str(member) == str(PeftType.LORA).replace("LORA", KIND)
    assert hash(member) == hash(KIND)
    assert copy.deepcopy(member) is member
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(member, protocol)) is member


def test_registering_twice_and_reloading_are_harmless():
    before = len(list(PeftType))
    registry.register_method("densedelta", config_cls=DenseDeltaConfig, model_cls=DenseDeltaModel)
    module = importlib.reload(dense_delta)
    try:
        assert len(list(PeftType)) == before
        assert PEFT_TYPE_TO_CONFIG_MAPPING[KIND] is module.DenseDeltaConfig
    finally:
        registry.register_method("densedelta", config_cls=DenseDeltaConfig, model_cls=DenseDeltaModel)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[KIND] is DenseDeltaConfig


def test_a_config_goes_through_json_and_peft_finds_its_class(tmp_path):
    DenseDeltaConfig(scale=2.0, target_modules=["q_proj"]).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert type(config) is DenseDeltaConfig
    assert (config.scale, config.target_modules) == (2.0, {"q_proj"})
    assert type(get_peft_config({"peft_type": KIND, "scale": 3.0})) is DenseDeltaConfig


def test_fused_lora_rides_on_pefts_own_type():
    method = petune.methods()["lora"]
    assert method.peft_type is PeftType.LORA
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] is LoraConfig
    assert method.config_cls is petune.FusedLoraConfig


@pytest.mark.parametrize("name", ["Upper", "trailing_", "two words", ""])
def test_a_name_that_peft_could_not_store_is_refused(name):
    with pytest.raises(ValueError, match="lower-case identifier"):
        registry.register_method(name, config_cls=DenseDeltaConfig, model_cls=DenseDeltaModel)


def test_a_taken_name_is_refused():
    @dataclass
    class Other(PetuneConfig):
        method: ClassVar[str] = "densedelta"

    with pytest.raises(ValueError, match=r"belongs to .*DenseDeltaConfig; choose another"):
        registry.register_method("densedelta", config_cls=Other, model_cls=DenseDeltaModel)


def test_a_prefix_that_is_not_the_namespaced_name_is_refused():
    class Model(BaseTuner):
        prefix = "mine_"

    with pytest.raises(ValueError, match="prefix='mine_' must be 'petune_mine_'"):
        registry.register_method("mine", config_cls=DenseDeltaConfig, model_cls=Model)


def test_a_taken_prefix_is_refused_though_peft_would_let_it_pass(monkeypatch):
    class Model(BaseTuner):
        prefix = "petune_fresh_"

    monkeypatch.setitem(PEFT_TYPE_TO_PREFIX_MAPPING, PeftType.IA3, "petune_fresh_")
    with pytest.raises(ValueError, match=r"'petune_fresh_' belongs to PeftType\.IA3"):
        registry.register_method("fresh", config_cls=DenseDeltaConfig, model_cls=Model)


def test_a_config_with_neither_tuner_nor_builtin_parent_is_refused():
    with pytest.raises(ValueError, match="pass the tuner as model_cls"):
        registry.register_method("orphan", config_cls=DenseDeltaConfig)


def test_entry_points_are_loaded_and_a_broken_one_does_not_take_the_others_with_it(monkeypatch):
    loaded = []
    good = EntryPoint("good", "tests.adapters.dense_delta:register_method", registry.ENTRY_POINT_GROUP)
    bad = EntryPoint("bad", "no_such_module_of_anyone", registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(EntryPoint, "load", lambda self: loaded.append(self.name) or _load(self))
    monkeypatch.setattr(registry, "entry_points", lambda group: [bad, good])
    with pytest.warns(
        UserWarning, match="method 'bad' of an unknown distribution could not be loaded.*no_such_module"
    ):
        registry.load_entry_points()
    assert loaded == ["bad", "good"]


def _load(entry: EntryPoint):
    return getattr(importlib.import_module(entry.module), entry.attr or "__name__")


@pytest.mark.parametrize("first", ["import petune, peft", "import peft, petune", "import petune.adapters"])
def test_methods_are_registered_whichever_import_comes_first(first):
    code = f"{first}\nfrom petune import registry\nprint(sorted(registry._methods))"
    assert "'lora'" in run(code)


def test_importing_petune_is_light():
    heavy = ("torch", "transformers", "peft", "lightning", "triton")
    code = f"import sys, petune; print([m for m in {heavy} if m in sys.modules])"  # a fresh process has torch already
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_registering_the_methods_needs_neither_lightning_nor_the_triton_kernels():
    # peft itself loads triton where it is installed, through torch._dynamo
    kernels = [f"petune.kernels.{name}" for name in ("launch", "lora_linear.kernel", "lora_group.kernel")]
    command = f"import sys, petune, peft; print([m for m in ('lightning', *{kernels}) if m in sys.modules])"
    assert run(command) == "[]"
    assert run(f"import sys, {kernels[1]}; print('{kernels[0]}' in sys.modules)") == "True"


def test_public_names_are_few_and_all_there():
    assert len(petune.__all__) <= 15
    assert all(getattr(petune, name) is not None for name in petune.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = petune.nothing


@pytest.mark.slow
@pytest.mark.parametrize("first", ["config", "layer", "registry", "quantized.tuner", "export", "callbacks", "tasks"])
def test_peft_knows_the_methods_whichever_module_of_ours_imports_it_first(first):
    command = f"import petune.{first}; from peft import PeftType; print(*(kind.value for kind in PeftType))"
    assert {"PETUNE_BIADAPTER", "PETUNE_BILORA", "PETUNE_PAT"} <= set(run(command).split())


def test_a_module_of_ours_that_fails_to_import_keeps_its_own_error(tmp_path):
    (tmp_path / "broken.py").write_text("import peft\nraise KeyError('its own')\n")
    command = (
        f"import importlib, petune; petune.__path__.append({str(tmp_path)!r})\n"
        "try:\n    importlib.import_module('petune.broken')\n"
        "except KeyError as error:\n    print(error.__context__)\n"
        "print(len(petune.methods()) > 5)"
    )
    assert run(command).split() == ["None", "True"]

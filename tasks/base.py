"""What every task shares: a pretrained model, an adapter or a baseline in its place, and how it is optimised."""

import copy
import inspect
from collections.abc import Mapping
from functools import partial
from os import PathLike, fspath
from typing import Any, ClassVar, Literal, Self, cast

import torch
from jsonargparse.typing import lazy_instance
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils.error import NoMatchingPeftModuleError
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics.utilities.distributed import gather_all_tensors
from transformers import AutoModel, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from petune.adapters.lora import FusedLoraConfig, fuse
from petune.fsdp2 import shard
from petune.tasks.describe import class_path, describe_adapter, no_match, plain, resolve_adapter
from petune.tasks.guard import GuardedModule
from petune.tasks.models import fresh_modules, load_config, load_model, load_tokenizer
from petune.tasks.optim import adamw, check_learning_rate, parameter_groups, warmup_schedule
from petune.tasks.quantization import Quantization, check_adapter, name_linears
from petune.tuner import PetuneTuner

Trained = Literal["adapter", "head", "all"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]

LEARNING_RATE: dict[Trained, float] = {"adapter": 5e-4, "head": 1e-3, "all": 5e-5}
# Lazy, so that the command line shows the class and takes its fields one by one; real code never sees this object.
DEFAULT_ADAPTER: PeftConfig = lazy_instance(FusedLoraConfig)
_WHERE = ("revision", "trust_remote_code", "cache_dir", "token", "subfolder")  # of model_kwargs, what a config needs
_PEFT_HEADS = ("classifier", "score")  # PEFT adds these two to modules_to_save itself
_HEADS = (*_PEFT_HEADS, "classification_head", "pre_classifier")
_AS_THEY_ARE = (  # arguments that the task keeps under their own names
    *("learning_rate", "head_learning_rate", "lora_plus_ratio", "weight_decay", "warmup_ratio"),
    *("gradient_checkpointing", "autocast_adapter_dtype", "quantization"),
)


class AdapterTask(GuardedModule):
    """A pretrained model that learns a task through an adapter, or as one of the two baselines.

    Nothing is loaded before `build()`, which the trainer calls through `configure_model`; after it `model` is the
    `PeftModel` (the plain model for train head and all). A subclass gives `task_type`, `auto_class` and the steps.

    Args:
        model: local folder or hub id of a pretrained model; from Python also a `PreTrainedModel`.
        adapter: any PEFT configuration, used where `train` is adapter; an empty task_type is filled in.
        train: adapter; head for a linear probe; all for full fine-tuning.
        learning_rate: peak rate; None for 5e-4 (adapter), 1e-3 (head) or 5e-5 (all).
        head_learning_rate: peak rate of the head; None for learning_rate.
        lora_plus_ratio: rate of LoRA's B over that of A (LoRA+); None for the same rate.
        weight_decay: of matrices; vectors (biases, norms, scales) never decay.
        warmup_ratio: share of the run with rising learning rate, 0..1.
        optimizer: optimizer class or function of the parameter groups.
        scheduler: linear, cosine or constant, stepped every batch; or a scheduler class, stepped every epoch.
        gradient_checkpointing: recompute activations in the backward pass.
        compile: compile the model in place, after the adapter is in it; a dictionary goes to `torch.compile`.
        dtype: of the base's parameters; auto for the checkpoint's own.
        autocast_adapter_dtype: keep the adapter in float32 where the base is in half precision.
        tokenizer: folder, hub id or object; None for the model's own.
        model_kwargs: further arguments of `from_pretrained`, such as revision or attn_implementation.
        quantization: form in which to load the linears of the base's blocks: nf4, fp4 or int8 (bitsandbytes),
            int8_weight_only or int4_weight_only (torchao).

    Raises:
        ValueError: an argument is out of its range.
    """

    task_type: ClassVar[str]
    auto_class: ClassVar[Any] = AutoModel
    calls_model: ClassVar[bool] = True
    """Whether all runs through `model`'s forward, where FSDP2 gathers weights, and not through parts of it."""
    main_metrics: ClassVar[dict[str, Literal["max", "min"]]] = {"loss": "min"}
    """Which value of a metric is the best one, by its name without val/ or test/; the first that is logged decides."""
    has_own_head: ClassVar[bool] = True
    """Whether train: head trains a small head for the task, and not the output embedding of a language model."""

    model: PreTrainedModel | PeftModel

    def __init__(
        self,
        model: str | PathLike[str] | PreTrainedModel,
        adapter: PeftConfig = DEFAULT_ADAPTER,
        train: Trained = "adapter",
        learning_rate: float | None = None,
        head_learning_rate: float | None = None,
        lora_plus_ratio: float | None = None,
        weight_decay: float = 0.01,
        warmup_ratio: float = 0.1,
        optimizer: OptimizerCallable = adamw,
        scheduler: Literal["linear", "cosine", "constant"] | LRSchedulerCallable = "linear",
        gradient_checkpointing: bool = False,
        compile: bool | dict[str, Any] = False,
        dtype: Dtype = "auto",
        autocast_adapter_dtype: bool = True,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        model_kwargs: dict[str, Any] | None = None,
        quantization: Quantization | None = None,
    ) -> None:
        super().__init__()
        if train not in LEARNING_RATE:
            raise ValueError(f"train={train!r} is not known; use one of {', '.join(LEARNING_RATE)}.")
        self.trained: Trained = train
        self.adapter = resolve_adapter(FusedLoraConfig() if adapter is DEFAULT_ADAPTER else adapter)
        self.learning_rate = LEARNING_RATE[train] if learning_rate is None else learning_rate
        self.head_learning_rate = head_learning_rate
        self.lora_plus_ratio = lora_plus_ratio
        self.weight_decay = weight_decay
        self.warmup_ratio = warmup_ratio
        self.optimizer_factory = optimizer
        self.scheduler_factory = scheduler
        self.gradient_checkpointing = gradient_checkpointing
        self.compile_options = compile
        self.dtype_name: Dtype = dtype
        self.autocast_adapter_dtype = autocast_adapter_dtype
        self.model_kwargs = dict(model_kwargs or {})
        self.head: list[str] = []
        source = fspath(model) if isinstance(model, PathLike) else model
        self._source: tuple[str | PreTrainedModel] = (source,)  # in a tuple, so that it is no submodule before build()
        self._tokenizer = tokenizer
        self.quantization: Quantization | None = quantization
        self._check_ranges()
        self.strict_loading = False  # checkpoints hold what was trained; on_load_checkpoint looks for all of it

    def __getattr__(self, name: str) -> Any:
        if name == "model" and name not in self.__dict__.get("_modules", {}):
            raise AttributeError(f"{type(self).__name__}.model is not loaded yet; call build() first.")
        return super().__getattr__(name)  # what nn.Module registered: parameters, buffers, modules

    @property
    def model_name(self) -> str:
        """The base model's folder or hub id; empty for an object made from a configuration."""
        source = self._source[0]
        return source if isinstance(source, str) else source.name_or_path or ""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded at the first use.

        Raises:
            ValueError: the model is an object without a name and no tokenizer was given.
        """
        if self._tokenizer is None or isinstance(self._tokenizer, str):
            name = self._tokenizer or self.model_name
            if not name:
                raise ValueError(
                    f"{type(self).__name__} was given a model object that names no folder, so its tokenizer is not "
                    "known; pass tokenizer= as well."
                )
            self._tokenizer = load_tokenizer(name)
        return self._tokenizer

    def build(self, weights: bool = True) -> PreTrainedModel | PeftModel:
        """Load the model and put the adapter in; a second call returns the same model.

        Args:
            weights: False makes the architecture alone and reads no checkpoint: an estimate runs it on `meta`.

        Raises:
            FileNotFoundError: the model is neither a local folder nor to be had from the hub.
            ValueError: the adapter does not fit the model or the task.
        """
        if "model" in self._modules:
            return self.model
        model, fresh = self.load_base(weights)
        self.head = self.find_head(model, fresh)
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model = self._inject(model) if self.trained == "adapter" else self.make_baseline(model)
        if self.gradient_checkpointing and self.trained == "adapter":
            model.enable_input_require_grads()  # a frozen embedding would cut a checkpointed block off the graph
        if self.compile_options:
            options = self.compile_options if isinstance(self.compile_options, dict) else {}
            # In place: torch.compile(model) would write `_orig_mod.` into every checkpoint key.
            self.model.compile(**options)
        self.save_hyperparameters(self.describe()["init_args"])
        self.train(self.training)  # from_pretrained returns eval mode, and the trainer keeps what it finds
        return self.model

    def load_base(self, weights: bool = True) -> tuple[PreTrainedModel, list[str]]:
        """The base model and the names of its parameters that the checkpoint did not hold.

        Args:
            weights: False for the architecture alone.
        """
        source = self._source[0]
        if not isinstance(source, str):
            if self.dtype_name != "auto":
                cast("nn.Module", source).to(dtype=getattr(torch, self.dtype_name))
            return source, []
        config = self.base_config()
        auto_class, kwargs = self.architecture(config)
        if weights:
            kwargs = {"config": config, "dtype": self.dtype_name, **kwargs, **self.model_kwargs}
            return load_model(auto_class, source, self.quantization, **kwargs)
        dtype = (config.dtype or torch.float32) if self.dtype_name == "auto" else getattr(torch, self.dtype_name)
        return auto_class.from_config(config, dtype=dtype, **kwargs), []

    def base_config(self) -> PretrainedConfig:
        """The configuration of the base model, with what the task sets in it."""
        where = {name: value for name, value in self.model_kwargs.items() if name in _WHERE}
        return load_config(self.model_name, **where)

    def architecture(self, config: PretrainedConfig) -> tuple[Any, dict[str, Any]]:
        """The Auto class for the task, and what it gives the model's constructor."""
        return self.auto_class, {}

    def find_head(self, model: PreTrainedModel, fresh: list[str]) -> list[str]:
        """Names of the modules that belong to the task and not to the pretrained body; they train and are saved.

        What the checkpoint lacks counts as well: frozen and unsaved, it would be random anew after every load.
        """
        body = model.base_model_prefix
        children = [name for name, child in model.named_children() if any(True for _ in child.parameters())]
        if body in children:
            heads = [name for name in children if name != body]
        else:
            heads = [name for name in children if name in _HEADS]
        return [*heads, *(name for name in fresh_modules(model, fresh) if name.split(".")[0] not in heads)]

    def prepare_adapter(self, config: PeftConfig, model: PreTrainedModel) -> None:
        """Change the configuration that goes into `model`, a copy of the one that was asked for; here nothing."""

    def make_baseline(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model without an adapter: its head trains (train: head) or all of it (train: all)."""
        model.requires_grad_(self.trained == "all")
        for name in self.head:
            model.get_submodule(name).requires_grad_(True)
        return model

    def configure_model(self) -> None:
        """Lightning's hook: load where the trainer wants the weights, and cut them up under FSDP2.

        Raises:
            ValueError: see `petune.fsdp2.shard`.
        """
        self.build()
        if self.device_mesh is not None:
            shard(self, self.device_mesh)

    def train(self, mode: bool = True) -> Self:
        """Switch modes, but keep a frozen normalisation layer from moving its running statistics."""
        super().train(mode)
        if mode and self.trained != "all":
            for module in self.modules():
                # BatchNorm and InstanceNorm share this base; there is no public one
                if isinstance(module, nn.modules.batchnorm._NormBase) and not any(
                    parameter.requires_grad for parameter in module.parameters()
                ):
                    module.eval()
        return self

    def on_fit_start(self) -> None:
        """Dropout on, whatever mode an earlier validation or prediction left."""
        self.train()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint without one of the trained parameters: loading is not strict and would hide it.

        Raises:
            ValueError: names the missing parameters.
        """
        if "state_dict" not in checkpoint:  # FSDP1 and DeepSpeed have loaded it by now
            return
        trained = [name for name, parameter in self.named_parameters() if parameter.requires_grad]
        missing = [name for name in trained if name not in checkpoint["state_dict"]]
        if missing:
            raise ValueError(
                f"the checkpoint lacks {len(missing)} of {len(trained)} trained parameters, {missing[0]} first; "
                "load it into the task, model and adapter it was written by."
            )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over the trainable parameters in groups, and its schedule.

        Raises:
            ValueError: nothing is trainable, or the schedule needs a length the trainer does not know.
        """
        groups = parameter_groups(
            self,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            head=self.head,
            head_learning_rate=self.head_learning_rate,
            lora_plus_ratio=self.lora_plus_ratio,
        )
        factory = self.optimizer_factory
        if factory is adamw and self.trainer.precision == "16-mixed":
            factory = partial(adamw, fused=False)  # Lightning refuses to clip gradients of a fused step under a scaler
        optimizer = factory(groups)
        check_learning_rate(optimizer, self.learning_rate)
        if isinstance(self.scheduler_factory, str):
            steps = self.trainer.estimated_stepping_batches
            schedule = warmup_schedule(optimizer, self.scheduler_factory, steps, self.warmup_ratio)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
        scheduler = self.scheduler_factory(optimizer)
        entry: dict[str, Any] = {"scheduler": scheduler, "interval": "epoch"}
        if isinstance(scheduler, ReduceLROnPlateau):
            entry["monitor"] = getattr(scheduler, "monitor", "val/loss")
        return cast("OptimizerLRScheduler", {"optimizer": optimizer, "lr_scheduler": entry})

    def describe(self) -> dict[str, Any]:
        """The task as plain data: `class_path` and `init_args` as the `model:` section of a configuration has them.

        An optimizer or scheduler class given as an object has no plain form and is left out.
        """
        init_args: dict[str, Any] = {
            "model": self.model_name,
            "adapter": describe_adapter(self.adapter),
            "train": self.trained,
            **{name: getattr(self, name) for name in _AS_THEY_ARE},
            "compile": plain(self.compile_options),
            "dtype": self.dtype_name,
            "model_kwargs": plain(self.model_kwargs),
        }
        if isinstance(self.scheduler_factory, str):
            init_args["scheduler"] = self.scheduler_factory
        if isinstance(self._tokenizer, str):
            init_args["tokenizer"] = self._tokenizer
        return {"class_path": class_path(type(self)), "init_args": init_args}

    def model_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The entries of a batch that the model's forward takes, labels aside."""
        return {name: value for name, value in batch.items() if name in self._accepted and name != "labels"}

    def auxiliary_loss(self) -> Tensor | float:
        """What the adapter wants added to the training loss after a forward, such as a loss on its mask; 0.0 for none.

        It is in the model's own `output.loss` already, which a task that computes its loss does not read.
        """
        tuner = self.model.base_model
        extra = tuner.auxiliary_loss() if isinstance(tuner, PetuneTuner) else None
        return 0.0 if extra is None else extra

    @property
    def _accepted(self) -> frozenset[str]:
        model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        return frozenset(inspect.signature(type(model).forward).parameters)

    def _inject(self, model: PreTrainedModel) -> PeftModel:
        config = copy.deepcopy(self.adapter)
        given = None if config.task_type is None else str(getattr(config.task_type, "value", config.task_type))
        if given not in (None, self.task_type):
            raise ValueError(
                f"{type(config).__name__}.task_type={given!r} does not fit {type(self).__name__}; "
                f"use {self.task_type!r} or leave task_type out."
            )
        config.task_type = self.task_type
        name_linears(config, model)
        self.prepare_adapter(config, model)
        if self.head and hasattr(config, "modules_to_save"):
            extra = [name for name in self.head if name not in _PEFT_HEADS]
            lora_like: Any = config
            lora_like.modules_to_save = [*(lora_like.modules_to_save or []), *extra] or None
        try:
            wrapped = get_peft_model(model, config, autocast_adapter_dtype=self.autocast_adapter_dtype)
        except NoMatchingPeftModuleError as error:
            raise ValueError(no_match(model, config)) from error
        if isinstance(config, FusedLoraConfig) and config.target_modules:  # else it trains tokens or parameters alone
            fuse(wrapped)
        return cast("PeftModel", wrapped)

    def _check_ranges(self) -> None:
        wants: dict[str, tuple[float | None, bool, str]] = {
            "learning_rate": (self.learning_rate, _positive(self.learning_rate), "a number above 0"),
            "head_learning_rate": (self.head_learning_rate, _positive(self.head_learning_rate), "a number above 0"),
            "lora_plus_ratio": (self.lora_plus_ratio, _positive(self.lora_plus_ratio), "a number above 0, such as 16"),
            "weight_decay": (self.weight_decay, self.weight_decay >= 0, "0 or more"),
            "warmup_ratio": (self.warmup_ratio, 0 <= self.warmup_ratio <= 1, "a share of the run, 0..1"),
        }
        for name, (value, good, want) in wants.items():
            if not good:
                raise ValueError(f"{type(self).__name__}.{name}={value} is out of range; use {want}.")
        if self.quantization is not None:
            check_adapter(self.quantization, self.trained, self.adapter, self._source[0])


def gather(values: Tensor) -> Tensor:
    """The rows of all processes, in an order that is the same for every tensor; the rows themselves on one process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.cat(gather_all_tensors(values))
    return values


def _positive(value: float | None) -> bool:
    return value is None or value > 0

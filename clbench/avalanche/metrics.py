"""clbench's scores as Avalanche metrics: whole volumes, the file's own grid, Avalanche's names.

When an experience was evaluated, its cases are predicted by
sliding window and scored by the code that scores a run (scoring `strict`), whatever mini-batches
Avalanche's loop held. All metrics of one evaluator share one prediction per case. They also put
the random state back after an evaluation, since Avalanche's loaders draw from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clbench.avalanche.lazy_import import load
from clbench.avalanche.network import Network
from clbench.avalanche.scenario_streams import Experience, Scenario
from clbench.errors import SettingError, TrainingError
from clbench.evaluation.metrics import continual
from clbench.evaluation.scoring import ScoreContext, measure_on_file, metric_rows
from clbench.evaluation.sliding_window import VolumePredictor
from clbench.nets.output import Output
from clbench.run.plan import Plan
from clbench.run.record import course_of
from clbench.store.run_folder import Score

_PluginMetric: Any = load("avalanche.evaluation.metric_definitions").PluginMetric
_results = load("avalanche.evaluation.metric_results")
_names = load("avalanche.evaluation.metric_utils")

Word = Literal["dice", "nsd"]
Per = Literal["experience", "structure", "stream"]


def dice_metrics(
    *, experience: bool = True, stream: bool = True, structures: bool = False
) -> list[VolumeMetric]:
    """Dice on the file's own grid.

    Args:
        experience: `Dice_Exp`: mean over the structures that the experience teaches, each the mean
            over the test cases that hold it.
        stream: `Dice_Stream`: mean over all structures that the model answers for.
        structures: `ClassDice_Exp`: each structure by name.

    Returns:
        Metrics for `EvaluationPlugin`. A score that does not exist is nan: that of an experience
        whose structures the model does not answer for yet, or of a structure no case holds.
    """
    return _scores("dice", "Dice", (experience, structures, stream))


def surface_dice_metrics(
    *, experience: bool = True, stream: bool = True, structures: bool = False
) -> list[VolumeMetric]:
    """Surface Dice (NSD) at each structure's own tolerance; see `dice_metrics`.

    Named `SurfaceDice_Exp`, `SurfaceDice_Stream`, `ClassSurfaceDice_Exp`.

    Args:
        experience: `SurfaceDice_Exp`: mean over the structures that the experience teaches.
        stream: `SurfaceDice_Stream`: mean over all structures that the model answers for.
        structures: `ClassSurfaceDice_Exp`: each structure by name.
    """
    return _scores("nsd", "SurfaceDice", (experience, structures, stream))


def forgetting_metrics(*, experience: bool = True, stream: bool = True) -> list[VolumeMetric]:
    """Forgetting of Dice, under the names of Avalanche's own forgetting metrics.

    Args:
        experience: `ExperienceForgetting`: mean over the structures of an earlier experience.
        stream: `StreamForgetting`: mean over the structures of all earlier experiences.

    Returns:
        Metrics for `EvaluationPlugin`; they need an evaluation after every experience.

    Source: forgetting of Avalanche 0.6, first minus last, which clbench calls
        `forgetting_first_last`.
    Differs: structures weigh the same in a stream, not experiences, as everywhere in clbench.
    """
    return _changes("Forgetting", 1.0, (experience, stream))


def bwt_metrics(*, experience: bool = True, stream: bool = True) -> list[VolumeMetric]:
    """Backward transfer of Dice (`ExperienceBWT`, `StreamBWT`): minus `forgetting_metrics`."""
    return _changes("BWT", -1.0, (experience, stream))


def _scores(word: Word, label: str, wanted: Iterable[bool]) -> list[VolumeMetric]:
    names = (f"{label}_Exp", f"Class{label}_Exp", f"{label}_Stream")
    pers: tuple[Per, ...] = ("experience", "structure", "stream")
    chosen = zip(names, pers, wanted, strict=True)
    return [VolumeMetric(word, name, per) for name, per, asked in chosen if asked]


def _changes(label: str, sign: float, wanted: Iterable[bool]) -> list[VolumeMetric]:
    pers: tuple[Per, ...] = ("experience", "stream")
    chosen = zip(pers, wanted, strict=True)
    return [ChangeMetric(f"{per.title()}{label}", per, sign) for per, asked in chosen if asked]


# ------------------------------------------------------------------------------------ the metrics


class VolumeMetric(_PluginMetric):  # type: ignore[misc]  # Avalanche has no types
    """A metric of whole volumes. The first of an evaluator measures for all of them.

    Its value is a mean over the structures of an experience, each structure of it by name, or a
    mean over the structures of all evaluated experiences that the model answers for.
    """

    def __init__(self, word: Word, name: str, per: Per) -> None:
        super().__init__()
        self.word, self.name, self.per = word, name, per
        self.mean_scores: dict[int, dict[str, float]] = {}
        """Experience → structure → its mean score, in this evaluation."""
        self._random: list[Tensor] = []

    def __str__(self) -> str:
        return self.name

    def reset(self) -> None:
        """Forget the scores of the last evaluation."""
        self.mean_scores = {}

    def result(self) -> dict[int, dict[str, float]]:
        """Experience → structure → mean score, of the last evaluation."""
        return self.mean_scores

    def before_eval(self, strategy: Any) -> None:
        """Begin an evaluation."""
        self.reset()
        if _together(self, strategy)[0] is self:
            self._random = _random_state()

    def after_eval_exp(self, strategy: Any) -> list[Any]:
        """Measure the experience, if this metric is the first, and say what is new."""
        group = _together(self, strategy)
        if group[0] is self:
            scores = _examine(strategy, sorted({m.word for m in group}))
            for metric in group:
                metric.mean_scores[strategy.experience.current_experience] = scores[metric.word]
        if self.per == "stream":
            return []
        values = self.of_experience(strategy)
        if self.per == "structure":  # as Avalanche's class accuracy ends with the class
            return [self._value(strategy, v, f"/{name}") for name, v in values.items()]
        return [self._value(strategy, continual.mean(values.values()))] if values else []

    def after_eval(self, strategy: Any) -> list[Any]:
        """Say what is known of the stream, and leave the random state as it was."""
        values = self.of_stream(strategy) if self.per == "stream" else []
        if self._random:
            _restore(self._random)
            self._random = []
        return [self._value(strategy, continual.mean(values))] if values else []

    def of_experience(self, strategy: Any) -> dict[str, float]:
        """Structure of the experience → score; nan where the model does not answer."""
        have = self.mean_scores[strategy.experience.current_experience]
        return {name: have.get(name, float("nan")) for name in strategy.experience.structures}

    def of_stream(self, strategy: Any) -> list[float]:
        """Every score of this evaluation; nan where there is none."""
        every = [v for scores in self.mean_scores.values() for v in scores.values()]
        return every or [float("nan")]

    def _value(self, strategy: Any, value: float, end: str = "") -> Any:
        name = _names.get_metric_name(self, strategy, add_experience=self.per != "stream")
        return _results.MetricValue(self, name + end, value, strategy.clock.train_iterations)


class ChangeMetric(VolumeMetric):
    """What became of the Dice of structures taught earlier, against that right after their own."""

    def __init__(self, name: str, per: Per, sign: float) -> None:
        super().__init__("dice", name, per)
        self.sign = sign
        self.time = 0
        """Experiences trained on so far."""
        self.taught: dict[int, int] = {}
        """Experience → when it was trained on, from 1."""
        self.scores: dict[str, dict[tuple[int, str], float]] = {}
        """Stream → (time, structure) → mean score."""

    def before_training_exp(self, strategy: Any) -> None:
        """Count experiences."""
        self.time += 1
        self.taught[strategy.experience.current_experience] = self.time

    def of_experience(self, strategy: Any) -> dict[str, float]:
        """Structure → change; none of the experience just taught and those not taught yet."""
        return self._changes(strategy, strategy.experience.current_experience)

    def of_stream(self, strategy: Any) -> list[float]:
        """The changes of all earlier experiences; none while there is only one."""
        return [v for e in self.mean_scores for v in self._changes(strategy, e).values()]

    def _changes(self, strategy: Any, experience: int) -> dict[str, float]:
        """Structure → change, of an experience taught earlier and examined right then; else {}.

        The last evaluation of a time stands, as where training evaluates in between.
        """
        stream = self.scores.setdefault(strategy.experience.origin_stream.name, {})
        now = self.mean_scores[experience]
        stream.update({(self.time, name): score for name, score in now.items()})
        own = self.taught.get(experience, self.time)
        known = {name: own for name in now if own < self.time and (own, name) in stream}
        lost = continual.forgetting_first_last(stream, known, self.time)
        return {name: self.sign * value for name, value in lost.items()}


# ---------------------------------------------------------------------------------------- measuring


class _Answers(nn.Module):
    """Any model of logits, in the form that clbench's sliding window asks for."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Output:
        answer = self.model(image)
        return answer if isinstance(answer, Output) else Output(logits=answer)


def _sigmoid(logits: Tensor, structures: tuple[str, ...]) -> Tensor:
    return torch.sigmoid(logits)


def _together(metric: VolumeMetric, strategy: Any) -> list[VolumeMetric]:
    """The metrics of the evaluator that this one is in, in order; itself where it is in none."""
    evaluator = getattr(strategy, "evaluator", None)
    group = [m for m in getattr(evaluator, "metrics", ()) if isinstance(m, VolumeMetric)]
    return group if metric in group else [metric]


def _examine(strategy: Any, metrics: Sequence[str]) -> dict[str, dict[str, float]]:
    """Metric → structure → mean over the experience's cases that hold it.

    Only structures that the experience teaches and the model answers for.
    """
    experience = strategy.experience
    if not isinstance(experience, Experience):
        raise SettingError(
            "clbench's metrics measure whole volumes, which this experience does not have",
            where="EvaluationPlugin",
            expected="an experience of clbench.avalanche.scenario(…)",
            got=type(experience).__name__,
        )
    scenario: Scenario = experience.benchmark
    plan, last = scenario.plan, scenario.n_experiences

    known = _known(strategy.model, experience, partial(_predictor, strategy, plan))
    wanted = [name for name in experience.structures if name in known]
    if not wanted:
        return {word: {} for word in metrics}
    server = _predictor(strategy, plan, known)
    context = ScoreContext(
        benchmark=plan.benchmark,
        strategy=type(strategy).__name__,
        seed=plan.settings.seed,
        step=last,
    )
    rows: list[Score] = []
    for case in experience.cases:
        volume = experience.volume(case)
        bits = server.predict(volume, postprocess=plan.profile.examine.postprocess)
        scores = measure_on_file(bits, known, volume, volume.native_bits(), metrics, among=wanted)
        rows += metric_rows(scores, wanted, volume, metrics, context)
    sources = [plan.catalog.source(n).name for n in range(1, last + 1)]
    patient_of = course_of(plan.benchmark, plan.catalog).patient_of
    return {
        word: {
            name: value
            for (_, name), value in continual.matrix(
                rows, sources, scoring="strict", patient_of=patient_of, metric=word
            ).items()
        }
        for word in metrics
    }


def _predictor(strategy: Any, plan: Plan, structures: tuple[str, ...]) -> VolumePredictor:
    return VolumePredictor(
        _Answers(strategy.model),
        _sigmoid,
        structures,
        patch_vox=plan.catalog.preprocessing.patch_vox,
        overlap=plan.profile.examine.overlap,
        windows=plan.profile.examine.windows,
        device=strategy.device,
    )


def _known(
    model: nn.Module,
    experience: Experience,
    serve: Callable[[tuple[str, ...]], VolumePredictor],
) -> tuple[str, ...]:
    """The structures a model answers for; of a foreign one as many as it has channels."""
    if isinstance(model, Network):
        return model.structures
    scenario: Scenario = experience.benchmark
    _, _, logits = next(serve(()).logits(experience.volume(experience.cases[0])))
    if len(logits) > scenario.n_classes:
        raise TrainingError(
            "the model answers for more structures than the course has",
            where=type(model).__name__,
            expected=f"at most {scenario.n_classes} channels",
            got=len(logits),
        )
    return scenario.structures[: len(logits)]


def _random_state() -> list[Tensor]:
    """States of torch's global generators: the CPU's, then every GPU's in use."""
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch
    gpus = torch.cuda.get_rng_state_all() if used else []
    return [torch.get_rng_state(), *gpus]


def _restore(states: Sequence[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(states[1:])

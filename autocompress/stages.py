"""The stages, as every process that runs trials has them: a study with its sampler, a space.

All of it follows from the study file, the layer table and the database, so that workers on other
machines propose what the conductor would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from optuna.samplers import RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial

from autocompress.annealing import AnnealingSampler, Parent
from autocompress.audition import strays
from autocompress.config import StudyConfig
from autocompress.longtrial import run_long_trial
from autocompress.objective import Bench, find_trial, run_trial
from autocompress.samplers import make_sampler
from autocompress.space import SearchSpace
from autocompress.store import FINALS
from autocompress.trials import EXTRA, counted, stage_of

PARENTS = "parents"
"""User attribute of the annealing: labels of the exploration's trials where it starts."""


@dataclass(frozen=True)
class Stage:
    """One stage of a study.

    Attributes:
        name: "exploration", "annealing" or "finals".
        study: Its Optuna study, with the sampler that proposes.
        space: What is proposed; None for the finals, whose trials are ordered.
        total: Its trials, in all.
    """

    name: str
    study: Study
    space: SearchSpace | None
    total: int

    @property
    def ordered(self) -> bool:
        """Whether its trials are ordered, and nothing is proposed: those of the finals."""
        return self.space is None

    def carry_out(self, bench: Bench, trial: Trial) -> FrozenTrial | None:
        """Carry out a trial that was taken; None if others have ended it."""
        if self.space is None:
            return run_long_trial(bench, trial)
        return run_trial(bench, self.name, self.space, trial)

    def refresh(self, bench: Bench) -> None:
        """Let the sampler know what the study has learned of what trials lose in the end."""
        sampler = self.study.sampler
        if isinstance(sampler, AnnealingSampler):
            sampler.outlook = bench.outlook
            known = [label for label in sampler.outlook.ends if stage_of(label) == "exploration"]
            sampler.adopt(_parents(bench, known))


def exploration_stage(
    bench: Bench, config: StudyConfig, space: SearchSpace, worker: int = 0
) -> Stage:
    """The first stage.

    Args:
        bench: Knows the study.
        config: The study file.
        space: The whole search space.
        worker: Tells the processes of a study apart, for the samplers that draw by lot.
    """
    study = bench.studies["exploration"]
    study.sampler = make_sampler(
        config.search.sampler,
        space,
        config.seed,
        len(study.get_trials(deepcopy=False)),
        config.search.trials,
        partial(bench.outlook.shortfall, "exploration"),
        worker,
    )
    return Stage("exploration", study, space, config.search.trials)


def annealing_stage(
    bench: Bench, config: StudyConfig, space: SearchSpace, study: Study, parents: Sequence[str]
) -> Stage:
    """The second stage: narrower, around the exploration's best.

    Args:
        bench: Knows the exploration; learns of the annealing.
        config: The study file.
        space: The whole search space.
        study: The annealing.
        parents: Labels of the exploration's trials where it starts.
    """
    bench.studies["annealing"] = study
    elders = _parents(bench, parents)
    plans = [elder.plan for elder in elders]
    # With channels to remove, each child has a space of its own: it depends on those that remain.
    narrowed = space if space.width is not None else space.narrow(plans, band=0.5)
    study.sampler = AnnealingSampler(
        narrowed,
        config.seed,
        outlook=bench.outlook,
        parents=elders,
        trials=config.search.annealing_trials,
        strays=partial(strays, bench),
    )
    total = config.search.annealing_trials + study.user_attrs.get(EXTRA, 0)
    return Stage("annealing", study, narrowed, total)


def finals_stage(bench: Bench, study: Study) -> Stage:
    """The long fine-tunings that are ordered by now.

    Args:
        bench: Learns of them.
        study: The finals.
    """
    bench.finals = study
    study.sampler = RandomSampler()
    return Stage(FINALS, study, None, len(counted(study)))


def _parents(bench: Bench, labels: Sequence[str]) -> list[Parent]:
    """Trials of the exploration as parents."""
    trials = [find_trial(bench.studies, label) for label in labels]
    return [Parent.of("exploration", trial, bench.delta) for trial in trials]

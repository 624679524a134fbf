"""How the annealing proposes candidates: children of good trials, which inherit their weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from optuna.trial import FrozenTrial

from autocompress.allocator import STAGES, Knobs, allocate
from autocompress.damage import EVEN
from autocompress.errors import DamagedArtifact
from autocompress.outlook import NEARLY, Outlook
from autocompress.plan import Plan
from autocompress.samplers import KNOBS, PlanSampler, Proposal, known_plans
from autocompress.space import Option, SearchSpace
from autocompress.trials import FINISHED, PARENT, has_weights, lost, stage_of

KINDS = ("ripen", "sample", "ripen", "greedy")
"""The kinds of children, taken in turn; where nothing can ripen, the next kind's turn comes."""

LAST_KINDS = ("greedy", "sample")
"""Likewise, of the trials beyond those planned."""

CANDIDATES = 6
"""Children of a parent that are compared before one of them is fine-tuned. In 66 comparisons the
worst strayed 2.3 times as far as the best for what it saved (median), and the one that the layer
table predicts to be the best 1.3 times."""

TRIES = 4
"""So many children are made, at most, for each that is compared: some are made twice."""

NOISE = 0.5
"""Spread of the logarithms of what a child's moves are compared by, but for the first child's."""

TILT_NOISE = 0.1
"""Spread of the logarithms of the error weights of a child that is sampled. At 0.5 children of a
CIFAR ResNet-20 stood 7 to 14 points lower before fine-tuning than at 0."""

PARTS = (0.0, 0.5, 1.0)
"""Parts of a child's saving that removing channels may make, the rest being made by ranks."""

STEPS = (0.7, 0.97)
"""Least and largest share of its parent's cost that a child may have. A child goes on with the
training of all its elders: on Fashion-MNIST steps of 0.55 missed what several smaller ones reached.
"""

PROMISE = 0.9
"""What children are to lose after the winner's long fine-tuning, in times delta."""

TOO_MUCH = 1.02
"""A child that costs more than so many times what it should has missed it."""

STEEP = 1.5
"""What children are expected to lose for each unit of the natural logarithm of what they save,
times delta, before one is finished. Fashion-MNIST networks lost 0.5 to 1, a CIFAR ResNet-20 3: one
child that saved too much tells that, while a hundred timid ones don't."""
FADES = 0.7
"""Weight of a child beside the next younger one. What 73 children in eight Fashion-MNIST studies
lost was foretold with an error of 0.31 delta by it, 0.33 where all count alike."""
LEAST_STEEP = 0.5
"""No lucky children make us hope for less."""
TRUST = 0.01
"""Weight of `STEEP`: that of one child that saved 10 % of its cost."""

FAR = "far"
"""In a trial's record: whether there was no child of its parent that saves what it should."""

Strays = Callable[[str, Sequence[Plan]], Sequence[float]]
"""How far children stray from the baseline before fine-tuning, by their parent's label and their
plans."""


@dataclass(frozen=True)
class Parent:
    """A trial whose weights a child may inherit.

    Attributes:
        label: "<stage>/<number>".
        text: Its plan, as JSON; of many parents few are chosen, so the others' is never read.
        drop: Its accuracy drop, in points.
        cost: Its cost, in the objective's unit.
        margin: By how much the bound of the drop is larger, in points.
        impact: Exponent of the impact in the damage that it was chosen by, as in `allocator.Knobs`.
    """

    label: str
    text: str
    drop: float
    cost: float
    margin: float = 0.0
    impact: float = EVEN

    @classmethod
    def of(cls, stage: str, trial: FrozenTrial, delta: float) -> Parent:
        """A finished trial of a stage as a parent."""
        return cls(
            f"{stage}/{trial.number}",
            trial.user_attrs["plan"],
            trial.values[0],
            trial.values[1],
            lost(trial, delta) - trial.values[0],
            trial.system_attrs.get(KNOBS, {}).get("impact", EVEN),
        )

    @cached_property
    def plan(self) -> Plan:
        """What it did to each layer."""
        return Plan.from_json(self.text)


@dataclass(frozen=True)
class _Wish:
    """What a child should be.

    Attributes:
        parent: Its parent.
        step: Share of its parent's cost that it should have.
        band: How far its rank fractions may lie from its parent's.
        space: The space at its parent's channels.
        far: Whether nothing in the band saves so much.
    """

    parent: Parent
    step: float
    band: float
    space: SearchSpace
    far: bool = False

    @cached_property
    def picked(self) -> dict[str, Option]:
        """The parent's options."""
        return self.space.pick(self.parent.plan)

    @cached_property
    def cost(self) -> float:
        """What the child should cost, as the space counts it."""
        return self.step * self.space.cost(self.picked)

    def misses(self, cost: float) -> bool:
        """Whether a child of this cost costs too much."""
        return cost > TOO_MUCH * self.cost

    def score(self, cost: float, stray: float) -> tuple[bool, float, float]:
        """What children are compared by, the less the better: those that cost too much come last;
        then how far they stray for each unit of the logarithm of what they save; then their cost.
        """
        saved = -math.log(max(cost, 1e-9) * self.step / self.cost)
        stray = max(stray, 0.0) / saved if math.isfinite(stray) and saved > 0 else math.inf
        return self.misses(cost), stray, cost


class AnnealingSampler(PlanSampler):
    """Annealing: children of the cheapest trials within the aim, ever nearer to them.

    Trials are compared by what they are expected to lose in the end (`outlook.Outlook`), and the
    aim is a little less than delta. There are three kinds of children, in turn. Two of them cost
    what would bring their parent to the aim, on a line through the finished children: so many
    points for each halving of the cost.

    - sample: the allocator shares that cost out anew, with random tilts, in a narrow band around
      the parent.
    - greedy: of the parent's layers only those move, one after the other, that save most for the
      error they add; all the others keep the weights that the parent was fine-tuned with.
    - ripen: a cheaper trial of the exploration that misses the aim narrowly keeps its plan, or
      nearly so, and is only fine-tuned further, for a trial of the annealing is longer than one of
      the exploration. That also tells how much longer fine-tuning wins back.

    Of children that are sampled or greedy several are made, and the one is proposed that strays
    least from the baseline for what it saves, as it is before fine-tuning: a parent's layers were
    trained, and the errors in the layer table, which are of the baseline's, miss what a cut of them
    breaks.

    The band, and the noise of the step, halve from round to round; it is widened for a child that
    can't save within it what it should. Trials beyond those planned are
    children of trials that were fine-tuned as long as the winner.

    Args:
        space: The space around the exploration's best trials.
        seed: The study's seed.
        outlook: What is expected of trials. It may be set anew as more is known.
        parents: The exploration's trials that may be parents.
        rounds: Number of rounds.
        trials: Number of trials of the whole annealing.
        strays: Compares children; None: the first one is proposed.
    """

    def __init__(
        self,
        space: SearchSpace,
        seed: int,
        *,
        outlook: Outlook,
        parents: Sequence[Parent],
        rounds: int = 3,
        trials: int = 15,
        strays: Strays | None = None,
    ) -> None:
        super().__init__(space, seed)
        self.outlook = outlook
        self._parents = list(parents)
        self._rounds = rounds
        self._trials = max(trials, 1)
        self._strays = strays

    def adopt(self, parents: Sequence[Parent]) -> None:
        """Take more trials of the exploration for parents, as they turned out well.

        Only those whose plans the space holds, for it was narrowed around others.
        """
        known = {parent.label for parent in self._parents}
        self._parents += [p for p in parents if p.label not in known and self._holds(p.plan)]

    def _holds(self, plan: Plan) -> bool:
        here = self._space.of_plan(plan)
        return here.plan(here.pick(plan)) == plan

    @property
    def _delta(self) -> float:
        return self.outlook.delta

    @property
    def _aim(self) -> float:
        return PROMISE * self._delta

    def _expected(self, parent: Parent) -> float:
        """What a trial is expected to lose in the end, or lost there, in points."""
        known = self.outlook.ends.get(parent.label)
        if known is not None:
            return known
        return self.outlook.bound(stage_of(parent.label), parent.drop, parent.margin)

    def propose(
        self, others: Sequence[FrozenTrial], number: int, attempt: int, rng: np.random.Generator
    ) -> Proposal:
        """A child, of the kind whose turn it is, of one of the best trials so far."""
        finished = [t for t in others if t.state in FINISHED and t.constraints]
        pool = self._parents + [
            Parent.of("annealing", t, self._delta) for t in finished if has_weights(t)
        ]
        turn = min(self._rounds - 1, len(finished) * self._rounds // self._trials)
        band = 0.5 / 2**turn
        place = number % len(KINDS)
        kind = KINDS[place]
        beyond = len(finished) >= self._trials
        if beyond:
            # What is left of the tolerance is spent in steps from what is known best; children of
            # others, which promised more by what they were expected to win back, lost too much.
            kind = LAST_KINDS[number % len(LAST_KINDS)]
        if kind == "ripen":
            ripe = self._unfinished(pool, others, number)
            if ripe is not None:
                here = self._space.of_plan(ripe.plan)
                picked = here.narrow([ripe.plan], band).pick(ripe.plan)
                record = {"kind": kind, "impact": ripe.impact}
                return Proposal(here, picked, record, ripe.label)
            kind = KINDS[(place + 1) % len(KINDS)]
        slope = self._slope(pool, finished)
        if beyond:
            ends = self.outlook.ends
            pool = [p for p in pool if ends.get(p.label, math.inf) <= self._aim] or pool
        parent = self._choose(pool, slope, rng)
        step = self._share(parent, slope) * math.exp(rng.normal(0.0, 0.1 * band))
        step = float(np.clip(step, *STEPS))
        wish = _Wish(parent, step, band, self._space.of_plan(parent.plan))
        while (far := self._is_out_of_reach(wish, rng)) and wish.band < 1:
            wish = replace(wish, band=2 * wish.band)
        wish = replace(wish, far=far)
        if self._strays is None:
            return self._child(wish, kind, rng, attempt > 0)
        return self._least_astray(wish, kind, known_plans(others), rng, attempt > 0)

    def _is_out_of_reach(self, wish: _Wish, rng: np.random.Generator) -> bool:
        """Whether the band is too narrow for what the child should save."""
        child = self._child(wish, "greedy", rng)
        return wish.misses(child.space.cost(child.picked))

    def _least_astray(
        self,
        wish: _Wish,
        kind: str,
        known: Collection[str | None],
        rng: np.random.Generator,
        again: bool,
    ) -> Proposal:
        """The best of several children that are new, of both kinds in turn."""
        assert self._strays is not None
        first = child = self._child(wish, kind, rng, again)
        other = LAST_KINDS[1 - LAST_KINDS.index(kind)]
        new: dict[Plan, Proposal] = {}
        for turn in range(TRIES * CANDIDATES):
            plan = child.space.plan(child.picked)
            if plan.digest not in known:
                new.setdefault(plan, child)
            if len(new) == CANDIDATES:
                break
            child = self._child(wish, kind if turn % 2 else other, rng, noisy=True)
        if len(new) < 2:
            return next(iter(new.values()), first)
        try:
            strays = self._strays(wish.parent.label, list(new))
        except DamagedArtifact:  # the trial begins from the baseline, and says why
            return next(iter(new.values()))
        costs = [one.space.cost(one.picked) for one in new.values()]
        scores = map(wish.score, costs, strays)
        return min(zip(scores, new.values(), strict=True), key=lambda pair: pair[0])[1]

    def _child(
        self, wish: _Wish, kind: str, rng: np.random.Generator, noisy: bool = False
    ) -> Proposal:
        """A greedy child, or one that is sampled.

        The first greedy one makes the moves that are predicted best; noisy ones look for others.
        """
        noise = NOISE if kind == "sample" or noisy else 0.0
        band, impact = wish.band, wish.parent.impact
        here, picked, part = self._narrower(wish, rng, noise)
        near = here.around([picked], band)
        if kind == "greedy":
            picked = near.lighten(picked, wish.cost, rng, noise, impact)
        else:
            picked = allocate(near, self._tilted(near, wish.cost, rng, impact))
        record = {
            "kind": kind,
            "step": wish.step,
            "band": band,
            "channels": part,
            "impact": impact,
            FAR: wish.far,
        }
        return Proposal(here, picked, record, wish.parent.label)

    def _narrower(
        self, wish: _Wish, rng: np.random.Generator, noise: float
    ) -> tuple[SearchSpace, dict[str, Option], float]:
        """A plan with fewer channels, which make a part of the saving, at the same rank fractions.

        Of the parts with which ranks near these can save the rest, without noise the one that the
        layer table predicts to break least; else it is drawn.

        Returns:
            The space at the channels that remain, its options, and the part, 0 to 1.
        """
        old, picked, impact, cost = wish.space, wish.picked, wish.parent.impact, wish.cost
        width = old.width
        if width is None:
            return old, picked, 0.0
        dense = width.count(width.cost(old.kept))
        found: list[tuple[bool, float, SearchSpace, dict[str, Option], float]] = []
        for part in PARTS if old.options else (1.0,):
            kept = old.kept
            if part:
                kept = width.lighten(kept, wish.step**part * dense, rng, noise, impact)
            here = self._space.at(kept)
            start = here.nearest(old.params(picked))
            lighter = here.around([start], wish.band).lighten(start, cost, rng, impact=impact)
            missed = wish.misses(here.cost(lighter))
            found.append((missed, here.damage(lighter, impact), here, start, part))
        useful = [one for one in found if not one[0]] or found
        if noise:
            chosen = useful[int(rng.integers(len(useful)))]
        else:
            chosen = min(useful, key=lambda one: one[1])
        return chosen[2:]

    def _tilted(
        self, near: SearchSpace, cost: float, rng: np.random.Generator, impact: float
    ) -> Knobs:
        return Knobs(
            budget=cost / near.baseline_cost,
            sharpness=float(np.clip(rng.normal(2.0, 0.2), 1.0, 3.0)),
            stages=tuple(rng.normal(0.0, TILT_NOISE, STAGES)),
            methods={method: float(rng.normal(0.0, TILT_NOISE)) for method in near.methods},
            impact=impact,
        )

    def _choose(self, pool: Sequence[Parent], slope: float, rng: np.random.Generator) -> Parent:
        """The trial within the aim whose child promises to be the cheapest, at times the second or
        third where theirs promise nearly as much; where none is within the aim, the nearest."""
        promise = {
            p: p.cost * max(self._share(p, slope), STEPS[0])
            for p in pool
            if self._expected(p) <= self._aim
        }
        if not promise:
            return min(pool, key=self._expected)
        best = min(promise.values())
        chosen = sorted((p for p in promise if promise[p] <= 1.1 * best), key=promise.__getitem__)
        odds = np.array([0.6, 0.25, 0.15])[: len(chosen)]
        return chosen[int(rng.choice(len(odds), p=odds / odds.sum()))]

    def _unfinished(
        self, pool: Sequence[Parent], others: Sequence[FrozenTrial], number: int
    ) -> Parent | None:
        """A trial of the exploration beyond the aim, but not far, that longer fine-tuning may make
        the cheapest one.

        It is the nearest or the cheapest of them, in turn; none that was fine-tuned further before,
        or is now.
        """
        least = min((p.cost for p in pool if self._expected(p) <= self._aim), default=math.inf)
        ripened = {t.user_attrs.get(PARENT) for t in others if _is_ripened(t)}
        near = [
            p
            for p in self._parents
            if self._aim < self._expected(p) <= NEARLY * self._delta
            and p.cost < 0.97 * least
            and p.label not in ripened
        ]
        if number // 2 % 2 == 0:
            return min(near, key=self._expected, default=None)
        return min(near, key=lambda p: (p.cost, self._expected(p)), default=None)

    def _slope(self, pool: Sequence[Parent], finished: Sequence[FrozenTrial]) -> float:
        """Points that a child loses for each unit of the logarithm of what it saves.

        Ridge regression through the origin on the finished children, towards `STEEP` times delta;
        the older ones count less, for the less is left the more each step costs. Of one that was
        stopped it is only known that it would have been of no use.
        """
        known = {p.label: p for p in pool}
        unit = self._delta or 1.0
        squares = TRUST
        products = STEEP * unit * squares
        fades = 1.0
        for child in reversed(finished):
            elder = known.get(child.user_attrs.get(PARENT, ""))
            if elder is None or _is_ripened(child):
                continue
            if has_weights(child):
                saving = math.log(elder.cost / child.values[1])
                after = self.outlook.expected("annealing", child)
            else:
                saving = -math.log(child.system_attrs[KNOBS]["step"])
                after = self.outlook.useful("annealing")
            products += fades * saving * (after - self._expected(elder))
            squares += fades * saving**2
            fades *= FADES
        return max(products / squares, LEAST_STEEP * unit)

    def _share(self, parent: Parent, slope: float) -> float:
        """Share of its parent's cost at which a child is expected to reach the aim."""
        return math.exp(min(0.0, self._expected(parent) - self._aim) / slope)


def at_the_end(trials: Sequence[FrozenTrial]) -> bool:
    """Whether some trials of the annealing all asked for more than the space holds."""
    return bool(trials) and all(t.system_attrs.get(KNOBS, {}).get(FAR, False) for t in trials)


def _is_ripened(trial: FrozenTrial) -> bool:
    """Whether a trial of the annealing has its parent's plan, or nearly so."""
    return bool(trial.system_attrs.get(KNOBS, {}).get("kind") == "ripen")

"""What the gates would have stopped in finished studies, and whether the winner would have passed.

    python scripts/replay_gates.py runs/quickstart runs/fashion-mnist-resnet ...

Every trial that was carried out to its end is shown to the gates again, with the trials before it
as all that is known. Printed is, for each stage, how many of them would have been stopped, what
they came to in the end, the share of the stage's fine-tuning that would have been saved, and
whether the winner or a trial that it inherits from is among them, which must never be. Trials that
were really stopped are counted beside.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from autocompress.database import open_storage
from autocompress.gates import RUNGS, Record, least_loss
from autocompress.outlook import LEAST_USEFUL
from autocompress.store import STAGES, load_study
from autocompress.trials import EARLY, PARENT, has_weights, lost


def main() -> None:
    """Print a table with a line for each stage of each study."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, help="folders of finished studies")
    print("| study | stage | trials | really stopped | would stop | lost | saved | winner |")
    print("|---|---|---|---|---|---|---|---|")
    for folder in parser.parse_args().folders:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        storage = open_storage(f"sqlite:///{folder.resolve() / 'study.db'}")
        found = {stage: load_study(storage, result["study"], stage) for stage in STAGES}
        studies = {stage: study for stage, study in found.items() if study is not None}
        needed = ancestors(studies, result)
        for stage, study in studies.items():
            print(line(result["study"], stage, study, float(result["delta"]), needed))


def ancestors(studies: dict[str, Study], result: dict[str, Any]) -> set[str]:
    """Labels of the winner and of all whose weights it inherits."""
    best, labels = result["best"], set()
    label = f"{best['stage']}/{best['trial']}" if best else None
    while label:
        labels.add(label)
        stage, number = label.split("/")
        label = studies[stage].trials[int(number)].user_attrs.get(PARENT)
    return labels


def line(name: str, stage: str, study: Study, delta: float, needed: set[str]) -> str:
    """One line of the table."""
    records: list[Record] = []
    stopped: list[FrozenTrial] = []
    saved = 0.0
    done = [trial for trial in study.trials if has_weights(trial) and EARLY in trial.user_attrs]
    for trial in done:
        early = trial.user_attrs[EARLY]
        for place, drop in enumerate(early):
            least = least_loss(records, place, drop)
            if least is not None and least > LEAST_USEFUL * delta:
                stopped.append(trial)
                saved += 1.0 - (RUNGS[place - 1] if place else 0.0)
                break
        else:
            # A trial that is stopped teaches the gates nothing.
            records.append(Record(early, lost(trial, delta)))
    losses = ", ".join(f"{lost(trial, delta):.1f}" for trial in stopped)
    cut = {f"{stage}/{trial.number}" for trial in stopped} & needed
    pruned = sum(trial.state == TrialState.PRUNED for trial in study.trials)
    share = 100 * saved / len(done) if done else 0.0
    verdict = f"CUT: {sorted(cut)}" if cut else "passes"
    return (
        f"| {name} | {stage} | {len(study.trials)} | {pruned} | {len(stopped)} | {losses or '-'} | "
        f"{share:.0f} % | {verdict} |"
    )


if __name__ == "__main__":
    main()

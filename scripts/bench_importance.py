"""Compare the orders in which channels can be removed (`search.importance`).

    python scripts/bench_importance.py fashion-mnist-small --images FOLDER --seeds 0 1 2

For each order the channel ladders are built anew, and plans that only remove channels are allocated
within each budget, recalibrated and fine-tuned (`--epochs`) with each seed. Printed are the points
lost before and after fine-tuning, mean and standard deviation over budgets and seeds, and the share
of the cost that is left, on average: keep-counts are coarse, so orders don't hit a budget alike.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import get_args

from arena import Arena, losses, parser_of, spread, start, table
from opponents import table_space

from autocompress.allocator import ALONE, Knobs, decode
from autocompress.artifacts import write_text
from autocompress.errors import AutocompressError
from autocompress.importance import Importance
from autocompress.surgery import apply_plan


def main() -> None:
    """Measure the orders that the command line names."""
    orders = get_args(Importance)
    parser = parser_of(__doc__)
    parser.add_argument("--orders", nargs="+", choices=orders, default=list(orders))
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.6, 0.5, 0.4])
    options = parser.parse_args()
    arena, out = start(options)
    rows: list[dict[str, float | str]] = []
    for order in options.orders:
        for row in measure(arena, order, options.budgets, options.seeds):
            rows.append({"order": order, **row})
            write_text(out / "importance.json", json.dumps(rows))
            print(rows[-1], flush=True)
    header = ["order", "cost left, %", "lost before fine-tuning", "after"]
    lines = []
    for order in options.orders:
        own = [row for row in rows if row["order"] == order]
        share, before, after = (
            [float(row[k]) for row in own] for k in ("share", "before", "after")
        )
        lines.append([order, f"{100 * sum(share) / len(share):.1f}", spread(before), spread(after)])
    print("\n" + table(header, lines))


def measure(
    arena: Arena, order: Importance, budgets: list[float], seeds: list[int]
) -> list[dict[str, float]]:
    """Share of the cost and points lost, before and after fine-tuning, of each plan and seed."""
    search = arena.config.search.model_copy(update={"importance": order})
    own = replace(arena, config=arena.config.model_copy(update={"search": search}))
    space, cache = table_space(own, channels=True)
    found = []
    for budget in budgets:
        here, picked = decode(space, Knobs(budget, channels=-ALONE))
        for seed in seeds:
            model = apply_plan(arena.baseline.model, here.plan(picked), cache)
            before, after = losses(arena, model, seed)
            share = here.cost(picked) / space.baseline_cost
            found.append({"budget": budget, "share": share, "before": before, "after": after})
    return found


if __name__ == "__main__":
    try:
        main()
    except AutocompressError as error:
        raise SystemExit(str(error)) from None

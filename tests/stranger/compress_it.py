"""The same from Python, with a network that its owner has trained."""

from __future__ import annotations

import sys

import shapes
import torch

import autocompress

torch.manual_seed(0)
torch.set_num_threads(1)
model, loaders = shapes.Net(), shapes.loaders(seed=1)
optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
for _ in range(4):
    for batch in loaders["train"]:
        optimizer.zero_grad()
        shapes.loss(shapes.forward(model, batch), batch).backward()
        optimizer.step()

outcome = autocompress.compress(
    model.eval(),
    loaders["train"],
    loaders["test"],
    val=loaders["val"],
    delta=10.0,
    name="by-script",
    trials=2,
    annealing_trials=1,
    display=False,
    settings={
        "confidence": 0.5,
        "finetune.epochs": 1.0,
        "finetune.final_epochs": 2.0,
        "finetune.learning_rate": 0.01,
    },
    **shapes.functions(),
)
assert outcome.met and outcome.model is not None
assert autocompress.__file__.startswith(sys.prefix), autocompress.__file__
print(outcome.folder)

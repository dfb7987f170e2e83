"""Save a trained model in half precision, in the package or in a folder.

    python benchmarks/scripts/ship.py runs/NAME PLACE [CHANGES]

PLACE is the model's name in the package, or a folder for models too large for it
(benchmarks/models/NAME). CHANGES are settings of its reducer to override, as JSON.
"""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch

import pumer
from pumer._shipped import SHIPPED
from pumer.lab.data.transforms import load_transform, save_transform
from pumer.lab.tasks.processors import save_processor

run, place = Path(sys.argv[1]), Path(sys.argv[2])
place = place if len(place.parts) > 1 else SHIPPED / place
model = pumer.load(run / "model").to(torch.float16)
if sys.argv[3:]:
    patch = pumer.active(model)
    pumer.apply(model, replace(patch.reducer, **json.loads(sys.argv[3])))
if place.exists():
    shutil.rmtree(place)
pumer.save(model, place)
for pattern in ("tokenizer*", "chat_template*"):
    for file in (run / "model").glob(pattern):
        shutil.copy(file, place)
save_transform(load_transform(run / "model"), place)
save_processor(model.config, place)
logs = Path(__file__).parents[1] / "logs" / place.name
logs.mkdir(parents=True, exist_ok=True)
for file in ("recipe.yaml", "log.json"):
    shutil.copy(run / file, logs / file)
print(f"{place}: {sum(f.stat().st_size for f in place.iterdir()) / 1e6:.1f} MB")

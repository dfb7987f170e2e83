"""Put a trained model into the package, in half precision: python benchmarks/ship.py runs/NAME NAME [CHANGES].

CHANGES are settings of its reducer that it is to have from now on, as JSON.
"""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch

import pumer
from pumer.data.transforms import load_transform, save_transform
from pumer.presets import SHIPPED

run, name = Path(sys.argv[1]), sys.argv[2]
model = pumer.load(run / "model").to(torch.float16)
if sys.argv[3:]:
    patch = pumer.active(model)
    pumer.apply(model, replace(patch.reducer, **json.loads(sys.argv[3])))
if (SHIPPED / name).exists():
    shutil.rmtree(SHIPPED / name)
pumer.save(model, SHIPPED / name)
for file in ("tokenizer.json", "tokenizer_config.json"):
    shutil.copy(run / "model" / file, SHIPPED / name / file)
save_transform(load_transform(run / "model"), SHIPPED / name)
logs = Path(__file__).parent / "logs" / name
logs.mkdir(parents=True, exist_ok=True)
for file in ("recipe.yaml", "log.json"):
    shutil.copy(run / file, logs / file)
print(f"{SHIPPED / name}: {sum(f.stat().st_size for f in (SHIPPED / name).iterdir()) / 1e6:.1f} MB")

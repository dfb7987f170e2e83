"""`pumer study`."""

from __future__ import annotations

from pumer._options import OutputFolder
from pumer._terminal import console
from pumer.lab.bench.settings import Device
from pumer.lab.commands.common import pick_device
from pumer.lab.study import read_study, run
from pumer.lab.study.run import Only


def study_(
    file: str,
    out: OutputFolder = "results",
    scratch: OutputFolder = "runs",
    skip_impossible: bool = False,
    keep_models: bool = False,
    only: Only = None,
    device: Device = "auto",
) -> None:
    """Compare methods at many settings: train and score every point, then write tables and draw
    plots.

    Stopped at any moment and started again, it goes on where it was; no point is lost or computed
    twice. Started several times at once, with a GPU or cores of its own each, the processes share
    the points.

    Args:
        file: YAML file of the study; docs/studies.md has examples.
        out: folder for NAME.csv, with a row per point, NAME.md, and the plots as PNG and SVG.
        scratch: folder for `study-NAME`, where trainings lie until they have their row.
        skip_impossible: leave settings out that the model cannot have, instead of refusing the
            study.
        keep_models: keep the models of finished points in `scratch`.
        only: "plan" says which points there are, what they cost and how long they will take;
            "scores" leaves the timing for when nothing else runs on the machine; "plots" writes
            tables and plots of the rows there are.
        device: device that points are scored and timed on, in float32; "auto" takes a CUDA device
            if there is one.
    """
    screen = console()
    run(
        read_study(file),
        out,
        scratch=scratch,
        skip_impossible=skip_impossible,
        keep_models=keep_models,
        only=only,
        device=pick_device(device),
        say=lambda text: screen.print(text, markup=False, highlight=False, soft_wrap=True),
    )

"""`pumer study`."""

from __future__ import annotations

from pumer._options import OutputFolder
from pumer._terminal import console
from pumer.lab.bench.run import Device
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
    """Compare methods at many settings: train and score every point, then write tables and plots.

    It can be stopped at any time and resumes where it was; no point is lost or computed twice.
    Several processes, each with its GPU or cores, share the points.

    Args:
        file: YAML file of the study; docs/studies.md has examples.
        out: folder for NAME.csv, with a row per point, NAME.md, and the plots as PNG and SVG.
        scratch: folder for `study-NAME`, where trainings lie until their points are finished.
        skip_impossible: skip settings that the model does not support, instead of refusing the
            study.
        keep_models: keep the models of finished points in `scratch`.
        only: "plan" prints the points, their cost and an estimate of the time; "scores" skips the
            timing, for a machine that is busy; "plots" writes tables and plots of existing rows.
        device: device to score and time points on, in float32; "auto" is a CUDA device if there is
            one.
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

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
    """Compare methods at many settings: train and score every point, then write tables and plots.

    Resumable: no point is lost or computed twice. Several processes started at once, each with its
    own GPU or cores, share the points.

    Args:
        file: YAML file of the study; docs/studies.md has examples.
        out: folder for NAME.csv, with a row per point, NAME.md, and the plots as PNG and SVG.
        scratch: folder for `study-NAME`, which holds trainings until they have their row.
        skip_impossible: skip settings that do not fit the model, instead of refusing the study.
        keep_models: keep the models of finished points in `scratch`.
        only: "plan" lists the points, their cost and how long they will take; "scores" skips the
            timing, for when other work runs on the machine; "plots" only writes tables and plots of
            existing rows.
        device: device to score and time on, in float32; "auto" takes a CUDA device if there is one.
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
        log=lambda text: screen.print(text, markup=False, highlight=False, soft_wrap=True),
    )

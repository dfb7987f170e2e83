"""Studies: methods compared at many settings, each trained and scored alike; tables and plots of
what came out."""

from pumer.lab.study.points import Point, Study, read_study
from pumer.lab.study.run import run

__all__ = ["Point", "Study", "read_study", "run"]

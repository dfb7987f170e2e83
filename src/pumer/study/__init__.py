"""Studies: methods compared at many settings, each trained and scored alike; tables and plots of what came out."""

from pumer.study.points import Point, Study, read_study
from pumer.study.run import run

__all__ = ["Point", "Study", "read_study", "run"]

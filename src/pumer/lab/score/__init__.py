"""Scores of every image with every text: towers run once, scores are streamed to disk, over many
devices."""

from pumer.lab.score.job import Job
from pumer.lab.score.run import score_pairs, stream_pairs

__all__ = ["Job", "score_pairs", "stream_pairs"]

"""Methods of token reduction as pure maths: tensors in, a `Plan` out. No model is known here."""

from pumer.reducers.base import ModelShape, Reducer, Traits
from pumer.reducers.cdpruner import CDPruner
from pumer.reducers.compose import Chain, Compose
from pumer.reducers.dart import DART
from pumer.reducers.divprune import DivPrune
from pumer.reducers.dymu import DyMU, DyMUCalibrator
from pumer.reducers.dynamicvit import DynamicViT
from pumer.reducers.energy import Energy, EnergyCalibrator
from pumer.reducers.fastv import FastV
from pumer.reducers.fopru import FoPru
from pumer.reducers.hiprune import HiPrune
from pumer.reducers.holov import HoloV
from pumer.reducers.learned import Learned
from pumer.reducers.mmtok import MMTok
from pumer.reducers.plan import Plan
from pumer.reducers.prumerge import PruMerge
from pumer.reducers.pumer import PuMer
from pumer.reducers.pyramiddrop import PyramidDrop
from pumer.reducers.registry import from_dict, get, is_reducer, list_reducers, register, to_dict
from pumer.reducers.scope import SCOPE
from pumer.reducers.selector import Selector
from pumer.reducers.simple import NoVision, Pool, Random, Uniform, Unreduced
from pumer.reducers.smarttrim import SmartTrim
from pumer.reducers.sparsevlm import SparseVLM
from pumer.reducers.svd_prune import SVDPrune
from pumer.reducers.tokens import EMBEDDINGS, Encoder, Tokens, TokenShape
from pumer.reducers.tome import ToMe
from pumer.reducers.v2drop import V2Drop
from pumer.reducers.visionzip import VisionZip
from pumer.reducers.vispruner import FasterVLM, VisPruner
from pumer.reducers.vtw import VTW

__all__ = [
    "DART",
    "EMBEDDINGS",
    "SCOPE",
    "VTW",
    "CDPruner",
    "Chain",
    "Compose",
    "DivPrune",
    "DyMU",
    "DyMUCalibrator",
    "DynamicViT",
    "Encoder",
    "Energy",
    "EnergyCalibrator",
    "FastV",
    "FasterVLM",
    "FoPru",
    "HiPrune",
    "HoloV",
    "Learned",
    "MMTok",
    "ModelShape",
    "NoVision",
    "Plan",
    "Pool",
    "PruMerge",
    "PuMer",
    "PyramidDrop",
    "Random",
    "Reducer",
    "SVDPrune",
    "Selector",
    "SmartTrim",
    "SparseVLM",
    "ToMe",
    "TokenShape",
    "Tokens",
    "Traits",
    "Uniform",
    "Unreduced",
    "V2Drop",
    "VisPruner",
    "VisionZip",
    "from_dict",
    "get",
    "is_reducer",
    "list_reducers",
    "register",
    "to_dict",
]

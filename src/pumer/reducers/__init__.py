"""Methods of token reduction as pure maths: tensors in, a `Plan` out. No model is known here."""

from pumer.reducers.base import EMBEDDINGS, Reducer, Tokens
from pumer.reducers.compose import Compose
from pumer.reducers.plan import Plan
from pumer.reducers.pumer import PuMer
from pumer.reducers.registry import from_dict, get, list_reducers, register, to_dict
from pumer.reducers.simple import NoVision, Pool, Random, Uniform, Unreduced
from pumer.reducers.tome import ToMe

__all__ = [
    "EMBEDDINGS",
    "Compose",
    "NoVision",
    "Plan",
    "Pool",
    "PuMer",
    "Random",
    "Reducer",
    "ToMe",
    "Tokens",
    "Uniform",
    "Unreduced",
    "from_dict",
    "get",
    "list_reducers",
    "register",
    "to_dict",
]

"""Token maps: which token was kept, merged or dropped, layer by layer.

`token_map` runs a reduced model and returns a `TokenMap`: data, JSON, and in a notebook a figure in
which hovering over a patch shows where it went. `draw` makes an image file of it, `page` a web
page.

>>> import torch, pumer
>>> from transformers import ViltConfig, ViltForQuestionAnswering
>>> from pumer.viz import draw, token_map
>>> config = ViltConfig(
...     hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
...     image_size=64, patch_size=16,
... )
>>> model = pumer.apply(ViltForQuestionAnswering(config), pumer.PuMer(0.25, 0.5, 0.0, layers=(1,)))
>>> words = ["is", "it", "red", "?"]
>>> inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "pixel_values": torch.rand(1, 3, 64, 64)}
>>> shown = token_map(model, inputs, words)
>>> shown.rows, shown.columns, shown.layers[0].layer
(4, 4, 1)
>>> len(shown.layers[0].dropped)
4
"""

from pumer.viz.drawing import draw, to_image
from pumer.viz.maps import LayerMap, TokenMap
from pumer.viz.page import page
from pumer.viz.tracing import token_map, token_maps

__all__ = ["LayerMap", "TokenMap", "draw", "page", "to_image", "token_map", "token_maps"]

"""Attention kernels. The only file that names a backend.

Shape suffixes: B batch, H heads, N tokens, P tokens of all rows end to end, C channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pumer.reducers.official import masked_softmax

BACKENDS = ("sdpa", "eager")


def attend(
    queries_BHNC: Tensor,
    keys_BHNC: Tensor,
    values_BHNC: Tensor,
    bias_B11N: Tensor | None,
    backend: str,
    dropout: float = 0.0,
    probabilities: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention -> context [B,H,N,C], and the probabilities [B,H,N,N] if asked
    for.

    Args:
        bias_B11N: bool (true: attend) or added to the logits.
        backend: "sdpa" (fused) or "eager"; asking for probabilities costs the fused kernel.
    """
    if keys_BHNC.shape[2] == 0:
        # Attention to no key is zero. Fused kernels would spread one sample's NaN to all here.
        nothing = queries_BHNC.new_zeros(*queries_BHNC.shape[:3], 0) if probabilities else None
        return torch.zeros_like(queries_BHNC), nothing
    if backend == "sdpa" and not probabilities:
        context = torch.nn.functional.scaled_dot_product_attention(
            queries_BHNC, keys_BHNC, values_BHNC, attn_mask=bias_B11N, dropout_p=dropout
        )
        return context, None
    logits = queries_BHNC @ keys_BHNC.transpose(-1, -2) / queries_BHNC.shape[-1] ** 0.5
    if bias_B11N is not None:
        logits = (
            logits.masked_fill(~bias_B11N, -torch.inf)
            if bias_B11N.dtype == torch.bool
            else logits + bias_B11N
        )
    attention = torch.nn.functional.dropout(logits.softmax(-1), dropout)
    return attention @ values_BHNC, attention


def attend_rows(
    queries_1HPC: Tensor,
    keys_1HPC: Tensor,
    values_1HPC: Tensor,
    bias_111P: Tensor | None,
    queries: Sequence[int],
    keys: Sequence[int],
    backend: str,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of rows that lie end to end, each to itself -> context [1,P,H*C].

    Args:
        bias_111P: of the keys, as in `attend`; None for none.
        queries, keys: number of tokens of every row.
    """
    query_rows = queries_1HPC.split(list(queries), 2)
    key_rows, value_rows = (x.split(list(keys), 2) for x in (keys_1HPC, values_1HPC))
    biases = [None] * len(keys) if bias_111P is None else bias_111P.split(list(keys), 3)
    contexts = [
        attend(*row, backend=backend, dropout=dropout)[0].transpose(1, 2).flatten(2)
        for row in zip(query_rows, key_rows, value_rows, biases, strict=True)
    ]
    return torch.cat(contexts, 1)


def attend_official(
    queries_BHNC: Tensor,
    keys_BHNC: Tensor,
    values_BHNC: Tensor,
    mask_BN: Tensor,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention with the published PuMer code's masked softmax -> context [B,H,N,C], probabilities
    [B,H,N,N]."""
    logits = queries_BHNC @ keys_BHNC.transpose(-1, -2) / queries_BHNC.shape[-1] ** 0.5
    attention = torch.nn.functional.dropout(masked_softmax(logits, mask_BN), dropout)
    return attention @ values_BHNC, attention


def attend_gated(
    queries_BHNC: Tensor,
    keys_BHNC: Tensor,
    values_BHNC: Tensor,
    mask_BN: Tensor,
    gate_BN: Tensor,
    own: bool,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention with keys gated by 0 or 1, differentiable in the gates -> context, probabilities.

    DynamicViT's (equation 11): the probabilities are those among the keys that are left.

    Args:
        mask_BN: bool, the real keys.
        gate_BN: 1 for keys that are attended to.
        own: whether the keys are the queries' own tokens; each then attends to itself whatever its
            gate.
    """
    logits = queries_BHNC @ keys_BHNC.transpose(-1, -2) / queries_BHNC.shape[-1] ** 0.5
    attention = logits.masked_fill(~mask_BN.bool()[:, None, None], -torch.inf).softmax(-1)
    gates = gate_BN[:, None, None]
    if own:
        eye = torch.eye(gate_BN.shape[1], device=gate_BN.device)
        gates = eye + (1 - eye) * gates
    attention = attention * gates.to(attention.dtype)
    attention = attention / attention.sum(-1, keepdim=True).clamp_min(1e-6)
    attention = torch.nn.functional.dropout(attention, dropout)
    return attention.to(values_BHNC.dtype) @ values_BHNC, attention


def attention_bias(mask_BN: Tensor, sizes_BN: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The attention mask of the keys, [B,1,1,N]: bool, or the log of the sizes where they count."""
    if sizes_BN is None:
        return mask_BN[:, None, None]
    weights = sizes_BN.clamp_min(1e-6).log().to(dtype)
    return weights.masked_fill(~mask_BN, -torch.inf)[:, None, None]

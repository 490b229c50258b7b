"""A variable-length attention kernel in plain torch, for machines without the real ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def varlen_in_plain_torch(q, k, v, cu_q, cu_k, max_q, max_k, scale):  # type: ignore[no-untyped-def]
    """What a variable-length kernel computes, a segment at a time: causal, aligned bottom right."""
    outputs = []
    for q0, q1, k0, k1 in zip(cu_q, cu_q[1:], cu_k, cu_k[1:]):
        query, key, value = (x.transpose(0, 1) for x in (q[q0:q1], k[k0:k1], v[k0:k1]))
        assert query.shape[1] <= max_q and key.shape[1] <= max_k
        mask = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool).tril(key.shape[1] - query.shape[1])
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs)

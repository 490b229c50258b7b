"""Names of our attention backends, for what must not wait for torch."""

from __future__ import annotations

# The name of each backend in transformers. No name may hold "flash" or "flex_attention": transformers takes such for
# its own backends, fetches kernels for the first and refuses some models for the second.
NAMES = {
    "sdpa": "dsdpo_sdpa",
    "varlen": "dsdpo_varlen",
    "flex_attention": "dsdpo_flex",
    "flash_attention_2": "dsdpo_fa2",
    "flash_attention_3": "dsdpo_fa3",
    "flash_attention_4": "dsdpo_fa4",
}
VARLEN = ("varlen", "flash_attention_2", "flash_attention_3", "flash_attention_4")  # one call for a row's segments

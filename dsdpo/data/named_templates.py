"""Chat templates of model families, as their makers document them, in the Jinja dialect of transformers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NamedTemplate:
    """A chat template and the special tokens that a tokenizer must know for it."""

    jinja: str
    tokens: tuple[str, ...]


_LLAMA2 = (
    "{% set ns = namespace(system='') %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}"
    "{% set ns.system = '<<SYS>>\n' + message['content'] + '\n<</SYS>>\n\n' %}"
    "{% elif message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (ns.system + message['content']).strip() + ' [/INST]' }}"
    "{% set ns.system = '' %}"
    "{% else %}"
    "{{ ' ' + message['content'].strip() + ' ' + eos_token }}"
    "{% endif %}"
    "{% endfor %}"
)
_LLAMA3 = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'].strip() + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_LLAMA3_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_CHATML_TEMPLATE = NamedTemplate(_CHATML, ("<|im_start|>", "<|im_end|>"))

NAMED = {
    "llama2": NamedTemplate(_LLAMA2, ()),
    "llama3": NamedTemplate(_LLAMA3, _LLAMA3_TOKENS),
    "chatml": _CHATML_TEMPLATE,
    "qwen": _CHATML_TEMPLATE,
}
PLAIN = ("none", "gpt2")

"""Chat templates of model families, as their makers document them, in the Jinja dialect of transformers.

They write roles and contents; function calls and tools need the tokenizer's own template. None of them brings a system
message of its own: `default_system` does. The names are LLaMA-Factory's, config/templates.py lists them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NamedTemplate:
    """A chat template and the special tokens that a tokenizer must know for it.

    One that writes bos_token or eos_token needs a tokenizer with such a token, too.
    """

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
# The last reply begins with its thoughts in <think>, also empty ones; thoughts of earlier turns are left out.
_QWEN3 = (
    "{% set ns = namespace(last=-1) %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}"
    "{% for message in messages %}"
    "{% set content = message['content'] or '' %}"
    "{% set thoughts = message['reasoning_content'] or '' %}"
    "{% if message['role'] == 'assistant' and not thoughts and '</think>' in content %}"
    "{% set thoughts = content.split('</think>')[0].split('<think>')[-1] %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.index0 > ns.last and (loop.last or thoughts) %}"
    "{{ '<think>\n' + thoughts.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{% else %}{{ content }}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
# A family without system messages: the text goes in front of the first user message, as LLaMA-Factory puts it.
_SYSTEM_FIRST = (
    "{% set ns = namespace(system='') %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set ns.system = message['content'].strip() + '\n\n' %}"
    "{% elif message['role'] == 'user' %}"
    "{{ USER }}"
    "{% set ns.system = '' %}"
    "{% else %}{{ REPLY }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ASKING }}{% endif %}"
)
_GEMMA = "{{ bos_token }}" + _SYSTEM_FIRST.replace(
    "USER", r"'<start_of_turn>user\n' + ns.system + message['content'].strip() + '<end_of_turn>\n'"
).replace("REPLY", r"'<start_of_turn>model\n' + message['content'].strip() + '<end_of_turn>\n'").replace(
    "ASKING", r"'<start_of_turn>model\n'"
)
_MISTRAL = "{{ bos_token }}" + _SYSTEM_FIRST.replace(
    "USER", "'[INST] ' + ns.system + message['content'].strip() + '[/INST]'"
).replace("REPLY", "' ' + message['content'].strip() + eos_token").replace("ASKING", "''")
_COHERE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% set role = {'system': 'SYSTEM', 'user': 'USER', 'assistant': 'CHATBOT'}[message['role']] %}"
    "{% set content = message['content'] if role == 'SYSTEM' else message['content'].strip() %}"
    "{{ '<|START_OF_TURN_TOKEN|><|' + role + '_TOKEN|>' + content + '<|END_OF_TURN_TOKEN|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)
_DEEPSEEK3 = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<\uff5cUser\uff5c>' + message['content'] }}"
    "{% else %}{{ '<\uff5cAssistant\uff5c>' + message['content'] + '<\uff5cend▁of▁sentence\uff5c>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<\uff5cAssistant\uff5c>' }}{% endif %}"
)
_PHI3 = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
_PHI4 = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
_ZEPHYR = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
_VICUNA = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'].strip() + ' ' }}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' + message['content'].strip() + ' ASSISTANT:' }}"
    "{% else %}{{ ' ' + message['content'].strip() + eos_token }}{% endif %}"
    "{% endfor %}"
)
_ALPACA = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'].strip() + '\n\n' }}"
    "{% elif message['role'] == 'user' %}"
    "{{ '### Instruction:\n' + message['content'].strip() + '\n\n### Response:\n' }}"
    "{% else %}{{ message['content'].strip() + eos_token + '\n\n' }}{% endif %}"
    "{% endfor %}"
)
_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
_GEMMA_TOKENS = ("<start_of_turn>", "<end_of_turn>")
_CHATML_TEMPLATE = NamedTemplate(_CHATML, _CHATML_TOKENS)
_PHI3_TEMPLATE = NamedTemplate(_PHI3, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"))

NAMED = {
    "alpaca": NamedTemplate(_ALPACA, ()),
    "chatml": _CHATML_TEMPLATE,
    "cohere": NamedTemplate(_COHERE, ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>")),
    "deepseek3": NamedTemplate(
        _DEEPSEEK3, ("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", "<\uff5cend▁of▁sentence\uff5c>")
    ),
    "gemma": NamedTemplate(_GEMMA, _GEMMA_TOKENS),
    "gemma2": NamedTemplate(_GEMMA, _GEMMA_TOKENS),
    "gemma3": NamedTemplate(_GEMMA, _GEMMA_TOKENS),
    "llama2": NamedTemplate(_LLAMA2, ()),
    "llama3": NamedTemplate(_LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "mistral": NamedTemplate(_MISTRAL, ()),
    "phi": _PHI3_TEMPLATE,
    "phi3": _PHI3_TEMPLATE,
    "phi4": NamedTemplate(_PHI4, ("<|im_start|>", "<|im_sep|>", "<|im_end|>")),
    "qwen": _CHATML_TEMPLATE,
    "qwen3": NamedTemplate(_QWEN3, _CHATML_TOKENS),
    "qwen3_nothink": _CHATML_TEMPLATE,
    "vicuna": NamedTemplate(_VICUNA, ()),
    "yi": _CHATML_TEMPLATE,
    "zephyr": NamedTemplate(_ZEPHYR, ()),
}

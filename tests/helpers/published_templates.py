"""Chat templates of published models: those that the installed TRL ships, and small ones with traits of others."""

from __future__ import annotations

import re
from functools import cache
from importlib import resources
from typing import Any

from helpers.chat_tokenizers import fast_tokenizer, trained_backend
from tokenizers import AddedToken, Tokenizer

# Kimi-K2-Thinking: a finished reply has an empty think block, which holds the thought only before a tool call. The id
# of a call is all that is written of the function's name.
KIMI = """\
{%- set ns = namespace(last=-1) -%}
{%- for message in messages -%}
  {%- if message.role == 'assistant' and not message.tool_calls -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- if tools -%}{{- '<|im_system|>tool_declare<|im_middle|>' ~ tools | tojson ~ '<|im_end|>' -}}{%- endif -%}
{%- for message in messages -%}
  {%- set kind = message.role if message.role in ['user', 'assistant'] else 'system' -%}
  {{- '<|im_' ~ kind ~ '|>' ~ (message.name or message.role) ~ '<|im_middle|>' -}}
  {%- if message.role == 'assistant' -%}
    {{- '<think>' ~ ((message.reasoning_content or '') if loop.index0 > ns.last else '') ~ '</think>' -}}
  {%- elif message.role == 'tool' -%}
    {{- '## Return of ' ~ message.tool_call_id ~ '\\n' -}}
  {%- endif -%}
  {{- message.content or '' -}}
  {%- if message.tool_calls -%}
    {{- '<|tool_calls_section_begin|>' -}}
    {%- for call in message.tool_calls -%}
      {{- '<|tool_call_begin|>' ~ call.id ~ '<|tool_call_argument_begin|>' ~ call.function.arguments | tojson -}}
      {{- '<|tool_call_end|>' -}}
    {%- endfor -%}
    {{- '<|tool_calls_section_end|>' -}}
  {%- endif -%}
  {{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_assistant|>assistant<|im_middle|>' -}}{%- endif -%}"""

# Mistral Small 3.1: ids of nine letters and digits, in calls and results; the system message has tags of its own.
MISTRAL = """\
{{- bos_token -}}
{%- if tools -%}{{- '[AVAILABLE_TOOLS]' ~ tools | tojson ~ '[/AVAILABLE_TOOLS]' -}}{%- endif -%}
{%- for message in messages -%}
  {%- if message.role == 'system' -%}{{- '[SYSTEM_PROMPT]' ~ message.content ~ '[/SYSTEM_PROMPT]' -}}
  {%- elif message.role == 'user' -%}{{- '[INST]' ~ message.content ~ '[/INST]' -}}
  {%- elif message.role == 'tool' -%}
    {%- if message.tool_call_id is not defined or message.tool_call_id | length != 9 -%}
      {{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') -}}
    {%- endif -%}
    {{- '[TOOL_RESULTS]{"content": ' ~ message.content | tojson ~ ', "call_id": "' ~ message.tool_call_id ~ '"}' -}}
    {{- '[/TOOL_RESULTS]' -}}
  {%- elif message.tool_calls -%}
    {{- '[TOOL_CALLS][' -}}
    {%- for call in message.tool_calls -%}
      {%- if call.id is not defined or call.id | length != 9 -%}
        {{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') -}}
      {%- endif -%}
      {{- '{"name": "' ~ call.function.name ~ '", "arguments": ' ~ call.function.arguments | tojson -}}
      {{- ', "id": "' ~ call.id ~ '"}' ~ ('' if loop.last else ', ') -}}
    {%- endfor -%}
    {{- ']' ~ eos_token -}}
  {%- else -%}{{- ' ' ~ message.content | trim ~ eos_token -}}
  {%- endif -%}
{%- endfor -%}"""

# Llama-Nemotron-Super: the words "detailed thinking off" or "/no_think" in a message decide how a reply begins.
NEMOTRON_SUPER = """\
{{- bos_token -}}
{%- set ns = namespace(think=true) -%}
{%- for message in messages if message.role in ['system', 'user'] -%}
  {%- if '/think' in message.content.replace('</think>', '') -%}{%- set ns.think = true -%}
  {%- elif '/no_think' in message.content -%}{%- set ns.think = false -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
  {%- set content = message.content -%}
  {%- if message.role in ['system', 'user'] -%}
    {%- set content = content.replace('/no_think', '').replace('</think>', '<_end>').replace('/think', '') | trim -%}
  {%- elif '</think>' in content -%}{%- set content = content.split('</think>')[-1] | trim -%}
  {%- endif -%}
  {{- '<SPECIAL_10>' ~ message.role | capitalize ~ '\\n' -}}
  {%- if message.role == 'assistant' and loop.last -%}
    {%- if message.reasoning_content -%}{{- '<think>\\n' ~ message.reasoning_content ~ '\\n</think>\\n' -}}
    {%- else -%}{{- '<think></think>' -}}{%- endif -%}
  {%- endif -%}
  {{- content ~ ('\\n<SPECIAL_12>\\n' if message.role == 'assistant' else '\\n') -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<SPECIAL_10>Assistant\\n' ~ ('<think>\\n' if ns.think else '<think></think>') -}}
{%- endif -%}"""

# MiniMax-M2: names of messages are written, the thought of earlier turns is dropped, calls are XML.
MINIMAX = """\
{%- set ns = namespace(last_user=-1) -%}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}{%- set ns.last_user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{{- ']~!b[' -}}
{%- if tools -%}
  {{- ']~b]system\\n<tools>\\n' -}}
  {%- for tool in tools -%}{{- '<tool>' ~ tool.function | tojson ~ '</tool>\\n' -}}{%- endfor -%}
  {{- '</tools>[e~[\\n' -}}
{%- endif -%}
{%- for message in messages -%}
  {%- if message.role == 'assistant' -%}
    {{- ']~b]ai' ~ ('=' ~ message.name if message.name else '') ~ '\\n' -}}
    {%- if message.reasoning_content and loop.index0 > ns.last_user -%}
      {{- '<think>\\n' ~ message.reasoning_content ~ '\\n</think>\\n\\n' -}}
    {%- endif -%}
    {{- message.content or '' -}}
    {%- if message.tool_calls -%}
      {{- '\\n<minimax:tool_call>\\n' -}}
      {%- for call in message.tool_calls -%}
        {{- '<invoke name="' ~ call.function.name ~ '">\\n' -}}
        {%- for key, value in call.function.arguments.items() -%}
          {{- '<parameter name="' ~ key ~ '">' ~ (value if value is string else value | tojson) ~ '</parameter>\\n' -}}
        {%- endfor -%}
        {{- '</invoke>\\n' -}}
      {%- endfor -%}
      {{- '</minimax:tool_call>' -}}
    {%- endif -%}
  {%- else -%}
    {{- ']~b]' ~ message.role ~ ('=' ~ message.name if message.name else '') ~ '\\n' -}}
    {{- ('<response>' ~ message.content ~ '</response>') if message.role == 'tool' else message.content -}}
  {%- endif -%}
  {{- '[e~[\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ']~b]ai\\n<think>\\n' -}}{%- endif -%}"""

# Granite 3.3: a default system message with today's date, if there is none; thoughts are text between tags.
GRANITE = """\
{%- if messages[0].role == 'system' -%}
  {%- set system_message = messages[0].content -%}{%- set loop_messages = messages[1:] -%}
{%- else -%}
  {%- set system_message = "Knowledge Cutoff Date: April 2024.\\nToday's Date: " ~ strftime_now('%B %d, %Y') ~ '.' -%}
  {%- set loop_messages = messages -%}
{%- endif -%}
{{- '<|start_of_role|>system<|end_of_role|>' ~ system_message ~ '<|end_of_text|>\\n' -}}
{%- if tools -%}
  {{- '<|start_of_role|>available_tools<|end_of_role|>' ~ tools | tojson(indent=4) ~ '<|end_of_text|>\\n' -}}
{%- endif -%}
{%- for message in loop_messages -%}
  {{- '<|start_of_role|>' ~ message.role ~ '<|end_of_role|>' -}}
  {%- if message.tool_calls -%}
    {%- for call in message.tool_calls -%}
      {{- '<|tool_call|>[' ~ {'name': call.function.name, 'arguments': call.function.arguments} | tojson ~ ']' -}}
    {%- endfor -%}
  {%- else -%}{{- message.content -}}{%- endif -%}
  {{- '<|end_of_text|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_of_role|>assistant<|end_of_role|>' -}}{%- endif -%}"""

# OLMo 2: the end-of-text token ends only the last reply; text of messages is not trimmed.
OLMO = """\
{{- bos_token -}}
{%- for message in messages -%}
  {%- if message.role == 'assistant' -%}
    {{- '<|assistant|>\\n' ~ message.content ~ (eos_token if loop.last else eos_token ~ '\\n') -}}
  {%- else -%}{{- '<|' ~ message.role ~ '|>\\n' ~ message.content ~ '\\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}"""

# Command A Reasoning: the thought has tags of its own, which a reply without one keeps, and a reply has two ends.
COMMAND_A = """\
{{- bos_token -}}
{%- for message in messages -%}
  {%- if message.role == 'assistant' -%}
    {{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_THINKING|>' ~ (message.reasoning_content or '') -}}
    {{- '<|END_THINKING|><|START_RESPONSE|>' ~ message.content ~ '<|END_RESPONSE|><|END_OF_TURN_TOKEN|>' -}}
  {%- else -%}
    {{- '<|START_OF_TURN_TOKEN|><|' ~ message.role | upper ~ '_TOKEN|>' ~ message.content ~ '<|END_OF_TURN_TOKEN|>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' -}}{%- endif -%}"""

# Magistral: the thought is a part of the content between tags of its own.
MAGISTRAL = """\
{{- bos_token -}}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}{{- '[INST]' ~ message.content ~ '[/INST]' -}}
  {%- elif message.role == 'system' -%}{{- '[SYSTEM_PROMPT]' ~ message.content ~ '[/SYSTEM_PROMPT]' -}}
  {%- else -%}
    {%- if message.reasoning_content -%}{{- '[THINK]' ~ message.reasoning_content ~ '[/THINK]' -}}{%- endif -%}
    {{- message.content ~ eos_token -}}
  {%- endif -%}
{%- endfor -%}"""

OWN = {
    "command_a": COMMAND_A,
    "magistral": MAGISTRAL,
    "kimi": KIMI,
    "mistral": MISTRAL,
    "nemotron_super_49b": NEMOTRON_SUPER,
    "minimax_m2": MINIMAX,
    "granite_3_3": GRANITE,
    "olmo_2": OLMO,
}
_CONTROL = re.compile(
    r"<\|[^<>\s|]+\|>|<\|\"\|>|<｜[^<>\s]+｜>|</?think>|</?tool_(?:call|response)>|<\|[a-z_]+>|<[a-z_]+\|>|\[/?[A-Z_]+\]|"
    r"<SPECIAL_\d+>|<(?:start|end)_of_turn>|<sop>|\[gMASK\]|\]~!?b[\][]|\[e~\[|</?minimax:tool_call>|</?s>"
)


def published() -> list[str]:
    """The names of TRL's templates; none if TRL is not installed or ships no templates."""
    try:
        folder = resources.files("trl") / "chat_templates"
        return sorted(path.name.removesuffix(".jinja") for path in folder.iterdir() if path.name.endswith(".jinja"))
    except (ModuleNotFoundError, FileNotFoundError):
        return []


@cache
def template(name: str) -> str:
    """The source of a template."""
    return OWN[name] if name in OWN else (resources.files("trl") / "chat_templates" / f"{name}.jinja").read_text()


@cache
def template_tokenizer(name: str) -> Any:
    """A byte-level BPE with the control tokens that a template writes."""
    backend = Tokenizer.from_str(trained_backend("plain", False).to_str())
    names = ["<|bos|>", "<|endoftext|>", *sorted(set(_CONTROL.findall(template(name))))]
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in names])
    return fast_tokenizer(backend, template(name), bos_token="<|bos|>", eos_token="<|endoftext|>")

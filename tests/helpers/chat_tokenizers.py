"""Small byte-level BPE tokenizers with chat templates that behave like those of well-known models.

The templates were written for these tests. They show the behaviour of each model family, and of Qwen3 with tools.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CORPUS = [
    "Once upon a time there was a spec. It said: be honest, be careful, and say so when you do not know.",
    "The user asks how to fix a bug.\nFirst I look at the code.\n\nThen I think about what could go wrong.\n",
    "Okay, so the policy says to refuse. Let me think step by step: 1 + 1 = 2, 2 + 2 = 4.\n\n\n",
    "system user assistant tool think User: Assistant: answer. . .\n.\n?\n!\n)\n]\n} \n\t\n",
    "<think> </think> <|im_end|> <|im_start|> naïve café 東京 🙂 \U0001f469‍\U0001f680 «quoted»",
] * 8

# The split pattern of Qwen2 and of most recent models: punctuation takes the newlines after it along.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)

CHATML = """\
{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}\
{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

QWEN25 = (
    """\
{%- if messages[0].role != 'system' %}\
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}\
"""
    + CHATML
)

QWEN3 = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- 'You may call these tools:\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\\n</tools>\\nWrite a call as <tool_call>\\n{"name": …, "arguments": …}\\n</tool_call><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if (loop.first and content) or (not loop.first) %}{{- '\\n' }}{%- endif %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {%- if tool_call.arguments is string %}{{- tool_call.arguments }}{%- else %}{{- tool_call.arguments | tojson }}{%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or messages[loop.index0 - 1].role != "tool" %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""  # noqa: E501

# Qwen3.5: the generation prompt opens the chain of thought, and messages without a user's are refused.
QWEN35 = """\
{%- set ns = namespace(last_query_index=-1) %}
{%- for message in messages %}{%- if message.role == "user" %}{%- set ns.last_query_index = loop.index0 %}{%- endif %}{%- endfor %}
{%- if ns.last_query_index < 0 %}{{- raise_exception('No user query found in messages.') }}{%- endif %}
{%- for message in messages %}
    {%- set content = message.content | trim %}
    {%- if message.role == "assistant" %}
        {%- set reasoning_content = (message.reasoning_content or '') | trim %}
        {%- if loop.index0 > ns.last_query_index %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning_content + '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- else %}{{- '<think>\\n' }}{%- endif %}
{%- endif %}"""  # noqa: E501

LLAMA3 = """\
{{- bos_token }}{%- for message in messages %}\
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}\
{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

# DeepSeek-R1: the chain of thought is removed from every finished turn; the generation prompt opens one.
R1 = """\
{{- bos_token }}{%- for message in messages %}
{%- if message.role == 'user' %}{{- '<|User|>' + message.content }}{%- endif %}
{%- if message.role == 'system' %}{{- message.content }}{%- endif %}
{%- if message.role == 'assistant' %}{%- set content = message.content %}
{%- if '</think>' in content %}{%- set content = content.split('</think>')[-1] %}{%- endif %}
{{- '<|Assistant|>' + content + eos_token }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|Assistant|><think>\\n' }}{%- endif %}"""

OURS = (Path(__file__).parents[2] / "delib_fast/models/templates/chatml_think.jinja").read_text()

_SPECIALS = {
    "chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "r1": ["<|bos|>", "<|eos|>", "<|User|>", "<|Assistant|>"],
    "plain": ["<|endoftext|>"],
}
_THINK = [
    AddedToken(t, special=False, normalized=False)
    for t in ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
]

# name: (template, special tokens, think tokens in the vocabulary, bos, eos)
FAMILIES = {
    "chatml": (CHATML, "chatml", False, None, "<|im_end|>"),
    "qwen25": (QWEN25, "chatml", False, None, "<|im_end|>"),
    "qwen3": (QWEN3, "chatml", True, None, "<|im_end|>"),
    "qwen35": (QWEN35, "chatml", True, None, "<|im_end|>"),
    "llama3": (LLAMA3, "llama3", False, "<|begin_of_text|>", "<|eot_id|>"),
    "r1": (R1, "r1", True, "<|bos|>", "<|eos|>"),
    "ours": (OURS, "chatml", True, None, "<|im_end|>"),
    "plain": (None, "plain", False, None, "<|endoftext|>"),
}


@cache
def trained_backend(specials: str, in_vocabulary: bool) -> Tokenizer:
    """Train a backend. Control tokens are part of the vocabulary, as with special_tokens in training, or not in it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=_SPECIALS[specials] if in_vocabulary else [],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


@cache
def tokenizer(family: str, *, in_vocabulary: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer of a family of models."""
    template, specials, think, bos, eos = FAMILIES[family]
    backend = Tokenizer.from_str(trained_backend(specials, in_vocabulary).to_str())
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in _SPECIALS[specials]])
    if think:
        backend.add_tokens(_THINK)
    return fast_tokenizer(backend, template, bos_token=bos, eos_token=eos)


def fast_tokenizer(backend: Tokenizer, template: Any = None, **tokens: str | None) -> PreTrainedTokenizerFast:
    """A transformers tokenizer with this backend and chat template."""
    from transformers import PreTrainedTokenizerFast  # takes seconds to import

    made = PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)
    made.chat_template = template
    return made

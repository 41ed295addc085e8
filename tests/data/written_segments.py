"""The segments of the replies that published chat templates write, written down by hand."""

from template_table import ANSWER

TAGS = "<think>\nLet me think.\n</think>\n\n"
QWEN_CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'
XML_CALL = "<tool_call>\n<function=get_weather>\n<parameter=city>\nRome\n</parameter>\n</function>\n</tool_call>"
GEMMA4_CALL = '<|tool_call>call:get_weather{city:<|"|>Rome<|"|>}<tool_call|>'
GPT_CALL = ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Rome"}<|call|>'
MUSE_CALL = (
    ' to=get_weather<|message|><atem:function_calls>\n<atem:invoke name="get_weather">\n<atem:parameter name="city">'
    "Rome</atem:parameter>\n</atem:invoke>\n</atem:function_calls><|eot|>"
)
LFM_CALL = "<|tool_call_start|>[get_weather(city='Rome')]<|tool_call_end|><|im_end|>"
LLAMA_CALL = '{"name": "get_weather", "parameters": {"city": "Rome"}}<|eot_id|>'
GLM_CALL = "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n</tool_call><|observation|>"
KIMI_CALL = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
    '{"city": "Rome"}<|tool_call_end|><|tool_calls_section_end|><|im_end|>'
)
MINIMAX_CALL = (
    '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Rome</parameter>\n</invoke>\n'
    "</minimax:tool_call>[e~["
)
GRANITE_CALL = '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Rome"}}]<|end_of_text|>'

# names: (the answer, the thought, the answer after a thought, the call, the thought before a call, the call after it)
WRITTEN = {
    ("cohere",): (ANSWER + "<|END_OF_TURN_TOKEN|>", TAGS, ANSWER + "<|END_OF_TURN_TOKEN|>"),
    ("cohere2",): (
        ANSWER + "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
        TAGS,
        ANSWER + "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    ),
    ("deepseek_r1_distill", "deepseekv3"): (
        ANSWER + "<｜end▁of▁sentence｜>",
        "Let me think.\n</think>\n\n",
        ANSWER + "<｜end▁of▁sentence｜>",
    ),
    ("gemma", "gemma3"): (ANSWER + "<end_of_turn>", TAGS, ANSWER + "<end_of_turn>"),
    ("gemma4", "gemma4_v3", "gemma4_v4", "gemma4_v5", "diffusion_gemma"): (
        ANSWER + "<turn|>",
        "<|channel>thought\nLet me think.\n<channel|>",
        ANSWER + "<turn|>",
        GEMMA4_CALL + "<|tool_response>",
        "<|channel>thought\nLet me think.\n<channel|>",
        GEMMA4_CALL + "<|tool_response>",
    ),
    ("gemma4_v2",): (
        ANSWER + "<turn|>",
        TAGS,
        ANSWER + "<turn|>",
        GEMMA4_CALL + "<turn|>",
        TAGS,
        GEMMA4_CALL + "<turn|>",
    ),
    ("glm4moe_training",): (
        ANSWER + "<|user|>",
        "\n<think>Let me think.</think>\n",
        ANSWER + "<|user|>",
        GLM_CALL,
        "\n<think>Let me think.</think>\n",
        GLM_CALL,
    ),
    ("gptoss",): (
        f"<|channel|>final<|message|>{ANSWER}<|return|>",
        "<|channel|>analysis<|message|>Let me think.<|end|>",
        f"<|start|>assistant<|channel|>final<|message|>{ANSWER}<|return|>",
        GPT_CALL,
        "<|channel|>analysis<|message|>Let me think.<|end|>",
        "<|start|>assistant" + GPT_CALL,
    ),
    ("idefics3", "smolvlm"): (f" {ANSWER}<end_of_utterance>", f" {TAGS}", f"{ANSWER}<end_of_utterance>"),
    ("lfm2",): (ANSWER + "<|im_end|>", TAGS, ANSWER + "<|im_end|>"),
    ("lfm2_v2",): (ANSWER + "<|im_end|>", TAGS, ANSWER + "<|im_end|>", LFM_CALL, TAGS, LFM_CALL),
    ("lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl"): (
        ANSWER + "<|im_end|>",
        "<think>Let me think.</think>",
        ANSWER + "<|im_end|>",
        LFM_CALL,
        "<think>Let me think.</think>",
        LFM_CALL,
    ),
    ("llama3",): (ANSWER + "<|eot_id|>", TAGS, ANSWER + "<|eot_id|>"),
    ("llama3_1", "llama3_2"): (ANSWER + "<|eot_id|>", TAGS, ANSWER + "<|eot_id|>", LLAMA_CALL, TAGS, LLAMA_CALL),
    ("llava_next",): (f" {ANSWER}</s>", f" {TAGS}", f"{ANSWER}</s>"),
    ("muse_glimmer",): (
        f" to=user<|message|>{ANSWER}<|eot|>",
        " to=self<|message|>Let me think.<|eom|>",
        f"<|start|>assistant to=user<|message|>{ANSWER}<|eot|>",
        MUSE_CALL,
        " to=self<|message|>Let me think.<|eom|>",
        "<|start|>assistant" + MUSE_CALL,
    ),
    ("nemotron_3_5_lightning", "nemotron_3_ultra"): (
        ANSWER + "<|im_end|>",
        "Let me think.</think>",
        ANSWER + "<|im_end|>",
        f"\n{XML_CALL}\n<|im_end|>",
        "Let me think.</think>\n",
        f"{XML_CALL}\n<|im_end|>",
    ),
    ("nemotron_3_nano", "nemotron_3_super"): (
        ANSWER + "<|im_end|>",
        "Let me think.\n</think>\n",
        ANSWER + "<|im_end|>",
        f"\n{XML_CALL}\n<|im_end|>",
        "Let me think.\n</think>\n",
        f"{XML_CALL}\n<|im_end|>",
    ),
    ("phi3", "phi3_5"): (ANSWER + "<|end|>", TAGS, ANSWER + "<|end|>"),
    ("qwen2_5", "qwen3_instruct_2507", "qwen3_vl"): (
        ANSWER + "<|im_end|>",
        TAGS,
        ANSWER + "<|im_end|>",
        QWEN_CALL,
        TAGS + "\n",
        QWEN_CALL,
    ),
    ("qwen2_5_vl",): (ANSWER + "<|im_end|>", TAGS, ANSWER + "<|im_end|>"),
    ("qwen3",): (ANSWER + "<|im_end|>", TAGS, ANSWER + "<|im_end|>", QWEN_CALL, TAGS, QWEN_CALL),
    ("qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_8"): (
        ANSWER + "<|im_end|>",
        "Let me think.\n</think>\n\n",
        ANSWER + "<|im_end|>",
        XML_CALL + "<|im_end|>",
        "Let me think.\n</think>\n\n",
        XML_CALL + "<|im_end|>",
    ),
    ("kimi",): (
        ANSWER + "<|im_end|>",
        "<think>Let me think.</think>",
        ANSWER + "<|im_end|>",
        KIMI_CALL,
        "<think>Let me think.</think>",
        KIMI_CALL,
    ),
    ("mistral",): (f" {ANSWER}<|endoftext|>", f" {TAGS}", f"{ANSWER}<|endoftext|>"),
    ("nemotron_super_49b",): (
        f"{ANSWER}\n<SPECIAL_12>",
        "Let me think.\n</think>\n",
        f"{ANSWER}\n<SPECIAL_12>",
    ),
    ("minimax_m2",): (
        ANSWER + "[e~[",
        "Let me think.\n</think>\n\n",
        ANSWER + "[e~[",
        "\n" + MINIMAX_CALL,
        "Let me think.\n</think>\n\n\n",
        MINIMAX_CALL,
    ),
    ("granite_3_3",): (
        ANSWER + "<|end_of_text|>",
        TAGS,
        ANSWER + "<|end_of_text|>",
        GRANITE_CALL,
        TAGS,
        GRANITE_CALL,
    ),
    ("command_a",): (
        f"<|START_RESPONSE|>{ANSWER}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
        "<|START_THINKING|>Let me think.<|END_THINKING|>",
        f"<|START_RESPONSE|>{ANSWER}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    ),
    ("magistral",): (ANSWER + "<|endoftext|>", "[THINK]Let me think.[/THINK]", ANSWER + "<|endoftext|>"),
    ("olmo_2",): (ANSWER + "<|endoftext|>", TAGS, ANSWER + "<|endoftext|>"),
}
BY_NAME = {name: texts for names, texts in WRITTEN.items() for name in names}

"""Golden values of small decoders in variants that no shared fixture has, computed by transformers in f64.

    pip install torch transformers==5.23.0 && python make.py > golden.json

Weights are not stored: both sides make them from the tensors' names (SplitMix64 seeded with FNV-1a). Of each gradient the norm and
its product with a vector made in the same way are kept. `variants.rs` reads the file.
"""

import json
import sys

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

PROMPT, CHOSEN, REJECTED = 9, 12, 15
# The weights of log π(chosen) and log π(rejected) in what is differentiated.
SLOPES = (1.5, -0.7)
MASK = (1 << 64) - 1
# A key that is left out, where `None` would be written as null.
ABSENT = object()


def stream(text, count):
    """Uniform in [0, 1)."""
    state = 0xCBF29CE484222325
    for byte in text.encode():
        state = ((state ^ byte) * 0x100000001B3) & MASK
    values = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        mixed = state
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & MASK
        values.append(((mixed ^ (mixed >> 31)) >> 11) / (1 << 53))
    return torch.tensor(values, dtype=torch.float64)


def weight(name, tensor, kind):
    """f32 values: matrices of deviation 0.25, norms near the identity, small biases."""
    centered = stream(name, tensor.numel()).reshape(tensor.shape) - 0.5
    if tensor.dim() > 1:
        value = centered * 0.9
    elif name.endswith(".bias") or kind.startswith("gemma"):
        value = centered * 0.4
    else:
        value = 1 + centered * 0.4
    return value.to(torch.float32).to(torch.float64)


def base(kind, **changes):
    config = {
        "model_type": kind,
        "vocab_size": 37,
        "hidden_size": 24,
        "intermediate_size": 28,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config.update(changes)
    return {key: value for key, value in config.items() if value is not ABSENT}


def rope(**fields):
    return {"rope_theta": 10000.0, **fields}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.1], "long_factor": [1.5, 3.0]}
VARIANTS = {
    "llama, biases and one key head": base("llama", attention_bias=True, mlp_bias=True, num_key_value_heads=1),
    "llama, as many key heads, wide heads": base("llama", num_key_value_heads=4, head_dim=10, tie_word_embeddings=False),
    "llama, linear": base("llama", rope_parameters=rope(rope_type="linear", factor=2.5)),
    "llama, llama3": base("llama", rope_parameters=rope(rope_type="llama3", factor=8.0, low_freq_factor=1.0,
                          high_freq_factor=4.0, original_max_position_embeddings=32)),
    "llama, yarn": base("llama", head_dim=12, rope_parameters=rope(**YARN)),
    "llama, yarn with every key": base("llama", head_dim=16, rope_parameters=rope(**YARN, beta_fast=16.0, beta_slow=2.0,
                                       mscale=0.8, mscale_all_dim=0.5, truncate=False)),
    "mistral, window 5": base("mistral", sliding_window=5),
    "mistral, no window": base("mistral", sliding_window=None, num_key_value_heads=4),
    "qwen2, windows from the second layer on": base("qwen2", head_dim=ABSENT, use_sliding_window=True, sliding_window=5,
                                                    max_window_layers=1),
    "qwen3, biases and layer types": base("qwen3", attention_bias=True, use_sliding_window=True, sliding_window=7,
                                          layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    "gemma": base("gemma", num_key_value_heads=1, hidden_act="gelu_pytorch_tanh"),
    "gemma, the name gelu": base("gemma", num_key_value_heads=4, hidden_act="gelu"),
    "gemma2": base("gemma2", sliding_window=5, query_pre_attn_scalar=9, attn_logit_softcapping=2.0,
                   final_logit_softcapping=3.0),
    "gemma2, no caps": base("gemma2", sliding_window=5, attn_logit_softcapping=None, final_logit_softcapping=None),
    "gemma3, linear in full layers": base("gemma3_text", sliding_window=5, query_pre_attn_scalar=9,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"], rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}),
    "phi3, longrope beyond its context": base("phi3", head_dim=ABSENT, partial_rotary_factor=0.7, sliding_window=None,
        original_max_position_embeddings=16, rope_parameters=rope(**LONG, partial_rotary_factor=0.7)),
    "phi3, longrope within its context": base("phi3", head_dim=ABSENT, original_max_position_embeddings=48,
        partial_rotary_factor=0.7, sliding_window=6, rope_parameters=rope(**LONG, partial_rotary_factor=0.7)),
    "gpt_neox": base("gpt_neox", head_dim=ABSENT, num_key_value_heads=ABSENT, layer_norm_eps=1e-5, tie_word_embeddings=False,
                     hidden_act="gelu", rope_parameters=rope(rope_type="default", partial_rotary_factor=0.4)),
    "gpt_neox, sequential, no attention biases": base("gpt_neox", head_dim=ABSENT, num_key_value_heads=ABSENT,
        use_parallel_residual=False, attention_bias=False, hidden_act="gelu_new",
        rope_parameters=rope(rope_type="default", partial_rotary_factor=1.0)),
}


def on_disk(key, config):
    """The name that `save_pretrained` writes."""
    return "embed_out.weight" if config["model_type"] == "gpt_neox" and key == "lm_head.weight" else key


def golden(config):
    arguments = {key: value for key, value in config.items() if key != "model_type"}
    made = AutoConfig.for_model(config["model_type"], **arguments)
    made._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float64, attn_implementation="eager").double().eval()
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            tensor.copy_(weight(on_disk(key, config), tensor, config["model_type"]))
    ids = (stream("ids", PROMPT + CHOSEN + REJECTED) * config["vocab_size"]).to(torch.int64)
    prompt, chosen, rejected = ids.split([PROMPT, CHOSEN, REJECTED])
    result = {"config": config, "token_logps": [], "gradients": {}}
    total = 0
    for completion, slope in zip((chosen, rejected), SLOPES):
        sequence = torch.cat([prompt, completion])[None]
        out = model(sequence, use_cache=False)
        logps = out.logits.log_softmax(-1)[0, PROMPT - 1 : -1].gather(1, completion[:, None])[:, 0]
        result["token_logps"].append(logps.tolist())
        total = total + slope * logps.sum()
    total.backward()
    for key, tensor in model.named_parameters():
        key = on_disk(key, config)
        probe = stream(key + "#", tensor.numel()).reshape(tensor.shape) - 0.5
        result["gradients"][key] = [tensor.grad.norm().item(), (tensor.grad * probe).sum().item()]
    return result


json.dump(
    {
        "made_by": f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}, f64",
        "lengths": [PROMPT, CHOSEN, REJECTED],
        "slopes": SLOPES,
        "variants": {name: golden(config) for name, config in VARIANTS.items()},
    },
    sys.stdout,
    indent=1,
)
print()

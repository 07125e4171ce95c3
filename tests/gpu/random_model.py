#!/usr/bin/env python3
"""Writes a random Hugging Face Llama with the tokenizer of another model: something to time, nothing to read.

usage: random_model.py TOKENIZER_DIR OUT [--hidden 2048] [--layers 24] [--heads 32] [--kv-heads 8] [--intermediate 5632]
                       [--vocabulary 32000] [--like]
`--like` takes the shape from TOKENIZER_DIR/config.json. A smaller vocabulary keeps the tokens with the lowest ids and the merges
that make them. Needs torch and transformers.
"""
import argparse, json, os, shutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

p = argparse.ArgumentParser()
p.add_argument("tokenizer"); p.add_argument("out"); p.add_argument("--like", action="store_true")
for name, value in dict(hidden=2048, layers=24, heads=32, kv_heads=8, intermediate=5632, vocabulary=32000).items():
    p.add_argument("--" + name.replace("_", "-"), type=int, default=value)
a = p.parse_args()
os.makedirs(a.out, exist_ok=True)
for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
    if os.path.exists(os.path.join(a.tokenizer, name)):
        shutil.copyfile(os.path.join(a.tokenizer, name), os.path.join(a.out, name))
if a.like:
    config = AutoConfig.from_pretrained(a.tokenizer)
else:
    config = LlamaConfig(hidden_size=a.hidden, num_hidden_layers=a.layers, num_attention_heads=a.heads, num_key_value_heads=a.kv_heads,
                         intermediate_size=a.intermediate, vocab_size=a.vocabulary, max_position_embeddings=8192,
                         tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, rms_norm_eps=1e-5)
    path = os.path.join(a.out, "tokenizer.json")
    tokenizer = json.load(open(path))
    model = tokenizer["model"]
    model["vocab"] = {token: i for token, i in model["vocab"].items() if i < a.vocabulary}
    pair = lambda merge: merge.split(" ") if isinstance(merge, str) else merge
    known = model["vocab"]
    model["merges"] = [m for m in model["merges"] if all(t in known for t in pair(m)) and "".join(pair(m)) in known]
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["id"] < a.vocabulary]
    json.dump(tokenizer, open(path, "w"))
torch.manual_seed(0)
torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
model.save_pretrained(a.out)
print(a.out, sum(q.numel() for q in model.parameters()), "parameters")

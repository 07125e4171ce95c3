#!/usr/bin/env python3
"""Prints README's table of which model fits which GPUs: what `coordinator plan` says of GPUs that need not be here.

usage: which_fits.py COORDINATOR [SHARED]
COORDINATOR is the program; SHARED (../shared) has the pairs and the tokenizer. Weights are not needed, only shapes. A cell has GiB of
each GPU under `cluster.zero=1`, `cluster.zero=2`, and `cluster.zero=2 cluster.offload=true`; one worker alone has no stage 2. The last
column trains an adapter on one GPU. Bold fits 80 GB, italic 141 GB.
"""
import json, os, shutil, subprocess, sys, tempfile

coordinator, shared = sys.argv[1], (sys.argv[2:] + ["../shared"])[0]
SHAPES = {
    "1B (Llama 3.2's shape)": ("llama", 2048, 16, 32, 8, 8192, 128256, True),
    "3B (Llama 3.2's shape)": ("llama", 3072, 28, 24, 8, 8192, 128256, True),
    "7B (Llama 2's shape, vocabulary 49152)": ("llama", 4096, 32, 32, 32, 11008, 49152, False),
    "8B (Llama 3's shape)": ("llama", 4096, 32, 32, 8, 14336, 128256, False),
    "14B (Qwen3's shape)": ("qwen3", 5120, 40, 40, 8, 17408, 151936, False),
    "32B (Qwen3's shape)": ("qwen3", 5120, 64, 64, 8, 25600, 151936, False),
}
LORA = ["adapter.kind=lora", "adapter.rank=16"]
SETTINGS = [["cluster.zero=1"], ["cluster.zero=2"], ["cluster.zero=2", "cluster.offload=true"]]
# A card's size by its name, which is nearly its GiB, and the mark of what fits it.
CARDS = [(80, "**"), (141, "*")]


def folder(into, shape):
    family, hidden, layers, heads, kv_heads, intermediate, vocabulary, tied = shape
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(os.path.join(shared, "models/smollm2-135m-instruct", name), os.path.join(into, name))
    config = dict(model_type=family, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
                  num_key_value_heads=kv_heads, intermediate_size=intermediate, vocab_size=vocabulary, tie_word_embeddings=tied,
                  max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=500000.0, hidden_act="silu", eos_token_id=2)
    if family == "qwen3":
        config |= dict(head_dim=128, attention_bias=False, use_sliding_window=False)
    with open(os.path.join(into, "config.json"), "w") as file:
        json.dump(config, file)


def planned(model, scratch, workers, settings, card):
    """What one GPU needs, in bytes, and whether it fits a card of so many GiB."""
    sets = [f"model.path={model}", "model.dtype=bf16", "model.gradient_checkpointing=true", "data.max_length=1024",
            f"data.train=['{os.path.join(shared, 'data/chat-preferences-1024.jsonl')}']", f"reference.store={scratch}/store",
            f"data.cache={scratch}/cache", "train.micro_batch_tokens=4096", "train.batch_pairs=64", "train.steps=100",
            f"job.output={scratch}/run", f"cluster.workers={workers}", *settings]
    command = [coordinator, "plan", "--json", "--gpu-gib", str(card), *(part for text in sets for part in ("--set", text))]
    made = subprocess.run(command, capture_output=True, text=True)
    if not made.stdout:
        sys.exit(made.stderr)
    gpu = json.loads(made.stdout)["gpu"]
    return gpu["worker"]["peak_bytes"], gpu["fits"]


def cell(model, scratch, workers, settings=None):
    settings = settings or (SETTINGS if workers > 1 else [SETTINGS[0], ["cluster.offload=true"]])
    parts = []
    for setting in settings:
        text = None
        for card, mark in CARDS:
            needed, fits = planned(model, scratch, workers, setting, card)
            text = f"{needed / 2**30:.0f}"
            if fits:
                text = f"{mark}{text}{mark}"
                break
        parts.append(text)
    return " / ".join(parts)


print("| model | 1 GPU | 2 | 4 | 8 | LoRA, 1 GPU |\n|---|---|---|---|---|---|")
with tempfile.TemporaryDirectory() as scratch:
    os.mkdir(os.path.join(scratch, "cache"))
    for name, shape in SHAPES.items():
        model = os.path.join(scratch, "model")
        os.makedirs(model, exist_ok=True)
        folder(model, shape)
        cells = [cell(model, scratch, workers) for workers in (1, 2, 4, 8)] + [cell(model, scratch, 1, [LORA])]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)

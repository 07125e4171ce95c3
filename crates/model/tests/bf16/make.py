"""Writes torch.json: how far torch's own bf16 (autocast, embeddings and head in bf16, log-softmax in f32) is from f64 on the fixtures.

    pip install torch transformers==5.23.0 && python make.py ../../../../../shared/fixtures/hf torch.json

For each fixture the largest error of a token's log-prob in nats, and the largest angle, in radians, between a tensor's gradient
of Cal-DPO at the start and its f64 golden value.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

# dL/dlogp of Cal-DPO with β = 0.1, λ = 1 at policy = reference, over 6 pairs.
START = 10.5 / 6.0


def measure(directory: Path) -> dict:
    golden = json.loads((directory / "golden.json").read_text())
    tensors = load_file(directory / "golden.safetensors")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    # As in a model that is loaded in bf16: the rows of the embedding, and the operands of the head.
    model.get_input_embeddings().register_forward_hook(lambda _module, _input, rows: rows.bfloat16().float())
    worst, loss = 0.0, 0.0
    for pair, expected in zip(golden["token_ids"], golden["token_logps_f64"], strict=True):
        for side, sign in [("chosen", -1), ("rejected", 1)]:
            prompt, completion = pair["prompt"], pair[side]
            ids = torch.tensor([prompt + completion])
            with torch.autocast("cpu", dtype=torch.bfloat16):
                hidden = model.base_model(ids).last_hidden_state[0, len(prompt) - 1 : -1]
            logits = hidden.bfloat16().float() @ model.get_output_embeddings().weight.bfloat16().float().T
            cap = getattr(model.config, "final_logit_softcapping", None)
            if cap:
                logits = cap * torch.tanh(logits / cap)
            logps = torch.log_softmax(logits, -1).gather(1, torch.tensor(completion)[:, None])[:, 0]
            errors = logps.detach().double() - torch.tensor(expected[side], dtype=torch.float64)
            worst = max(worst, errors.abs().max().item())
            loss = loss + sign * START * logps.sum()
    loss.backward()
    angle = 0.0
    for name, parameter in model.named_parameters():
        if f"grad.{name}" in tensors:
            a = parameter.grad.double().flatten()
            b = tensors[f"grad.{name}"].double().flatten()
            angle = max(angle, torch.arccos((a @ b / a.norm() / b.norm()).clamp(max=1)).item())
    return {"logp": round(worst, 4), "angle": round(angle, 4)}


def main() -> None:
    fixtures, out = map(Path, sys.argv[1:])
    names = sorted(path.name for path in fixtures.iterdir())
    found = {name: measure(fixtures / name) for name in names}
    out.write_text(json.dumps(found, indent=2) + "\n")


main()

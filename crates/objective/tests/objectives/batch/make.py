"""Golden values of objectives that read more than a pair's own log-probs, by torch's autograd in f64.

    pip install torch numpy && python make.py > golden.json

The formulas are written as in the papers and in TRL 1.16 (`bco_pair` with the running mean of TRL 0.24), without regard to
overflow. Derivatives are those of the loss of the whole batch by every log-prob of it. `batch.rs` reads the file.
"""

import json
import random

import torch
from torch.nn.functional import logsigmoid


class Batch:
    """`rows`: log π_w, log π_l, log π_ref,w, log π_ref,l, n_w, n_l, score_w, score_l. A completion without tokens is absent."""

    def __init__(self, rows, mismatched):
        self.rows, self.mismatched = rows, mismatched
        columns = torch.tensor(rows, dtype=torch.float64).T
        self.policy_chosen = columns[0].clone().requires_grad_()
        self.policy_rejected = columns[1].clone().requires_grad_()
        self.reference_chosen, self.reference_rejected = columns[2], columns[3]
        self.tokens_chosen, self.tokens_rejected = columns[4], columns[5]
        self.gap = columns[6] - columns[7]
        self.r_chosen = self.policy_chosen - self.reference_chosen
        self.r_rejected = self.policy_rejected - self.reference_rejected


class Running:
    """Mean of the batches' means."""

    def __init__(self):
        self.means = []

    def update(self, value):
        self.means.append(value)
        return sum(self.means) / len(self.means)


def smoothed(x, label_smoothing):
    return -logsigmoid(x) * (1 - label_smoothing) - logsigmoid(-x) * label_smoothing


def kto(batch, running, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0):
    z = max(0.0, sum(batch.mismatched) / max(1, len(batch.mismatched)))
    desirable = batch.r_chosen[batch.tokens_chosen > 0]
    undesirable = batch.r_rejected[batch.tokens_rejected > 0]
    losses = torch.cat((
        desirable_weight * (1 - torch.sigmoid(beta * (desirable - z))),
        undesirable_weight * (1 - torch.sigmoid(beta * (z - undesirable))),
    ))
    return losses.mean()


def bco_pair(batch, running, beta=0.1):
    chosen, rejected = beta * batch.r_chosen, beta * batch.r_rejected
    # The running mean holds unscaled log-ratios, so that it serves any β.
    delta = beta * running.update(torch.cat((batch.r_chosen, batch.r_rejected)).mean().item())
    return (-logsigmoid(chosen - delta) - logsigmoid(-(rejected - delta))).mean()


def aot(batch, running, beta=0.1, label_smoothing=0.0):
    policy, _ = torch.sort(batch.policy_chosen - batch.policy_rejected, stable=True)
    reference, _ = torch.sort(batch.reference_chosen - batch.reference_rejected, stable=True)
    return smoothed(beta * (policy - reference), label_smoothing).mean()


def aot_unpaired(batch, running, beta=0.1, label_smoothing=0.0):
    chosen, _ = torch.sort(batch.r_chosen, stable=True)
    rejected, _ = torch.sort(batch.r_rejected, stable=True)
    return smoothed(beta * (chosen - rejected), label_smoothing).mean()


def cal_dpo(batch, running, beta=0.1, calibration_weight=1.0, calibration_shift=0.5, score_scale=None):
    gap = 1 if score_scale is None else score_scale * batch.gap
    target_chosen = (1 - calibration_shift) * gap / beta
    target_rejected = -calibration_shift * gap / beta
    calibration = (batch.r_chosen - target_chosen) ** 2 + (batch.r_rejected - target_rejected) ** 2
    return (-logsigmoid(batch.r_chosen - batch.r_rejected) + calibration_weight * calibration).mean()


def sft(batch, running):
    there = batch.tokens_chosen > 0
    return -batch.policy_chosen[there].sum() / batch.tokens_chosen[there].sum()


def mix(batch, running, parts):
    return sum(part.get("weight", 1.0) * loss(part, batch, running) for part in parts)


def loss(objective, batch, running):
    parameters = {key: value for key, value in objective.items() if key not in ("kind", "weight")}
    return globals()[objective["kind"]](batch, running, **parameters)


def rows(dice, count, sides=lambda index: (True, True)):
    def side(there):
        reference = round(dice.uniform(-60, -5), 3)
        tokens = dice.randint(1, 30)
        return (round(reference + dice.uniform(-12, 12), 3), reference, tokens) if there else (0.0, 0.0, 0)

    made = []
    for index in range(count):
        (chosen, reference_chosen, n_chosen), (rejected, reference_rejected, n_rejected) = map(side, sides(index))
        scores = [round(dice.uniform(1, 10), 1), round(dice.uniform(1, 10), 1)]
        made.append([chosen, rejected, reference_chosen, reference_rejected, n_chosen, n_rejected, *scores])
    return made


def mismatched(dice, low, high, count=5):
    return [round(dice.uniform(low, high), 3) for _ in range(count)]


# Log-ratios and margins, of the policy and of the reference, that are equal in several slots: who gets whose derivative is a
# matter of the sort.
TIES = [
    [-20.0, -25.0, -22.0, -24.0, 9, 9, 1.0, 0.0],
    [-30.0, -35.0, -32.0, -34.0, 9, 9, 1.0, 0.0],
    [-10.0, -11.0, -12.0, -15.0, 9, 9, 1.0, 0.0],
    [-40.0, -45.0, -42.0, -41.0, 9, 9, 1.0, 0.0],
    [-50.0, -51.0, -49.0, -48.0, 9, 9, 1.0, 0.0],
]


def cases(dice):
    unpaired = lambda index: [(True, False), (False, True), (True, True)][index % 3]
    lone = lambda index: (index % 2 == 0, index % 2 == 1)
    desirable = lambda index: (True, False)
    one = lambda objective, rows, mismatched=(): (objective, [(rows, list(mismatched))])

    kto_ = {"kind": "kto"}
    weighted = {"kind": "kto", "beta": 0.25, "desirable_weight": 1.5, "undesirable_weight": 0.7}
    yield one(kto_, rows(dice, 5), mismatched(dice, 0, 9))
    yield one(kto_, rows(dice, 6, lone), mismatched(dice, -9, 0))
    yield one(kto_, rows(dice, 4, desirable), mismatched(dice, 0, 3))
    yield one(kto_, rows(dice, 3))
    yield one(weighted, rows(dice, 7, unpaired), mismatched(dice, -2, 6))
    yield {"kind": "bco_pair"}, [(rows(dice, 4 + index), []) for index in range(4)]
    yield {"kind": "bco_pair", "beta": 0.4}, [(rows(dice, 3), []) for _ in range(2)]
    for kind in "aot", "aot_unpaired":
        yield one({"kind": kind}, rows(dice, 8))
        yield one({"kind": kind, "beta": 0.3, "label_smoothing": 0.2}, rows(dice, 5))
        yield one({"kind": kind, "beta": 0.5}, TIES)
        yield one({"kind": kind}, rows(dice, 1))
    yield one({"kind": "cal_dpo", "score_scale": 0.4}, rows(dice, 5))
    shifted = {"beta": 0.05, "calibration_weight": 0.5, "calibration_shift": 0.3, "score_scale": 1.25}
    yield one({"kind": "cal_dpo", **shifted}, rows(dice, 4))
    taking = {"kind": "mix", "parts": [{**weighted, "weight": 3.0}, {"kind": "sft", "weight": 0.2}]}
    yield one(taking, rows(dice, 6, unpaired), mismatched(dice, -1, 5))
    parts = [
        {"kind": "bco_pair", "beta": 0.2, "weight": 0.5},
        {"kind": "aot", "label_smoothing": 0.1},
        {"kind": "aot_unpaired", "beta": 0.3},
        {"kind": "cal_dpo", "score_scale": 0.5, "weight": 0.01},
        {"kind": "kto"},
    ]
    yield {"kind": "mix", "parts": parts}, [(rows(dice, 5), mismatched(dice, -1, 5)) for _ in range(2)]


def golden(objective, batches):
    running, steps = Running(), []
    for batch in (Batch(*batch) for batch in batches):
        value = loss(objective, batch, running)
        leaves = batch.policy_chosen, batch.policy_rejected
        chosen, rejected = (gradient.tolist() for gradient in torch.autograd.grad(value, leaves))
        steps.append({
            "rows": batch.rows,
            "mismatched": batch.mismatched,
            "value": value.item(),
            "d_chosen": chosen,
            "d_rejected": rejected,
            "running_mean": sum(running.means) / max(1, len(running.means)),
        })
    return {"objective": objective, "steps": steps}


made_by = f"torch {torch.__version__.split('+')[0]}, f64"
lines = ",\n".join(json.dumps(golden(*case)) for case in cases(random.Random(20240612)))
print(f'{{"made_by": "{made_by}", "cases": [\n{lines}\n]}}')

"""What shows how far a model has come, beside losses: text it writes, numbers it finds."""

from dataclasses import replace

import torch

from rwkvx.data.sources.passkey import Passkey, Prompts
from rwkvx.model import Model
from rwkvx.sampling import generate
from rwkvx.tokenizers.stream import prompt_ids, text_stream
from rwkvx.training.config import StageConfig, TrainConfig
from rwkvx.training.evaluation import evaluate_source
from rwkvx.training.forward import Objective, alone
from rwkvx.training.world import World

SAMPLE_TOKENS, TEMPERATURE = 60, 0.8
PROBE_TOKENS = 16_384  # of the prompts that are read at once


def passkey_probe(
    objective: Objective, config: TrainConfig, stage: StageConfig, world: World
) -> dict[str, float]:
    """Share of passkey prompts (standard filler) answered right, by their length in tokens."""
    prompts = Prompts(Passkey(prose=0.0), objective.model.tokenizer, None)
    found = {}
    with alone(objective.model):  # whose prompts have any length
        for length in config.probe:
            rows = max(1, PROBE_TOKENS // length)
            asked = replace(stage, length=length, batch=rows, recurrent_length=0, long_ce=0.0)
            everyone = World(world.rank, world.size)
            metrics = evaluate_source(objective, prompts, config, asked, everyone)
            found[f"accuracy/passkey-{length}"] = metrics["accuracy", ""]
    return found


@torch.no_grad()
def samples(model: Model, config: TrainConfig) -> dict[str, str]:
    """Each prompt of the config with a continuation, drawn with the run's seed."""
    model.set_topk(config.model.topk)
    model.recurrent_pieces = 1
    found = {}
    for prompt in config.samples:
        data = prompt.encode("utf-8", "replace")
        ids = prompt_ids(model.tokenizer, data) or [model.tokenizer.eos_token_id]
        tokens = generate(
            model,
            ids,
            max_tokens=SAMPLE_TOKENS,
            temperature=TEMPERATURE,
            seed=config.seed,
            stop_ids=[model.tokenizer.eos_token_id],
            device=str(model.device),
        )
        found[prompt] = "".join(text_stream(model.tokenizer, data, tokens))
    return found

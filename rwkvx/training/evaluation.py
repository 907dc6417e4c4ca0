"""What a model scores on data that training does not show it."""

import torch

from rwkvx.data.sources import Source
from rwkvx.model import Model
from rwkvx.training.batches import evaluation_batch
from rwkvx.training.config import StageConfig, TrainConfig
from rwkvx.training.forward import hidden_states, weighted_loss


@torch.no_grad()
def evaluate(
    model: Model, source: Source, config: TrainConfig, stage: StageConfig
) -> dict[str, float]:
    """Loss of each evaluation of the source; share of rows whose answers are all right, if any."""
    model.set_topk(stage.topk or config.model.topk)
    model.recurrent_pieces = 1
    metrics = {}
    for name, part in source.evaluations().items():
        loss, right, asked = 0.0, 0, 0
        for index in range(config.eval_batches):
            batch = evaluation_batch(part, config, stage, index).to(config.device)
            hidden, _ = hidden_states(model, batch, None)
            loss += weighted_loss(model, hidden, batch).item() / config.eval_batches
            if batch.answers.any():
                guessed = model.head(hidden[batch.answers]).argmax(-1)
                wrong = torch.zeros_like(batch.answers)
                wrong[batch.answers] = guessed != batch.targets[batch.answers]
                right += int((~wrong.any(dim=1)).sum())
                asked += len(wrong)
        metrics[f"loss/{name}"] = loss
        if asked:
            metrics[f"accuracy/{name}"] = right / asked
    return metrics

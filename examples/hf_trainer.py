"""A Hugging Face Trainer that distils a causal language model, without the logits of the vocabulary in memory."""

import tempfile
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments, set_seed

from pykd.ops import linear_distillation_loss

IGNORED = -100


class DistillationTrainer(Trainer):
    """The student learns from the teacher's noisy logits and from the labels, mean over the tokens with a label."""

    loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of all parts whose gradients are accumulated

    def __init__(self, *args: Any, teacher: PreTrainedModel, sigma: float = 0.1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # so that those tokens are counted, whatever the student's forward takes
        self.teacher, self.sigma = teacher.requires_grad_(False).eval().to(self.args.device), sigma

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = nn.functional.pad(inputs.pop("labels"), (0, 1), value=IGNORED)[:, 1:]  # each token tells the next
        rows = labels != IGNORED
        hidden = {"output_hidden_states": True, "logits_to_keep": 1, "use_cache": False}
        with self.accelerator.autocast():
            outputs = model(**inputs, **hidden)
            with torch.no_grad():
                taught = self.teacher(**inputs, **hidden)
            loss = linear_distillation_loss(
                outputs.hidden_states[-1][rows],
                self.accelerator.unwrap_model(model).get_output_embeddings().weight,
                taught.hidden_states[-1][rows],
                self.teacher.get_output_embeddings().weight,
                labels[rows],
                temperature=2.0,
                hard_weight=0.1,
                sigma=self.sigma,
                row_offset=self.accelerator.process_index << 40,  # all processes draw the same seeds
                reduction="sum",
            )
        count = rows.sum() if num_items_in_batch is None else num_items_in_batch
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            count = count / self.accelerator.num_processes  # it is that of all, and their gradients are averaged
        return (loss / count, outputs) if return_outputs else loss / count


def lines(count: int) -> list[dict[str, Tensor]]:
    """Real English, which comes with Python: lines of its language reference, in bytes."""
    found = [line.strip().encode("ascii", "ignore") for page in topics.values() for line in page.splitlines()]
    return [{"input_ids": torch.tensor(list(line[:48]))} for line in found if len(line) > 40][:count]


def padded(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    tokens = [sample["input_ids"] for sample in samples]
    mask = pad_sequence([torch.ones_like(each) for each in tokens], batch_first=True)
    labels = pad_sequence(tokens, batch_first=True, padding_value=IGNORED)
    return {"input_ids": pad_sequence(tokens, batch_first=True), "attention_mask": mask, "labels": labels}


def language_model(width: int, layers: int) -> LlamaForCausalLM:
    """From random weights."""
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, num_attention_heads=4, **sizes))


def main() -> None:
    set_seed(0)
    samples = lines(1000)
    train, test = {"train_dataset": samples[:800], "data_collator": padded}, padded(samples[800:])
    teacher, student = language_model(64, 2), language_model(32, 1)
    how = {"num_train_epochs": 2, "learning_rate": 1e-2, "bf16": torch.cuda.is_available()}
    with tempfile.TemporaryDirectory() as folder:
        how.update(output_dir=folder, save_strategy="no", report_to="none", disable_tqdm=True)
        Trainer(teacher, TrainingArguments(per_device_train_batch_size=16, **how), **train).train()
        arguments = TrainingArguments(per_device_train_batch_size=8, gradient_accumulation_steps=2, **how)
        DistillationTrainer(student, arguments, **train, teacher=teacher).train()
    for name, model in (("teacher", teacher), ("student", student)):
        with torch.no_grad():
            loss = model.eval().cpu()(**test).loss
        print(f"{name}: {loss:.2f} nats a character, {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()

"""DPO made safe for long chains (paper, Fine-grained DPO and Joint Post-training Objective), packed by tree.

L = cDPO(beta, eps) + alpha L_SFT(chosen). The reference is the SFT checkpoint that training starts from: its
log-probabilities are computed once, before step 0, with the very model that is about to be trained, so there is never a
second model in memory and every margin d is 0 at step 0. That holds for adapters too: one of the checkpoint is merged
before a new one is added, and a new one changes nothing yet.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from cotree.config import TrainDPO
from cotree.data.files import check_template
from cotree.errors import UsageError
from cotree.llm.tokenizer import load_tokenizer
from cotree.train.durable import whole_file
from cotree.train.encode import Pair, encode_dpo
from cotree.train.forest import Scored, forest_logps, multiplicities, packs
from cotree.train.losses import dpo_loss, joint_loss, margin_weights, weighted
from cotree.train.model import load_model
from cotree.train.resume import claim, weights_hash
from cotree.train.trainer import (
    StepLog,
    StepTrainer,
    TrainResult,
    add_over_processes,
    finished,
    fixed_steps,
    read_rows,
    release,
    room_for,
    run,
    training_arguments,
)


def train_dpo(
    rows: Path,
    student: Path,
    out: Path,
    settings: TrainDPO,
    seed: int,
    max_tokens: int,
    on_step: Callable[[StepLog], None] | None = None,
    on_reference: Callable[[int, int], None] | None = None,
) -> TrainResult:
    """Train an SFT checkpoint on pairs; resumes and returns as `sft.train_sft` does.

    Args:
        rows: Parquet with `prompt`, `chosen` and `rejected` (messages).
        student: the SFT checkpoint, a transformers folder; it is the reference.
        out: folder of this run: `model/`, `result.json`, `log.jsonl`.
        settings: the recipe's `train.dpo`.
        seed: fixes the order of the pairs.
        max_tokens: pairs with a side of more tokens, prompt included, are left out and counted.
        on_step: called after each optimizer step. Gauges, means over the step's pairs: `margin` (beta times the
            difference of log-ratios), `accuracy` (share with margin > 0), `chosen_logps` and `rejected_logps` (sums
            over the tokens in the margin), `dpo_loss`, `sft_loss`; and `learning_rate`, `grad_norm`, `seconds`.
        on_reference: called with (pairs done, pairs) while the reference is computed.

    Raises:
        UsageError: rows, student or settings cannot be trained on, or `out` holds a run on other inputs.
        CotreeError: the loss is no number any more, or the disk is full; nothing before the last checkpoint is lost.
    """
    began = monotonic()
    if (out / "model").exists():
        claim(out, rows, student, settings, seed, max_tokens)
        return finished(out)
    tokenizer = load_tokenizer(student)
    found = read_rows(rows, ("prompt", "chosen", "rejected"))
    check_template(rows, tokenizer)
    encoded = encode_dpo(tokenizer, found, max_tokens)
    if not encoded.rows:
        raise UsageError(f"all {encoded.too_long} pairs are over {max_tokens} tokens: raise build.max_tokens")
    steps = fixed_steps([tuple(pair.prompt) for pair in encoded.rows], settings.batch_size, settings.epochs, seed)
    trainer: PairTrainer | None = None
    try:
        arguments = training_arguments(out, settings, len(steps), seed)
        with arguments.main_process_first(local=False):
            claim(out, rows, student, settings, seed, max_tokens)
        model = load_model(student, settings.lora, seed, settings.compile)
        model.to(arguments.device)
        pairs = _with_reference(model, encoded.rows, settings, out, weights_hash(student), arguments, on_reference)
        trainer = PairTrainer(model, [[pairs[index] for index in step] for step in steps], arguments, settings)
        del model
        return run(trainer, tokenizer, out, encoded, began, on_step)
    finally:
        release(trainer)


@dataclass(frozen=True)
class ReferencedPair:
    """A pair with the reference's log-probabilities, summed with `margin_weights`, in nats; 0 without a reference."""

    pair: Pair
    chosen: float
    rejected: float

    @property
    def tokens(self) -> int:
        """Of both sides, prompts included."""
        return self.pair.tokens

    @property
    def prompt(self) -> list[int]:
        """Token ids of the question."""
        return self.pair.prompt

    @property
    def chains(self) -> tuple[list[int], ...]:
        """Both sides after the prompt."""
        return self.pair.chains


@dataclass(frozen=True)
class PairStep:
    """What a pack must know about its step: pairs, and the SFT weights of each (by id of its row) and their sum."""

    pairs: int
    tokens: float
    weights: dict[int, Tensor]


class PairTrainer(StepTrainer[ReferencedPair, PairStep]):
    """The joint objective over the pairs of a step."""

    def __init__(
        self,
        model: PreTrainedModel,
        steps: list[list[ReferencedPair]],
        arguments: TrainingArguments,
        settings: TrainDPO,
    ) -> None:
        self.dpo = settings
        super().__init__(model, steps, arguments, settings)

    def whole(self, rows: Sequence[ReferencedPair]) -> PairStep:
        """Pairs and SFT weights of the step."""
        weights = sft_weights([row.pair for row in rows], self.dpo)
        tokens = sum(float(each.sum()) for each in weights)
        return PairStep(len(rows), tokens, {id(row): each for row, each in zip(rows, weights, strict=True)})

    def share(
        self, model: nn.Module, rows: Sequence[ReferencedPair], step: PairStep
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Share of L = L_DPO + alpha L_SFT(chosen) of the step."""
        settings = self.dpo
        sft = [step.weights[id(row)] for row in rows]
        wanted = sft if settings.alpha else [torch.zeros_like(weights) for weights in sft]
        chosen, policy_chosen, policy_rejected = pair_logps(model, [row.pair for row in rows], settings, wanted)
        reference_chosen = policy_chosen.new_tensor([row.chosen for row in rows])
        reference_rejected = policy_chosen.new_tensor([row.rejected for row in rows])
        losses, d = dpo_loss(
            policy_chosen,
            policy_rejected,
            reference_chosen,
            reference_rejected,
            settings.beta,
            settings.label_smoothing,
            settings.simpo_gamma if settings.loss == "simpo" else 0.0,
        )
        loss, dpo, sft_loss = joint_loss(
            losses,
            chosen,
            wanted if settings.alpha else sft,
            alpha=settings.alpha,
            sft_norm=settings.sft_norm,
            pairs=step.pairs,
            tokens=step.tokens,
        )
        means = {"margin": d, "accuracy": (d > 0).to(d)}
        means |= {"chosen_logps": policy_chosen, "rejected_logps": policy_rejected}
        if settings.has_reference:
            means |= {"chosen_reward": settings.beta * (policy_chosen - reference_chosen)}
            means |= {"rejected_reward": settings.beta * (policy_rejected - reference_rejected)}
        gauges = {name: values.sum() / step.pairs for name, values in means.items()}
        return loss, gauges | {"dpo_loss": dpo, "sft_loss": sft_loss}


def pair_logps(
    model: nn.Module, pairs: Sequence[Pair], settings: TrainDPO, sft: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Log-probabilities of some pairs, from one forward pass; a token that counts nowhere is not scored.

    Args:
        model: see `forest_logps`.
        pairs: of this pack.
        settings: decide the weights in the margin.
        sft: for each pair the weights of chosen's tokens in the SFT term; only where they are not 0 matters here.

    Returns:
        Those of chosen's tokens (0 for one that is not scored), and the sums in the margin of chosen and of rejected,
        both (pairs,).
    """
    margins = [
        *(margin_weights(len(pair.chosen), len(pair.rejected), pair.prefix, settings) for pair in pairs),
        *(margin_weights(len(pair.rejected), len(pair.chosen), pair.prefix, settings) for pair in pairs),
    ]
    needed = [*(m + s for m, s in zip(margins, sft, strict=False)), *margins[len(pairs) :]]
    starts = [min(int((weights == 0).long().cumprod(0).sum()), len(weights) - 1) for weights in needed]
    prompts = [len(pair.prompt) for pair in pairs] * 2
    chains = [pair.chains[side] for side in (0, 1) for pair in pairs]
    scored = [Scored(ids, prompt + start) for ids, prompt, start in zip(chains, prompts, starts, strict=True)]
    logps = [
        nn.functional.pad(values, (start, 0)) for values, start in zip(forest_logps(model, scored), starts, strict=True)
    ]
    sums = torch.stack([weighted(values, weights) for values, weights in zip(logps, margins, strict=True)])
    return logps[: len(pairs)], sums[: len(pairs)], sums[len(pairs) :]


def sft_weights(pairs: Sequence[Pair], settings: TrainDPO) -> list[Tensor]:
    """How much each token of each pair's chosen completion counts in the SFT term of a step of these pairs."""
    if settings.scope == "dedup":
        counts = multiplicities([Scored(pair.chains[0], len(pair.prompt)) for pair in pairs])
        return [1 / count.double() for count in counts]
    weights = [torch.ones(len(pair.chosen), dtype=torch.float64) for pair in pairs]
    if settings.scope == "suffix":
        for pair, each in zip(pairs, weights, strict=True):
            each[: pair.prefix] = 0
    return weights


def reference_logps(
    model: nn.Module,
    pairs: Sequence[Pair],
    settings: TrainDPO,
    arguments: TrainingArguments,
    on_progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Log-probabilities of (chosen, rejected) under the model as it is, as they are in the margin: (pairs, 2).

    Packed like a step, and dealt out to the processes of a distributed run.
    """
    place = {id(pair): index for index, pair in enumerate(pairs)}
    sums = torch.zeros(len(pairs), 2, device=arguments.device)
    done = 0
    model.eval()
    with torch.no_grad(), torch.autocast(arguments.device.type, torch.bfloat16, enabled=arguments.bf16):
        for pack in packs(pairs, settings.pack_tokens)[arguments.process_index :: arguments.world_size]:
            none = [torch.zeros(len(pair.chosen), dtype=torch.float64) for pair in pack]
            with room_for(pack, "in the reference", settings.pack_tokens):
                _, chosen, rejected = pair_logps(model, pack, settings, none)
            sums[[place[id(pair)] for pair in pack]] = torch.stack([chosen, rejected], 1).to(sums)
            done += len(pack) * arguments.world_size
            if on_progress is not None:
                on_progress(min(done, len(pairs)), len(pairs))
    return add_over_processes(sums).cpu()


def _with_reference(
    model: nn.Module,
    pairs: Sequence[Pair],
    settings: TrainDPO,
    out: Path,
    student: str,
    arguments: TrainingArguments,
    on_progress: Callable[[int, int], None] | None,
) -> list[ReferencedPair]:
    """The pairs with their reference, computed before step 0, and kept for a resume and for runs beside this one.

    The file is named by what it depends on: the student's weights, the pairs, and how a margin counts tokens.
    """
    if not settings.has_reference:
        return [ReferencedPair(pair, 0.0, 0.0) for pair in pairs]
    margin = settings.model_dump(include={"loss", "mask_prefix", "ld_alpha"})
    content = json.dumps([student, [pair.chains for pair in pairs], margin, arguments.bf16], sort_keys=True)
    name = hashlib.sha256(content.encode()).hexdigest()[:16]
    path = out.parent / "reference" / f"{name}.safetensors"
    with arguments.main_process_first(local=False):
        cached = path.exists()
    if not cached:
        logps = reference_logps(model, pairs, settings, arguments, on_progress)
        if arguments.process_index == 0:
            with whole_file(path) as draft:
                save_file({"logps": logps}, draft)
    else:
        logps = load_file(path)["logps"]
    chosen, rejected = logps.unbind(1)
    return [ReferencedPair(*row) for row in zip(pairs, chosen.tolist(), rejected.tolist(), strict=True)]

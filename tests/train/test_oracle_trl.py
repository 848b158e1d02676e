"""TRL as an oracle: on the same rows and weights, its losses and gradients are ours wherever it has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tests.support.tiny_student import distance, dpo_row, gradients, sft_row, tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from cotree.models.encode import encode_dpo, encode_sft
from cotree.train.dpo import PairTrainer, with_reference
from cotree.train.model import load_model
from cotree.train.settings import DPO, SFT
from cotree.train.sft import ChainTrainer
from cotree.train.trainer import training_arguments

ROWS = 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The policy and its reference. Nothing follows the end of turn: TRL would score it, cotree trims it."""
    root = tmp_path_factory.mktemp("oracle")
    for name, seed in (("policy", 0), ("reference", 0)):
        model = tiny_model(seed=seed)
        if name == "policy":
            torch.manual_seed(5)
            with torch.no_grad():
                for values in model.parameters():
                    values += 0.02 * torch.randn_like(values)
        model.save_pretrained(root / name)
        tiny_tokenizer(newline=False).save_pretrained(root / name)
    return root / "policy", root / "reference"


def theirs(trainer: Any) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of a TRL trainer on its one batch."""
    (batch,) = trainer.get_train_dataloader()
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), {name: values.grad for name, values in trainer.model.named_parameters()}


def options(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": ROWS,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "bf16": False,
        "max_length": None,
        "report_to": [],
        "disable_tqdm": True,
    }


def trl_dpo(folders: tuple[Path, Path], tmp_path: Path, **settings: Any) -> tuple[float, dict[str, Tensor]]:
    from trl import DPOConfig, DPOTrainer

    columns = ("prompt", "chosen", "rejected")
    rows = [{name: row[name] for name in columns} for row in map(dpo_row, range(ROWS))]
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders)
    trainer = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=DPOConfig(**options(tmp_path), **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folders[0]),
    )
    return theirs(trainer)


def our_dpo(folders: tuple[Path, Path], tmp_path: Path, settings: DPO) -> tuple[float, dict[str, Tensor]]:
    policy, reference = folders
    pairs = encode_dpo(AutoTokenizer.from_pretrained(policy), map(dpo_row, range(ROWS)), 512).rows
    arguments = training_arguments(tmp_path, settings, 1, 0)
    rows = with_reference(load_model(reference), pairs, arguments, settings)
    return gradients(PairTrainer(load_model(policy), [rows], arguments, settings), rows)


@pytest.mark.parametrize("mask_prefix", [True, False])
def test_dpo_is_trls_sigmoid_masked_or_not(mask_prefix: bool, folders: tuple[Path, Path], tmp_path: Path) -> None:
    expected, gradient = trl_dpo(folders, tmp_path, loss_type=["sigmoid"], beta=0.3)
    settings = DPO(beta=0.3, label_smoothing=0.0, alpha=0.0, mask_prefix=mask_prefix)
    loss, found = our_dpo(folders, tmp_path, settings)
    assert loss != pytest.approx(0.6931472, abs=1e-3)  # the policy has moved, so this compares something
    assert loss == pytest.approx(expected, rel=1e-5)
    assert distance(found, gradient) < 2e-5


def test_the_joint_loss_is_trls_where_the_norms_agree_and_differs_where_they_do_not(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """TRL's `sft` term is a token mean over its micro-batch: ours is one over the step, so one micro-batch agrees."""
    expected, gradient = trl_dpo(folders, tmp_path, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.7], beta=0.1)
    base = DPO(beta=0.1, label_smoothing=0.0, alpha=0.7, sft_scope="full", pack_tokens=1)
    loss, found = our_dpo(folders, tmp_path, base)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert distance(found, gradient) < 2e-5
    for change in ({"sft_norm": "pair"}, {"sft_scope": "suffix"}, {"label_smoothing": 0.2}):
        other, changed = our_dpo(folders, tmp_path, base.model_copy(update=change))
        assert other != pytest.approx(expected, rel=1e-4), change
        assert distance(changed, gradient) > 1e-3, change


@pytest.mark.parametrize(
    ("theirs_", "ours"),
    [
        ({"loss_type": ["sigmoid_norm"], "beta": 2.0}, {"loss": "length_normalised", "beta": 2.0}),
        ({"loss_type": ["sigmoid"], "ld_alpha": 0.3, "beta": 0.3}, {"loss": "ld_dpo", "ld_alpha": 0.3, "beta": 0.3}),
    ],
)
def test_the_variants_are_trls(
    theirs_: dict[str, Any], ours: dict[str, Any], folders: tuple[Path, Path], tmp_path: Path
) -> None:
    expected, gradient = trl_dpo(folders, tmp_path, **theirs_)
    settings = DPO(label_smoothing=0.0, alpha=0.0, mask_prefix=False, **ours)
    loss, found = our_dpo(folders, tmp_path, settings)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert distance(found, gradient) < 2e-5
    if ours["loss"] == "length_normalised":  # masking is no no-op here
        assert distance(our_dpo(folders, tmp_path, settings.model_copy(update={"mask_prefix": True}))[1], found) > 0.01


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_simpo_is_trls(folders: tuple[Path, Path], tmp_path: Path) -> None:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in map(dpo_row, range(ROWS))]
    trainer = CPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32),
        args=CPOConfig(
            **options(tmp_path), loss_type="simpo", cpo_alpha=0.0, beta=2.0, simpo_gamma=0.7, label_smoothing=0.1
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folders[0]),
    )
    expected, gradient = theirs(trainer)
    settings = DPO(
        loss="simpo", beta=2.0, simpo_gamma=0.7, label_smoothing=0.1, alpha=0.0, mask_prefix=False, batch_size=8
    )
    pairs = encode_dpo(AutoTokenizer.from_pretrained(folders[0]), rows, 512).rows
    arguments = training_arguments(tmp_path, settings, 1, 0)
    loss, found = gradients(PairTrainer(load_model(folders[0]), [pairs], arguments, settings), pairs)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert distance(found, gradient) < 2e-5


def test_trls_sigmoid_ignores_label_smoothing(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Why cDPO is checked against the formula and not against TRL."""
    plain, _ = trl_dpo(folders, tmp_path, loss_type=["sigmoid"], beta=0.3)
    smoothed, _ = trl_dpo(folders, tmp_path, loss_type=["sigmoid"], beta=0.3, label_smoothing=0.2)
    assert plain == smoothed


def test_sft_is_trls_completion_only_loss(folders: tuple[Path, Path], tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    rows = [{name: row[name] for name in ("prompt", "completion")} for row in map(sft_row, range(ROWS))]
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32),
        args=SFTConfig(**options(tmp_path), completion_only_loss=True, packing=False),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folders[0]),
    )
    expected, gradient = theirs(trainer)
    settings = SFT(batch_size=8)
    chains = encode_sft(AutoTokenizer.from_pretrained(folders[0]), map(sft_row, range(ROWS)), 512).rows
    arguments = training_arguments(tmp_path, settings, 1, 0)
    loss, found = gradients(ChainTrainer(load_model(folders[0]), [chains], arguments, settings), chains)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert distance(found, gradient) < 2e-5

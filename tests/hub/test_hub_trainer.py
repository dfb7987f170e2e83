"""Checkpoints of transformers' own Trainer carry what reduces the model."""

import matrix
import pytest
import tiny
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import pumer

# PEFT asks transformers by a name that it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
REDUCER = matrix.REDUCERS["pumer"]


class Rows(Dataset):
    """A few questions with soft scores for their answers."""

    def __len__(self):
        return 4

    def __getitem__(self, row):
        inputs = {name: x[row] for name, x in tiny.batch().items()}
        return inputs | {"labels": torch.eye(7)[row]}


def trainer(model, folder, steps=2, **arguments):
    settings = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=0.05,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
    )
    return Trainer(model, settings, train_dataset=Rows(), **arguments)


def same(model, other):
    return torch.equal(
        tiny.logits(model.eval(), tiny.batch()), tiny.logits(other.eval(), tiny.batch())
    )


def with_lora(model, folder):
    peft = pytest.importorskip("peft", reason="needs the package peft")
    pumer.remove(model).save_pretrained(folder)
    model = pumer.apply(type(model).from_pretrained(folder), REDUCER)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query", "value"]))


@pytest.mark.parametrize("reducer", ["pumer", "dynamicvit"])
def test_checkpoints_carry_the_reducer(tmp_path, reducer):
    model = pumer.apply(tiny.model(), REDUCER if reducer == "pumer" else reducer)
    trainer(model, tmp_path).train()
    loaded = pumer.load(tmp_path / "checkpoint-2")
    assert pumer.active(loaded).reducer == pumer.active(model).reducer
    assert same(loaded, model)


def test_a_training_goes_on_with_what_the_reducer_has_learned(tmp_path):
    first = pumer.apply(tiny.model(), "dynamicvit")
    trainer(first, tmp_path).train()
    again = pumer.apply(tiny.model(), "dynamicvit")
    before = {name: x.clone() for name, x in first.state_dict().items()}
    trainer(again, tmp_path).train(resume_from_checkpoint=True)  # has nothing left to do
    assert all(torch.equal(x, before[name]) for name, x in again.state_dict().items())


def test_an_adapter_put_on_later_needs_the_callback(tmp_path):
    model = with_lora(tiny.model(), tmp_path / "base")
    trainer(model, tmp_path / "without").train()
    assert not (tmp_path / "without/checkpoint-2/pumer.json").exists()
    run = trainer(model, tmp_path / "with", callbacks=[pumer.PumerCallback()])
    run.train()
    run.save_model(tmp_path / "last")
    for folder in (tmp_path / "with/checkpoint-2", tmp_path / "last"):
        loaded = pumer.load(folder)
        assert pumer.active(loaded).reducer == REDUCER
        assert same(loaded, model)
    pumer.remove(model)
    assert "save_pretrained" not in vars(model)


def test_a_model_in_a_module_of_the_users_gets_its_settings(tmp_path):
    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, **inputs):
            return self.module(**inputs)

    model = Wrapper(pumer.apply(tiny.model(), REDUCER))
    trainer(model, tmp_path, callbacks=[pumer.PumerCallback()]).train()
    assert pumer.presets.read_reducer(tmp_path / "checkpoint-2/pumer.json") == REDUCER


def test_an_unreduced_model_gets_nothing(tmp_path):
    trainer(tiny.model(), tmp_path, callbacks=[pumer.PumerCallback()]).train()
    assert not (tmp_path / "checkpoint-2/pumer.json").exists()

"""Folders that `pumer train` writes, read by transformers' own means and by `pumer.processor`."""

import importlib
import sys

import numpy as np
import pytest
import tiny_llm
import torch
from PIL import Image
from tiny_processor import processor_of
from transformers import AutoProcessor, BatchFeature, pipeline

import pumer
from pumer.lab.data.text import load_tokenizer, save_tokenizer, train_tokenizer
from pumer.lab.scenes.tasks import Scenes
from pumer.lab.tasks.inputs import load_inputs
from pumer.lab.train.run import train
from pumer.lab.train.settings import ModelSettings, TrainSettings
from test_lmms_eval import GREEDY, INSTALLED, requests, stand_in

# PEFT asks transformers by a name that it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

WIDTH = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
IMAGES = {"image_size": 32, "patch_size": 8}
TASK = {"name": "scenes", "questions": 16, "image_size": 32}
STEPS = {
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "report_to": "none",
    "disable_tqdm": True,
}
QUESTIONS = ["is there a red circle?", "how many blue squares are there?"]
VILT = WIDTH | IMAGES | {"num_hidden_layers": 3, "vocab_size": 150, "max_position_embeddings": 24}
METER = WIDTH | {
    "num_hidden_layers": 2,
    "text_config": WIDTH
    | {"num_hidden_layers": 1, "vocab_size": 150, "max_position_embeddings": 26, "pad_token_id": 0},
    "vision_config": WIDTH | IMAGES | {"num_hidden_layers": 1},
}
LLAVA = {
    "text_config": WIDTH
    | {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
    },
    "vision_config": WIDTH
    | IMAGES
    | {"model_type": "clip_vision_model", "num_hidden_layers": 2, "hidden_act": "gelu"},
    "vision_feature_layer": -1,
}
KINDS = {
    "ViltForQuestionAnswering": VILT,
    "MeterForQuestionAnswering": METER,
    "LlavaForConditionalGeneration": LLAVA,
}


def noise(seed, width=70, height=40):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of a trained model, by its class."""
    tokenizer = tmp_path_factory.mktemp("tokenizer")
    texts = [example.text for example in Scenes(questions=300, image_size=32).examples("train")[:]]
    words = train_tokenizer(texts, 150)
    words("padded and cut", padding="max_length", truncation=True, max_length=9)
    words.save_pretrained(tokenizer)  # as the shipped ones were, between two calls
    written = {}

    def folder(kind):
        if kind not in written:
            out = tmp_path_factory.mktemp(kind)
            model = ModelSettings(
                kind=kind, tokenizer=str(tokenizer), config=KINDS[kind], max_length=24
            )
            image = {"kind": "square", "size": 32}
            train(TrainSettings(str(out), TASK, model, image=image, eval_split=None, trainer=STEPS))
            written[kind] = out / "model"
        return written[kind]

    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_makes_the_same_pixels(folders, kind):
    theirs, ours = AutoProcessor.from_pretrained(folders(kind)), pumer.processor(folders(kind))
    images = [noise(0), noise(1, 33, 64)]
    pixels = theirs.image_processor(images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, ours(QUESTIONS, images)["pixel_values"], atol=1e-6, rtol=0)


def test_a_processor_needs_no_weights(folders):
    folder = folders("ViltForQuestionAnswering")
    model = pumer.load(folder)
    batch = pumer.processor(folder)(QUESTIONS, [noise(0), noise(1)])
    assert isinstance(batch, BatchFeature)
    for name, value in load_inputs(folder, model)(QUESTIONS, [noise(0), noise(1)]).items():
        assert torch.equal(batch[name], value)
    assert batch.to(dtype=torch.bfloat16)["pixel_values"].dtype == torch.bfloat16
    assert model(**batch).logits.shape[0] == 2


def test_a_processor_of_a_decoder_and_of_an_adapters_base(tmp_path):
    peft = pytest.importorskip("peft", reason="needs the package peft")
    model = tiny_llm.model("llava")
    model.save_pretrained(tmp_path / "base")
    processor_of("llava").save_pretrained(tmp_path / "base")
    model = type(model).from_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    pumer.save(pumer.apply(adapted, "divprune"), tmp_path / "adapter")
    for folder in (tmp_path / "base", tmp_path / "adapter"):
        batch = pumer.processor(folder)("w4 w5", noise(0))
        assert model.generate(**batch, max_new_tokens=2, do_sample=False).shape[0] == 1
    with pytest.raises(ValueError, match=r"is not a model folder\. It has no config\.json"):
        pumer.processor(tmp_path)
    with pytest.raises(ValueError, match="Did you mean 'scenes-vilt'"):
        pumer.processor("scenes-vlit")


def test_a_processor_on_the_hub_is_fetched_without_weights(folders, monkeypatch):
    asked = {}

    def fetch(name, **kwargs):
        asked.update(kwargs, name=name)
        return str(folders("ViltForQuestionAnswering"))

    monkeypatch.setattr("pumer.hub.sources.snapshot_download", fetch)
    assert pumer.processor("owner/name", revision="v1", token="hf_mine")(QUESTIONS[0], noise(0))
    assert (asked["name"], asked["revision"], asked["token"]) == ("owner/name", "v1", "hf_mine")
    assert not any("safetensors" in pattern for pattern in asked["allow_patterns"])


def answer(folder, question, image):
    """What `generate` writes of pumer's own inputs."""
    model = pumer.load(folder)
    inputs = load_inputs(folder, model)
    batch = inputs(question, image)
    ids = model.generate(**batch, max_new_tokens=6, do_sample=False)
    return inputs.tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def spread(folder):
    """Give a model weights large enough to answer differently."""
    model = pumer.load(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.0 if "embed" in name or "lm_head" in name else 0.25)
    model.save_pretrained(folder)


def test_a_llava_answers_in_transformers_pipeline_and_in_lmms_eval(folders):
    folder = folders("LlavaForConditionalGeneration")
    spread(folder)
    asked = [(question, noise(seed)) for seed, question in enumerate([*QUESTIONS, "is it big?"])]
    ours = [answer(folder, *pair).strip() for pair in asked]
    assert len(set(ours)) > 1
    ask = pipeline("image-text-to-text", model=str(folder), device="cpu")
    settings = {"max_new_tokens": 6, "do_sample": False}
    chats = [
        [
            {
                "role": "user",
                "content": [{"type": "image", key: image}, {"type": "text", "text": question}],
            }
        ]
        for key in ("image", "url")
        for question, image in asked
    ]
    theirs = [
        ask(text=chat, return_full_text=False, generate_kwargs=settings) for chat in chats[:3]
    ]
    # A pipeline decodes the answer behind its prompt, where the first token may go on with a word.
    assert [rows[0]["generated_text"].strip() for rows in theirs] == [
        text.removeprefix("##") for text in ours
    ]
    with pytest.MonkeyPatch.context() as patch:
        if not INSTALLED:
            for name, module in stand_in().items():
                patch.setitem(sys.modules, name, module)
        plugin = importlib.import_module("pumer.lmms_eval")
        model = plugin.PumerModel(str(folder), device="cpu", batch_size=2)
        assert model.generate_until(requests(model, chats[3:], GREEDY)) == ours
    if not INSTALLED:
        del sys.modules["pumer.lmms_eval"], pumer.lmms_eval


def test_tokenizers_are_saved_without_their_last_call(tmp_path):
    tokenizer = train_tokenizer(QUESTIONS, 60)
    tokenizer(QUESTIONS, padding="max_length", truncation=True, max_length=4)
    tokenizer.save_pretrained(tmp_path / "theirs")
    theirs = load_tokenizer(tmp_path / "theirs")
    assert (
        theirs.init_kwargs["max_length"] == 4
    )  # by which a processor cuts off what an image stands for
    save_tokenizer(theirs, tmp_path / "ours")
    ours = load_tokenizer(tmp_path / "ours")
    assert "max_length" not in ours.init_kwargs
    assert ours.backend_tokenizer.truncation is None
    assert ours.backend_tokenizer.padding is None
    assert theirs.init_kwargs["max_length"] == 4

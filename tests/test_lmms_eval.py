"""The model for lmms-eval: what it answers, what it refuses, and a run of lmms-eval itself where
that is installed.

lmms-eval brings gigabytes along, so most tests take a stand-in for the few things of it that the
model touches: the base class, the manifest and the requests of its chat interface, as lmms-eval
0.7.3 has them.
"""

import importlib
import importlib.util
import json
import sys
import tomllib
from dataclasses import make_dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import tiny_llm
import torch
import transformers
from PIL import Image
from tiny_processor import PROCESSORS, VIDEOS, processor_of
from transformers import AutoProcessor

import halves
import pumer
from pumer.reducers import DivPrune, FastV, Unreduced

ROOT = Path(__file__).parents[1]
INSTALLED = importlib.util.find_spec("lmms_eval") is not None
GREEDY = {"max_new_tokens": 6, "temperature": 0, "do_sample": False, "until": []}


# --- lmms-eval, or what stands in for it ---


@pytest.fixture(scope="module")
def plugin():
    """`pumer.lmms_eval`."""
    with pytest.MonkeyPatch.context() as patch:
        if not INSTALLED:
            for name, module in stand_in().items():
                patch.setitem(sys.modules, name, module)
        yield importlib.import_module("pumer.lmms_eval")
    if not INSTALLED:
        del sys.modules["pumer.lmms_eval"], pumer.lmms_eval


def stand_in():
    class lmms:
        is_simple = True

        def __init__(self):
            self._rank, self._world_size, self.task_dict = 0, 1, {}

        rank = property(lambda self: self._rank)
        world_size = property(lambda self: self._world_size)

    fields = ["model_id", ("simple_class_path", str, None), ("chat_class_path", str, None)]
    contents = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": lmms},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {
            "ModelManifest": make_dataclass("ModelManifest", fields, frozen=True)
        },
    }
    modules = {}
    for name, content in contents.items():
        modules[name] = ModuleType(name)
        vars(modules[name]).update(content)
    return modules


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of a small model by its family, with its processor if that is complete."""
    made = {}

    def folder(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            tiny_llm.model(family).save_pretrained(made[family])
            if family not in VIDEOS:
                processor_of(family).save_pretrained(made[family])
        return str(made[family])

    return folder


@pytest.fixture
def opened(plugin, folders, monkeypatch):
    """Open a model as lmms-eval does."""

    def open_(family="llava", **arguments):
        with monkeypatch.context() as patch:
            if family in VIDEOS:
                patch.setattr(
                    AutoProcessor, "from_pretrained", lambda *_, **__: processor_of(family)
                )
            return plugin.PumerModel(folders(family), device="cpu", **arguments)

    return open_


def picture(number):
    torch.manual_seed(number)
    size = ((60, 30), (64, 64), (40, 64))[number % 3]
    return Image.fromarray(torch.randint(256, (size[1], size[0], 3), dtype=torch.uint8).numpy())


def asked(*parts):
    """A conversation: texts, and numbers of pictures."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "url": picture(part)}
        for part in parts
    ]
    return [{"role": "user", "content": content}]


def requests(model, conversations, settings=GREEDY):
    """What lmms-eval 0.7.3 asks of a model that takes conversations."""
    model.task_dict = {"task": {"test": conversations}}
    settings = settings if isinstance(settings, list) else [settings] * len(conversations)
    return [
        SimpleNamespace(args=("", lambda doc: doc, dict(own), number, "task", "test"))
        for number, own in enumerate(settings)
    ]


def directly(family, conversation, reducer, **settings):
    """The same question put to transformers, with the family's template written out."""
    processor, model = processor_of(family), tiny_llm.model(family)
    mark = "<image>" if family == "paligemma" else processor.chat_template.split("'")[1].strip()
    content = conversation[0]["content"]
    if family == "paligemma":
        text = mark * sum(part["type"] == "image" for part in content)
        text += "\n".join(part["text"] for part in content if part["type"] == "text")
    else:
        text = (
            " ".join(mark if part["type"] == "image" else part["text"] for part in content) + " w3"
        )
    images = [part["url"] for part in content if part["type"] == "image"]
    inputs = processor(text=[text], images=[images] if images else None, return_tensors="pt")
    inputs.pop("labels", None)
    if reducer is not None:
        pumer.apply(model, reducer)
    ids = model.generate(**inputs, **{"do_sample": False, "max_new_tokens": 6} | settings)
    return processor.tokenizer.decode(
        ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    ).strip()


CONVERSATIONS = [
    asked(0, "w4 w5 w6"),
    asked("w7", 1, "w8", 2, "w9 w10 w11"),
    asked("w12 w13"),
    asked(2, "w14 w15 w16 w17"),
    asked(1, 0, "w18"),
]


# --- what it answers ---


# PaliGemma's processor makes NumPy arrays of torch's tensors, whose __array__ is older than NumPy
# 2:
# https://numpy.org/devdocs/numpy_2_0_migration_guide.html#adapting-to-changes-in-the-copy-keyword
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("family", PROCESSORS)
@pytest.mark.parametrize("reducer", halves.sweep([None, "fastv", "divprune"], ("fastv",)))
def test_answers_are_those_of_generate(opened, family, reducer):
    """Batches of prompts of different lengths, with one image, several or none: as each alone,
    without lmms-eval.

    PaliGemma's processor takes no prompt without an image.
    """
    settings = {None: {}, "fastv": {"layer": 1, "keep": 0.5}, "divprune": {"keep": 0.5}}[reducer]
    alone = {None: None, "fastv": FastV(keep=0.5, layer=1), "divprune": DivPrune(keep=0.5)}[reducer]
    model = opened(family, reducer=reducer, batch_size="3", **settings)
    conversations = (
        [CONVERSATIONS[row] for row in (0, 1, 3, 4)] if family == "paligemma" else CONVERSATIONS
    )
    answers = model.generate_until(requests(model, conversations))
    assert answers == [directly(family, conversation, alone) for conversation in conversations]
    assert any(answers)


def test_a_reducer_changes_answers(opened):
    whole, less = opened(), opened(reducer="fastv", keep=1, layer=1)
    assert pumer.api.active(whole.model) is None
    assert pumer.api.active(less.model).reducer == FastV(keep=1, layer=1)
    first, second = (
        model.generate_until(requests(model, CONVERSATIONS)) for model in (whole, less)
    )
    assert first != second
    assert first[2] == second[2]  # nothing to reduce


def test_different_settings_are_not_mixed(opened):
    model = opened(batch_size=4)
    settings = [GREEDY | {"max_new_tokens": number} for number in (2, 5, 2, 5)]
    answers = model.generate_until(requests(model, [CONVERSATIONS[0]] * 4, settings))
    assert answers[0] == answers[2] == directly("llava", CONVERSATIONS[0], None, max_new_tokens=2)
    assert answers[1] == answers[3] == directly("llava", CONVERSATIONS[0], None, max_new_tokens=5)


def test_settings_of_tasks_reach_generate(opened, monkeypatch):
    model, seen = opened(), {}
    generate = model.model.generate

    def watched(**kwargs):
        seen.update(kwargs)
        return generate(**kwargs)

    monkeypatch.setattr(model.model, "generate", watched)

    def given(**settings):
        seen.clear()
        model.answer([CONVERSATIONS[0]], {"max_new_tokens": 2} | settings)
        names = ("do_sample", "temperature", "top_p", "num_beams", "max_new_tokens")
        return tuple(seen.get(name) for name in names)

    assert given() == (False, None, None, None, 2)
    assert given(temperature=0, top_p=None, num_beams=1) == (False, None, None, 1, 2)
    assert given(temperature=0.7, top_p=0.9, num_beams=3) == (True, 0.7, 0.9, 3, 2)
    assert given(temperature=0.7, do_sample=False) == (False, None, None, None, 2)
    assert given(temperature=0, do_sample=True) == (False, None, None, None, 2)
    assert given(do_sample=True, image_aspect_ratio="original", until=["x"]) == (
        True,
        None,
        None,
        None,
        2,
    )
    assert {"image_aspect_ratio", "until"}.isdisjoint(seen)
    monkeypatch.setattr(
        model.model, "generate", lambda **kwargs: seen.update(kwargs) or kwargs["input_ids"]
    )
    assert model.answer([CONVERSATIONS[0]], {"max_new_tokens": None}) == [""]
    assert seen["max_new_tokens"] == 1024


def test_beams_and_greedy_whatever_the_model_prefers(opened):
    model = opened(reducer="fastv", layer=1)
    reducer = FastV(layer=1)
    beams = model.generate_until(requests(model, CONVERSATIONS[:1], GREEDY | {"num_beams": 3}))
    assert beams == [directly("llava", CONVERSATIONS[0], reducer, num_beams=3)]
    model.model.generation_config.update(do_sample=True, temperature=5.0, top_k=50)
    assert model.generate_until(requests(model, CONVERSATIONS[:1])) == [
        directly("llava", CONVERSATIONS[0], reducer)
    ]


def test_answers_end_where_the_task_says(opened):
    model = opened()
    (whole,) = model.answer([CONVERSATIONS[0]], GREEDY)
    words = whole.split()
    assert len(words) > 2
    assert (
        model.answer([CONVERSATIONS[0]], GREEDY | {"until": words[-1]})[0]
        == whole.split(words[-1])[0].strip()
    )
    assert model.answer([CONVERSATIONS[0]], GREEDY | {"until": ["", "none", words[0]]}) == [""]


def test_images_come_as_files_too(opened, tmp_path):
    model, file = opened(), tmp_path / "picture.png"
    picture(0).save(file)
    messages = asked(0, "w4 w5 w6")
    messages[0]["content"][0]["url"] = str(file)
    assert model.answer([messages], GREEDY) == model.answer([CONVERSATIONS[0]], GREEDY)


def test_a_template_may_begin_the_text_itself(opened):
    model = opened()
    model.processor.chat_template = "<s>" + model.processor.chat_template
    seen = []
    model.model.generate = lambda **kwargs: seen.append(kwargs["input_ids"]) or kwargs["input_ids"]
    backend = model.processor.tokenizer.backend_tokenizer
    backend.post_processor = (
        transformers.tokenization_utils_tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    )
    model.answer([CONVERSATIONS[0]], GREEDY)
    assert (seen[0] == 1).sum() == 1


def test_rounds(opened):
    """Each round's prompt is made from the answers so far, until the task says that it is
    enough."""
    model = opened()

    def messages_of(doc, round_idx=None, previous_output=None, previous_round_info=None):
        if round_idx is None:
            return asked(0, doc)
        assert len(previous_output) == round_idx
        assert previous_round_info == (None if round_idx == 1 else "w9")
        if round_idx == 3:
            return None, True, previous_output, None
        return asked(previous_output[-1]), False, previous_output, "w9"

    model.task_dict = {"task": {"test": ["w4"]}}
    request = SimpleNamespace(args=("", messages_of, GREEDY, 0, "task", "test"))
    ((first, second, third),) = model.generate_until_multi_round([request])
    assert first == directly("llava", asked(0, "w4"), None)
    assert second == directly("llava", asked(first), None)
    assert third == directly("llava", asked(second), None)


# --- how it is opened ---


def test_reducers_and_their_settings(opened, tmp_path):
    def reducer(**arguments):
        return pumer.api.active(opened(**arguments).model).reducer

    assert reducer(reducer="none") == Unreduced()
    assert reducer(reducer="pyramiddrop", keep="[0.5, 0.25]", layers="[0,2]").layers == (0, 2)
    (tmp_path / "mine.yaml").write_text("reducer: fastv\nkeep: 0.3\nlayer: 1\n")
    assert reducer(reducer=str(tmp_path / "mine.yaml")) == FastV(keep=0.3, layer=1)
    assert reducer(reducer=str(tmp_path / "mine.yaml"), keep=0.7) == FastV(keep=0.7, layer=1)
    (tmp_path / "mine.json").write_text(json.dumps({"reducer": "fastv", "keep": 0.3, "layer": 1}))
    assert reducer(reducer=str(tmp_path / "mine.json")) == FastV(keep=0.3, layer=1)


def test_a_folder_of_pumer_brings_its_reducer(plugin, tmp_path):
    pumer.save(pumer.apply(tiny_llm.model(), FastV(keep=0.3, layer=1)), tmp_path / "model")
    processor_of("llava").save_pretrained(tmp_path / "model")

    def opened(**arguments):
        return pumer.api.active(
            plugin.PumerModel(str(tmp_path / "model"), device="cpu", **arguments).model
        ).reducer

    assert opened() == FastV(keep=0.3, layer=1)
    assert opened(reducer="none") == Unreduced()


def test_settings_of_the_image_processor(opened):
    model = opened(
        reducer="fastv", layer=1, do_normalize=False, crop_size="{height: 32, width: 32}"
    )
    assert model.processor.image_processor.do_normalize is False
    assert model.processor.image_processor.crop_size["width"] == 32
    assert model.processor.tokenizer.padding_side == "left"


def test_settings_of_the_model(opened):
    model = opened(dtype="bfloat16", attn_implementation="eager", reducer="fastv", layer=1)
    assert model.model.dtype == torch.bfloat16
    assert model.model.config._attn_implementation == "eager"
    assert len(model.generate_until(requests(model, CONVERSATIONS))) == len(CONVERSATIONS)
    assert (model.rank, model.world_size, model.device) == (0, 1, torch.device("cpu"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"reducer": "fastv", "kep": 0.5},
            "kep is a setting neither of fastv, which has keep, layer, nor of CLIP",
        ),
        ({"keep": 0.5}, "keep is a setting neither of no reducer"),
        ({"reducer": "nothing"}, "no reducer is named 'nothing'"),
        ({"reducer": "nothing.yaml"}, "there is no file nothing.yaml"),
        ({"reducer": "dymu"}, "dymu"),
        ({"batch_size": "auto"}, "batch_size is auto: give a number"),
        ({"batch_size": 0}, "batch_size is 0: give a number"),
    ],
)
def test_what_cannot_be_opened(opened, arguments, message):
    with pytest.raises(ValueError, match=message):
        opened(**arguments)


def test_what_it_does_not_do(opened):
    model = opened()
    video = [
        {
            "role": "user",
            "content": [{"type": "video", "url": "a.mp4"}, {"type": "text", "text": "w4"}],
        }
    ]
    with pytest.raises(ValueError, match="cannot run a task with video"):
        model.generate_until(requests(model, [video]))
    with pytest.raises(NotImplementedError, match="the form of the task that generates"):
        model.loglikelihood([])


# --- how lmms-eval finds it ---


def test_the_entry_point(plugin):
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    manifest = EntryPoint("pumer", points["lmms_eval.models"]["pumer"], "lmms_eval.models").load()
    assert (manifest.model_id, manifest.simple_class_path) == ("pumer", None)
    module, name = manifest.chat_class_path.rsplit(".", 1)
    assert getattr(importlib.import_module(module), name) is plugin.PumerModel
    assert not plugin.PumerModel.is_simple


def test_without_lmms_eval(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "pumer.lmms_eval", raising=False)
    with pytest.raises(
        ImportError,
        match=r"benchmarks of lmms-eval need lmms_eval.*: .*pip install '\.\[lmms-eval\]'",
    ):
        importlib.import_module("pumer.lmms_eval")


@pytest.mark.parametrize("arguments", ["", ",reducer=fastv,keep=0.5,layer=1"])
def test_a_run_of_lmms_eval(plugin, folders, tmp_path, arguments):
    """A task of its own, from the command line's arguments to the score."""
    evaluator = pytest.importorskip("lmms_eval.evaluator")
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.tasks import TaskManager

    MODEL_REGISTRY_V2.register_manifest(plugin.MANIFEST, overwrite=True)
    reducer = FastV(keep=0.5, layer=1) if arguments else None
    right = [
        directly("llava", conversation, reducer)
        for conversation in (asked(0, "w4 w5"), asked(1, "w6"))
    ]
    for number in range(3):
        picture(number).save(tmp_path / f"{number}.png")
    docs = [
        {"image": str(tmp_path / "0.png"), "question": "w4 w5", "answer": right[0]},
        {"image": str(tmp_path / "1.png"), "question": "w6", "answer": right[1]},
        {"image": str(tmp_path / "2.png"), "question": "w7 w8 w9", "answer": "something else"},
    ]
    (tmp_path / "docs.json").write_text(json.dumps(docs))
    (tmp_path / "utils.py").write_text(
        "from PIL import Image\ndef visual(doc):\n    return "
        "[Image.open(doc['image']).convert('RGB')]\n"
        "def text(doc, lmms_eval_specific_kwargs=None):\n    return doc['question']\n"
    )
    (tmp_path / "tiny.yaml").write_text(
        "task: pumer_tiny\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files: {tmp_path / 'docs.json'}\n  cache_dir: "
        f"{tmp_path / 'cache'}\n"
        "test_split: train\noutput_type: generate_until\n"
        "doc_to_visual: !function utils.visual\ndoc_to_text: !function utils.text\ndoc_to_target: "
        "answer\n"
        "generation_kwargs:\n  max_new_tokens: 6\n  temperature: 0\n  until: []\n"
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
    )
    results = evaluator.simple_evaluate(
        model="pumer",
        model_args=f"pretrained={folders('llava')}{arguments}",
        tasks=["pumer_tiny"],
        batch_size="2",
        device="cpu",
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        cli_args=SimpleNamespace(process_with_media=False, output_path=None),
    )
    score = results["results"]["pumer_tiny"]
    assert [value for name, value in score.items() if name.startswith("exact_match,")] == [
        pytest.approx(2 / 3)
    ]

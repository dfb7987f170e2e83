"""A folder as users have it on their disks: models and data of every task, and what is broken in
each possible way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import tiny
import tiny_llm
import yaml
from PIL import Image
from tiny_processor import processor_of
from transformers import GPT2Config, GPT2LMHeadModel

import pumer
from pumer.lab.data.text import train_tokenizer
from pumer.lab.data.transforms import Square, save_transform

FIXTURES = Path(__file__).parents[2] / "data" / "fixtures"
PHOTO = "vqa/val2014/COCO_val2014_000000000001.png"
RECIPE = {
    "task": {"name": "vqav2", "root": "vqa"},
    "model": {"path": "vqa-model"},
    "train_split": "val2014",
    "eval_split": "val2014",
    "trainer": {
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "report_to": [],
        "disable_tqdm": True,
    },
}
STUDY = {
    "name": "small",
    "model": "vqa-model",
    "task": {"name": "vqav2", "root": "vqa"},
    "split": "val2014",
    "timed": 2,
    "batch_size": 2,
    "methods": [
        {"name": "PuMer", "reducer": "pumer", "points": [{"layers": [1]}, {"layers": [2]}]}
    ],
}
ANSWERS = ["2", "3", "blue", "green", "no", "red", "yes"]


def build(folder: Path) -> None:
    """Fill a folder, once for all mistakes."""
    shutil.copytree(FIXTURES / "vqav2", folder / "vqa")
    for name in ("nlvr2", "snli-ve", "flickr30k"):
        shutil.copytree(FIXTURES / name, folder / name)
    _models(folder)
    _broken_models(folder)
    _broken_data(folder)
    _files(folder)
    _settings(folder)


def _models(folder: Path) -> None:
    names = dict(enumerate(ANSWERS))
    vqa = tiny.model(id2label=names, label2id={name: number for number, name in names.items()})
    _save(vqa, folder / "vqa-model")
    _save(tiny.model("ViltForImagesAndTextClassification", num_labels=2), folder / "nlvr-model")
    _save(tiny.model("ViltForImageAndTextRetrieval"), folder / "retrieval-model")
    _save(tiny.model("MeterForQuestionAnswering", id2label=names), folder / "meter-model", pad=1)
    animals = dict(enumerate(["cat", "dog", "cow"]))
    _save(
        tiny.model("ViltForVisualEntailment", id2label=animals, num_labels=3),
        folder / "animals-model",
    )
    decoder = tiny_llm.model("llava")
    decoder.save_pretrained(folder / "decoder")
    processor_of("llava").save_pretrained(folder / "decoder")


def _save(model, folder: Path, pad: int = 0) -> None:
    pumer.save(model, folder)
    train_tokenizer(
        ["how many balls are there", "is the red ball left of the blue one"], 50
    ).save_pretrained(folder)
    save_transform(Square(96), folder)


def _broken_models(folder: Path) -> None:
    def like(name: str) -> Path:
        return Path(shutil.copytree(folder / "vqa-model", folder / name))

    (like("no-tokenizer") / "tokenizer.json").unlink()
    (folder / "no-tokenizer/tokenizer_config.json").unlink()
    (like("no-transform") / "preprocessor_config.json").unlink()
    (like("no-weights") / "model.safetensors").unlink()
    (like("no-config") / "config.json").unlink()
    weights = like("cut-weights") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    config = like("cut-config") / "config.json"
    config.write_text(config.read_text()[:100])
    like("stock") / "pumer.json"
    (folder / "stock/pumer.json").unlink()
    _change(like("other-class") / "config.json", architectures=["ViltForMaskedLM"])
    _change(like("unknown-class") / "config.json", architectures=["ViltForEverything"])
    _change(like("newer") / "pumer.json", format=99)
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=8)).save_pretrained(
        folder / "gpt2"
    )


def _change(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _broken_data(folder: Path) -> None:
    questions, annotations = (
        "v2_OpenEnded_mscoco_val2014_questions.json",
        "v2_mscoco_val2014_annotations.json",
    )

    def like(name: str) -> Path:
        return Path(shutil.copytree(folder / "vqa", folder / name))

    photo = Path(PHOTO).relative_to("vqa")
    (like("lost-image") / photo).unlink()
    cut = like("cut-image") / photo
    cut.write_bytes(cut.read_bytes()[:-100])
    (like("text-image") / photo).write_text("this is no image")
    cut = like("cut-json") / questions
    cut.write_text(cut.read_text()[:300])
    _change(like("no-annotations") / annotations, annotations=[])
    (like("unlabelled") / annotations).unlink()
    other = like("other-ids") / annotations
    rows = json.loads(other.read_text())["annotations"]
    _change(other, annotations=[row | {"question_id": row["question_id"] + 7} for row in rows])
    aorta = like("other-answers") / annotations
    for row in rows:
        row["multiple_choice_answer"] = "aorta"
        row["answers"] = [answer | {"answer": "aorta"} for answer in row["answers"]]
    _change(aorta, annotations=rows)
    captions = (
        Path(shutil.copytree(folder / "flickr30k", folder / "cut-captions"))
        / "dataset_flickr30k.json"
    )
    captions.write_text(captions.read_text()[:-20])


def _files(folder: Path) -> None:
    (folder / "full").mkdir()
    (folder / "full/mine.txt").write_text("mine")
    (folder / "notes.txt").write_text("notes")
    (folder / "rows.csv").write_text("a,b\n1,2\n")
    (folder / "bare.csv").write_text("vilt,0.5\n")
    Image.new("RGB", (96, 96), "red").save(folder / "photo.png")
    (folder / "cut.png").write_bytes((folder / PHOTO).read_bytes()[:-100])
    (folder / "text.png").write_text("this is no image")
    pyarrow.parquet.write_table(pyarrow.table({"words": ["a", "b"]}), folder / "words.parquet")
    (folder / "cut.parquet").write_bytes((folder / "words.parquet").read_bytes()[:40])
    # Trainings that were stopped: one of other settings, one of an unknown version, one that is
    # finished.
    for name in ("begun", "unknown-run"):
        (folder / name / "checkpoint-1").mkdir(parents=True)
        (folder / name / "checkpoint-1/trainer_state.json").write_text("{}")
    other = RECIPE | {"seed": 9, "reducer": "tome"}
    (folder / "begun/recipe.yaml").write_text(yaml.safe_dump(other))
    shutil.copytree(folder / "vqa-model", folder / "done/model")


def _settings(folder: Path) -> None:
    def write(name: str, settings: object) -> None:
        text = settings if isinstance(settings, str) else yaml.safe_dump(settings, sort_keys=False)
        (folder / f"{name}.yaml").write_text(text)

    write("recipe", RECIPE)
    write("broken", "task: {name: vqav2\nmodel: [")
    write("list", ["task", "model"])
    write("empty", "")
    write("tabs", "task:\n\tname: vqav2\n")
    write("unknown", RECIPE | {"learning_rat": 1e-4})
    write("yes", RECIPE | {"task": {"name": "vqav2", "root": "vqa", "labels": [True, False]}})
    write("no-task", {name: value for name, value in RECIPE.items() if name != "task"})
    write("study", STUDY)
    method = STUDY["methods"][0]
    write("study-twice", STUDY | {"methods": [method, method]})
    write("study-same", STUDY | {"methods": [method, method | {"name": "other"}]})
    write("study-key", STUDY | {"method": []})
    write("study-model", STUDY | {"model": "nowhere"})
    write("study-none", STUDY | {"methods": []})
    write("study-method", STUDY | {"methods": [{"name": "PuMer", "reducers": "pumer"}]})
    write("study-reducer", STUDY | {"methods": [{"name": "PuMer", "reducer": "pumr"}]})
    write("study-deep", STUDY | {"methods": [method | {"points": [{"layers": [40]}]}]})
    write("study-seed", STUDY | {"seeds": [1, 2]})
    write("study-reference", STUDY | {"reference": "ToMe"})
    write("study-split", STUDY | {"split": "val2015"})
    write("study-examples", STUDY | {"examples": 100})
    write("study-train", STUDY | {"train": {"recipe": "recipe.yaml", "learning_rat": 1e-4}})
    write("study-trainer", STUDY | {"train": {"recipe": "recipe.yaml", "trainer": {"max_stps": 1}}})
    write("reducer", {"reducer": "tome", "dpth": 3})

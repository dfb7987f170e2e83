"""Mistakes that users make, over all commands: each is found before anything is computed, and says
how to mend it.

The folder in which they are made is `workshop`.
"""

import hashlib
import os
import shlex
import shutil
import sys

import pytest
import torch
import workshop
from workshop import PHOTO

from pumer.cli import COMMANDS, main

TRAIN = "train --config recipe.yaml --output new"
VQA = "eval --model vqa-model --split val2014 --task vqav2 --task.root"
TUNE = "tune --model scenes-vilt --out new"
# What is wrong, the line as a user types it behind `pumer`, and words of the error that say how to
# mend it.
MISTAKES = [
    # --- names of commands and options ---
    ("no command of that name", "evall --model vqa-model", "Did you mean 'eval'?"),
    ("command of a group", "bench modl --model vqa-model", "Did you mean 'bench model'?"),
    ("group alone", "data --out new", "data check"),
    ("option misspelt", "eval --modle vqa-model", "Did you mean '--model'?"),
    ("option with one dash", "eval -model vqa-model", "Did you mean '--model'?"),
    (
        "option with a hyphen",
        "eval --model vqa-model --batch-size 4",
        "Did you mean '--batch_size'?",
    ),
    ("option without its value", "eval --model", "--model"),
    ("required option left out", "eval --task scenes", "--model"),
    ("required argument left out", "study", "FILE"),
    ("an argument too many", "eval vqa-model", "--NAME VALUE"),
    # --- values of options ---
    ("text for a number", "eval --model vqa-model --batch_size ten", "--batch_size"),
    ("batch size 0", "eval --model vqa-model --batch_size 0", "whole number from 1"),
    ("batch size negative", "eval --model vqa-model --batch_size -4", "whole number from 1"),
    ("batch size with a fraction", "eval --model vqa-model --batch_size 2.5", "--batch_size"),
    ("limit 0", "eval --model vqa-model --limit 0", "whole number from 1"),
    ("threads 0", "bench --model vilt-tiny --threads 0", "whole number from 1"),
    ("runs 0", "bench --model vilt-tiny --runs 0", "whole number from 1"),
    ("dtype misspelt", "bench --model vilt-tiny --dtype bf16", "bfloat16"),
    ("device misspelt", "eval --model vqa-model --device gpu", "cuda"),
    ("yes for true", "study study.yaml --keep_models yep", "true"),
    ("attention misspelt", "bench llm --model llava-tiny-shape --attention flash", "sdpa"),
    ("blind misspelt", "eval --model vqa-model --blind pictures", "image"),
    ("engine misspelt", "predict --model vqa-model --task scenes --out p.json --engine rey", "ray"),
    ("choice misspelt", "convert vqa-model new --to publishd", "published"),
    ("part of a study misspelt", "study study.yaml --only plots-only", "plots"),
    # --- models ---
    ("model misspelt", "eval --model scenes-vil", "Did you mean 'scenes-vilt'?"),
    ("folder without a model", "eval --model full", "not a model folder"),
    ("file for a model", "eval --model notes.txt", "not a model folder"),
    ("model without config.json", "eval --model no-config", "no config.json"),
    ("model without weights", "eval --model no-weights", "save it again"),
    ("weights cut off", "eval --model cut-weights", "save it again"),
    ("config.json cut off", "eval --model cut-config", "get it again"),
    ("model without its tokenizer", "eval --model no-tokenizer", "tokenizer"),
    ("model without its transform", "eval --model no-transform", "save_transform"),
    ("model of transformers", "eval --model stock", "pumer convert stock"),
    ("weights of another class", "eval --model other-class", "config.json"),
    ("class that there is not", "eval --model unknown-class", "ViltForEverything"),
    ("model of a newer pumer", "eval --model newer", "upgrade pumer"),
    ("unsupported family", "eval --model gpt2", "pumer list"),
    ("text model reported", "report --model gpt2", "pumer list"),
    ("checkpoint to report", "report --model PROJECT.ckpt", "not a model folder"),
    ("model to time misspelt", "bench --model vilt-b-32", "vilt-b32"),
    ("decoder among the encoders", "bench --model llava-1.5-7b-shape", "vilt-b32"),
    ("encoder among the decoders", "bench llm --model vilt-b32", "llava-1.5-7b-shape"),
    ("saved model to bench", "bench --model vqa-model", "bench model"),
    ("bench model without a model", "bench model", "--model"),
    ("pairs of another model", "bench pairs --model vilt-b32", "vilt"),
    # --- tasks and data ---
    ("task misspelt", "eval --model vqa-model --task vqa2", "Did you mean 'vqav2'?"),
    ("task without root", "eval --model vqa-model --task vqav2", "root"),
    ("setting of a task misspelt", "eval --model vqa-model --task vqav2 --task.rot vqa", "'root'"),
    (
        "setting of a task of another type",
        "eval --model vqa-model --task scenes --task.questions many",
        "int",
    ),
    (
        "settings of a task without its name",
        "eval --model vqa-model --task.root vqa",
        "--task vqav2",
    ),
    ("folder of data missing", "eval --model vqa-model --task vqav2 --task.root vqq", "vqq"),
    ("folder without data", f"{VQA} full", "full"),
    (
        "file for a folder of data",
        "eval --model vqa-model --task vqav2 --task.root notes.txt",
        "folder",
    ),
    (
        "split misspelt",
        "eval --model vqa-model --task vqav2 --task.root vqa --split val2015",
        "val2014",
    ),
    ("split of scenes misspelt", "eval --model scenes-vilt --split tset", "test"),
    ("model of another task", "eval --model nlvr-model --task scenes", "ViltForQuestionAnswering"),
    (
        "task of two images",
        "eval --model vqa-model --task nlvr2 --task.root nlvr2 --split dev",
        "--model.kind",
    ),
    (
        "labels that do not fit",
        "eval --model animals-model --task snli-ve --task.root snli-ve --split dev",
        "id2label",
    ),
    ("answers that do not fit", "eval --model vqa-model --task scenes", "id2label"),
    ("image missing", f"{VQA} lost-image", 'skip to "missing"'),
    ("image cut off", f"{VQA} cut-image", "skip"),
    ("text for an image", f"{VQA} text-image", "skip"),
    ("questions cut off", f"{VQA} cut-json", "again"),
    ("annotations of other questions", f"{VQA} other-ids", "question"),
    ("annotations empty", f"{VQA} no-annotations", "annotation"),
    ("scored without annotations", f"{VQA} unlabelled", "annotations"),
    (
        "captions cut off",
        "score --model retrieval-model --task retrieval --task.root cut-captions --out new",
        "cut-captions",
    ),
    (
        "score of a task without captions",
        "score --model vqa-model --task scenes --out new",
        "retrieval",
    ),
    (
        "score with a model of answers",
        "score --model vqa-model --task retrieval --task.root flickr30k --out new",
        "ForImageAndTextRetrieval",
    ),
    (
        "more folds than images",
        "score --model retrieval-model --task retrieval --task.root flickr30k --out new --folds 50",
        "folds",
    ),
    (
        "more workers than none",
        "score --model retrieval-model --task scenes-retrieval --out n --workers 0",
        "1",
    ),
    (
        "predictions of a model of another task",
        "predict --model nlvr-model --task vqav2 --task.root vqa --split val2014 --out p.json",
        "ViltForQuestionAnswering",
    ),
    (
        "split without files",
        "predict --model vqa-model --task vqav2 --task.root vqa --out p.json",
        "test2015",
    ),
    (
        "blind where texts are chosen",
        "eval --model retrieval-model --task scenes-retrieval --blind image",
        "blind text",
    ),
    # --- reducers ---
    ("reducer misspelt", "eval --model vqa-model --reducer pumr", "Did you mean 'pumer'?"),
    ("preset misspelt", "eval --model vqa-model --reducer vilt-vqa2", "Did you mean 'vilt-vqav2'?"),
    (
        "setting misspelt",
        "report --model vqa-model --reducer tome --reducer.dpth 3",
        "Did you mean 'depth'?",
    ),
    ("setting of another type", "report --model vqa-model --reducer tome --reducer.r many", "int"),
    ("negative ratio", "report --model vqa-model --reducer pumer --reducer.prune -0.1", "prune"),
    ("ratio of 1.5", "report --model vqa-model --reducer pumer --reducer.merge 1.5", "merge"),
    ("ratio over 1", "report --model decoder --reducer fastv --reducer.keep 1.5", "keep"),
    ("layer too deep", "report --model vqa-model --reducer pumer --reducer.layers [99]", "0 to 3"),
    ("layer negative", "report --model vqa-model --reducer pumer --reducer.layers [-5]", "layer"),
    (
        "layer that is no list",
        "report --model vqa-model --reducer pumer --reducer.layers 2",
        "layers",
    ),
    (
        "everything reduced away",
        "report --model vqa-model --reducer pumer --reducer.prune 1.0",
        "prune",
    ),
    (
        "two reducers",
        "bench model --model vqa-model --reducer pumer --reducer tome",
        "--reducers takes a list",
    ),
    ("setting without a reducer", "report --model vqa-model --reducer.depth 3", "--reducer tome"),
    ("reducer of decoders", "report --model vqa-model --reducer visionzip", "take another reducer"),
    ("reducer of encoders", "report --model decoder --reducer dynamicvit", "dynamicvit"),
    ("tower that there is not", "report --model vqa-model --reducer meter-vqav2-tower", "tower"),
    ("same reducer twice", "bench --model vilt-tiny --reducers [tome,tome]", "once"),
    ("reducer's file missing", "eval --model vqa-model --reducer mine.yaml", "mine.yaml"),
    (
        "reducer's file with a misspelt setting",
        "report --model vqa-model --reducer reducer.yaml",
        "'depth'",
    ),
    (
        "JSON of a reducer broken",
        'report --model vqa-model --reducer \'{"reducer": "tome", r: \'',
        "--reducer",
    ),
    ("reducers that are no list", "bench --model vilt-tiny --reducers tome", "[tome]"),
    ("text that is too long", "bench --model vilt-tiny --text 4000", "padded length"),
    ("text longer than the model's", "report --model vqa-model --text 5000", "20"),
    ("images smaller than a patch", "bench --model vilt-tiny --image_size 3", "16 px"),
    ("one layer of a decoder", "bench llm --model llava-tiny-shape --layers 1", "2 or more"),
    (
        "teachers that are no truth values",
        "bench train --model vilt-tiny --teachers [maybe]",
        "true",
    ),
    ("batches of nothing", "bench where --model vilt-tiny --batches [0]", "whole number from 1"),
    # --- recipes and training ---
    (
        "recipe misspelt",
        "train --config scenes-pummer --output new",
        "Did you mean 'scenes-pumer'?",
    ),
    ("recipe's file missing", "train --config mine.yaml --output new", "pumer list"),
    ("folder for a recipe", "train --config full --output new", "full"),
    ("recipe broken", "train --config broken.yaml --output new", "broken.yaml"),
    ("recipe with tabs", "train --config tabs.yaml --output new", "tabs.yaml"),
    ("recipe that is a list", "train --config list.yaml --output new", "list.yaml"),
    ("recipe empty", "train --config empty.yaml --output new", "empty.yaml"),
    ("key of a recipe misspelt", "train --config unknown.yaml --output new", "learning_rat"),
    ("words that YAML takes for truth values", "train --config yes.yaml --output new", "in quotes"),
    ("recipe without a task", "train --config no-task.yaml --output new", "task"),
    ("output left out", "train --config recipe.yaml", "--output"),
    ("nested key misspelt", f"{TRAIN} --model.pth vqa-model", "'--model.path'"),
    ("teacher misspelt", f"{TRAIN} --distill.teacher scenes-vil", "'scenes-vilt'"),
    ("teacher of other answers", f"{TRAIN} --distill.teacher scenes-vilt", "answers"),
    ("temperature 0", f"{TRAIN} --distill.temperature 0", "above 0"),
    ("setting of the trainer misspelt", f"{TRAIN} --trainer.max_stps 3", "'max_steps'"),
    ("setting of the trainer of another type", f"{TRAIN} --trainer.max_steps few", "int"),
    ("learning rate in words", f"{TRAIN} --trainer.learning_rate fast", "float"),
    ("batch size of a training 0", f"{TRAIN} --trainer.per_device_train_batch_size 0", "1 or more"),
    ("optimizer misspelt", f"{TRAIN} --trainer.optim adamww", "adamw_torch"),
    ("schedule misspelt", f"{TRAIN} --trainer.lr_scheduler_type cosin", "cosine"),
    (
        "rate of a model's setting in words",
        f"{TRAIN} --model.config.hidden_dropout_prob much",
        "float",
    ),
    (
        "number of a model's setting in words",
        f"{TRAIN} --model.config.num_hidden_layers four",
        "int",
    ),
    ("setting of a model misspelt", f"{TRAIN} --model.config.hiden_size 32", "'hidden_size'"),
    (
        "model class misspelt",
        f"{TRAIN} --model.kind ViltForQuestionAnswerin",
        "'ViltForQuestionAnswering'",
    ),
    (
        "model class of another family",
        f"{TRAIN} --model.kind MeterForQuestionAnswering",
        "class of its family",
    ),
    ("kind of a transform misspelt", f"{TRAIN} --image '{{kind: squar, size: 96}}'", "'square'"),
    ("size of a transform in words", f"{TRAIN} --image '{{kind: square, size: big}}'", "int"),
    ("size of a transform 0", f"{TRAIN} --image '{{kind: square, size: 0}}'", "for example 384"),
    ("setting of a transform misspelt", f"{TRAIN} --image '{{kind: square, sise: 96}}'", "'size'"),
    ("split of a training misspelt", f"{TRAIN} --train_split train", "val2014"),
    ("split of an evaluation misspelt", f"{TRAIN} --eval_split val", "val2014"),
    ("answers that no model has", f"{TRAIN} --task.root other-answers", "answers"),
    ("metric misspelt", f"{TRAIN} --trainer.metric_for_best_model acuracy", "accuracy"),
    ("seed in words", f"{TRAIN} --seed lucky", "--seed"),
    ("max_length negative", f"{TRAIN} --model.max_length 0", "--model.max_length"),
    ("image missing in a training", f"{TRAIN} --task.root lost-image", "skip"),
    ("patience 0", f"{TRAIN} --early_stopping.patience 0", "--early_stopping.patience"),
    (
        "resume of other settings",
        "train --config recipe.yaml --output begun --resume true",
        "recipe.yaml",
    ),
    (
        "resume without recipe.yaml",
        "train --config recipe.yaml --output unknown-run --resume true",
        "recipe.yaml",
    ),
    (
        "resume of a finished training",
        "train --config recipe.yaml --output done --resume true",
        "another --output",
    ),
    ("output that is not empty", "train --config recipe.yaml --output full", "another --output"),
    # --- outputs ---
    (
        "output of a training is a file",
        "train --config recipe.yaml --output notes.txt",
        "name a folder",
    ),
    ("samples into a folder", "eval --model vqa-model --samples full", "name a file"),
    ("rows into another table", "eval --model vqa-model --record rows.csv", "other columns"),
    ("rows into a CSV without header", "eval --model vqa-model --record bare.csv", "other columns"),
    ("record that is an image", "bench --model vilt-tiny --record photo.png", "photo.png"),
    ("same file twice", "eval --model scenes-vilt --samples new.csv --record new.csv", "--record"),
    ("output is the input", "convert vqa-model vqa-model", "empty folder"),
    ("output over a file of data", f"viz --out {PHOTO} --image {PHOTO} --question why", "--out"),
    (
        "output on a disk that is read-only",
        "predict --model vqa-model --task scenes --out /proc/p.json",
        "another path",
    ),
    # --- images and questions ---
    ("image misspelt", "viz --out new.png --image foto.png --question why", "foto.png"),
    ("image that is cut off", "viz --out new.png --image cut.png --question why", "cut.png"),
    ("image that is text", "viz --out new.png --image text.png --question why", "text.png"),
    ("folder for an image", "viz --out new.png --image full --question why", "full"),
    ("image without a question", "viz --out new.png --image photo.png", "--question"),
    ("question without an image", "viz --out new.png --question why", "--image"),
    ("question that is empty", "viz --out new.png --image photo.png --question ''", "question"),
    ("example negative", "viz --out new.png --example -1", "--example"),
    ("ending that is no image's", "viz --out new.mp4", ".png"),
    ("nothing reduces", "viz --out new.png --model scenes-vilt", "--reducer"),
    (
        "image to time without a question",
        "bench model --model scenes-vilt-pumer --image photo.png",
        "--question",
    ),
    ("nothing reduces what is timed", "bench model --model scenes-vilt", "--reducer"),
    # --- converting ---
    ("checkpoint missing", "convert vilt.ckpt new", "vilt.ckpt"),
    ("checkpoint that is text", "convert notes.txt new", "notes.txt"),
    ("folder without a checkpoint", "convert full new", "full"),
    ("answers of a model folder", "convert vqa-model new --answers notes.txt", "for checkpoints"),
    ("answers' file missing", "convert stock new --answers nowhere.json", "nowhere.json"),
    ("answers' file that is text", "convert stock new --answers notes.txt", "notes.txt"),
    (
        "class that there is not to convert to",
        "convert stock new --kind ViltForQuestionAnswerin",
        "'ViltForQuestionAnswering'",
    ),
    # --- data ---
    ("task without files", "data check scenes vqa", "vqav2"),
    ("task to check misspelt", "data check vqa vqa", "Did you mean 'vqav2'?"),
    ("root to check missing", "data check vqav2 nowhere", "nowhere"),
    ("images to check missing", "data check vqav2 vqa --images nowhere", "nowhere"),
    ("images of scenes 0", "data scenes --out new --pictures 0", "whole number from 1"),
    (
        "questions of scenes too many",
        "data scenes --out new --pictures 1 --per_picture 5000",
        "1000",
    ),
    ("split of scenes leads elsewhere", "data scenes --out new --split ../val", "plain name"),
    (
        "splits that there are not",
        "data scenes --out new --task nlvr2 --splits '{valid: 4}'",
        "dev",
    ),
    ("task of scenes misspelt", "data scenes --out new --task vqa", "vqav2"),
    ("scenes too small", "data scenes --out new --pictures 1 --image_size 4", "image_size"),
    (
        "sentences missing",
        "data tokenizer --out new --sentences [nowhere.parquet]",
        "nowhere.parquet cannot be read",
    ),
    (
        "sentences without a column",
        "data tokenizer --out new --sentences [words.parquet]",
        "sentence or caption",
    ),
    ("sentences cut off", "data tokenizer --out new --sentences [cut.parquet]", "cut.parquet"),
    (
        "sentences that are no Parquet",
        "data tokenizer --out new --sentences [notes.txt]",
        "Parquet",
    ),
    # --- studies and tuning ---
    ("shell misspelt", "completion fsh", "bash, zsh, fish or tcsh"),
    ("study missing", "study nowhere.yaml", "nowhere.yaml"),
    ("study broken", "study broken.yaml", "broken.yaml"),
    ("study that is a recipe", "study recipe.yaml", "name"),
    ("methods of one name", "study study-twice.yaml", "names of their own"),
    ("points that are the same", "study study-same.yaml", "the same point"),
    ("key of a study misspelt", "study study-key.yaml", "'methods'"),
    ("model of a study misspelt", "study study-model.yaml", "nowhere"),
    ("study without methods", "study study-none.yaml", "methods"),
    ("key of a method misspelt", "study study-method.yaml", "'reducer'"),
    ("reducer of a study misspelt", "study study-reducer.yaml", "'pumer'"),
    ("layer of a study too deep", "study study-deep.yaml", "skip_impossible"),
    ("seeds without a training", "study study-seed.yaml", "seed"),
    ("reference that is no method", "study study-reference.yaml", "PuMer"),
    ("split of a study misspelt", "study study-split.yaml", "val2014"),
    ("more examples than there are", "study study-examples.yaml", "8 examples"),
    ("key of a study's training misspelt", "study study-train.yaml", "learning_rat"),
    ("trainer of a study misspelt", "study study-trainer.yaml", "max_steps"),
    ("plots of nothing", "study study.yaml --only plots --out new", "no results"),
    ("memory without a unit", "tune --model vqa-model --out new --max_memory lots", "300MB"),
    ("bound that is negative", "tune --model vqa-model --out new --max_drop -1", "--max_drop"),
    ("speed below 1", f"{TUNE} --min_speedup 0", "--min_speedup"),
    ("probability over 1", "tune --model vqa-model --out new --max_drop 1 --alpha 5", "--alpha"),
    (
        "tuning without labels",
        "tune --model vqa-model --max_drop 1 --out new --task vqav2 --task.root unlabelled "
        "--split val2014",
        "label",
    ),
    (
        "too few examples",
        "tune --model vqa-model --max_drop 1 --out new --task vqav2 --task.root vqa --split "
        "val2014",
        "--batch_size",
    ),
    ("grid's key misspelt", f"{TUNE} --grid.prun [0.1]", "'--grid.prune'"),
    (
        "grid of layers that are too deep",
        "tune --model scenes-vilt --max_drop 1 --out new --grid.layers [[40]]",
        "--skip_impossible",
    ),
    ("recipe to go on with missing", f"{TUNE} --finetune nowhere.yaml", "nowhere.yaml"),
    (
        "tuning into a full folder",
        "tune --model scenes-vilt --max_drop 1 --out full",
        "another --out",
    ),
    # --- demo and list ---
    ("no questions", "demo --out new --questions 0", "whole number from 1"),
    ("list of something", "list reducers", "stands alone"),
]


class Computed(BaseException):
    """A model was asked; no `except Exception` takes it for an error."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("workshop")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        workshop.build(path)
    return path


@pytest.fixture
def idle(folder, monkeypatch):
    """Work in the folder, where no layer of any model is called."""

    def compute(module, *arguments, **settings):
        raise Computed(type(module).__name__)

    monkeypatch.chdir(folder)
    monkeypatch.setattr(torch.nn.Module, "__call__", compute)


def contents(folder):
    """Every file and folder below, with the digest of what is in it."""
    found = {}
    for parent, folders, names in os.walk(folder):
        found |= {os.path.join(parent, name): None for name in folders}
        for name in names:
            path = os.path.join(parent, name)
            with open(path, "rb") as file:
                found[path] = hashlib.file_digest(file, "md5").digest()
    return found


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize(
    ("line", "words"), [row[1:] for row in MISTAKES], ids=[row[0] for row in MISTAKES]
)
def test_a_mistake_is_named_with_its_mend_and_costs_nothing(line, words, folder, capfd):
    before = contents(folder)
    assert main(shlex.split(line)) != 0
    said = capfd.readouterr().err
    assert 1 <= len(said.splitlines()) <= 5, said
    assert "Traceback" not in said
    assert words in said
    assert contents(folder) == before


@pytest.mark.usefixtures("idle")
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
@pytest.mark.parametrize(
    "line", [f"{VQA} vqa", "bench model --model scenes-vilt-pumer", "study study.yaml", TUNE]
)
def test_a_device_that_is_not_there(line, folder, capfd):
    before = contents(folder)
    more = " --max_drop 1" if line == TUNE else ""
    assert main(shlex.split(f"{line}{more} --device cuda")) == 2
    assert "leave --device out" in capfd.readouterr().err
    assert contents(folder) == before


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize(
    ("package", "line", "extra"),
    [
        ("tensorboard", f"{TRAIN} --trainer.report_to [tensorboard]", "train"),
        ("ray", "predict --model vqa-model --task vqav2 --out new --engine ray", "ray"),
        (
            "ray",
            "score --model retrieval-model --task scenes-retrieval --out new --engine ray",
            "ray",
        ),
        ("matplotlib", "study study.yaml --out new", "study"),
        ("optuna", f"{TUNE} --max_drop 1", "tune"),
    ],
)
def test_an_extra_that_is_not_installed(package, line, extra, folder, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    before = contents(folder)
    assert main(shlex.split(line)) == 2
    assert f"pip install '.[{extra}]'" in capfd.readouterr().err
    assert contents(folder) == before


# The lines that the mistakes are made in, without one.
RIGHT = [
    f"{VQA} vqa",
    "predict --model vqa-model --task vqav2 --task.root vqa --split val2014 --out new/p.json",
    "score --model retrieval-model --task retrieval --task.root flickr30k --out new",
    TRAIN,
    "study study.yaml --out new --scratch new",
    f"{TUNE} --max_drop 1 --task scenes --task.questions 40 --batch_size 1",
    "bench --model vilt-tiny",
    "bench llm --model llava-tiny-shape",
    "bench train --model vilt-tiny",
    "bench where --model vilt-tiny",
    "bench pairs --model vilt-tiny --reducers [tome]",
    "bench model --model scenes-vilt-pumer",
    "viz --out new/map.png --image photo.png --question why",
    "demo --out new --questions 4",
]


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("line", RIGHT)
def test_without_the_mistake_a_model_is_asked(line, folder):
    with pytest.raises(Computed):
        main(shlex.split(line))
    shutil.rmtree(folder / "new", ignore_errors=True)


def test_every_command_is_in_the_table():
    lines = [f"{line} " for _, line, _ in MISTAKES]
    assert [
        name for name in COMMANDS if not any(line.startswith(f"{name} ") for line in lines)
    ] == []
    assert len(MISTAKES) >= 80
    assert len({name for name, _, _ in MISTAKES}) == len(MISTAKES)

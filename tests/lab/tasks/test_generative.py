"""Models that write their answers: prompts, training, and what `pumer eval` makes of what they
write."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_llm
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    LlavaForConditionalGeneration,
    ViltConfig,
    ViltForQuestionAnswering,
)

import pumer
from pumer.cli import main
from pumer.hub import load, save
from pumer.lab.data.images import Square
from pumer.lab.data.text import TextTransform, train_tokenizer
from pumer.lab.evaluate import answer, constant_accuracy, evaluate, model_inputs, predict
from pumer.lab.scenes.other_tasks import ScenesVE
from pumer.lab.scenes.questions import ANSWERS
from pumer.lab.scenes.tasks import Scenes
from pumer.lab.study.evaluation import cost, load_eval_model, score
from pumer.lab.tasks import VQAv2
from pumer.lab.tasks.base import Collator, Example
from pumer.lab.tasks.inputs import Inputs
from pumer.lab.tasks.prompts import (
    IGNORED,
    MAX_ANSWER,
    PromptCollator,
    best_answer,
    collator_for,
    image_tokens,
)
from pumer.lab.tasks.vqa_answers import normalize, vqa_score
from pumer.lab.train.generative_trainer import answered
from pumer.lab.train.grounding import Grounded
from pumer.lab.train.model import ModelSettings, prepare
from pumer.lab.train.optimizer import OptimizerSettings
from pumer.lab.train.run import train
from pumer.lab.train.settings import DistillSettings, GroundingSettings, TrainSettings
from pumer.lab.tune.examples import ExamplePool
from pumer.models.llava import IMAGE, writing_tokenizer
from pumer.reducers import FastV

FIXTURE = Path(__file__).parents[2] / "data" / "fixtures" / "vqav2"
WIDTH = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
PICTURES = {"image_size": 32, "patch_size": 8}
LLAVA = {
    "text_config": WIDTH
    | {
        "model_type": "llama",
        "num_hidden_layers": 4,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
    },
    "vision_config": WIDTH
    | PICTURES
    | {"model_type": "clip_vision_model", "num_hidden_layers": 2, "hidden_act": "gelu"},
    "vision_feature_layer": -1,
}
TASK = {"name": "scenes", "questions": 24, "image_size": 32}
IMAGES = {"kind": "square", "size": 32}
STEPS = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "learning_rate": 3e-3,
}
STEPS |= {"report_to": "none", "disable_tqdm": True}
REDUCER = {"reducer": "pumer", "prune": 0.2, "merge": 0.3, "merge_text": 0.0, "layers": [0, 1]}


@pytest.fixture(scope="module")
def vilt(tmp_path_factory):
    """A ViLT that a LLaVA can start from, with its tokenizer, which has seen no answers."""
    folder = tmp_path_factory.mktemp("vilt") / "model"
    texts = [example.text for example in Scenes(questions=300, image_size=32).examples("train")[:]]
    tokenizer = train_tokenizer(texts, 150)
    words = {"vocab_size": len(tokenizer), "max_position_embeddings": 40}
    torch.manual_seed(0)
    save(
        ViltForQuestionAnswering(ViltConfig(**WIDTH, **PICTURES, **words, num_hidden_layers=3)),
        folder,
    )
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def settings(vilt):
    return ModelSettings(
        kind="LlavaForConditionalGeneration",
        start=vilt,
        tokenizer=vilt,
        config=LLAVA,
        max_length=24,
    )


@pytest.fixture(scope="module")
def base(settings, tmp_path_factory):
    out = tmp_path_factory.mktemp("base")
    train(
        TrainSettings(
            str(out),
            TASK | {"patch_size": 8},
            settings,
            image=IMAGES,
            grounding=GroundingSettings(1.0, 2),
            trainer=STEPS | {"max_steps": 8},
        )
    )
    return out / "model"


@pytest.fixture(scope="module")
def opened(settings):
    """Model, tokenizer and collator, untrained but with weights that make it say this and that."""
    torch.manual_seed(0)
    model, tokenizer, task = prepare(settings, TASK)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.0 if "embed" in name or "lm_head" in name else 0.25)
    return model.eval(), tokenizer, collator_for(model, task, tokenizer, Square(32), 24)


# --- prompts ---


def test_a_prompt_is_image_question_and_separator(opened):
    _, tokenizer, collator = opened
    examples = collator.task.examples("train")[:6]
    batch = collator(examples)
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values"}
    for example, ids, mask in zip(
        examples, batch["input_ids"], batch["attention_mask"], strict=True
    ):
        question = tokenizer(example.text, add_special_tokens=False)["input_ids"]
        wanted = [tokenizer.convert_tokens_to_ids(IMAGE)] * 16 + question + [tokenizer.sep_token_id]
        padding = len(ids) - len(wanted)
        assert ids.tolist() == [tokenizer.pad_token_id] * padding + wanted
        assert mask.tolist() == [0] * padding + [1] * len(wanted)
    assert batch["attention_mask"].all(1).any()


def test_only_the_answers_are_learned(opened):
    _, tokenizer, collator = opened
    examples = collator.task.examples("train")[:6]
    batch = replace(collator, teach=True)(examples)
    prompts = collator(examples)
    for row, example in enumerate(examples):
        labels, ids = batch["labels"][row], batch["input_ids"][row]
        learned = labels != IGNORED
        assert torch.equal(labels[learned], ids[learned])
        *words, end = labels[learned].tolist()
        assert tokenizer.decode(words) == example.meta["answer"]
        assert end == tokenizer.eos_token_id
        before = ids[batch["attention_mask"][row].bool() & ~learned]
        assert torch.equal(before, prompts["input_ids"][row][prompts["attention_mask"][row].bool()])
        assert learned[-1]


def test_every_answer_can_be_written_and_read(opened):
    _, tokenizer, collator = opened
    for text in ANSWERS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert collator.read(
            torch.tensor([[*ids, tokenizer.eos_token_id, tokenizer.pad_token_id]])
        ) == [text]
        assert len(ids) < MAX_ANSWER
        assert normalize(text) == text


def test_long_questions_are_cut_but_not_the_template(opened):
    _, tokenizer, collator = opened
    example = replace(collator.task.examples("train")[0], text="is there a red circle? " * 9)
    ids = collator([example])["input_ids"][0].tolist()
    assert len(ids) == 16 + 24 + 1
    assert ids[-1] == tokenizer.sep_token_id


def test_blind_batches(opened):
    _, tokenizer, collator = opened
    examples = collator.task.examples("train")[:3]
    hidden = replace(collator, blind="text")(examples)["pixel_values"]
    assert (hidden == hidden[0, 0, 0, 0]).all()
    ids = replace(collator, blind="image")(examples)["input_ids"]
    assert tokenizer.decode(ids[0, 16:-1]) == "a picture"
    assert (ids == ids[0]).all()


def test_inputs_of_ones_own_are_the_same_prompts(opened):
    model, _, collator = opened
    examples = collator.task.examples("train")[:3]
    inputs = Inputs(model, collator)
    batch = inputs(
        [example.text for example in examples], [example.images[0] for example in examples]
    )
    expected = collator(examples)
    assert set(batch) == set(expected)
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    with pytest.raises(
        ValueError, match="texts have 2 images; LlavaForConditionalGeneration takes 1 each"
    ):
        inputs("what is it?", [examples[0].images[0]] * 2)


def test_prompts_that_cannot_be_written(opened, vilt):
    model, tokenizer, collator = opened
    example = collator.task.examples("train")[0]
    with pytest.raises(ValueError, match="question 0 has 2 image tokens"):
        collator([replace(example, text=f"what is {IMAGE}?")])
    with pytest.raises(ValueError, match="1 of 1 questions have no text"):
        collator([replace(example, text=" ")])
    with pytest.raises(ValueError, match="question 0 has no answer"):
        replace(collator, teach=True)([replace(example, target=None)])
    with pytest.raises(ValueError, match="scenes-ve has no answers in words"):
        collator_for(model, ScenesVE(), tokenizer, Square(32))
    plain = TextTransform(AutoTokenizer.from_pretrained(vilt))
    with pytest.raises(ValueError, match="no chat template"):
        PromptCollator(collator.task, plain, Square(32), image_token=1, image_tokens=16)
    plain.tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(ValueError, match="no token that ends an answer"):
        PromptCollator(collator.task, plain, Square(32), image_token=1, image_tokens=16)
    with pytest.raises(ValueError, match="not for qwen2_vl"):
        collator_for(tiny_llm.model("qwen2_vl"), collator.task, tokenizer, Square(32))


def test_image_tokens_are_those_of_the_model():
    model = tiny_llm.model()
    assert image_tokens(model.config) == 16
    model.config.vision_feature_select_strategy = "full"
    assert image_tokens(model.config) == 17


def test_a_tokenizer_that_writes_comes_back(vilt, tmp_path):
    tokenizer = writing_tokenizer(AutoTokenizer.from_pretrained(vilt), ANSWERS)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert (len(again), again.eos_token, again.chat_template) == (
        len(tokenizer),
        "[SEP]",
        tokenizer.chat_template,
    )
    assert again.encode(f"{IMAGE}how many? 10") == tokenizer.encode(f"{IMAGE}how many? 10")
    assert again.encode("how many?") == again.encode("how many?", add_special_tokens=False)
    assert len(writing_tokenizer(again, ANSWERS)) == len(tokenizer)


@pytest.mark.parametrize("start", ["", "[CLS]"])
def test_prompts_of_other_models_begin_once(opened, vilt, start):
    """The first token comes from the tokenizer, or from the template: never twice."""
    model, _, collator = opened
    tokenizer = writing_tokenizer(AutoTokenizer.from_pretrained(vilt), ANSWERS)
    first = tokenizer.convert_tokens_to_ids("[CLS]")
    tokenizer.bos_token = "[CLS]"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", first)]
    )
    part = (
        "{% for part in messages[0].content %}{{ '<image> ' if part.type == 'image' else "
        "part.text }}{% endfor %}"
    )
    tokenizer.chat_template = f"{start}how many: {part} is"
    ids = collator_for(model, collator.task, tokenizer, Square(32)).prompt("red square?", 0)
    before, after = (
        tokenizer.encode(text, add_special_tokens=False) for text in ("how many:", "red square? is")
    )
    assert ids == [first, *before, *[model.config.image_token_id] * 16, *after]


# --- answers ---


def greedy(model, tokenizer, batch, row):
    """One by one: the most likely token, again and again, each time from the start and without
    padding."""
    real = batch["attention_mask"][row].bool()
    ids, pixels = batch["input_ids"][row][real][None], batch["pixel_values"][row : row + 1]
    written = []
    with torch.no_grad():
        while len(written) < MAX_ANSWER and tokenizer.eos_token_id not in written:
            logits = model(input_ids=ids, pixel_values=pixels, use_cache=False).logits
            written.append(int(logits[0, -1].argmax()))
            ids = torch.cat([ids, torch.tensor([written[-1:]])], 1)
    return normalize(tokenizer.decode(written, skip_special_tokens=True))


def test_predictions_are_what_a_slow_loop_writes(opened):
    model, tokenizer, collator = opened
    examples = collator.task.examples("test")[:5]
    found = predict(model, examples, collator, batch_size=5).predictions
    batch = collator(examples)
    assert len(set(found.values())) > 1
    for row, example in enumerate(examples):
        assert found[example.id] == greedy(model, tokenizer, batch, row)


@pytest.mark.parametrize(
    "reducer", [None, FastV(keep=4, layer=1), pumer.PuMer(0.2, 0.3, 0.0, (0, 1))]
)
def test_batches_answer_as_single_questions_do(opened, reducer):
    model, _, collator = opened
    examples = collator.task.examples("test")[:6]
    with pumer.reduced(model, reducer or pumer.Unreduced()):
        many = predict(model, examples, collator, batch_size=6).predictions
        single = predict(model, examples, collator, batch_size=1).predictions
    assert many == single


def test_a_reducer_changes_what_is_written(opened):
    model, _, collator = opened
    examples = collator.task.examples("test")[:]
    whole = predict(model, examples, collator).predictions
    with pumer.reduced(model, pumer.NoVision()):
        assert predict(model, examples, collator).predictions != whole


def test_scores_are_those_of_the_words(opened):
    model, _, collator = opened
    examples = collator.task.examples("test")[:]
    result = evaluate(model, examples, collator)
    right = [result.predictions[example.id] == example.meta["answer"] for example in examples]
    assert result.metric["accuracy"] == pytest.approx(100 * sum(right) / len(right), abs=0.01)
    assert result.metric["constant"] == constant_accuracy(collator.task, examples) > 0


def test_accuracy_in_training_is_that_of_writing(opened):
    """Teacher-forced: every token of the answer most likely is the answer that greedy decoding
    writes."""
    model, tokenizer, collator = opened
    examples = collator.task.examples("test")[:8]
    said = predict(model, examples, collator).predictions
    # The model's own answers for half of them, so that it is right for some.
    own = [
        replace(e, target={said[e.id]: 1.0}) if n % 2 and tokenizer.encode(said[e.id]) else e
        for n, e in enumerate(examples)
    ]
    batch = replace(collator, teach=True)(own)
    with torch.no_grad():
        marks = answered(model(**batch).logits, batch["labels"])
    for row, example in enumerate(own):
        learned = batch["labels"][row] != IGNORED
        alone = {"input_ids": collator(own)["input_ids"][row : row + 1]}
        alone["attention_mask"] = collator(own)["attention_mask"][row : row + 1]
        wrote = model.generate(
            **alone,
            pixel_values=batch["pixel_values"][row : row + 1],
            do_sample=False,
            max_new_tokens=int(learned.sum()),
        )[0, alone["input_ids"].shape[1] :]
        assert bool(marks[row]) == (wrote.tolist() == batch["labels"][row][learned].tolist()), (
            example
        )


def test_official_answers_are_targets_in_words():
    answers = ("red", "Red", "a red", "dark red", "red", "red", "blue", "blue", "red.", "red")
    target = VQAv2("nowhere")._scores(answers)
    assert target == {word: vqa_score(word, answers) for word in ("red", "dark red", "blue")}
    example = Example(1, "what colour?", (), target, 1, {"answers": answers})
    assert best_answer(VQAv2("nowhere"), example) == "red"
    assert constant_accuracy(VQAv2("nowhere"), [example]) == 100
    assert VQAv2("nowhere", labels=("red", "blue"))._scores(("blue",) * 10) == {1: 1.0}


# --- training ---


def test_a_trained_model_is_evaluated_by_the_command(base, capsys, tmp_path):
    assert load(base).config.text_config.vocab_size == len(AutoTokenizer.from_pretrained(base))
    log = json.loads((base.parent / "log.json").read_text())
    assert {"task_loss", "grounding_loss", "accuracy"} <= set(log[0])
    task = json.dumps({"name": "scenes", "questions": 8, "image_size": 32})
    samples = tmp_path / "samples.jsonl"
    for more in (
        [],
        ["--reducer", json.dumps(REDUCER)],
        ["--reducer", "no-vision"],
        ["--blind", "text"],
    ):
        assert (
            main(["eval", "--model", str(base), "--task", task, "--samples", str(samples), *more])
            == 0
        )
        shown = capsys.readouterr().out
        assert "accuracy_low" in shown
        assert "constant" in shown
        assert len(samples.read_text().splitlines()) == 8
    out = tmp_path / "predictions.json"
    assert (
        main(
            ["predict", "--model", str(base), "--task", task, "--split", "test", "--out", str(out)]
        )
        == 0
    )
    assert all(isinstance(row["answer"], str) for row in json.loads(out.read_text()))


def test_vqav2_by_the_command(base, capsys, tmp_path):
    task = json.dumps({"name": "vqav2", "root": str(FIXTURE)})
    samples, record = tmp_path / "samples.jsonl", tmp_path / "record.csv"
    command = [
        "eval",
        "--model",
        str(base),
        "--task",
        task,
        "--split",
        "val2014",
        "--samples",
        str(samples),
    ]
    assert main([*command, "--record", str(record)]) == 0
    assert "answer_type:number" in capsys.readouterr().out
    answers = {
        example.id: example.meta["answers"] for example in VQAv2(FIXTURE).examples("val2014")
    }
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(rows) == 8
    for row in rows:
        assert row["score"] == vqa_score(row["prediction"], answers[row["id"]])
    assert record.is_file()


def test_study_and_tuning_take_models_that_write(base):
    whole, one = (
        load_eval_model(str(base), TASK, reducer) for reducer in ({"reducer": "none"}, REDUCER)
    )
    examples = whole.collator.task.examples("test")[:8]
    assert {"accuracy", "accuracy_low", "scores"} <= set(score(one, examples, 4))
    whole, one = whole.on(examples, 4), one.on(examples, 4)
    spent = cost(one, whole, 8)
    assert spent["gflops"] < spent["unreduced_gflops"]
    text, image = json.loads(spent["tokens"])[0]
    questions = [len(whole.collator.prompt(example.text, example.id)) - 16 for example in examples]
    assert (text, image) == (pytest.approx(sum(questions) / 8, abs=0.01), 16)
    assert json.loads(spent["tokens"])[-1][1] < 16
    pool = ExamplePool(whole.collator.task.examples("test"), whole.collator, 4, 16)
    assert [len(scores) for scores in pool.scores(one.model, range(3))] == [4, 4, 4]


def test_training_goes_on_with_reducer_and_teacher(base, tmp_path):
    metrics = train(
        TrainSettings(
            str(tmp_path / "out"),
            TASK,
            ModelSettings(path=str(base), max_length=24),
            reducer=REDUCER,
            distill=DistillSettings(teacher=str(base), weight=2.0),
            trainer=STEPS,
        )
    )
    assert 0 <= metrics["eval_accuracy"] <= 100
    model = load(tmp_path / "out/model")
    assert pumer.active(model).reducer == pumer.PuMer(0.2, 0.3, 0.0, (0, 1))
    log = json.loads((tmp_path / "out/log.json").read_text())
    assert max(row.get("distill_loss", 0) for row in log) > 0
    before = load(base).state_dict()
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_loss_falls(settings, tmp_path):
    steps = STEPS | {"max_steps": 30, "per_device_train_batch_size": 8, "learning_rate": 1e-2}
    train(
        TrainSettings(
            str(tmp_path / "out"), TASK, settings, image=IMAGES, eval_split=None, trainer=steps
        )
    )
    losses = [
        row["task_loss"]
        for row in json.loads((tmp_path / "out/log.json").read_text())
        if "task_loss" in row
    ]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_accumulated_batches_teach_as_one(vilt, tmp_path):
    """Also for models that choose: the mean over the batches, not their sum."""

    def weights(name, size, accumulated):
        more = {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": accumulated,
            "max_steps": 2,
        }
        more |= {"optim": "sgd", "max_grad_norm": 0.0}
        task = TASK | {"questions": 8}
        train(
            TrainSettings(
                str(tmp_path / name),
                task,
                ModelSettings(path=vilt),
                image=IMAGES,
                eval_split=None,
                trainer=STEPS | more,
            )
        )
        return load(tmp_path / name / "model").state_dict()

    whole, parts = weights("whole", 4, 1), weights("parts", 2, 2)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, msg=name)


def test_dense_targets_see_patches_and_the_end_of_the_question(opened):
    model, _, collator = opened
    task = replace(collator.task, patch_size=8)
    batch = replace(collator, task=task, teach=True)(task.examples("train")[:4])
    grounded = Grounded(model, 2)
    output = grounded(**batch)
    assert output.loss is not None
    assert output.grounding_loss > 0
    hidden = model(**batch, output_hidden_states=True).hidden_states[2]
    states = grounded._of_decoder(hidden, batch)
    for row in range(4):
        ids, labels = batch["input_ids"][row].tolist(), batch["labels"][row].tolist()
        last = next(n for n, label in enumerate(labels) if label != IGNORED) - 1
        norm = [torch.nn.functional.rms_norm(x, x.shape[-1:]) for x in hidden[row]]
        image = torch.stack(
            [norm[n] for n, token in enumerate(ids) if token == model.config.image_token_id]
        )
        torch.testing.assert_close(
            states[row], torch.cat([image, image * grounded.asks(norm[last])], 1)
        )


def test_the_tower_starts_as_the_vilt(settings, vilt):
    model, tokenizer, _ = prepare(settings, TASK)
    source, tower = load(vilt).base_model, model.model.vision_tower
    states = torch.randn(2, 17, 32)
    for layer, block in zip(tower.encoder.layers, source.encoder.layer, strict=False):
        theirs = block(states)
        torch.testing.assert_close(
            layer(states, None), theirs[0] if isinstance(theirs, tuple) else theirs
        )
    assert not any(parameter.requires_grad for parameter in tower.post_layernorm.parameters())
    assert (
        len(tokenizer)
        == model.config.text_config.vocab_size
        == len(model.model.language_model.embed_tokens.weight)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"vision_config": LLAVA["vision_config"] | {"intermediate_size": 40}},
            "intermediate_size differ",
        ),
        ({"text_config": LLAVA["text_config"] | {"hidden_size": 48}}, "hidden_size differ"),
    ],
)
def test_starts_that_do_not_fit(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        prepare(replace(settings, config=LLAVA | changes), TASK)


def test_settings_that_do_not_fit(settings, base, tmp_path):
    with pytest.raises(ValueError, match="scenes-ve has no answers in words"):
        train(
            TrainSettings(
                str(tmp_path),
                {"name": "scenes-ve", "image_size": 32},
                settings,
                image=IMAGES,
                trainer=STEPS,
            )
        )
    with pytest.raises(ValueError, match="does not support LlavaForConditionalGeneration"):
        train(
            TrainSettings(
                str(tmp_path),
                TASK,
                settings,
                image=IMAGES,
                optimizer=OptimizerSettings(),
                trainer=STEPS,
            )
        )
    with pytest.raises(ValueError, match="keeps its class and configuration"):
        prepare(ModelSettings(path=str(base), config={"image_seq_length": 3}), TASK)
    assert not any(tmp_path.iterdir())


def test_collators_by_model(opened, vilt):
    model, _tokenizer, collator = opened
    assert isinstance(model, LlavaForConditionalGeneration)
    assert isinstance(collator, PromptCollator)
    chooser = load(vilt)
    chooser.config.id2label = dict(enumerate(collator.task.labels))
    chosen = collator_for(chooser, collator.task, AutoTokenizer.from_pretrained(vilt), Square(32))
    assert type(chosen) is Collator
    inputs = model_inputs(collator(collator.task.examples("test")[:2]))
    assert answer(model, inputs, collator, 2) == answer(model, inputs, collator, 2)

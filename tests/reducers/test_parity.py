"""The published code's outputs, function by function and model by model: `official=True` gives the
same.

Of ToMe's functions the k-th and the random bipartite matching are left out: no reducer here uses
them.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pumer
from pumer.adapters.encoder.patches import embed_patches
from pumer.models.vilt.published import LAYOUT
from pumer.reducers import Plan, PuMer, Tokens, TokenShape
from pumer.reducers import official as published
from pumer.reducers.ops.budget import merge_schedule
from pumer.reducers.ops.matching import bipartite

FUNCTION = 1e-5  # largest difference allowed in what one function returns
MODEL = 1e-4  # and a whole model
MODELS = ["vqa2", "nlvr2", "ve", "irtr", "vqa2_interp", "vqa2_shuffled"]
HEADS = {"vqa2": "vqa_classifier", "nlvr2": "nlvr2_classifier", "ve": "ve_classifier"}


@pytest.fixture(params=["part", "whole"])
def folder(request):
    """The part of the reference data that is in the repository, and all of it where it is found."""
    if request.param == "part":
        return Path(__file__).parents[1] / "data" / "parity"
    return request.getfixturevalue("shared") / "parity"


def read(folder, name):
    """Settings and tensors of one file, skipping the test if the folder lacks it."""
    if not (folder / f"{name}.json").exists():
        pytest.skip(f"{name} is not in this part of the reference data")
    return json.loads((folder / f"{name}.json").read_text()), load_file(
        folder / f"{name}.safetensors"
    )


def same(found, expected, where, tolerance=FUNCTION):
    torch.testing.assert_close(
        found.float(), expected.float(), rtol=0, atol=tolerance, msg=lambda text: f"{where}: {text}"
    )


def test_masked_softmax(folder):
    settings, data = read(folder, "masked_softmax")
    for case in settings["cases"]:
        same(
            published.masked_softmax(data[f"{case}.logits"], data[f"{case}.mask"]),
            data[f"{case}.out"],
            case,
        )


# --- matching ---


def check_indices(plan, data, case):
    """The plan against the published lists of which even token stays, and which goes into which odd
    one."""
    slot = plan.slot_BN
    stays, goes, into = (data[f"{case}.{name}_idx"][..., 0] for name in ("unm", "src", "dst"))
    assert torch.equal(slot.gather(1, 2 * goes), slot.gather(1, 2 * into + 1)), case
    assert torch.equal(slot.gather(1, 2 * stays), torch.arange(stays.shape[1]).expand_as(stays)), (
        case
    )


def check_averages(plan, data, case, order=None):
    """Averages with sizes of one and with given ones, the sizes of the groups, and both plain
    reductions."""
    inputs = case.split(".")[0]
    x, size = data[f"{inputs}.x"], data[f"{inputs}.size"][..., 0]
    order = torch.arange(plan.slots) if order is None else order
    sized = Plan.merge(plan.slot_BN, plan.mask_BK, size)
    same(plan.reduce(x)[:, order], data[f"{case}.wavg"], case)
    same(plan.total(torch.ones_like(size))[:, order], data[f"{case}.wavg_size"][..., 0], case)
    same(sized.reduce(x)[:, order], data[f"{case}.wavg_sized"], case)
    same(sized.total(size)[:, order], data[f"{case}.wavg_sized_size"][..., 0], case)
    same(plan.reduce(x)[:, order], data[f"{case}.mean"], case)


def test_matching_of_pumer(folder):
    settings, data = read(folder, "matching_pumer")
    for case, setting in settings["cases"].items():
        inputs = case.split(".")[0]
        similarity, mask = (
            published.cosine(data[f"{inputs}.metric"]),
            data[f"{inputs}.mask"].float(),
        )
        plan = published.match(similarity, setting["r"], setting["class_token"])
        summing = published.match(similarity, setting["r"], setting["class_token"], average=False)
        assert plan.slots == setting["tokens"] - setting["r_used"], case
        check_indices(plan, data, case)
        check_averages(plan, data, case)
        same(summing.reduce(data[f"{inputs}.x"]), data[f"{case}.sum"], case)
        same(plan.reduce(mask), data[f"{case}.mask_out"].reshape(mask.shape[0], -1), case)


def test_other_matchings_of_pumer(folder):
    settings, data = read(folder, "matching_pumer_other")
    for case, setting in settings["cases"].items():
        inputs, average = case.split(".")[0], setting["mode"] == "mean"
        scores = data[f"{inputs}.attn"]
        if setting["function"] == "weighted":
            similarity = published.cosine(data[f"{inputs}.metric"] * scores[..., None])
            plan = published.match(similarity, setting["r"], average=average)
        else:
            plan = published.match(
                published.closeness(scores), setting["r"], protect_first=False, average=average
            )
        same(plan.reduce(data[f"{inputs}.x"]), data[f"{case}.out"], case)


def test_matching_of_tome(folder):
    settings, data = read(folder, "matching_tome")
    for case, setting in settings["cases"].items():
        if setting["function"] != "bipartite_soft_matching":
            continue
        inputs = case.split(".")[0]
        similarity = published.cosine(data[f"{inputs}.metric"])
        order = None
        if setting["distill_token"]:
            # No reducer here has a distillation token. It is the first of the odd ones: nothing may
            # merge into it, and the published layout has it second.
            similarity[..., 0] = -torch.inf
            stays = similarity.shape[1] - setting["r_used"]
            order = torch.tensor(
                [0, stays, *range(1, stays), *range(stays + 1, stays + similarity.shape[2])]
            )
        plan = published.match(similarity, setting["r_used"], setting["class_token"])
        check_indices(plan, data, case)
        check_averages(plan, data, case, order)
        order = torch.arange(plan.slots) if order is None else order
        same(plan.sources()[:, order], data[f"{case}.source"], case)
        # With a distillation token the published function does not undo its own order; nor is it
        # undone here.
        same(plan.expand(plan.reduce(data[f"{inputs}.x"])[:, order]), data[f"{case}.unmerge"], case)


def test_our_matching_makes_the_groups_of_tome(folder):
    """Our own layout keeps the order of the tokens, so groups are compared as sets."""
    settings, data = read(folder, "matching_tome")
    for case, setting in settings["cases"].items():
        if setting["function"] != "bipartite_soft_matching":
            continue
        inputs = case.split(".")[0]
        metric, x, size = (data[f"{inputs}.{name}"] for name in ("metric", "x", "size"))
        # [CLS] and the distillation token stay, in front.
        prefix = setting["class_token"] + setting["distill_token"]
        valid = torch.ones(metric.shape[:2], dtype=torch.bool)
        slots = setting["tokens"] - setting["r_used"] - prefix
        patches = bipartite(
            metric[:, prefix:],
            valid[:, prefix:],
            setting["r_used"],
            slots,
            size[:, prefix:, 0],
            prefix,
        )
        plan = Plan.side_by_side([Plan.identity(valid[:, :prefix]), patches])
        groups = data[f"{case}.source"].bool()
        where = (plan.sources()[:, :, None] == groups[:, None]).all(
            -1
        )  # [B, our slot, published slot]
        assert (where.sum(1) == 1).all(), case
        assert (where.sum(2) == 1).all(), case
        order = where.long().argmax(1)
        wide = order[..., None].expand(-1, -1, x.shape[2])
        same(plan.reduce(x).gather(1, wide), data[f"{case}.wavg_sized"], case)
        same(
            plan.total(size[..., 0]).gather(1, order), data[f"{case}.wavg_sized_size"][..., 0], case
        )


def test_schedules_of_tome(folder):
    settings, _ = read(folder, "matching_tome")
    for case in settings["parse_r"]:
        r = tuple(case["r"]) if isinstance(case["r"], list) else case["r"]
        assert merge_schedule(r, case["num_layers"]) == case["out"], case


# --- the reducer ---


def reducer_of(setting, layers=(0,), official=True):
    return PuMer(
        prune=setting.get("prune", 0),
        merge=setting.get("merge_image", setting.get("joint_r", 0)),
        merge_text=setting.get("merge_text", 0),
        score=setting.get("score", "mean_head"),
        style=setting.get("style", "tome"),
        layers=layers,
        official=official,
    )


def test_reducer_of_vilt(folder):
    settings, data = read(folder, "reducer_vilt")
    for case, setting in settings["cases"].items():
        if "joint_r" in case:
            setting["joint_r"] = int(case.split("joint_r")[1])
        given = {
            name: data.get(f"{setting['input']}.in.{name}")
            for name in ("text_states", "image_states", "mask")
        }
        probes = {
            name: data[f"{setting['input']}.in.{name}"]
            for name in ("query_metric", "key_metric", "attn")
        }
        text, image = given["text_states"].shape[1], given["image_states"].shape[1]
        reducer = reducer_of(setting)
        tokens = Tokens(
            mask_BN=given["mask"],
            text=text,
            sizes_BN=torch.ones(given["mask"].shape),
            queries_BHNC=probes["query_metric"][:, None],
            keys_BHNC=probes["key_metric"][:, None],
            attention_BHNN=probes["attn"],
        )
        if setting.get("raises"):
            with pytest.raises(ValueError, match="too few to merge"):
                reducer.plan(tokens)
            continue
        plan = reducer.plan(tokens)
        states = plan.reduce(torch.cat([given["text_states"], given["image_states"]], 1))
        lengths = reducer.lengths(TokenShape(text, image, 0))
        assert states.shape[1] == plan.slots == sum(lengths), case
        if "joint_r" in case:
            same(states, data[f"{case}.states"], case)
            same(plan.mask_BK, data[f"{case}.mask"], case)
        else:
            text = lengths[0]
            same(states[:, :text], data[f"{case}.text_states"], case)
            same(states[:, text:], data[f"{case}.image_states"], case)
            same(plan.mask_BK[:, :text], data[f"{case}.text_mask"], case)
            same(plan.mask_BK[:, text:], data[f"{case}.image_mask"], case)


def test_reducer_of_meter(folder):
    settings, data = read(folder, "reducer_meter")
    for case, setting in settings["cases"].items():
        names = (
            "text_states",
            "image_states",
            "text_mask",
            "image_mask",
            "text_key_metric",
            "image_key_metric",
        )
        given = {name: data[f"{setting['input']}.in.{name}"] for name in names}
        text, image = given["text_states"].shape[1], given["image_states"].shape[1]
        reducer = reducer_of(setting, official="meter")
        tokens = Tokens(
            mask_BN=torch.cat([given["text_mask"], given["image_mask"]], 1).float(),
            text=text,
            sizes_BN=torch.ones(len(given["text_mask"]), text + image),
            queries_BHNC=torch.zeros_like(given["text_key_metric"])[
                :, None
            ],  # unread: probabilities are given
            keys_BHNC=torch.cat([given["text_key_metric"], given["image_key_metric"]], 1)[:, None],
            attention_BHNN=data[f"{setting['input']}.in.text_to_image_attn"],
            cross=True,
        )
        if setting.get("raises"):
            with pytest.raises(ValueError, match="too few to merge"):
                reducer.plan(tokens)
            continue
        plan = reducer.plan(tokens)
        states = plan.reduce(torch.cat([given["text_states"], given["image_states"]], 1))
        lengths = reducer.lengths(TokenShape(text, image, 0))
        assert states.shape[1] == plan.slots == sum(lengths), case
        text = lengths[0]
        for part, where in (("text", slice(0, text)), ("image", slice(text, None))):
            same(states[:, where], data[f"{case}.{part}_states"], case)
            same(plan.mask_BK[:, where], data[f"{case}.{part}_mask"], case)


# --- whole models ---


def publish(folder, settings, data, case):
    """Write a case's model in the layout of a released checkpoint; the config has the published
    names."""
    names = {
        "prune": "prune_r",
        "merge_image": "merge_r",
        "score": "sim_method",
        "style": "merge_style",
    }
    setting = settings["cases"][case].items()
    setting = {names.get(name, name): value for name, value in setting if name != "token_counts"}
    sizes = {name: settings["extra"][name] for name in ("patch_size", "pos_grid")}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**settings["config"], **sizes, **setting}))
    weights = {
        name.removeprefix("weights."): tensor
        for name, tensor in data.items()
        if name.startswith("weights.")
    }
    save_file(weights, folder / "model.safetensors")
    return folder


def inputs_of(data):
    pixels = data.get("inputs.pixel_values")
    if pixels is None:
        pixels = torch.stack([data["inputs.pixel_values1"], data["inputs.pixel_values2"]], 1)
    return {
        "input_ids": data["inputs.text_ids"],
        "attention_mask": data["inputs.text_masks"],
        "pixel_values": pixels,
    }


class Watch:
    """What passes through a model's encoder: one entry per pass."""

    def __init__(self, model):
        self.model, self.passes = model, []
        model.vilt.register_forward_hook(self.note)
        for layer in model.vilt.encoder.layer:
            layer.register_forward_hook(self.note_layer)
        self.layers = []

    def note_layer(self, module, args, output):
        self.layers.append(output[:2])

    def note(self, module, args, output):
        counts = [list(pair) for pair in pumer.active(self.model).lengths[1:]]
        self.passes.append((counts, output, self.layers))
        self.layers = []


@pytest.mark.filterwarnings("ignore:weights in")
@pytest.mark.parametrize("name", MODELS)
def test_whole_model(folder, tmp_path, name):
    settings, data = read(folder, f"vilt_{name}")
    for case in settings["cases"]:
        model = pumer.load_official(publish(tmp_path / case, settings, data, case))
        watch = Watch(model)
        with torch.no_grad():
            logits = model(**inputs_of(data)).logits
        same(logits, data[f"cases.{case}.logits"], case, MODEL)
        counts = [counts for counts, _, _ in watch.passes]
        assert (counts if len(counts) > 1 else counts[0]) == settings["cases"][case][
            "token_counts"
        ], case
        if f"cases.{case}.cls_feats" in data:
            pooled = torch.cat([output.pooler_output for _, output, _ in watch.passes], 1)
            same(pooled, data[f"cases.{case}.cls_feats"], case, MODEL)
        for number, (_, output, layers) in enumerate(watch.passes, 1):
            prefix = f"cases.{case}." + (f"image{number}." if len(watch.passes) > 1 else "")
            check_states(model, output, layers, data, prefix)
        if f"cases.{case}.loss" in data:
            same(
                loss_of(name, logits, data["inputs.labels"]),
                data[f"cases.{case}.loss"][0],
                case,
                MODEL,
            )


def check_states(model, output, layers, data, prefix):
    """States after every layer, where stored, and the text masks, whose fractions tell what
    merged."""
    for number, (states, axis) in enumerate(layers):
        layer = f"{prefix}layer{number}."
        if f"{layer}text_mask" in data:
            same(axis.mask_BN[:, : axis.text], data[f"{layer}text_mask"], layer, MODEL)
        for part, where in (("text", slice(0, axis.text)), ("image", slice(axis.text, None))):
            if layer + part in data:
                same(states[:, where], data[layer + part], layer + part, MODEL)
    if f"{prefix}final_text" in data:
        text, image = data[f"{prefix}final_text"], data[f"{prefix}final_image"]
        states, order = output.last_hidden_state, data.get(f"{prefix}patch_index")
        if order is not None and states.shape[1] - text.shape[1] == order.shape[1] + 1:
            # The published order of patches is random until a reduction sorts them; ours is the
            # raster's.
            columns = order[..., 1].max() + 1
            place = (
                torch.nn.functional.pad(1 + order[..., 0] * columns + order[..., 1], (1, 0))
                + text.shape[1]
            )
            place = torch.cat([torch.arange(text.shape[1]).expand(len(place), -1), place], 1)
            states = states.gather(1, place[..., None].expand(-1, -1, states.shape[2]))
        same(states, torch.cat([text, image], 1), prefix, MODEL)


def loss_of(name, logits, labels):
    """The published loss; transformers multiplies that of VQA by the number of answers."""
    if name.startswith("vqa2"):
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
    return torch.nn.functional.cross_entropy(logits, labels)


@pytest.mark.parametrize("case", ["base", "pumer_p0.1_r0.3_t0.2_l134"])
def test_image_embeddings(folder, tmp_path, case):
    settings, data = read(folder, "vilt_vqa2")
    if f"cases.{case}.image_embeds" not in data:
        pytest.skip("the image embeddings are not in this part of the reference data")
    model = pumer.load_official(publish(tmp_path / case, settings, data, case))
    with torch.no_grad():
        embeds, mask, _, grid = embed_patches(
            model.vilt.embeddings, data["inputs.pixel_values"], None
        )
    same(embeds, data[f"cases.{case}.image_embeds"], case)
    assert mask.all()
    assert grid == (6, 6)


def test_gradients(folder, tmp_path):
    settings, data = read(folder, "vilt_vqa2")
    stored = {
        name.removeprefix("grads."): tensor
        for name, tensor in data.items()
        if name.startswith("grads.")
    }
    cases = [
        case for case in settings["cases"] if any(name.startswith(f"{case}.") for name in stored)
    ]
    assert cases
    for case in cases:
        model = pumer.load_official(publish(tmp_path / case, settings, data, case))
        loss_of("vqa2", model(**inputs_of(data)).logits, data["inputs.labels"]).backward()
        gradients = {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in model.named_parameters()
        }
        gradients = LAYOUT.from_ours(gradients, "vqa_classifier")
        for name, expected in stored.items():
            if name.startswith(f"{case}."):
                same(gradients[name.removeprefix(f"{case}.")], expected, name, FUNCTION)


@pytest.mark.filterwarnings("ignore:weights in")
def test_training_form_of_retrieval(folder, tmp_path):
    settings, data = read(folder, "vilt_irtr")
    inputs = inputs_of(data)
    both = {
        "input_ids": torch.stack([inputs["input_ids"], inputs["input_ids"].roll(1, 0)], 1).flatten(
            0, 1
        ),
        "attention_mask": torch.stack(
            [inputs["attention_mask"], inputs["attention_mask"].roll(1, 0)], 1
        ).flatten(0, 1),
        "pixel_values": inputs["pixel_values"].repeat_interleave(2, 0),
    }
    for case in settings["cases"]:
        model = pumer.load_official(publish(tmp_path / case, settings, data, case))
        with torch.no_grad():
            logits = model(**both).logits
        same(logits, data[f"train5d.{case}.logits"], case, MODEL)
        ranks = torch.nn.functional.cross_entropy(
            logits.view(-1, 2), torch.zeros(3, dtype=torch.long)
        )
        same(ranks, data[f"train5d.{case}.rank_loss"][0], case, MODEL)

"""Reducers with trained parts: the published port's outputs, what training does, and that the parts
are kept."""

import copy
from dataclasses import replace

import pytest
import tiny
import torch
from test_parity import MODEL, folder, inputs_of, publish, read, same  # noqa: F401  # folder is a fixture
from test_parity_meter import publish as publish_meter

import pumer
from pumer.reducers import (
    Chain,
    Compose,
    DynamicViT,
    Plan,
    PuMer,
    SmartTrim,
    Tokens,
    TokenShape,
    ToMe,
)
from pumer.reducers.learned import GumbelSampling, decide
from pumer.reducers.smarttrim import HeadTrimmer

LEARNED = {
    "dynamicvit": DynamicViT(keep=0.6, layers=(0, 2)),
    "dynamicvit-port": DynamicViT(keep=0.5, layers=(1,), official=True),
    "smarttrim": SmartTrim(layers=(0, 1, 3), target=0.4),
    "smarttrim-image": SmartTrim(layers=(1, 2), text=False, heads=False),
}
KINDS = list(tiny.FAMILIES.values())


# --- the published port of DynamicViT ---


def test_the_published_pruner(folder):  # noqa: F811
    settings, data = read(folder, "dyvit_pruner")
    states = torch.cat([data["text_states"], data["image_states"]], 1)
    text = data["text_states"].shape[1]
    checked = 0
    for case, setting in settings["cases"].items():
        if setting.get("prune_method", "mlp_states") != "mlp_states" or setting.get("skipped"):
            continue
        reducer = DynamicViT(
            keep=setting["keep_ratio"], layers=tuple(setting["prune_layers"]), official=True
        )
        parts = reducer.parts(states.shape[2], 4, 4, False)
        prefix = f"{case}.weights.token_predictors."
        parts.load_state_dict(
            {
                ".layers.".join(name.removeprefix(prefix).split(".", 1)): tensor
                for name, tensor in data.items()
                if name.startswith(prefix)
            }
        )
        tokens = Tokens(
            mask_BN=torch.cat([data["text_mask"], data["image_mask"]], 1).float(),
            text=text,
            sizes_BN=torch.ones(states.shape[:2]),
            layer=setting["layer"],
            states_BND=states,
            part=parts[str(setting["layer"])],
        )
        plan = reducer.plan(tokens)
        assert plan.slots == sum(
            reducer.lengths(TokenShape(text, states.shape[1] - text, setting["layer"]))
        ), case
        assert plan.slots == text + setting["out_tokens"], case
        assert torch.equal(plan.index_BK[:, text + 1 :] - text - 1, data[f"{case}.keep_idx"]), case
        same(plan.reduce(states)[:, text:], data[f"{case}.out_states"], case)
        same(plan.mask_BK[:, text:], data[f"{case}.out_mask"], case)
        checked += 1
    assert checked >= 6


@pytest.mark.filterwarnings("ignore:config.json in")
@pytest.mark.parametrize(("family", "write"), [("vilt", publish), ("meter", publish_meter)])
def test_published_models_with_learned_pruning(folder, tmp_path, family, write):  # noqa: F811
    settings, data = read(folder, f"{family}_vqa2_dyvit")
    model = pumer.load_official(write(tmp_path / "model", settings, data, "dyvit"))
    trunk, seen = getattr(model, family), []
    if family == "vilt":
        trunk.register_forward_hook(lambda module, args, output: seen.append(output))
    else:
        fuse = trunk.fuse
        trunk.fuse = lambda *args, **kwargs: seen.append(fuse(*args, **kwargs)) or seen[-1]
    with torch.no_grad():
        logits = model(**inputs_of(data)).logits
    same(logits, data["cases.dyvit.logits"], "logits", MODEL)
    same(seen[0].pooler_output, data["cases.dyvit.cls_feats"], "pooled", MODEL)
    states = (
        seen[0].last_hidden_state
        if family == "vilt"
        else torch.cat([seen[0].text_states, seen[0].image_states], 1)
    )
    final = torch.cat([data["cases.dyvit.final_text"], data["cases.dyvit.final_image"]], 1)
    same(states, final, "final states", MODEL)
    # There the lengths were noted before the pruning that follows a layer.
    assert [list(pair) for pair in pumer.active(model).lengths[:-1]] == settings["cases"]["dyvit"][
        "token_counts"
    ]


# --- training ---


def training(kind, reducer):
    model = pumer.apply(tiny.model(kind), reducer).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LEARNED)
def test_all_parts_learn_from_the_answer_and_from_the_price(kind, name):
    model = training(kind, LEARNED[name])
    answer = model(**tiny.batch(kind)).logits.square().mean()
    price = pumer.active(model).budget_loss()
    assert price > 0
    parts = list(pumer.active(model).parts.parameters())
    # What is decided after the last layer, or on the last image, changes no answer.
    from_answer = torch.autograd.grad(answer, parts, retain_graph=True, allow_unused=True)
    from_price = torch.autograd.grad(price, parts, allow_unused=True)
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in from_answer)
    assert all(a is not None or b is not None for a, b in zip(from_answer, from_price, strict=True))
    assert all(x.isfinite().all() for x in (*from_answer, *from_price) if x is not None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["dynamicvit", "smarttrim"])
def test_training_leaves_out_what_using_drops(kind, name, monkeypatch):
    """With the same decisions, dense and masked in training gives what short gives afterwards."""
    reducer = LEARNED[name]
    first = 14 if kind.startswith("BridgeTower") else 0  # of two channels that differ there
    if (
        name == "dynamicvit"
    ):  # there the share is fixed afterwards: let both decide alike, by two channels of the state
        monkeypatch.setattr(
            DynamicViT,
            "_logits",
            lambda self, tokens: tokens.states_BND[
                :, tokens.text + tokens.num_prefix_tokens :, first : first + 2
            ],
        )
        traits = replace(reducer.traits, dynamic_length=True)
        monkeypatch.setattr(DynamicViT, "traits", traits)
        monkeypatch.setattr(
            DynamicViT, "plan", lambda self, tokens: keep(tokens, liked(self._logits(tokens)))
        )
    module = type(reducer).__module__
    monkeypatch.setattr(f"{module}.decide", lambda logits, sampling: liked(logits).float())
    model = training(kind, reducer)
    inputs = tiny.batch(kind)
    dense = model(**inputs).logits
    with torch.no_grad():
        short = model.eval()(**inputs).logits
    assert sum(pumer.active(model).lengths[-1]) < sum(pumer.active(model).lengths[0])
    torch.testing.assert_close(dense, short, rtol=0, atol=1e-5)


def liked(logits):
    return logits[..., 0] > logits[..., 1]


def keep(tokens, wanted_BN):
    kept_BN = wanted_BN & tokens.valid_BN[:, tokens.text + tokens.num_prefix_tokens :]
    return tokens.with_structure(None, Plan.keep(kept_BN, kept_BN.shape[1]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_model_is_its_own_teacher(kind):
    model = training(kind, LEARNED["smarttrim"])
    inputs = tiny.batch(kind)
    with pumer.api.unreduced(model):
        whole = model(**inputs).logits
    pumer.remove(model)
    torch.testing.assert_close(whole, model(**inputs).logits, rtol=0, atol=1e-5)


def test_the_price_counts_every_picture_and_no_older_forward():
    model = training("ViltForImagesAndTextClassification", LEARNED["dynamicvit"])
    for _ in range(3):
        model(**tiny.batch("ViltForImagesAndTextClassification"))
    decided = pumer.active(model).decisions
    assert [len(spent) for spent, _ in decided] == [2, 2]  # two pictures, two layers


def test_the_price_of_dynamicvit_is_that_of_its_paper():
    reducer = DynamicViT(keep=0.5, layers=(0, 1), weight=2.0)
    spent = [torch.tensor([0.5, 0.7]), torch.tensor([0.25, 0.05])]
    assert reducer.budget_loss(spent, 0.0).item() == pytest.approx(
        2 * (0.2**2 / 2 + 0.2**2 / 2) / 2
    )


def test_the_target_of_smarttrim_goes_down_and_stays():
    reducer = SmartTrim(target=0.4, layers=(0, 1), curriculum=0.5, weight=1.0)
    whole = [torch.ones(3, 2), torch.ones(3, 2)]
    prices = [reducer.budget_loss(whole, progress).item() for progress in (0.0, 0.25, 0.5, 1.0)]
    assert prices == pytest.approx([0.0, 0.3, 0.6, 0.6])
    half = [torch.tensor([[1.0, 0.5]]), torch.tensor([[0.5, 0.5]])]
    cost = (1 / 3) * 0.75 * 0.5 + (
        2 / 3
    ) * 0.5  # attention before the decision, with half of the heads; the MLP after
    assert reducer.budget_loss(half, 1.0, [torch.tensor([0.5])]).item() == pytest.approx(
        abs(cost - 0.4)
    )


@pytest.mark.parametrize("noise", [0.0, 0.5, 1.0])
def test_decisions_are_drawn_with_this_much_noise(noise):
    logits = torch.randn(500, 2, generator=torch.Generator().manual_seed(3)).requires_grad_()
    torch.manual_seed(4)
    drawn = decide(logits, GumbelSampling(temperature=0.7, noise=noise))
    torch.manual_seed(4)
    gumbel = -torch.log(torch.empty(500, 2).exponential_())
    noisy = logits + noise * gumbel
    torch.testing.assert_close(drawn, liked(noisy).float())
    assert torch.allclose(drawn, decide(logits, None)) == (noise == 0)
    soft = torch.softmax(noisy / 0.7, dim=-1)[:, 0]
    mine, slow = (torch.autograd.grad(one.sum(), logits)[0] for one in (drawn, soft))
    torch.testing.assert_close(mine, slow)


def test_at_the_end_of_its_training_smarttrim_pays_for_what_it_will_keep():
    assert SmartTrim(temperature=2.0).sampling_at(0.0) == GumbelSampling(2.0, noise=1.0)
    assert SmartTrim(temperature=2.0).sampling_at(1.0) == GumbelSampling(1.0, noise=0.0)
    for curriculum, noises in (
        (0.5, [1, 1, 1, 0.5, 0]),
        (0.0, [1, 0.75, 0.5, 0.25, 0]),
        (1.0, [1, 1, 1, 1, 0]),
    ):
        drawn = [
            SmartTrim(curriculum=curriculum).sampling_at(quarter / 4).noise for quarter in range(5)
        ]
        assert drawn == pytest.approx(noises)


@pytest.mark.parametrize("depth", [2, 4])
def test_smarttrim_begins_with_nearly_everything_whatever_its_depth(depth, monkeypatch):
    """Decisions of a layer count in all later ones, so that each has to keep more the more there
    are."""
    monkeypatch.undo()  # parts as users get them, not those of conftest
    model = training("ViltForQuestionAnswering", SmartTrim(layers=tuple(range(depth)), target=0.4))
    pumer.active(model).progress, left = 0.0, []
    for _ in range(40):
        with torch.no_grad():
            model(**tiny.batch())
        left.append(pumer.active(model).decisions[-1][0][-1][:, 1])
    assert torch.stack(left).mean().item() == pytest.approx(0.9, abs=0.03)


def test_one_head_is_always_heard():
    trimmer = HeadTrimmer(8, 3, 2.0)
    torch.nn.init.constant_(trimmer.decisions.bias, 0.0)
    with torch.no_grad():
        trimmer.decisions.bias.view(3, 2)[:, 1] = torch.tensor([5.0, 4.0, 6.0])
    heard = trimmer(torch.zeros(2, 8), torch.zeros(2, 8), None)
    assert heard.tolist() == [[0, 1, 0]] * 2


def test_every_head_learns_whether_it_is_heard():
    """Of the straight-through decision nothing is lost where one head has to be heard: ties are not
    shared out."""
    torch.manual_seed(0)
    trimmer = HeadTrimmer(8, 3, 2.0)
    torch.nn.init.normal_(trimmer.decisions.weight)
    states = torch.randn(64, 8)
    given = []
    trimmer.decisions.register_forward_hook(lambda *found: given.append(found[2]))

    torch.manual_seed(1)
    heard = trimmer(states, states, GumbelSampling())
    mine = torch.autograd.grad(heard.sum(), given[-1])[0]
    logits = given[-1].detach().requires_grad_()
    torch.manual_seed(1)
    alone = decide(logits.unflatten(-1, (-1, 2)), GumbelSampling())
    assert (heard != alone).any()  # some surest heads were drawn silent
    torch.testing.assert_close(mine, torch.autograd.grad(alone.sum(), logits)[0])


# --- keeping the parts ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LEARNED)
def test_parts_are_saved_and_read(kind, name, tmp_path):
    model = pumer.apply(tiny.model(kind), LEARNED[name])
    for parameter in pumer.active(model).parts.parameters():
        torch.nn.init.normal_(parameter)
    inputs = tiny.batch(kind)
    pumer.save(model, tmp_path / "model")
    again = pumer.load(tmp_path / "model")
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)
    (tmp_path / "model" / "reducer.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks reducer\.safetensors"):
        pumer.load(tmp_path / "model")


def test_parts_of_another_reducer_are_refused(tmp_path):
    model = pumer.apply(tiny.model(), LEARNED["dynamicvit"])
    pumer.save(model, tmp_path / "model")
    pumer.save(pumer.apply(model, replace(LEARNED["dynamicvit"], layers=(1,))), tmp_path / "other")
    (tmp_path / "other" / "reducer.safetensors").replace(tmp_path / "model" / "reducer.safetensors")
    with pytest.raises(ValueError, match="does not fit the reducer"):
        pumer.load(tmp_path / "model")


def test_parts_stay_where_they_fit_and_go_with_the_reducer():
    model = tiny.model()
    names = set(model.state_dict())
    pumer.apply(model, LEARNED["dynamicvit"])
    parts = pumer.active(model).parts
    assert set(model.state_dict()) - names == {
        f"reducer_parts.{name}" for name in parts.state_dict()
    }
    pumer.apply(model, replace(LEARNED["dynamicvit"], keep=0.3), attention="eager")
    assert pumer.active(model).parts is parts
    with pumer.reduced(model, PuMer(layers=(1,))):
        assert set(model.state_dict()) == names
    assert pumer.active(model).parts is parts
    pumer.apply(model, replace(LEARNED["dynamicvit"], layers=(1,)))
    assert pumer.active(model).parts is not parts
    pumer.remove(model)
    assert set(model.state_dict()) == names
    assert not hasattr(model, "reducer_parts")


def test_parts_follow_the_model_while_another_reducer_is_in_force():
    model = pumer.apply(tiny.model(), LEARNED["smarttrim"]).train()
    with pumer.reduced(model, PuMer(layers=(1,))):
        model.eval().double()
    assert not any(module.training for module in model.modules())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


def test_a_model_in_training_can_be_copied():
    model = training("ViltForQuestionAnswering", LEARNED["dynamicvit"])
    model(**tiny.batch()).logits.sum().backward()
    twin = copy.deepcopy(model)
    assert pumer.active(model).budget_loss() > 0
    assert pumer.active(twin).budget_loss() is None


def test_the_port_keeps_all_where_all_are_wanted():
    model = pumer.apply(tiny.model(), DynamicViT(keep=1.0, layers=(1,), official=True))
    with torch.no_grad():
        assert model(**tiny.batch()).logits.isfinite().all()
    assert pumer.report(model).active
    assert pumer.active(model).lengths[-1] == pumer.active(model).lengths[0]


def test_a_copy_has_parts_of_its_own():
    model = pumer.apply(tiny.model(), LEARNED["dynamicvit"])
    twin = copy.deepcopy(model)
    assert pumer.active(twin).parts is twin.reducer_parts
    assert twin.reducer_parts is not model.reducer_parts
    inputs = tiny.batch()
    with torch.no_grad():
        before = model(**inputs).logits
        for parameter in twin.reducer_parts.parameters():
            parameter.normal_()
        torch.testing.assert_close(model(**inputs).logits, before, rtol=0, atol=0)
        assert not torch.equal(twin(**inputs).logits, before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DynamicViT(keep=0), "keep is a share above 0"),
        (lambda: DynamicViT(layers=(-1,)), "prunes after layers"),
        (lambda: SmartTrim(target=1.5), "target is a share of the cost"),
        (lambda: SmartTrim(curriculum=2), "curriculum is a share of the training"),
        (lambda: SmartTrim(layers=(-1, 2)), "trims in layers"),
        (
            lambda: Chain((ToMe(r=[2], depth=1), SmartTrim(layers=(2,)))),
            "smarttrim learns, which a chain",
        ),
        (lambda: Compose(DynamicViT(), PuMer()), "dynamicvit learns where text and image meet"),
        (lambda: Compose(ToMe(proportional=True), SmartTrim()), "give tome proportional=False"),
    ],
)
def test_settings_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()

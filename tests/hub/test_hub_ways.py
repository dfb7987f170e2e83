"""Hugging Face's own ways: names on the Hub, save_pretrained, push_to_hub, model cards, PEFT's
folders."""

import copy
import inspect
import json
import os
import pickle
import shutil

import huggingface_hub
import matrix
import pytest
import tiny
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file

import pumer
from pumer._shipped import SHIPPED
from pumer.hub import is_stock
from pumer.hub.reduction import saved_reducer

# PEFT asks transformers by a name that it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

REDUCER = matrix.REDUCERS["pumer"]
OLD, NEW = "1" * 40, "2" * 40
"""Commits of a repository."""


def same(model, other):
    return torch.equal(tiny.logits(model, tiny.batch()), tiny.logits(other, tiny.batch()))


def reduced(reducer=REDUCER):
    return pumer.apply(tiny.model(), reducer)


# --- names on the Hub ---


@pytest.fixture
def cache(tmp_path):
    """Put folders into a cache as huggingface_hub leaves it behind: `put(name, commit, write)`."""

    def put(name, commit, write, branch="main"):
        repository = tmp_path / "cache" / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / commit
        snapshot.parent.mkdir(parents=True, exist_ok=True)
        write(snapshot)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
        return {"cache_dir": str(tmp_path / "cache"), "local_files_only": True}

    return put


def test_a_name_on_the_hub_is_loaded_with_its_reducer(cache):
    model = reduced()
    where = cache("owner/name", NEW, lambda folder: pumer.save(model, folder))
    loaded = pumer.load("owner/name", **where)
    assert pumer.active(loaded).reducer == REDUCER
    assert same(loaded, model)
    assert loaded.config._name_or_path == "owner/name"
    assert saved_reducer("owner/name", **where) == REDUCER
    assert not is_stock("owner/name", **where)


def test_a_revision_counts_for_weights_and_reducer(cache):
    old, new = reduced(), pumer.apply(tiny.model(), "dynamicvit")
    with torch.no_grad():
        for weight in old.parameters():
            weight.mul_(1.5)
    cache("owner/name", OLD, lambda folder: pumer.save(old, folder), "v1")
    where = cache("owner/name", NEW, lambda folder: new.save_pretrained(folder))
    assert same(pumer.load("owner/name", **where), new)
    for revision in ("v1", OLD):
        loaded = pumer.load("owner/name", revision=revision, **where)
        assert pumer.active(loaded).reducer == REDUCER
        assert same(loaded, old)


def test_token_and_arguments_are_passed_on(cache, monkeypatch):
    where = cache("owner/name", NEW, lambda folder: pumer.save(reduced(), folder))
    asked = {}
    kind = type(tiny.model())
    snapshot, stock = huggingface_hub.snapshot_download, kind.from_pretrained

    def fetch(*args, **kwargs):
        asked["files"] = kwargs
        return snapshot(*args, **kwargs)

    def read(*args, **kwargs):
        asked["model"] = kwargs
        return stock(*args, **kwargs)

    monkeypatch.setattr("pumer.hub.sources.snapshot_download", fetch)
    monkeypatch.setattr(kind, "from_pretrained", read)
    model = pumer.load(
        "owner/name",
        token="hf_mine",
        device_map={"": "cpu"},
        attn_implementation="eager",
        dtype="bfloat16",
        **where,
    )
    assert asked["files"]["token"] == asked["model"]["token"] == "hf_mine"
    assert asked["model"]["revision"] == NEW
    assert asked["model"]["trust_remote_code"] is False
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert asked["model"]["device_map"] == {"": "cpu"}
    pumer.load("owner/name", trust_remote_code=True, **where)
    assert asked["model"]["trust_remote_code"] is True


def test_what_cannot_be_loaded_is_said(cache, tmp_path):
    where = cache("owner/stock", NEW, lambda folder: tiny.model().save_pretrained(folder))
    with pytest.raises(
        ValueError,
        match=r"owner/stock on the Hub has no pumer\.json.*from_pretrained and pumer\.app",
    ):
        pumer.load("owner/stock", **where)
    assert is_stock("owner/stock", **where)
    with pytest.raises(
        ValueError, match="no folder owner/none, and the Hub does not give"
    ) as caught:
        pumer.load("owner/none", **where)
    assert len(str(caught.value).splitlines()) <= 5
    with pytest.raises(ValueError, match="the Hub does not give a model"):
        pumer.load("owner/stock", revision="v9", **where)
    with pytest.raises(ValueError, match="Did you mean 'scenes-vilt'"):
        pumer.load("scenes-vlit")
    with pytest.raises(ValueError, match="device and device_map both"):
        pumer.load("scenes-vilt", device="cpu", device_map="cpu")
    with pytest.raises(ValueError, match=r"or leave out colour: .*colour"):
        pumer.load("scenes-vilt", colour="red")


def test_a_subfolder_is_a_model_of_its_own(cache, tmp_path):
    where = cache("owner/name", NEW, lambda folder: pumer.save(reduced(), folder / "small"))
    assert pumer.active(pumer.load("owner/name", subfolder="small", **where)).reducer == REDUCER
    pumer.save(reduced(), tmp_path / "here" / "small")
    assert pumer.active(pumer.load(tmp_path / "here", subfolder="small")).reducer == REDUCER


# --- a model's own save_pretrained ---


@pytest.mark.parametrize("reducer", ["pumer", "dynamicvit", "smarttrim"])
@pytest.mark.parametrize("copied", ["itself", "deepcopy", "pickle"])
def test_save_pretrained_writes_the_reducer_too(tmp_path, reducer, copied):
    model = pumer.apply(tiny.model(), REDUCER if reducer == "pumer" else reducer)
    if copied != "itself":
        before = model
        model = copy.deepcopy(model) if copied == "deepcopy" else pickle.loads(pickle.dumps(model))
        pumer.remove(before)  # which is none of the copy's business
    model.save_pretrained(tmp_path)
    assert (tmp_path / "reducer.safetensors").is_file() == (reducer != "pumer")
    loaded = pumer.load(tmp_path)
    assert pumer.active(loaded).reducer == pumer.active(model).reducer
    assert same(loaded, model)
    assert inspect.signature(model.save_pretrained) == inspect.signature(
        tiny.model().save_pretrained
    )


def test_after_remove_nothing_of_it_is_left(tmp_path):
    model = tiny.model()
    before = set(vars(model))
    pumer.remove(pumer.apply(model, "dynamicvit"))
    assert set(vars(model)) == before
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_a_reducer_that_learned_nothing_takes_away_what_another_did(tmp_path):
    model = pumer.apply(tiny.model(), "dynamicvit")
    model.save_pretrained(tmp_path)
    pumer.apply(model, REDUCER).save_pretrained(save_directory=tmp_path)
    assert not (tmp_path / "reducer.safetensors").exists()
    assert same(pumer.load(tmp_path), model)


def test_shards_and_other_arguments_go_on_working(tmp_path):
    model = pumer.apply(tiny.model(), "dynamicvit")
    model.save_pretrained(tmp_path / "a", max_shard_size="20KB", safe_serialization=True)
    pumer.save(model, tmp_path / "b", max_shard_size="20KB")
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert (folder / "model.safetensors.index.json").is_file()
        assert same(pumer.load(folder), model)
    names = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())["weight_map"]
    assert not any("reducer_parts" in name for name in names)
    model.save_pretrained(tmp_path / "c", is_main_process=False)
    assert os.listdir(tmp_path / "c") == []


def test_weights_that_are_given_are_those_that_are_written(tmp_path):
    model = pumer.apply(tiny.model(), "dynamicvit")
    state = {name: x * 2 for name, x in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=dict(state))
    for name, weight in load_file(tmp_path / "reducer.safetensors").items():
        assert torch.equal(weight, state[f"reducer_parts.{name}"])


# --- the model card ---


def test_the_card_says_what_the_model_is(tmp_path):
    model = pumer.apply(tiny.model(), "dynamicvit")
    model.config._name_or_path = "owner/base"
    pumer.save(model, tmp_path / "model")
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data.library_name == "pumer"
    assert card.data.base_model == "owner/base"
    assert card.data.pipeline_tag == "visual-question-answering"
    assert {"pumer", "token-reduction", "dynamicvit", "vilt"} <= set(card.data.tags)
    for part in (
        "with DynamicViT",
        "pip install pumer",
        'pumer.load("OWNER/NAME")',
        '"keep":',
        "runs unreduced",
    ):
        assert part in card.text
    assert "`reducer.safetensors`, is missing then" in card.text
    pumer.save(tiny.model(), tmp_path / "unreduced")
    assert not (tmp_path / "unreduced" / "README.md").exists()


def test_a_folder_of_this_machine_is_no_base_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pumer.save(tiny.model(), "runs/base")
    for base in (tmp_path / "runs/base", "runs/base"):  # the latter could be a name on the Hub
        shutil.rmtree("model", ignore_errors=True)
        pumer.save(pumer.apply(pumer.load(base), REDUCER), "model")
        assert "runs/base" not in (tmp_path / "model" / "README.md").read_text()
    pumer.save(pumer.apply(tiny.model("MeterForQuestionAnswering"), REDUCER), tmp_path / "meter")
    assert "transformers alone has no such model" in (tmp_path / "meter" / "README.md").read_text()


def test_a_card_of_the_users_stays_and_ours_follows_the_settings(tmp_path):
    model, file = reduced(), tmp_path / "README.md"
    model.save_pretrained(tmp_path)
    pumer.apply(model, "tome").save_pretrained(tmp_path)
    card = ModelCard.load(file)
    assert "with ToMe" in card.text
    assert "tome" in card.data.tags
    ours = file.read_text()
    for mine in (
        "# My model\n",
        "---\nlicense: mit\n---\n# My model\n",
        ours + "\nTrained for fun.\n",
        "---\n",
    ):
        file.write_text(mine)
        pumer.apply(model, REDUCER).save_pretrained(tmp_path)
        assert file.read_text() == mine


# --- push_to_hub ---


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that takes whatever is pushed; `hub.folder` has the files, `hub.card` is the
    repository's before."""

    class Hub:
        folder = tmp_path / "pushed"
        card = None

    def commit(self, repo_id, operations, **kwargs):
        shutil.rmtree(Hub.folder, ignore_errors=True)
        Hub.folder.mkdir()
        for operation in operations:
            shutil.copy(operation.path_or_fileobj, Hub.folder / operation.path_in_repo)

    def load(name, **kwargs):
        if Hub.card is None:
            raise EntryNotFoundError("no card")
        return ModelCard(Hub.card)

    def create(self, repo_id, **kwargs):
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", commit)
    monkeypatch.setattr("transformers.utils.hub.ModelCard.load", load)
    return Hub


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_a_push_takes_everything_along(hub, tmp_path, way):
    model = pumer.apply(tiny.model(), "dynamicvit")
    if way == "push_to_hub":
        model.push_to_hub("owner/name", tags=["mine"])
    else:
        model.save_pretrained(tmp_path / "local", push_to_hub=True, repo_id="owner/name")
    assert {"pumer.json", "reducer.safetensors", "README.md", "config.json"} <= set(
        os.listdir(hub.folder)
    )
    content = (hub.folder / "README.md").read_text()
    assert 'pumer.load("owner/name")' in content
    assert "library_name: pumer" in content
    assert ("- mine\n" in content) == (way == "push_to_hub")
    assert same(pumer.load(hub.folder), model)


def test_the_hubs_card_is_not_written_over(hub):
    hub.card = "---\nlicense: mit\n---\n# My model\n"
    model = reduced()
    model.push_to_hub("owner/name")
    assert "# My model" in (hub.folder / "README.md").read_text()
    pumer.remove(model).push_to_hub("owner/name")
    assert not (hub.folder / "pumer.json").exists()


# --- PEFT ---


def lora(model, folder):
    peft = pytest.importorskip("peft", reason="needs the package peft")
    model.save_pretrained(folder)
    model = type(model).from_pretrained(folder).eval()
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
    return peft, model, config


@pytest.mark.parametrize("reducer", ["pumer", "dynamicvit"])
@pytest.mark.parametrize("way", ["save", "save_pretrained", "push_to_hub"])
def test_a_peft_model_comes_back_with_adapter_and_reducer(tmp_path, hub, way, reducer):
    peft, base, config = lora(tiny.model(), tmp_path / "base")
    model = peft.get_peft_model(base, config).eval()
    pumer.apply(model, REDUCER if reducer == "pumer" else reducer)
    folder = tmp_path / "adapter"
    if way == "save":
        pumer.save(model, folder)
    elif way == "save_pretrained":
        model.save_pretrained(folder)
    else:
        model.push_to_hub("owner/name")
        folder = hub.folder
    assert not (folder / "config.json").exists()
    loaded = pumer.load(folder)
    assert isinstance(loaded, peft.PeftModel)
    assert pumer.active(loaded).reducer == pumer.active(model).reducer
    assert same(loaded, model)
    assert not same(pumer.load(folder), pumer.apply(pumer.load(folder).unload(), REDUCER))
    content = (folder / "README.md").read_text()
    assert "library_name: p" in content
    assert "PeftModel.from_pretrained" in content or way == "push_to_hub"
    assert str(tmp_path) not in content
    pumer.remove(model)
    assert "save_pretrained" not in vars(model)


def test_an_adapter_put_on_a_reduced_model_is_saved_with_it(tmp_path):
    peft, base, config = lora(tiny.model(), tmp_path / "base")
    model = peft.get_peft_model(pumer.apply(base, REDUCER), config)
    pumer.save(model, tmp_path / "adapter")
    assert same(pumer.load(tmp_path / "adapter"), model.eval())


def test_an_adapter_on_the_hub_finds_its_base_there(tmp_path, cache):
    peft, base, config = lora(tiny.model(), tmp_path / "base")
    model = pumer.apply(peft.get_peft_model(base, config).eval(), REDUCER)
    model.peft_config["default"].base_model_name_or_path = "owner/base"
    where = cache("owner/adapter", OLD, lambda folder: pumer.save(model, folder))
    with pytest.raises(
        ValueError,
        match="base model of the adapter in owner/adapter is missing: there is no folder",
    ):
        pumer.load("owner/adapter", **where)
    cache("owner/base", NEW, lambda folder: shutil.copytree(tmp_path / "base", folder))
    assert same(pumer.load("owner/adapter", revision=OLD, **where), model)


def test_an_adapter_of_transformers_own_way_is_saved_too(tmp_path):
    _, model, config = lora(tiny.model(), tmp_path / "base")
    pytest.importorskip(
        "peft", minversion="0.22", reason="transformers' own adapters need peft 0.22"
    )
    model.add_adapter(config)
    pumer.apply(model, REDUCER).save_pretrained(tmp_path / "adapter")
    assert same(pumer.load(tmp_path / "adapter"), model)


def test_shipped_folders_are_loaded_with_arguments():
    model = pumer.load("scenes-vilt-pumer", dtype="bfloat16", attn_implementation="eager")
    assert model.dtype == torch.bfloat16
    assert pumer.active(model).reducer == saved_reducer(SHIPPED / "scenes-vilt-pumer")

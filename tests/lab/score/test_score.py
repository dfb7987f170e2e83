"""Scoring of pools: the same scores as pair by pair, every pair once, resumed after a kill, on
several processes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import model as tiny_model

import pumer
from pumer.cli import main
from pumer.hub import save
from pumer.lab.data.images import BrokenImageError, KeepAspect, Square, open_image
from pumer.lab.data.text import TextTransform, train_tokenizer
from pumer.lab.data.transforms import save_transform
from pumer.lab.score import Job, score_pairs, stream_pairs
from pumer.lab.score import run as run_module
from pumer.lab.score.bench import COLUMNS, MODELS, PairsBenchSettings, bench_pairs
from pumer.lab.score.chunks import Chunks, Matrix
from pumer.lab.score.job import Scorer
from pumer.lab.score.ray import Cluster
from pumer.lab.tasks.retrieval import ranking_scores

REDUCER = pumer.PuMer(prune=0.2, merge=0.3, merge_text=0.3, layers=(0, 1))
CASES = {
    "vilt": ("vilt-tiny", None),
    "vilt-pumer": ("vilt-tiny", REDUCER),
    "vilt-pool": ("vilt-tiny", pumer.Pool(window=2)),
    "vilt-official": ("vilt-tiny", replace(REDUCER, official=True)),
    "meter": ("meter-tiny", None),
    "meter-pumer": ("meter-tiny", REDUCER),
    "meter-tower": ("meter-tiny", pumer.Compose(tower=pumer.ToMe(r=3, depth=2), inside=REDUCER)),
    "bridgetower": ("bridgetower-tiny", None),
    "bridgetower-pool": ("bridgetower-tiny", pumer.Pool(window=2)),
    "bridgetower-tower": (
        "bridgetower-tiny",
        pumer.Compose(tower=pumer.ToMe(r=3, depth=2), inside=REDUCER),
    ),
    "meter-official": ("meter-tiny", replace(REDUCER, official=True)),
}
TEXTS = [
    "a red ball",
    "the small dog left of a large blue box in the green house",
    "tree",
    "a cat above the round ball",
    "a red box",
    "two square things of red and blue",
    "the house right of the tree",
]
FLICKR = {"name": "retrieval", "root": str(Path(__file__).parents[2] / "data/fixtures/flickr30k")}


@pytest.fixture(scope="module")
def tokenize():
    return TextTransform(train_tokenizer(TEXTS, 100), 20)


@pytest.fixture(scope="module")
def images():
    noise = np.random.default_rng(0)
    sizes = ((64, 64), (64, 96), (48, 64), (64, 64), (64, 96))
    return [Image.fromarray(noise.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def make(name, reducer=None):
    """A tiny model whose weights are large enough for every token to matter."""
    torch.manual_seed(1)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    model.eval()
    return model if reducer is None else pumer.apply(model, reducer)


def transform_of(name):
    """ViLT takes pictures of any shape, the others those of one size."""
    return KeepAspect(48, multiple=16) if name.startswith("vilt") else Square(64)


@pytest.fixture
def job(images, tokenize):
    return Job(
        make("meter-tiny", REDUCER),
        images,
        TEXTS,
        tokenize,
        Square(64),
        3,
        chunk_images=2,
        chunk_texts=4,
    )


@torch.inference_mode()
def plain(model, images, texts, tokenize, transform):
    """One forward for every pair."""
    scores = torch.empty(len(images), len(texts))
    for row, image in enumerate(images):
        for column, text in enumerate(texts):
            pixels = transform(open_image(image))[None]
            logits = model(**tokenize([text], [column]), pixel_values=pixels).logits
            scores[row, column] = ranking_scores(logits)[0]
    return scores


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_every_pair_alone(case, images, tokenize):
    name, reducer = CASES[case]
    model, transform = make(name, reducer), transform_of(name)
    scores = score_pairs(model, images, TEXTS, tokenize, transform, batch_size=3)
    if case.endswith("official"):  # which counts padded text
        tokenize = replace(tokenize, padding="max_length")
    expected = plain(model, images, TEXTS, tokenize, transform)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
    assert expected.std(0).min() > 1e-2, "scores that are all alike prove nothing"
    assert expected.std(1).min() > 1e-2, "scores that are all alike prove nothing"


@pytest.mark.parametrize("case", ["vilt", "vilt-pumer", "vilt-pool", "meter", "meter-tower"])
def test_scores_of_an_offloaded_model(case, images, tokenize):
    """Whose weights accelerate brings in for a call alone."""
    name, reducer = CASES[case]
    expected, scores = (
        score_pairs(model, images, TEXTS, tokenize, transform_of(name), batch_size=3)
        for model in (
            make(name, reducer),
            accelerate.cpu_offload(make(name, reducer), execution_device="cpu"),
        )
    )
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)


def test_every_image_and_text_is_encoded_once(job):
    job, meter, seen = replace(job, chunk_images=9), job.model.meter, {"images": 0, "texts": 0}
    meter.vision_model.register_forward_pre_hook(
        lambda module, args: seen.__setitem__("images", seen["images"] + len(args[0]))
    )
    meter.text_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.__setitem__(
            "texts", seen["texts"] + len(kwargs["input_ids"])
        ),
        with_kwargs=True,
    )
    scorer = Scorer(job)
    for number in range(len(job.chunks)):
        scorer(number)
    assert len(job.chunks) == 2
    assert seen == {"images": len(job.images), "texts": len(TEXTS)}


@given(*[st.integers(1, 40)] * 4)
def test_every_pair_is_in_exactly_one_chunk(images, texts, chunk_images, chunk_texts):
    chunks = Chunks(images, texts, chunk_images, chunk_texts)
    seen = np.zeros((images, texts), int)
    for number in range(len(chunks)):
        seen[chunks[number]] += 1
        assert seen[chunks[number]].shape == chunks.shape(number) <= (chunk_images, chunk_texts)
    assert (seen == 1).all()
    with pytest.raises(IndexError):
        chunks[len(chunks)]


def test_streamed_scores_are_those_in_memory(job, tmp_path):
    scores = stream_pairs(job, tmp_path / "out")
    together = score_pairs(
        job.model, job.images, job.texts, job.tokenize, job.transform, batch_size=3
    )
    torch.testing.assert_close(torch.from_numpy(np.array(scores)), together, atol=1e-5, rtol=0)
    assert scores.dtype == np.float32
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "manifest.json",
        "scores.npy",
        "scores.npy.sha256",
    ]


class Stop(Exception):
    pass


def test_what_was_finished_is_not_computed_again(job, tmp_path, monkeypatch):
    whole = stream_pairs(job, tmp_path / "whole")
    computed = []

    class Stopping(Scorer):
        def __call__(self, number, *args):
            if len(computed) == 3:
                raise Stop
            computed.append(number)
            return super().__call__(number, *args)

    monkeypatch.setattr(run_module, "Scorer", Stopping)
    with pytest.raises(Stop):
        stream_pairs(job, tmp_path / "out")
    assert not (tmp_path / "out/scores.npy").exists()
    (tmp_path / "out/chunks/00000005.f4.99.tmp").write_bytes(b"half")

    class Counting(Scorer):
        def __call__(self, number, *args):
            computed.append(number)
            return super().__call__(number, *args)

    monkeypatch.setattr(run_module, "Scorer", Counting)
    said = []
    scores = stream_pairs(job, tmp_path / "out", log=said.append)
    assert computed == list(range(6))
    assert "3 of 6 chunks" in said[0]
    assert (tmp_path / "out/scores.npy").read_bytes() == (
        tmp_path / "whole/scores.npy"
    ).read_bytes()
    assert np.array_equal(scores, whole)
    stream_pairs(job, tmp_path / "out")
    assert len(computed) == 6


def test_a_folder_takes_one_job_only(job, tmp_path):
    stream_pairs(job, tmp_path / "out")
    other = replace(job, model=make("meter-tiny"))
    with pytest.raises(ValueError, match=r"other reducer\).*give another folder"):
        stream_pairs(other, tmp_path / "out")
    with pytest.raises(ValueError, match=r"other texts, pool\)"):
        stream_pairs(replace(job, texts=TEXTS[1:]), tmp_path / "out")
    with pytest.raises(ValueError, match=r"other pool\)"):
        stream_pairs(replace(job, images=job.images[::-1]), tmp_path / "out")
    with pytest.raises(ValueError, match=r"other pool\)"):
        stream_pairs(replace(job, transform=Square(64, mean=(0.4, 0.5, 0.5))), tmp_path / "out")
    with torch.no_grad():
        job.model.rank_output.bias += 1
    with pytest.raises(ValueError, match=r"other model\)"):
        stream_pairs(job, tmp_path / "out")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/love.txt").write_text("dear")
    with pytest.raises(ValueError, match="files that are no scores"):
        stream_pairs(job, tmp_path / "letters")
    (tmp_path / "out/manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json is damaged"):
        stream_pairs(job, tmp_path / "out")


def test_what_was_cut_is_computed_again(job, tmp_path):
    matrix = Matrix(tmp_path / "out", job.chunks, job.fingerprint())
    scorer = Scorer(job)
    for number in matrix.missing():
        matrix.write(number, scorer(number))
    chunk = tmp_path / "out/chunks/00000002.f4"
    chunk.write_bytes(chunk.read_bytes()[:-4])
    assert matrix.missing() == [2]
    assert stream_pairs(job, tmp_path / "out").shape == (5, 7)
    scores = tmp_path / "out/scores.npy"
    good = scores.read_bytes()
    for damaged in (good[:-4], good[:-1] + bytes([good[-1] ^ 1]), b""):
        scores.write_bytes(damaged)
        said = []
        stream_pairs(job, tmp_path / "out", log=said.append)
        assert said == [f"{scores} has changed since it was written, and is computed again"]
        assert scores.read_bytes() == good
    (tmp_path / "out/scores.npy.sha256").unlink()  # as an earlier version wrote it
    before = scores.stat().st_mtime_ns
    stream_pairs(job, tmp_path / "out")
    assert scores.stat().st_mtime_ns == before


def test_what_is_wrong_shows_before_the_work(job, tmp_path, monkeypatch):
    monkeypatch.setattr(Scorer, "__call__", lambda *args: pytest.fail("something was computed"))
    broken = replace(job, images=[*job.images, b"no picture"])
    with pytest.raises(
        BrokenImageError, match=r"1 of 6 images are broken.* image 5 cannot be read"
    ):
        stream_pairs(broken, tmp_path / "out")
    empty = replace(job, texts=[*TEXTS, " "])
    with pytest.raises(ValueError, match=r"1 of 8 questions have no text.* 7"):
        stream_pairs(empty, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="texts is 0"):
        replace(job, texts=[])
    with pytest.raises(ValueError, match="batch_size is 0"):
        replace(job, batch_size=0)
    with pytest.raises(
        ValueError, match=r"ViltForQuestionAnswering scores no pairs.*MeterForImageAndTextRetrieval"
    ):
        replace(job, model=tiny_model())


# --- other processes ---

STREAM = """
import sys, torch
torch.set_num_threads(1)
torch.manual_seed(0)
from pumer.lab.score.bench import MODELS, _pool
from pumer.lab.score import stream_pairs
from dataclasses import replace
job = replace(_pool(MODELS["vilt-tiny"]().eval(), 12, 60, 4), chunk_images=1, chunk_texts=6)
print("ready", flush=True)
stream_pairs(job, sys.argv[1])
"""
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(Path(__file__).parents[3] / "src"),
    "OMP_NUM_THREADS": "1",
}


def start(folder):
    return subprocess.Popen(
        [sys.executable, "-c", STREAM, str(folder)], env=ENVIRONMENT, stdout=subprocess.PIPE
    )


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_file(tmp_path):
    process = start(tmp_path / "killed")
    process.stdout.readline()
    wanted = random.SystemRandom().randint(1, 40)
    while len(list(tmp_path.glob("killed/chunks/*.f4"))) < wanted:
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = len(list(tmp_path.glob("killed/chunks/*.f4")))
    assert wanted <= finished < 120
    assert not (tmp_path / "killed/scores.npy").exists()
    for folder in ("killed", "whole"):
        assert start(tmp_path / folder).wait() == 0
    assert (tmp_path / "killed/scores.npy").read_bytes() == (
        tmp_path / "whole/scores.npy"
    ).read_bytes()


@pytest.fixture
def folder(tokenize, tmp_path):
    captions = json.loads(Path(FLICKR["root"], "dataset_flickr30k.json").read_text())["images"]
    sentences = [sentence["raw"] for image in captions for sentence in image["sentences"]]
    model = tiny_model("ViltForImageAndTextRetrieval", vocab_size=200, max_position_embeddings=24)
    save(model, tmp_path / "model")
    train_tokenizer(sentences, 200).save_pretrained(tmp_path / "model")
    save_transform(Square(96), tmp_path / "model")
    return tmp_path / "model"


def command(folder, out, *more):
    task = [
        "--task",
        json.dumps(FLICKR),
        "--split",
        "train",
        "--chunk_images",
        "2",
        "--chunk_texts",
        "6",
    ]
    return ["score", "--model", str(folder), *task, "--out", str(out), "--reducer", "random", *more]


def test_the_command_prints_recalls_and_goes_on(folder, tmp_path, capsys):
    assert main(command(folder, tmp_path / "out")) == 0
    shown = capsys.readouterr().out
    assert "tr_r1" in shown
    assert "ir_r1_low" in shown
    whole = np.load(tmp_path / "out/scores.npy")
    assert main(command(folder, tmp_path / "out")) == 0
    assert "chunks are in" in capsys.readouterr().out.replace("\n", " ")
    assert main(command(folder, tmp_path / "few", "--limit", "2")) == 0
    few = np.load(tmp_path / "few/scores.npy")
    assert few.shape[0] == 2
    np.testing.assert_allclose(few, whole[:2, : few.shape[1]], atol=1e-5)
    assert main(command(folder, tmp_path / "few")) == 2
    assert "scores of something else" in capsys.readouterr().err
    assert main(command(folder, tmp_path / "out", "--folds", "3")) == 2
    assert "do not make 3 equal folds" in capsys.readouterr().err
    assert main(command(folder, tmp_path / "few", "--limit", "2", "--folds", "2")) == 0
    shown = capsys.readouterr().out
    assert "mean of 2 folds" in " ".join(shown.split())
    assert "ir_r1_low" not in shown
    scenes = ["score", "--model", str(folder), "--task", "scenes", "--out", str(tmp_path / "no")]
    assert main(scenes) == 2
    assert "no pool of captions" in capsys.readouterr().err


@pytest.mark.slow
def test_ranks_of_torchrun_share_the_work(folder, tmp_path):
    assert main(command(folder, tmp_path / "one")) == 0
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "pumer.cli",
    ]
    done = subprocess.run(
        [*launch, *command(folder, tmp_path / "two")],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tr_r1 ") == 1
    np.testing.assert_allclose(
        np.load(tmp_path / "two/scores.npy"), np.load(tmp_path / "one/scores.npy"), atol=1e-5
    )


@pytest.mark.slow
def test_ray_is_started_for_the_call_and_gives_the_same_scores(job, tmp_path):
    ray = pytest.importorskip("ray", reason="needs the extra ray")
    plain_scores = stream_pairs(job, tmp_path / "plain")
    scores = stream_pairs(job, tmp_path / "ray", cluster=Cluster(workers=2))
    np.testing.assert_allclose(scores, plain_scores, atol=1e-5)
    assert not ray.is_initialized()
    assert (tmp_path / "ray/manifest.json").read_bytes() == (
        tmp_path / "plain/manifest.json"
    ).read_bytes()


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray", reason="needs the extra ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.mark.smoke
@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_ray_writes_the_same_predictions(folder, tmp_path):
    task = {**FLICKR, "negatives": 0}
    files = []
    for engine in ("plain", "ray"):
        files.append(tmp_path / f"{engine}.jsonl")
        words = [
            "--split",
            "train",
            "--batch_size",
            "2",
            "--out",
            str(files[-1]),
            "--engine",
            engine,
        ]
        assert main(["predict", "--model", str(folder), "--task", json.dumps(task), *words]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()


def test_without_ray_the_extra_is_named(job, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install '\.\[ray\]'"):
        stream_pairs(job, tmp_path / "out", cluster=Cluster())
    with pytest.raises(ValueError, match="workers is 0"):
        stream_pairs(job, tmp_path / "out", cluster=Cluster(workers=0))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="without torchrun"):
        stream_pairs(job, tmp_path / "out", cluster=Cluster())


def test_measurements_are_rows(tmp_path):
    rows = bench_pairs(
        PairsBenchSettings(
            "meter-tiny", [REDUCER], 2, 6, rows=1, plain_pairs=5, batch_size=4, runs=1
        )
    )
    assert all(tuple(row) == COLUMNS for row in rows)
    assert [(bool(row["reducer"]), row["way"]) for row in rows] == [
        (False, "plain"),
        (False, "once"),
        (True, "plain"),
        (True, "once"),
    ]
    assert [row["pairs_timed"] for row in rows] == [5, 6, 5, 6]
    assert max(row["difference"] for row in rows) < 1e-4
    assert rows[0]["x_plain"] == rows[0]["x_unreduced"] == rows[2]["x_plain"] == 1
    with pytest.raises(ValueError, match="no model to measure"):
        bench_pairs(PairsBenchSettings("bert", []))

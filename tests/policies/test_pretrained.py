"""Encoders of transformers as tiny random twins: what they read, what is trained and kept, what a checkpoint holds."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, PreTrainedTokenizerFast, SiglipConfig, SmolVLMConfig

from dreamgen.data.lerobot import Dataset
from dreamgen.data.writer import write_dataset
from dreamgen.engine.precision import autocast
from dreamgen.engine.state import states_gb
from dreamgen.engine.train import train
from dreamgen.policies import features
from dreamgen.policies.chunks import Chunks, collate
from dreamgen.policies.features import Features, cacheable, worthwhile
from dreamgen.policies.feed import Feed
from dreamgen.policies.policy import FlowPolicy
from dreamgen.policies.siglip import SiglipEncoder
from dreamgen.policies.vlm import SmolVlmEncoder
from dreamgen.stages.train_policy import train_policy
from tests.policies.test_chunks import episode, recorded
from tests.policies.toy import STEPS, B, batch, loss, observations, robot

WORDS = ["<pad>", "<unk>", "do", "push", "block", "lift", "open", "the", "red", "0", "1", "2", "3", "4"]


def twin(folder, config) -> str:
    """A folder as a hub would give it: config, random weights, tokenizer."""
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    vision = dict(hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, patch_size=8)
    text = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=len(WORDS))
    siglip = SiglipConfig(vision_config={**vision, "image_size": 24},
                          text_config={**text, "max_position_embeddings": 6, "projection_size": 16})  # fmt: skip
    smol = SmolVLMConfig(vision_config={**vision, "image_size": 32}, scale_factor=2, image_token_id=1,
                         text_config={**text, "model_type": "llama", "num_hidden_layers": 3,
                                      "num_key_value_heads": 1, "pad_token_id": 0})  # fmt: skip
    root = tmp_path_factory.mktemp("hub")
    return {"siglip": twin(root / "siglip", siglip), "vlm": twin(root / "vlm", smol)}


def encoder(folders: dict[str, str], name: str, **changes):
    torch.manual_seed(1)
    if name == "siglip":
        return SiglipEncoder(path=folders[name], width=20, tokens=2, length=6, max_views=2, **changes)
    return SmolVlmEncoder(path=folders[name], width=20, layers=2, length=6, **changes)


def made(folders: dict[str, str], name: str, tune: bool = False, **changes) -> FlowPolicy:
    torch.manual_seed(2)
    options = dict(horizon=STEPS, layers=2, heads=2, head_width=8, draws=1, state_dropout=0.0) | changes
    return FlowPolicy(robot=robot(), encoder=encoder(folders, name, tune=tune), **options)


def noise(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.integers(0, 256, (rows, 24, 16, 3), dtype=np.uint8) for name in ("front", "wrist")}


@pytest.mark.parametrize("name", ["siglip", "vlm"])
def test_rows_depend_on_their_own_pictures_and_words(folders, name):
    it = encoder(folders, name).eval()
    told = "Push the RED block" if name == "siglip" else "push the red block"  # SigLIP2 has learned in small letters
    words = it.words([told, "push", "push the red block"])
    assert torch.equal(words[0], words[2])
    assert words.shape == (3, 6) and (words[1, 1:] == 0).all() and words[1, 0] == 1 + WORDS.index("push")
    pictures = torch.randint(0, 256, (3, 2, 24, 16, 3), dtype=torch.uint8)
    pictures[2] = pictures[0]
    visual, language = it(pictures, words)
    n = 2 * 2 * 2 if name == "siglip" else 2 * (32 // 8 // 2) ** 2
    assert visual.shape == (3, n, 20) and language.shape == (3, 1 if name == "siglip" else 6, 20)
    torch.testing.assert_close(visual[0], visual[2]), torch.testing.assert_close(language[0], language[2])
    alone, spoken = it(pictures[1:2], words[1:2])
    torch.testing.assert_close(alone[0], visual[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(spoken[0], language[1], atol=1e-4, rtol=1e-4)
    other, _ = it(pictures[:1], words[1:2])
    assert torch.allclose(other[0], visual[0], atol=1e-5) == (name == "siglip")  # a VLM reads pictures with the words


def test_the_texts_of_a_frozen_model_are_kept_up_to_a_bound(folders, monkeypatch):
    monkeypatch.setattr("dreamgen.policies.siglip.KEPT", 2)
    it, calls = encoder(folders, "siglip").eval(), []
    forward = it.model.text_model.forward
    monkeypatch.setattr(it.model.text_model, "forward", lambda **k: calls.append(len(k["input_ids"])) or forward(**k))
    want = it._text(it.words(["push", "open", "lift"]))  # more than are kept, at once
    assert len(it._known) == 2  # "lift", then "open", by their numbers
    for asked in (["lift"], ["push"], ["lift"]):  # "open" was asked for longest ago
        found = it._text(it.words(asked))
        torch.testing.assert_close(found, want[[["push", "open", "lift"].index(text) for text in asked]])
    assert calls == [1] * 4 and len(it._known) == 2


def test_a_text_has_one_embedding_whatever_was_asked_before(folders, monkeypatch):
    """With others or alone, in training or in acting, to the bit."""
    monkeypatch.setattr("dreamgen.engine.onednn.SMALL", 0)
    texts = ["push", "open the red block", "lift", "do 0 1 2 3 4"]
    alone, together = (encoder(folders, "siglip").eval() for _ in range(2))
    want = torch.cat([alone._text(alone.words([text])) for text in texts])
    assert want.dtype == torch.float32 and torch.equal(together._text(together.words(texts)), want)
    for precision in ("bf16", "fp32"):
        trained = encoder(folders, "siglip")
        with autocast(precision):
            assert torch.equal(trained._text(trained.words(texts[::-1])).flip(0), want)
        assert torch.equal(trained._text(trained.words(texts)), want)


SCRIPT = """
import dataclasses, sys, pytest
from tests.policies.test_pretrained import made
from tests.policies.toy import counted, observations
graphs, model = counted(pytest.MonkeyPatch()), made({"siglip": sys.argv[1]}, "siglip", layers=1).eval()
for text in ("", "push", "open"):
    model.act([dataclasses.replace(observations(1)[0], instruction=text)], [1])
    print(len(graphs))
"""


def test_another_instruction_compiles_nothing_anew(folders):
    """In a process of its own: under checks of shapes the texts are not traced at all."""
    command, root = [sys.executable, "-c", SCRIPT, folders["siglip"]], Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    counts = done.stdout.split()
    assert len(counts) == 3 and len(set(counts)) == 1, done.stdout + done.stderr


def test_weights_and_layers_are_those_of_the_hub(folders):
    it, there = encoder(folders, "siglip"), AutoModel.from_pretrained(folders["siglip"])
    assert all(torch.equal(a, b) for a, b in zip(it.model.parameters(), there.parameters(), strict=True))
    there = AutoModel.from_pretrained(folders["vlm"])
    mine = encoder(folders, "vlm").model
    assert len(mine.text_model.layers) == 2 and len(there.text_model.layers) == 3
    pairs = zip(mine.text_model.layers.parameters(), there.text_model.layers[:2].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    with pytest.raises(ValueError, match="is a 'smolvlm'; SiglipEncoder reads siglip"):
        SiglipEncoder(path=folders["vlm"], width=20)
    with pytest.raises(ValueError, match="could not be opened"):
        SmolVlmEncoder(path=folders["vlm"] + "none", width=20)


@pytest.mark.parametrize("name", ["siglip", "vlm"])
@pytest.mark.parametrize("tune", [False, True])
def test_frozen_or_tuned(folders, name, tune):
    model = made(folders, name, tune).train()
    assert model.encoder.model.training == tune
    data = batch()
    data["words"] = model.encoder.words(["push"] * B)
    loss(model, data).backward()
    grads = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.encoder.model.parameters()]
    assert any(grads) == tune
    assert all(p.requires_grad == tune for p in model.encoder.model.parameters())
    head = [p for n, p in model.encoder.named_parameters() if not n.startswith("model.")]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head if p.ndim > 1)


@pytest.mark.parametrize("name", ["siglip", "vlm"])
def test_a_checkpoint_needs_no_hub(folders, name, tmp_path):
    model = made(folders, name).eval()
    model.save(tmp_path / "p")
    again = FlowPolicy.load(tmp_path / "p")
    assert again.encoder.config["path"] == str(tmp_path / "p" / "encoder")
    np.testing.assert_allclose(again.act(observations(2), [1, 2]), model.act(observations(2), [1, 2]), atol=1e-6)


@pytest.mark.parametrize("name", ["siglip", "vlm"])
def test_a_frozen_model_is_held_once(folders, name, tmp_path):
    """By the encoder and by FLARE's targets; a tuned one is copied."""
    options = dict(align_weight=0.2, align_layer=1, future_tokens=2, target="qformer")
    model, tuned = made(folders, name, **options), made(folders, name, tune=True, **options)
    assert model.flare.target.model is model.encoder.model and tuned.flare.target.model is not tuned.encoder.model
    assert not any("target.model" in key for key in model.state_dict())
    assert sum("target.model" in key for key in tuned.state_dict()) == len(tuned.encoder.model.state_dict())
    own = dict(model.encoder.named_parameters(), **dict(model.encoder.named_buffers()))
    copied = {key for key, _ in model.flare.target.named_buffers()}
    assert copied == {key for key in own if not key.startswith("model.")}
    data = batch()
    data["words"] = model.encoder.words(["push"] * B)
    assert torch.equal(
        model.flare.embed(data["future"], data["words"]),
        model.double().float().flare.embed(data["future"], data["words"]),
    )  # moved with it
    model.train()
    assert not model.encoder.model.training
    how = dict(lr=1e-2, warmup=1, ema=None, precision="fp32", checkpoint_every=1, log_every=1)
    train(model, lambda step: data, out=tmp_path, steps=2, **how)
    kept = load_file(tmp_path / "training/step_00000002/buffers.safetensors")
    assert not any("target.model" in key for key in kept) and any("flare.target" in key for key in kept)
    before = model.flare.embed(data["future"], data["words"])
    model.eval().save(tmp_path / "p")
    again = FlowPolicy.load(tmp_path / "p")
    assert torch.equal(again.flare.embed(data["future"], data["words"]), before)


@pytest.mark.parametrize("name", ["siglip", "vlm"])
def test_features_are_computed_once(folders, name, tmp_path):
    model = made(folders, name, align_weight=0.2, align_layer=1, future_tokens=2, target="qformer").eval()
    chunks = Chunks(recorded(), horizon=STEPS, future_steps=STEPS)
    places = [(0, 1), (2, 3), (1, 6)]
    plain = collate([chunks.batch(places)], model.encoder.words)
    calls = []
    forward = type(model.encoder).features
    model.encoder.features = lambda *a: calls.append(1) or forward(model.encoder, *a)
    assert cacheable(model)
    chunks.features = Features(chunks, model.encoder, tmp_path, batch_size=7)
    asked = len(calls)
    cached = collate([chunks.batch(places)], model.encoder.words)
    assert cached["pictures"].dtype == torch.float32 and cached["pictures"].ndim == 3 and asked == 5
    torch.testing.assert_close(loss(model, cached), loss(model, plain), atol=2e-2, rtol=2e-2)  # half precision
    Features(chunks, model.encoder, tmp_path, batch_size=7)
    assert len(calls) == asked + 1  # the plain loss's own look
    model.shift = 2
    assert not cacheable(model)
    tuned = made(folders, name, tune=True)
    assert not cacheable(tuned)
    assert dataclasses.is_dataclass(model.robot)


def test_an_episode_is_decoded_once_for_its_features(folders, tmp_path, monkeypatch):
    """A part of it at a time, and each row gets the features of its own pictures."""
    monkeypatch.setattr(features, "ROWS", 5)
    model, data, asked = made(folders, "siglip").eval(), recorded(), []
    chunks = Chunks(data, horizon=STEPS, memory_gb=0.0)
    views = data.views
    monkeypatch.setattr(data, "views", lambda i, rows: asked.append((i, list(rows))) or views(i, rows))
    found = Features(chunks, model.encoder, tmp_path, batch_size=7)
    parts = {0: [5, 4], 1: [5, 2], 2: [5, 5, 3]}
    assert [(i, len(rows)) for i, rows in asked] == [(i, n) for i, sizes in parts.items() for n in sizes]
    assert [(i, row) for i, rows in asked for row in rows] == list(chunks)
    places = list(chunks)
    for group in [places[k : k + 7] for k in range(0, len(places), 7)]:
        seen = torch.from_numpy(np.stack([chunks.pictures(*place) for place in group]))
        want = model.encoder.features(seen, model.encoder.words(["push"] * len(group))).half().float()
        assert np.array_equal(np.stack([found(*place) for place in group]), want)


def test_two_parts_of_one_dataset_have_features_of_their_own(folders, tmp_path):
    """Episodes as many and as long, such as the first and the second half of it."""
    write_dataset(tmp_path / "data", [episode(7, k, video=noise(7, k)) for k in range(4)], robot())
    it, seen = made(folders, "siglip").eval().encoder, []
    for held in ([0, 1], [2, 3]):
        chunks = Chunks(Dataset(tmp_path / "data", robot(), episodes=held), horizon=STEPS)
        found = Features(chunks, it, tmp_path / "f")
        want = it.features(torch.from_numpy(chunks.pictures(1, 3))[None], it.words(["push"]))[0].half().float()
        torch.testing.assert_close(torch.from_numpy(found(1, 3)), want, atol=1e-2, rtol=1e-2)
        seen.append(found(1, 3))
    assert np.abs(seen[0] - seen[1]).max() > 0.1 and len(list((tmp_path / "f").glob("*.f16"))) == 2


def test_features_are_computed_where_they_pay_and_fit(folders, tmp_path, monkeypatch, caplog):
    """An observation that is drawn once at most, on average, gains nothing; a disk that is too small is told first."""
    caplog.set_level("INFO")
    model, chunks = made(folders, "siglip").eval(), [Chunks(recorded(), horizon=STEPS)]
    count, needed = len(chunks[0]), len(chunks[0]) * 8 * 12 * 2
    room = needed + round(1e9 * states_gb(model))  # the states of the training lie beside them
    assert not worthwhile(model, chunks, tmp_path / "f", draws=count - 1)
    assert f"training takes {count - 1} observations, and there are {count}" in caplog.text
    usage, free = shutil.disk_usage(tmp_path), [room - 1]
    monkeypatch.setattr(features.shutil, "disk_usage", lambda path: usage._replace(free=free[0]))
    with pytest.raises(ValueError, match=r"features of 29 observations take 5.57e-06 GB in .*cache_features=false"):
        worthwhile(model, chunks, tmp_path / "f", draws=count)
    assert not (tmp_path / "f").exists()
    free[0] = room + 1
    assert worthwhile(model, chunks, tmp_path / "f", draws=count)
    Features(chunks[0], model.encoder, tmp_path / "f")
    free[0] = 0
    assert worthwhile(model, chunks, tmp_path / "f", draws=count)  # they are there: a run that goes on
    assert not worthwhile(made(folders, "siglip", tune=True), chunks, tmp_path / "f", draws=count)


@pytest.mark.parametrize(("batch_size", "cached"), [(4, False), (5, True)])
def test_a_training_shorter_than_its_data_computes_no_features_first(
    folders, tmp_path, monkeypatch, batch_size, cached
):
    made_in: list = []
    write_dataset(tmp_path / "real", [episode(9, video=noise(9))], robot())
    monkeypatch.setattr(Feed, "cache", lambda feed, folder: made_in.append(folder))
    train_policy(made(folders, "siglip"), Dataset(tmp_path / "real", robot()), out=tmp_path / "p", steps=2,
                 batch_size=batch_size, record={})  # fmt: skip
    assert made_in == [tmp_path / "p/features"] * cached

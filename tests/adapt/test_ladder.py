"""adapt=ladder and adapt=lora: what is frozen, what is stored, and that all else works on such runs."""

import json
import shutil

import pytest
import torch
from torch import nn

from llm.adapt.ladder import LadderTransformer
from llm.adapt.lora import merge_additions
from llm.adapt.work import training_factor
from llm.commands.evaluate import evaluate
from llm.commands.export import ExportConfig, export
from llm.config.build import adapted, build_meta_model, build_model
from llm.config.check import check
from llm.contracts import BIDIRECTIONAL, CAUSAL, Sight
from llm.errors import CheckpointError, ConfigError
from llm.generate import stream_tokens
from llm.ops.memory import SavedBytes
from llm.run_folder.checkpoint import load_model
from llm.training.rebuild import rebuild_model
from llm.training.train import train

SMALL = ("model.d_model=32", "model.num_layers=3", "model.num_heads=2", "model.num_kv_heads=1", "model.ffn.d_ff=48",
         "context_length=16", "batch_tokens=16", "micro_batch_size=1", "loader.val_tokens=16",
         "init_from=runs/x")  # fmt: skip
VOCAB = 40
KINDS = ("ladder", "lora")


def random_pair(composed, *overrides):
    """A decoder with random gains and biases, and a copy of it that is adapted."""
    cfg = composed(*SMALL, *overrides)
    plain = build_model(cfg, VOCAB)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    other = build_model(cfg, VOCAB)
    other.load_state_dict(plain.state_dict())
    return plain, adapted(cfg, other)


def scores(model, ids, **options):
    return model.logits(model(ids, positions=torch.arange(ids.shape[1]).expand_as(ids), **options).hidden)


@pytest.mark.parametrize("kind", ["ladder", "lora"])
def test_the_function_at_the_start_is_that_of_the_frozen_decoder(composed, kind):
    plain, model = random_pair(composed, f"adapt={kind}")
    ids = torch.randint(VOCAB, (2, 16))
    torch.testing.assert_close(scores(model, ids), scores(plain, ids), atol=1e-6, rtol=1e-6)


def test_a_ladder_equals_its_equations(composed):
    plain, model = random_pair(composed, "adapt=ladder", "adapt.every=2")
    with torch.no_grad():
        for parameter in model.ladder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    ids = torch.randint(VOCAB, (2, 16))
    places = torch.arange(16).expand_as(ids)
    options = {"positions": places, "document_ids": None}
    states = [plain.token_embedding(ids)]
    for layer in plain.layers:
        states.append(layer(states[-1], **options).hidden)
    net = model.ladder
    assert net.reads == (1, 2)  # every second layer, and the last
    s = net.embedding_shortcut(net.embedding_norm(states[0]))
    for k, layer in enumerate(net.reads):
        shortcut = net.shortcuts[k]
        mu = torch.sigmoid(shortcut.gate / 0.1)
        s = mu * shortcut.down(shortcut.norm(states[layer + 1])) + (1 - mu) * s
        s = net.blocks[k](s, **options).hidden
    expected = plain.logits(plain.final_norm(states[-1] + net.up(net.norm(s))))
    torch.testing.assert_close(scores(model, ids), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head", ["frozen", "own"])
def test_gradients_reach_the_side_network_alone_and_nothing_of_the_decoder_is_kept(composed, head):
    plain, model = random_pair(composed, "adapt=ladder", f"adapt.head={head}")
    nn.init.normal_(model.ladder.up.weight) if head == "frozen" else None
    ids = torch.randint(VOCAB, (4, 16))
    with SavedBytes(plain) as whole:
        scores(plain, ids).sum()
    with SavedBytes(model) as side:
        loss = scores(model, ids).square().mean()
    assert side.total < 0.8 * whole.total
    loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith("ladder."), name
    assert not model.layers.training
    assert model.ladder.training


@pytest.mark.parametrize("head", ["frozen", "own"])
@pytest.mark.parametrize("model_kind", ["model/attention=softmax", "model/attention=linear"])
def test_decoding_with_caches_equals_the_whole_forward(composed, head, model_kind):
    _, model = random_pair(composed, model_kind, "adapt=ladder", f"adapt.head={head}")
    if head == "frozen":
        nn.init.normal_(model.ladder.up.weight)
    model.eval()
    ids = torch.randint(VOCAB, (2, 9))
    with torch.no_grad():
        whole = scores(model, ids)
        caches = model.new_caches(batch=2, max_length=9, dtype=torch.float32)
        steps = [
            model.logits(model(ids[:, [t]], positions=torch.full((2, 1), t), caches=caches).hidden) for t in range(9)
        ]
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-4, rtol=1e-4)


def test_a_decoder_that_sees_earlier_tokens_alone_ignores_the_sight_of_the_objective(composed):
    _, causal = random_pair(composed, "adapt=ladder", "adapt.backbone_sight=causal", "adapt.head=own")
    ids = torch.randint(VOCAB, (1, 12))
    seen = []
    causal.layers[2].register_forward_hook(lambda _m, _i, out: seen.append(out.hidden))
    for sight in (CAUSAL, BIDIRECTIONAL):
        scores(causal, ids, sight=sight)
    torch.testing.assert_close(seen[0], seen[1], atol=0, rtol=0)
    with pytest.raises(ConfigError, match=r"adapt\.backbone_sight=causal: a clean copy"):
        causal.check_sight(Sight("block_pair", 4))


@pytest.mark.parametrize("kind", KINDS)
def test_the_work_of_an_update_counts_what_is_computed(composed, kind):
    plain, model = random_pair(composed, f"adapt={kind}")
    assert training_factor(plain, 16, CAUSAL) == 3
    forward = model.flops_per_token(16)
    if kind == "ladder":
        layers, head = sum(b.flops_per_token(16) for b in plain.blocks()), 2 * VOCAB * 32
        side = forward - layers - head
        assert training_factor(model, 16, CAUSAL) * forward == pytest.approx(layers + 3 * side + 2 * head)
    else:
        frozen = 2 * sum(p.numel() for p in plain.layers.parameters() if p.ndim == 2) + 2 * VOCAB * 32
        assert training_factor(model, 16, CAUSAL) * forward == pytest.approx(3 * forward - frozen)


@pytest.fixture(scope="module")
def source(composed, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "run"
    train(composed(*tiny, "optimizer.lr=1e-2", "max_steps=12", "callbacks.samples=null"), folder)
    return folder


def overriding(tiny, *overrides):
    names = {override.split("=")[0] for override in overrides}
    return [*(setting for setting in tiny if setting.split("=")[0] not in names), *overrides]


@pytest.fixture(scope="module", params=KINDS)
def finished(request, source, composed, tiny, tmp_path_factory):
    """An adapted run of 6 updates, and its overrides."""
    given = (f"adapt={request.param}", f"init_from={source}", "callbacks.samples=null", "optimizer.lr=1e-2")
    given = overriding(tiny, *given, "max_steps=6", "val_every=3", "checkpoint_every=3")
    folder = tmp_path_factory.mktemp(request.param) / "run"
    loss = train(composed(*given), folder)
    return request.param, folder, given, loss


def test_a_checkpoint_has_what_was_added_and_names_the_frozen_weights(finished, source):
    kind, folder, _, loss = finished
    names = load_model(folder / "checkpoints/last").keys()
    assert names
    assert all(("ladder." in name) if kind == "ladder" else ("lora_" in name) for name in names)
    manifest = json.loads((folder / "checkpoints/last/manifest.json").read_text())
    weights = (source / "checkpoints/last").resolve()
    assert manifest["backbone"]["folder"] == str(weights)
    assert loss < json.loads((source / "summary.json").read_text())["val/loss"]
    before = rebuild_model(source, "last").model.state_dict()
    after = {name.replace(".base_layer", ""): t for name, t in rebuild_model(folder, "last").model.state_dict().items()}
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, atol=0, rtol=0)


def test_evaluation_has_the_loss_of_training_and_text_is_generated(finished, judging, tmp_path):
    _, folder, _, loss = finished
    assert evaluate(judging(f"run_dir={folder}", "eval=[loss]"), tmp_path) == pytest.approx(loss, abs=1e-6)
    trained = rebuild_model(folder, "last")
    greedy = {"max_new_tokens": 4, "temperature": 0.0, "top_k": None, "top_p": None, "seed": 0}
    drawn = [int(token) for token in stream_tokens(trained.model, [[trained.tokenizer.bos_id, 40, 50]], **greedy)]
    ids = torch.tensor([[trained.tokenizer.bos_id, 40, 50, *drawn]])
    with torch.no_grad():
        assert scores(trained.model, ids)[0, 2:-1].argmax(-1).tolist() == drawn


def test_a_resumed_run_equals_an_uninterrupted_one(finished, composed, tmp_path):
    _, folder, given, loss = finished
    half = tmp_path / "half"
    shutil.copytree(folder, half, symlinks=True)
    shutil.rmtree(half / "checkpoints/step-00000006")
    for link in ("last", "best"):
        (half / "checkpoints" / link).unlink()
    assert train(composed(*given, f"resume={half}"), half) == loss
    ours, theirs = (load_model(path / "checkpoints/step-00000006") for path in (half, folder))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_frozen_weights_that_moved_are_found_and_changed_ones_are_refused(finished, source, composed, tmp_path):
    _, folder, _, _ = finished
    own, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(folder, own, symlinks=True)
    shutil.copytree(source, moved, symlinks=True)
    last = (own / "checkpoints/last").resolve()
    manifest = json.loads((last / "manifest.json").read_text())
    manifest["backbone"]["folder"] = str(tmp_path / "gone")
    (last / "manifest.json").write_text(json.dumps(manifest))
    config = (own / "config.yaml").read_text()
    (own / "config.yaml").write_text(config.replace(str(source), str(moved)))
    rebuild_model(own, "last")
    shutil.rmtree(moved / "checkpoints")
    with pytest.raises(CheckpointError, match=r"backbone=.*gone: the frozen weights are missing or have changed"):
        rebuild_model(own, "last")


def test_a_ladder_is_not_exported_and_additions_are_merged(finished, tmp_path):
    pytest.importorskip("transformers")
    kind, folder, _, _ = finished
    given = {"checkpoint": "last", "average": 1, "format": "hf", "dtype": "float32", "tokens": 64}
    config = ExportConfig(run_dir=str(folder), out=str(tmp_path / "hf"), **given)
    if kind == "ladder":
        with pytest.raises(ConfigError, match="adapt=ladder: no class has a side network"):
            export(config)
    else:
        export(config)
        trained = rebuild_model(folder, "last").model
        ids = torch.randint(trained.vocab_size, (1, 8))
        before = scores(trained, ids)
        merge_additions(trained)
        assert not any("lora" in name for name in trained.state_dict())
        torch.testing.assert_close(scores(trained, ids), before, atol=1e-5, rtol=1e-5)


def test_an_adapted_run_is_not_a_source_of_weights(finished, composed, tiny, tmp_path):
    _, folder, _, _ = finished
    with pytest.raises(ConfigError, match=r"init_from=.*an adapted run stores what it added"):
        train(composed(*tiny, f"init_from={folder}"), tmp_path / "next")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", ["masked", "block", "uniform", "flow"])
def test_a_run_of_next_token_becomes_one_of_every_objective(source, composed, tiny, tmp_path, judging, kind, objective):
    given = (f"objective={objective}", f"adapt={kind}", f"init_from={source}", "callbacks.samples.max_new_tokens=4")
    loss = train(composed(*overriding(tiny, *given, "max_steps=2", "val_every=2")), tmp_path / "run")
    again = evaluate(judging(f"run_dir={tmp_path / 'run'}", "eval=[loss]"), tmp_path / "eval")
    assert again == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("model", ["moe", "hybrid"])
@pytest.mark.parametrize("optimizer", ["muon", "tiger"])
def test_every_kind_of_decoder_is_adapted(composed, model, optimizer):
    given = (f"model={model}", "model.ffn.d_ff=48", f"optimizer={optimizer}", "adapt=ladder")
    cfg = composed(*(s for s in SMALL if "ffn" not in s), *given)
    check(cfg)
    assert isinstance(build_meta_model(cfg), LadderTransformer)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("adapt=ladder", "init_from=null"), "adapt: needs the weights of a trained run; add init_from="),
        (("adapt=ladder", "adapt.reduction=3"), "adapt.reduction=3: must divide model.d_model=32"),
        (("adapt=ladder", "model.residual=attention"), "adapt=ladder: model.residual=attention has no sum"),
        (("adapt=ladder", "adapt.every=0"), "adapt.every=0: must be at least 1"),
        (("adapt=ladder", "adapt.temperature=0"), "adapt.temperature=0.*must be above 0"),
        (("adapt=ladder", "adapt.backbone_sight=causal", "objective=block"), "adapt.backbone_sight=causal: a clean"),
        (("adapt=lora", "adapt.rank=0"), "adapt.rank=0: must be at least 1"),
        (("adapt=lora", "adapt.dropout=1.0"), "adapt.dropout=1.0: must lie in"),
        (("adapt=lora", "adapt.projections=[q]"), "adapt.projections=q: no such projection; use some of down_proj"),
        (("adapt=lora", "grow=depth"), "adapt: frozen weights are stored by name and hash"),
        (("adapt=lora", "averaging=ema"), "adapt: averaging copies the frozen weights"),
        (("adapt=lora", "trainer=deepspeed", "trainer.stage=3"), "adapt: trainer.stage=3 shards trained weights alone"),
    ],
)
def test_a_mistake_is_named(composed, given, message):
    cfg = {override.split("=")[0] for override in given}
    with pytest.raises(ConfigError, match=message):
        check(composed(*(s for s in SMALL if s.split("=")[0] not in cfg), *given))

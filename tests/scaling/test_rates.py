import json

import pytest
import torch
from catalogue import CONF, options
from omegaconf import OmegaConf

from llm.config.build import build_model, module_factories
from llm.config.check import check
from llm.config.files import to_plain
from llm.config.pieces import instantiate
from llm.config.sizes import batch_ramp
from llm.errors import ConfigError
from llm.ops.loss import linear_cross_entropy
from llm.scaling.rates import RatedTensor, Rates, update_of
from llm.training.learning_rate import rated_groups
from llm.training.train import train

KNOWN = [name for name in options("optimizer") if name != "sgd"]
RATES = [name for name in options("rates") if name != "plain"]


def wide(width):
    heads = width // 16
    shape = {"d_model": width, "num_heads": heads, "num_kv_heads": heads, "ffn.d_ff": 2 * width, "num_layers": 2}
    return tuple(f"model.{key}={value}" for key, value in shape.items())


def setting(composed, optimizer, rates, width, *further, base=64):
    known = () if rates in ("plain", "amos") else (f"rates.base_d_model={base}",)
    decay = ("optimizer.weight_decay=0",) if rates == "amos" else ()
    chosen = (f"optimizer={optimizer}", f"rates={rates}", *known, *decay, *further)
    cfg = composed("tokenizer=bytes", *wide(width), *chosen)
    model, factories = build_model(cfg, vocab_size=256), module_factories(cfg, batch_ramp(cfg))
    rating = {key: factories[key] for key in ("rates", "optimizer", "lr", "weight_decay")}
    return model, factories["optimizer"], rated_groups(model, **rating), cfg


def rate_of(groups, name):
    return next((g["lr"], g["weight_decay"]) for g in groups if name in g["names"])


@pytest.mark.parametrize("optimizer", options("optimizer"))
def test_plain_rates_are_those_of_the_run(composed, optimizer):
    _, _, groups, cfg = setting(composed, optimizer, "plain", 64)
    assert [g["kind"] for g in groups] == ["matrix", "embedding", "vector"]
    assert {g["lr"] for g in groups} == {cfg["optimizer"]["lr"]}
    assert [g["weight_decay"] for g in groups] == [cfg["optimizer"]["weight_decay"], 0.0, 0.0]


@pytest.mark.parametrize("optimizer", KNOWN)
def test_at_the_base_width_mup_changes_nothing(composed, optimizer):
    plain, mup = (setting(composed, optimizer, rates, 64) for rates in ("plain", "mup"))
    for left, right in zip(plain[2], mup[2], strict=True):
        assert (left["names"], left["lr"], left["weight_decay"]) == (right["names"], right["lr"], right["weight_decay"])
    for left, right in zip(plain[0].parameters(), mup[0].parameters(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize(
    ("optimizer", "settings", "power"),
    [
        ("adamw", (), 1.0),
        ("lion", (), 1.0),
        ("tiger", (), 0.5),
        ("muon", (), 0.5),
        ("muon", ("optimizer.update_scale=spectral",), 0.0),
    ],
)
def test_four_times_the_width_divides_the_rate_of_matrices_as_the_kind_of_step_asks(
    composed, optimizer, settings, power
):
    model, _, groups, cfg = setting(composed, optimizer, "mup", 256, *settings)
    lr, decay = cfg["optimizer"]["lr"], cfg["optimizer"]["weight_decay"]
    for name in ("layers.0.attention.q_proj.weight", "layers.1.ffn.down_proj.weight"):
        assert rate_of(groups, name) == (pytest.approx(lr / 4**power), pytest.approx(decay * 4**power))
    assert rate_of(groups, "token_embedding.weight") == (lr, 0.0)
    gain = next(name for name, _ in model.named_parameters() if "norm" in name and "final" not in name)
    assert rate_of(groups, gain) == (lr, 0.0)
    assert rate_of(groups, "final_norm.weight") == (pytest.approx(lr / 4), 0.0)
    assert torch.equal(model.final_norm.weight, torch.full((256,), 0.25))


@pytest.mark.parametrize("optimizer", KNOWN)
def test_spectral_rates_move_every_matrix_by_the_root_of_its_shape(composed, optimizer):
    model, factory, groups, _ = setting(composed, optimizer, "spectral", 256)
    update, moved = update_of(factory), {}
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight"):
            rows, columns = parameter.shape
            std = model.initial_stds[name]
            assert std == pytest.approx(float(parameter.detach().std()), rel=0.05)  # of 32k draws and more

            size = update.spectral_norm(RatedTensor(name, "matrix", rows, columns, std))
            moved[name] = rate_of(groups, name)[0] * size / (rows / columns) ** 0.5
    if optimizer != "tiger":  # its steps are relative to a std that depth makes smaller in residual outputs
        assert max(moved.values()) == pytest.approx(min(moved.values()))
    assert len({round(v, 12) for v in moved.values()}) <= 2


def movement(composed, optimizer, rates, width):
    """How far each sublayer's output and the scores moved in four updates on one batch.

    The rate is small enough for the fourth update to act on a model that is still close to its first.
    """
    lr = {"adamw": 4e-3, "lion": 2e-4, "tiger": 1e-2, "muon": 1.6e-2}[optimizer]
    settings = ("trainer.precision=32-true", f"optimizer.lr={lr}")
    model, factory, groups, _ = setting(composed, optimizer, rates, width, *settings)
    step = factory(groups)
    ids = torch.randint(256, (4, 33), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def look():
        seen = {}
        hooks = [
            getattr(layer, part).register_forward_hook(lambda _, __, out, key=(i, part): seen.update({key: out.hidden}))
            for i, layer in enumerate(model.blocks())
            for part in ("attention", "ffn")
        ]
        seen["scores"] = model.logits(model(ids[:, :-1], positions=torch.arange(32).expand(4, -1)).hidden)
        for hook in hooks:
            hook.remove()
        return seen

    before = look()
    for _ in range(4):
        out = model(ids[:, :-1], positions=torch.arange(32).expand(4, -1))
        step.zero_grad()
        linear_cross_entropy(out.hidden, model.lm_head.weight, ids[:, 1:]).backward()
        step.step()
    return {name: float((value - before[name]).square().mean().sqrt()) for name, value in look().items()}


@pytest.mark.parametrize("optimizer", KNOWN)
@pytest.mark.parametrize("rates", ["mup", "spectral"])
def test_activations_move_as_far_at_four_times_the_width(composed, optimizer, rates):
    narrow, wider = (movement(composed, optimizer, rates, width) for width in (64, 256))
    scores = wider.pop("scores") / narrow.pop("scores")
    for name, moved in wider.items():
        assert moved / narrow[name] == pytest.approx(1.0, abs=0.2), name  # one draw of weights each
    assert 0.4 < scores < 1.2  # what the random head makes of moved activations falls with the root of the width


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_with_plain_rates_they_move_further_the_wider_the_model(composed, optimizer):
    narrow, wider = (movement(composed, optimizer, "plain", width) for width in (64, 256))
    assert wider["scores"] > 2 * narrow["scores"]
    assert wider[0, "ffn"] > 1.5 * narrow[0, "ffn"]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", KNOWN)
def test_activations_keep_their_size_from_width_64_to_1024(composed, optimizer):
    moved = {width: movement(composed, optimizer, "mup", width) for width in (64, 256, 1024)}
    for name in moved[64]:
        exponent = torch.tensor(moved[1024][name] / moved[64][name]).log() / torch.tensor(16.0).log()
        assert abs(float(exponent)) < (0.5 if name == "scores" else 0.1), name


def test_amos_rates_for_signs_are_the_published_ones(composed):
    model, _, groups, _ = setting(composed, "lion", "amos", 64, "optimizer.lr=1e-2")
    for name in ("layers.0.attention.q_proj.weight", "token_embedding.weight"):
        std = model.initial_stds[name]
        assert rate_of(groups, name) == (pytest.approx(1e-2 * std), pytest.approx(1e-2 / (2 * std)))
    assert rate_of(groups, "final_norm.weight") == (pytest.approx(5e-3), 0.0)


def test_amos_rates_divide_by_the_size_of_adams_steps(composed):
    model, _, groups, _ = setting(composed, "adamw", "amos", 64, "optimizer.lr=1e-2")
    std, rms = model.initial_stds["layers.0.attention.q_proj.weight"], (0.1 / 1.9) ** 0.5
    wanted = (pytest.approx(1e-2 * std / rms), pytest.approx(1e-2 * rms / (2 * std)))
    assert rate_of(groups, "layers.0.attention.q_proj.weight") == wanted


def test_amos_does_not_change_the_rates_of_tiger(composed):
    _, _, groups, _ = setting(composed, "tiger", "amos", 64, "optimizer.lr=1e-2")
    assert {round(g["lr"], 12) for g in groups} == {1e-2}


def test_amos_decay_keeps_the_size_of_weights_whose_gradients_are_noise():
    std, alpha = 0.05, 1e-2
    lr, decay = alpha * std, alpha / (2 * std)
    generator, weights = torch.Generator().manual_seed(0), torch.zeros(20_000)
    weights.normal_(0, std, generator=generator)
    for _ in range(2000):  # ten times 1 / alpha; signs of independent noise
        steps = torch.randn(weights.shape, generator=generator).sign()
        weights -= lr * (steps + decay * weights)
    # 20 000 weights leave 0.5 % of one standard deviation; four of them
    assert float(weights.square().mean().sqrt()) == pytest.approx(std, rel=0.02)


@pytest.mark.parametrize("rates", RATES)
def test_an_optimizer_whose_steps_are_as_large_as_the_gradient_is_refused(composed, tiny, rates):
    decay = ("optimizer.weight_decay=0",)
    with pytest.raises(ConfigError, match=rf"rates={rates}: has no rule for SGD.*optimizer=adamw, lion"):
        check(composed(*tiny, "optimizer=sgd", f"rates={rates}", *decay))


@pytest.mark.parametrize("rates", ["mup", "spectral"])
def test_a_base_width_below_one_is_refused(rates):
    node = {**to_plain(OmegaConf.load(CONF / "rates" / f"{rates}.yaml")), "base_d_model": 0}
    with pytest.raises(ConfigError, match=r"rates\.base_d_model=0: .* at which optimizer\.lr was tuned"):
        instantiate(node)


def test_a_decay_that_amos_would_ignore_is_refused(composed, tiny):
    with pytest.raises(ConfigError, match=r"optimizer\.weight_decay=0\.1: rates=amos derives it"):
        check(composed(*tiny, "rates=amos"))


def test_the_receipt_shows_the_rate_of_every_tensor(composed, tiny, tmp_path):

    train(composed(*tiny, "rates=mup", "rates.base_d_model=16", "max_steps=2"), tmp_path)
    lines = {line.split()[0]: line for line in (tmp_path / "optimizer.txt").read_text().splitlines() if line}
    assert " 0.002 " in lines["layers.0.attention.q_proj.weight"]
    assert " 0.004 " in lines["token_embedding.weight"]
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("optimizer", options("optimizer"))
def test_rates_and_decay_can_be_set_per_kind_for_every_optimizer(composed, optimizer):
    given = ("rates.lr_scales.embedding=0.5", "rates.decay_kinds=[matrix,vector]")
    _, factory, groups, cfg = setting(composed, optimizer, "plain", 64, *given)
    lr, decay = cfg["optimizer"]["lr"], cfg["optimizer"]["weight_decay"]
    expected = {"matrix": (lr, decay), "embedding": (0.5 * lr, 0.0), "vector": (lr, decay)}
    assert {g["kind"]: (g["lr"], g["weight_decay"]) for g in groups} == expected
    assert len(factory(groups).param_groups) == 3


@pytest.mark.parametrize("rates", options("rates"))
def test_scales_and_kinds_act_on_every_rule_for_rates(composed, rates):
    before = setting(composed, "adamw", rates, 128)[2]
    given = ("rates.lr_scales={matrix: 1, embedding: 3, head: 1, vector: 1}", "rates.decay_kinds=[]")
    after = setting(composed, "adamw", rates, 128, *given)[2]
    name = "token_embedding.weight"
    assert rate_of(after, name)[0] == pytest.approx(3 * rate_of(before, name)[0])
    assert {group["weight_decay"] for group in after} == {0.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"lr_scales": {"embeding": 1}}, "did you mean embedding"), ({"decay_kinds": ["gains"]}, "no such kind"),
     ({"lr_scales": {"head": -1}}, "must be at least 0")],
)  # fmt: skip
def test_an_unknown_kind_or_a_negative_scale_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Rates(**settings)


@pytest.mark.parametrize("decay", ["true", "false"])
def test_amos_rates_a_tensor_that_starts_at_zero_by_its_width(composed, decay):
    given = ("model.init.embedding_std=0", f"rates.decay={decay}")
    _, _, groups, cfg = setting(composed, "lion", "amos", 64, *given)
    lr = cfg["optimizer"]["lr"]
    assert rate_of(groups, "token_embedding.weight")[0] == pytest.approx(lr * 64**-0.5)

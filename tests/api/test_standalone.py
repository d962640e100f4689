import pytest
import torch
from catalogue import options
from torch import nn

import llm
from llm.model.attention.vq import VQAttention
from llm.model.position.none import NoPosition
from llm.optim.param_groups import build_param_groups


class Foreign(nn.Module):
    """A model of somebody else, with modules that state no kinds."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(50, 16)
        self.pos_embed = nn.Parameter(torch.randn(8, 16))
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm = nn.BatchNorm1d(16)
        self.hidden = nn.Linear(16, 16)
        self.out = nn.Linear(16, 50)

    def forward(self, ids):
        x = self.tokens(ids) + self.pos_embed
        x = self.conv(x.mT).mT
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.out(self.hidden(self.norm(x.mT).mT))


def kinds(optimizer):
    return {name: group["kind"] for group in optimizer.param_groups for name in group["names"]}


@pytest.mark.parametrize("option", options("optimizer"))
def test_an_optimizer_lowers_the_loss_of_any_module_in_a_plain_loop(option):
    torch.manual_seed(0)
    model, ids = Foreign(), torch.randint(50, (4, 8))
    optimizer = llm.build(f"optimizer={option}", model)
    values = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        values.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert values[-1] < 0.9 * values[0]


def test_parameters_of_foreign_modules_have_sensible_kinds_and_decay():
    optimizer = llm.build("optimizer=muon", Foreign(), lr=3e-3, weight_decay=0.2)
    found = kinds(optimizer)
    assert {name for name, kind in found.items() if kind == "matrix"} == {
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "hidden.weight",
    }
    assert {name for name, kind in found.items() if kind == "embedding"} == {"tokens.weight", "pos_embed"}
    assert {name for name, kind in found.items() if kind == "head"} == {"out.weight"}
    decayed = {name for group in optimizer.param_groups for name in group["names"] if group["weight_decay"] == 0.2}
    assert decayed == {"attention.in_proj_weight", "attention.out_proj.weight", "hidden.weight", "conv.weight"}
    resting = {name: v for g in optimizer.param_groups for name, v in zip(g["names"], g["resting_values"], strict=True)}
    assert resting["norm.weight"] == 1.0
    assert resting["conv.weight"] == 0.0


def test_tied_weights_are_one_embedding_and_frozen_ones_are_excluded():
    model = Foreign()
    model.out.weight = model.tokens.weight
    model.conv.requires_grad_(False)
    found = kinds(llm.build("optimizer=adamw", model))
    assert found["tokens.weight"] == "embedding"
    assert not {"out.weight", "conv.weight", "conv.bias"} & found.keys()


def test_stated_kinds_win_and_a_pattern_without_a_parameter_is_refused():
    found = kinds(llm.build("optimizer=muon", Foreign(), kinds={"hidden.*": "vector"}))
    assert found["hidden.weight"] == "vector"
    with pytest.raises(llm.ConfigError, match=r"kinds\['hiden.weight'\]: fits no parameter; try hidden.weight"):
        llm.build("optimizer=muon", Foreign(), kinds={"hiden.weight": "vector"})
    with pytest.raises(llm.ConfigError, match="no such kind; use one of matrix"):
        llm.build("optimizer=muon", Foreign(), kinds={"hidden.weight": "matrx"})


def test_a_decoder_of_the_project_has_the_groups_of_training():
    model = llm.build("model=moe", vocab_size=64, num_layers=1, d_model=32, num_heads=2, num_kv_heads=1)
    optimizer = llm.build("optimizer=lion", model, lr=1e-3)
    usual = build_param_groups(model, lr=1e-3, weight_decay=0.5)
    found = {(g["kind"], *g["names"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups}
    assert found == {(g["kind"], *g["names"], g["lr"], g["weight_decay"]) for g in usual}


def test_settings_and_defaults_reach_an_optimizer():
    optimizer = llm.build("optimizer=muon", Foreign(), "optimizer.nesterov=false", momentum=0.5)
    assert (optimizer.momentum, optimizer.nesterov) == (0.5, False)
    assert {group["lr"] for group in optimizer.param_groups} == {1.6e-2}


@pytest.mark.parametrize("option", options("model/attention"))
def test_every_attention_works_alone_and_its_gradients_reach_the_input(option):
    attention = llm.build(f"model/attention={option}", d_model=32, num_heads=4)
    x = torch.randn(2, 70, 32, requires_grad=True)
    out = attention(x, positions=torch.arange(70).expand(2, -1), document_ids=None)
    out.hidden.square().sum().backward()
    assert out.hidden.shape == x.shape
    assert x.grad.abs().sum() > 0


def test_an_attention_takes_another_position_and_nested_settings():
    attention = llm.build(
        "model/attention=vq", d_model=32, num_heads=4, num_kv_heads=2, position="none", codebook={"codebook_size": 16}
    )
    assert isinstance(attention, VQAttention)
    assert isinstance(attention.position, NoPosition)
    assert attention.num_kv_heads == 2
    assert attention.codebook.codebook_size == 16
    own = llm.build("model/position=rope", head_dim=8, base=500.0)
    assert llm.build("model/attention=softmax", d_model=32, num_heads=4, position=own).position is own
    scaled = llm.build(
        "model/attention=softmax", "model/position=ntk", "model.position.factor=3.0", d_model=32, num_heads=4
    )
    assert type(scaled.position).__name__ == "NTKRoPE" or "NTK" in type(scaled.position).__name__


@pytest.mark.parametrize("option", options("model/position"))
def test_every_position_works_alone(option):
    position = llm.build(f"model/position={option}", head_dim=8)
    q = torch.randn(1, 5, 2, 8)
    assert position(q, q, torch.arange(5)[None])[0].q.shape == q.shape


@pytest.mark.parametrize("option", options("model/ffn"))
def test_every_feed_forward_works_alone_and_needs_its_width(option):
    assert llm.build(f"model/ffn={option}", d_model=16, d_ff=32)(torch.randn(1, 3, 16)).hidden.shape == (1, 3, 16)
    with pytest.raises(llm.ConfigError, match=r"needs d_ff; write llm\.build"):
        llm.build(f"model/ffn={option}", d_model=16)


def test_functions_are_returned_with_their_settings_bound():
    schedule = llm.build("schedule=wsd", total_steps=100, warmup=10)
    assert [schedule(step) for step in (0, 5, 10, 50, 100)] == [0.1, 0.6, 1.0, 1.0, 0.0]
    assert llm.build("scaling=sqrt", base_batch_tokens=100)(400) == 2.0
    assert llm.build("batch_schedule=constant", batch_tokens=64) == {0: 64}


def test_each_group_without_a_run_has_a_piece():
    built = {
        choice: type(llm.build(choice, **settings)).__name__
        for choice, settings in {
            "model/ffn/router=softmax": {"d_model": 8, "num_experts": 4, "top_k": 2, "num_shared_experts": 0},
            "model/ffn/balance=quantile": {"num_experts": 4, "top_k": 2},
            "model/norm=layer": {"dim": 8},
            "rates=mup": {},
            "tokenizer=bytes": {},
            "data=python": {},
            "eval=loss": {},
            "spikes=skip": {},
            "spikes=none": {},
            "averaging=ema": {},
        }.items()
    }
    assert list(built.values()) == [
        "TopKRouter", "Quantile", "LayerNorm", "MuP", "ByteTokenizer", "PythonSource", "HeldOutLoss", "SpikeGuard",
        "NoneType", "EMA",
    ]  # fmt: skip


def test_weights_are_drawn_from_the_generator_of_the_session():
    torch.manual_seed(1)
    first, second = (llm.build("model/attention=softmax", d_model=8, num_heads=2).q_proj.weight for _ in range(2))
    torch.manual_seed(1)
    assert not first.equal(second)
    assert llm.build("model/attention=softmax", d_model=8, num_heads=2).q_proj.weight.equal(first)


@pytest.mark.parametrize(
    ("choice", "settings", "message"),
    [
        ("model/attention=vqq", {}, "no such option; did you mean vq"),
        ("modle/attention=vq", {}, "unknown key; did you mean model/attention"),
        ("model/attention", {}, "not <group>=<option>"),
        ("model/attention=vq", {"d_model": 64}, "needs num_heads; write llm.build"),
        ("model/attention=vq", {"d_model": 64, "num_heads": 3}, "model.num_heads=3: must divide"),
        ("model/attention=vq", {"d_model": 64, "num_heads": 4, "blok_size": 3}, "did you mean block_size"),
        ("model/attention=vq", {"d_model": 64, "num_heads": 4, "block_size": "x"}, "block_size='x': must be int"),
        ("model/attention=vq", {"d_model": 8, "num_heads": 2, "codebook": {"codebok_size": 3}}, "mean codebook_size"),
        ("model/attention=vq", {"d_model": 8, "num_heads": 2, "position": "rope"}, "use model/position=rerope"),
        ("model/position=rope", {}, "needs head_dim; write llm.build"),
        ("model/position=rope", {"head_dim": 7}, "use an even head_dim"),
        ("tokenizer=pretrained", {}, "needs path; write llm.build"),
        ("trainer=cpu", {}, "belongs to a run"),
        ("optimizer=muon", {"lr": 1.0}, "needs one model"),
    ],
)
def test_mistakes_name_the_choice_and_the_remedy(choice, settings, message):
    with pytest.raises(llm.ConfigError, match=message):
        llm.build(choice, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 1.0}, "did you mean lr"),
        ({"lr": "x"}, "must be a number"),
        ({"lr": -1.0}, r"optimizer\.lr=-1\.0: must be above 0"),
        ({"lr": 0}, r"optimizer\.lr=0: must be above 0"),
        ({"weight_decay": -0.1}, r"optimizer\.weight_decay=-0\.1: must be at least 0"),
    ],
)
def test_mistakes_in_the_settings_of_an_optimizer(settings, message):
    with pytest.raises(llm.ConfigError, match=message):
        llm.build("optimizer=adamw", Foreign(), **settings)
    with pytest.raises(llm.ConfigError, match="takes no model"):
        llm.build("model/norm=rms", Foreign())

"""Decoders as Hugging Face folders and back: the same logits, the same weights, or a refusal that says why."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from catalogue import options

from llm.commands.export import ExportConfig, export, write_model
from llm.config.build import build_model, build_objective, build_tokenizer
from llm.config.check import check
from llm.config.settings import settings
from llm.errors import CheckpointError, ConfigError
from llm.huggingface.defaults import DEFAULTS, complete
from llm.huggingface.families import find_family
from llm.huggingface.load import load_hf_weights
from llm.huggingface.logits import TOLERANCE, check_import, compare_logits, random_windows
from llm.huggingface.names import to_theirs, weight_pairs
from llm.model.ffn.balance.balance_rule import TRAINING_STATISTICS
from llm.training.rebuild import TrainedModel
from llm.training.train import train

SMALL = (
    "model.d_model=32", "model.num_layers=3", "model.num_heads=4", "model.num_kv_heads=2", "model.ffn.d_ff=48",
    "tokenizer=bytes", "context_length=24", "batch_tokens=24", "micro_batch_size=1", "loader.val_tokens=24",
)  # fmt: skip
MOE = ("model=moe", "model.ffn.num_experts=5", "model.ffn.top_k=2")
SOFTMAX = (*MOE, "model/ffn/router=softmax", "model/ffn/balance=aux_loss")
MIXTRAL = (*SOFTMAX, "model.ffn.router.normalize=true")
QK_NORM = "model.attention.qk_norm=true"

FAMILIES = {
    "LlamaForCausalLM": (),
    "LlamaForCausalLM, head of its own": ("model.tie_embeddings=false", "model.position.base=500000.0"),
    "LlamaForCausalLM, wide heads": ("model.head_dim=16", "model.norm.eps=1e-5"),
    "LlamaForCausalLM, raised base": ("model/position=ntk", "model.position.factor=4.0"),
    "MistralForCausalLM": ("model.attention.window=7",),
    "Qwen3ForCausalLM": (QK_NORM,),
    "Qwen3ForCausalLM, eps of its norms": (QK_NORM, "model.norm.eps=1e-3", "model.attention.qk_norm_eps=1e-3"),
    "Qwen3ForCausalLM, window": (QK_NORM, "model.attention.window=7"),
    "Qwen3ForCausalLM, some layers with a window": (
        "model=hybrid", "model.attention.kinds.local.window=5", "model.attention.kinds.local.qk_norm=true",
        "model.attention.kinds.softmax.qk_norm=true", "model.attention.pattern=[local,softmax]",
    ),
    "MixtralForCausalLM": (*SOFTMAX, "model.ffn.router.normalize=true"),
    "Qwen3MoeForCausalLM": (*SOFTMAX, QK_NORM),
    "Qwen3MoeForCausalLM, normalised, a dense layer": (
        *SOFTMAX, QK_NORM, "model.ffn.router.normalize=true", "model.first_ffn_layers=1",
    ),
    "Glm4MoeForCausalLM": MOE,
    "Glm4MoeForCausalLM, all of it": (
        *MOE, QK_NORM, "model.ffn.num_shared_experts=2", "model.first_ffn_layers=1", "model.ffn.d_ff=64",
        "model/ffn/balance=quantile", "model.tie_embeddings=false",
    ),
    "LlamaForCausalLM, positions of Llama 3.1": (
        "model/position=llama3", "model.position.original_context_length=16", "model.position.factor=4.0",
    ),
    "LlamaForCausalLM, linear scaling": ("model/position=linear_scaling",),
    "Qwen3ForCausalLM, YaRN": (QK_NORM, "model/position=yarn", "model.position.original_context_length=16"),
    "MixtralForCausalLM, statistics of balance": (
        *SOFTMAX, "model.ffn.router.normalize=true", "model.ffn.balance.scope=global_batch",
    ),
    "Glm4MoeForCausalLM, a share of each head turns": (*MOE, "model.head_dim=12", "model.position.rotary_share=0.4"),
    "Glm4MoeForCausalLM, a share of a raised base": (
        *MOE, "model.head_dim=12", "model.position.rotary_share=0.5", "model/position=ntk", "model.position.factor=4.0",
    ),
    "Glm4MoeForCausalLM, a share under YaRN": (
        *MOE, "model.head_dim=24", "model.position.rotary_share=0.5", "model/position=yarn",
        "model.position.original_context_length=16",
    ),
    "Glm4MoeForCausalLM, no bias": (*MOE, "model/ffn/balance=none", "model.ffn.router.normalize=false"),
}  # fmt: skip


@pytest.fixture
def random_model(composed):
    """Build a decoder in which no weight has a value that hides a mistake: gains and biases are random as well."""

    def make(*overrides):
        cfg = composed(*SMALL, *overrides)
        tokenizer = build_tokenizer(cfg)
        model = build_model(cfg, tokenizer.vocab_size).eval()
        with torch.no_grad():
            for tensor in [*model.parameters(), *(b for n, b in model.named_buffers() if n.endswith("balance.bias"))]:
                tensor.add_(torch.randn_like(tensor) * 0.1)
        return TrainedModel(
            folder=Path("run"),
            config=check(cfg),
            model=model,
            tokenizer=tokenizer,
            device=torch.device("cpu"),
            precision="32-true",
            objective=build_objective(cfg, vocab_size=tokenizer.vocab_size, bos_id=tokenizer.bos_id),
        )

    return make


def load_back(folder, trained):
    cfg = trained.config.tree
    fresh = build_model({**cfg, "seed": 1}, trained.tokenizer.vocab_size)
    return load_hf_weights(folder, fresh, context_length=cfg["context_length"], bos_id=trained.tokenizer.bos_id)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_model_has_the_logits_and_gives_back_the_very_weights(random_model, tmp_path, family):
    pytest.importorskip("transformers")
    trained = random_model(*FAMILIES[family])
    assert write_model(trained, tmp_path, dtype=torch.float32) == family.split(",")[0]
    check_import(tmp_path, trained.model, context_length=24, bos_id=256)
    ids = random_windows(tokens=72, context_length=24, vocab_size=trained.model.vocab_size, bos_id=256)
    assert compare_logits(trained.model, tmp_path, ids) < TOLERANCE
    back, own = load_back(tmp_path, trained), trained.model.state_dict()
    assert back.keys() == own.keys()
    assert all(torch.equal(back[name], own[name]) for name in own)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("model/attention=vq", "model/position=rerope"), "model/attention is VQAttention"),
        (("model/attention=performer",), "model/attention is PerformerAttention"),
        (("model/position=rerope",), "model/position is ReRoPE"),
        (("model/norm=layer",), "model/norm is LayerNorm"),
        (("model.attention.key_norm=true",), "key_norm"),
        ((*MOE, "model.ffn.latent=16"), r"model\.ffn\.latent"),
        (("model/attention=delta",), "model/attention is DeltaAttention"),
        (("model.residual=attention",), r"model\.residual=attention"),
        (("model.ffn.activation=situ",), r"model\.ffn\.activation=situ"),
        ((*MOE, "model.ffn.activation=situ"), r"model\.ffn\.activation=situ"),
        (("model.position.turn_values=true",), r"model\.position\.turn_values"),
        (("model.attention.shared_kv=true",), r"model\.attention\.shared_kv"),
        (("model.position.rotary_share=0.5",), r"model\.position\.rotary_share below 1"),
        (("model.position.log_n=clipped", "model.position.train_length=24"), "log_n"),
        ((QK_NORM, "model.norm.eps=1e-5"), "differ in eps"),
        ((*MOE, "model.ffn.normalize_outputs=true"), "normalize_outputs"),
        ((*MOE, "model/ffn/router=threshold", "model/ffn/balance=budget"), "ThresholdRouter"),
        ((*SOFTMAX, "model/ffn/balance=loss_free"), "a balance that biases the choice"),
        (SOFTMAX, "not normalised, without"),
    ],
)
def test_what_no_class_computes_is_refused_with_the_reason(random_model, overrides, reason):
    model = random_model(*overrides).model
    with pytest.raises(ConfigError, match=reason):
        find_family(model, context_length=24, bos_id=256)


@pytest.mark.parametrize(
    ("overrides", "hint"),
    [
        (("model.num_layers=2",), r"model\.num_layers is 2, there it is 3"),
        (("model.position.base=500.0",), r"model\.position\.base is 500\.0, there it is 10000\.0"),
        ((QK_NORM,), r"a llama has model\.attention\.qk_norm=false"),
        (("model.tie_embeddings=false",), r"model\.tie_embeddings is False, there it is True"),
        (("model.attention.window=9",), "its model_type is llama, this decoder would be a mistral"),
        (("model/attention=vq", "model/position=rerope"), "no Hugging Face class computes this decoder"),
        (MOE, "would be a glm4_moe"),
    ],
)
def test_a_folder_of_another_architecture_is_refused_with_what_to_change(random_model, tmp_path, overrides, hint):
    write_model(random_model(), tmp_path, dtype=torch.float32)
    with pytest.raises(CheckpointError, match=hint):
        load_back(tmp_path, random_model(*overrides))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "gpt2"}, "its model_type is gpt2; only llama"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 8.0}}, "scales positions"),
        ({"attention_bias": True}, "model.attention.bias is none, there it is all"),
        ({"hidden_act": "gelu"}, "uses gelu"),
    ],
)
def test_a_folder_that_computes_something_else_is_refused(random_model, tmp_path, change, reason):
    trained = random_model()
    write_model(trained, tmp_path, dtype=torch.float32)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=reason):
        load_back(tmp_path, trained)


def rewrite_config(folder, changes, absent=()):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: v for key, v in config.items() if key not in absent}))


ROPE_KEYS = ("rope_theta", "rope_parameters")


@pytest.mark.parametrize(
    ("overrides", "changes", "absent", "reason"),
    [
        (
            MOE,
            {"partial_rotary_factor": 0.5},
            ("rope_parameters",),
            r"model\.position\.rotary_share is 1\.0, there it is 0\.5",
        ),
        ((), {"partial_rotary_factor": 0.5}, ("rope_parameters",), "its class turns all of each head"),
        (MOE, {}, ("rope_parameters", "partial_rotary_factor"), r"model\.position\.rotary_share is 1\.0"),
        (MOE, {"n_group": 4, "topk_group": 1}, (), "n_group and topk_group: .* 1 of 4 groups"),
        (MOE, {}, ("norm_topk_prob", "routed_scaling_factor"), r"router\.routed_scale is .*, there it is 1\.0"),
        (MOE, {}, ("first_k_dense_replace",), r"model\.first_ffn_layers is 0, there it is 1"),
        (MIXTRAL, {}, ROPE_KEYS, r"model\.position\.base is 10000\.0, there it is 1000000\.0"),
        (MIXTRAL, {}, ("rms_norm_eps",), r"model\.norm\.eps is 1e-06, there it is 1e-05"),
        ((QK_NORM,), {}, ("head_dim",), r"model\.head_dim is 8, there it is 128"),
        ((), {"rope_scaling": {"type": "linear", "factor": 2.0}}, ("rope_parameters",), "linear_scaling"),
        ((), {"logit_scale": 0.5}, (), r"logit_scale=0\.5: no setting here"),
        ((), {"quantization_config": {"bits": 4}}, (), "quantization_config="),
        ((), {"tie_word_embeddings": True}, ("tie_word_embeddings",), r"tie_embeddings is True, there it is False"),
    ],
)
def test_each_setting_that_changes_the_computation_is_refused_by_name(
    random_model, tmp_path, overrides, changes, absent, reason
):
    trained = random_model(*overrides)
    write_model(trained, tmp_path, dtype=torch.float32)
    rewrite_config(tmp_path, changes, absent)
    with pytest.raises(CheckpointError, match=reason):
        load_back(tmp_path, trained)


@pytest.mark.parametrize(
    ("overrides", "changes", "absent"),
    [
        ((*SOFTMAX, QK_NORM), {"intermediate_size": 999, "router_aux_loss_coef": 0.5}, ()),
        ((*SOFTMAX, QK_NORM), {"num_local_experts": 5}, ("num_experts",)),
        ((), {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}, ()),
        ((), {"rope_scaling": None, "pretraining_tp": 1, "hidden_act": "swish"}, ("rope_parameters",)),
        ((*MOE, "model.ffn.num_experts=6"), {"n_group": 3, "topk_group": 3}, ()),
    ],
    ids=["unused width", "other name", "mistral without a window", "old keys", "all groups chosen"],
)
def test_settings_that_change_no_logits_are_accepted(random_model, tmp_path, overrides, changes, absent):
    pytest.importorskip("transformers")
    trained = random_model(*overrides)
    write_model(trained, tmp_path, dtype=torch.float32)
    rewrite_config(tmp_path, changes, absent)
    assert load_back(tmp_path, trained)
    check_import(tmp_path, trained.model, context_length=24, bos_id=256)


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_defaults_of_absent_keys_are_those_of_transformers(model_type):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(model_type).to_dict()
    assert complete({"model_type": model_type}) == complete(theirs)


def test_an_import_whose_logits_differ_from_those_of_transformers_is_refused(random_model, tmp_path):
    pytest.importorskip("transformers")
    trained = random_model()
    write_model(trained, tmp_path, dtype=torch.float32)
    with torch.no_grad():
        trained.model.final_norm.weight.mul_(1.01)
    with pytest.raises(CheckpointError, match="its logits in transformers differ from those here"):
        check_import(tmp_path, trained.model, context_length=24, bos_id=256)


def test_statistics_of_training_are_no_weights(random_model, tmp_path):
    from safetensors.torch import load_file

    trained = random_model(*MIXTRAL)
    assert any(name.endswith("ffn.balance.load") for name in trained.model.state_dict())
    write_model(trained, tmp_path, dtype=torch.float32)
    assert not any("balance" in name for name in load_file(tmp_path / "model.safetensors"))
    with pytest.raises(ConfigError, match=r"the weight layers\.0\.ffn\.other has no name"):
        list(weight_pairs(trained.model.state_dict() | {"layers.0.ffn.other": torch.zeros(1)}, "mixtral"))


@pytest.mark.parametrize("option", sorted(options("model/ffn/balance")))
def test_each_buffer_of_a_balance_is_a_selection_bias_or_a_statistic(composed, option):
    router = {"budget": "threshold"}.get(option, "sigmoid")
    model = build_model(composed(*SMALL, *MOE, f"model/ffn/balance={option}", f"model/ffn/router={router}"), 257)
    names = {name for name, _ in model.named_buffers() if ".balance." in name}
    assert all(name.endswith((".bias", *TRAINING_STATISTICS)) for name in names)


GGUF_ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "mixtral": "LLAMA", "qwen3": "QWEN3"} | {
    "qwen3_moe": "QWEN3MOE", "glm4_moe": "GLM4_MOE",
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_each_tensor_of_an_export_has_a_name_in_gguf(random_model, family):
    gguf = pytest.importorskip("gguf")
    model = random_model(*FAMILIES[family]).model
    model_type = find_family(model, context_length=24, bos_id=256).model_type
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, GGUF_ARCHITECTURES[model_type]), len(model.layers))
    # llama.cpp's converter stacks experts, whose names then lack a number, and renames the selection bias
    merged = {
        re.sub(r"experts\.\d+\.", "experts.", name).replace("correction_bias", "correction.bias")
        for name in to_theirs(model.state_dict(), model_type)
    }
    absent = {name for name in merged if names.get_name(name, try_suffixes=(".weight", ".bias")) is None}
    # llama.cpp's Qwen3-MoE has no dense layers
    has_dense_layers = model_type == "qwen3_moe" and "model.first_ffn_layers=1" in FAMILIES[family]
    dense = {f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    assert absent == (dense if has_dense_layers else set())


def test_weights_in_several_files_and_a_padded_vocabulary_are_read(random_model, tmp_path):
    from safetensors.torch import load_file, save_file

    trained = random_model()
    write_model(trained, tmp_path, dtype=torch.float32)
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.embed_tokens.weight"
    first = {name: torch.cat([weights.pop(name), torch.ones(7, 32)])}
    files = {"model-00001-of-00002.safetensors": first, "model-00002-of-00002.safetensors": weights}
    for file, part in files.items():
        save_file(part, tmp_path / file)
    index = {"weight_map": {key: file for file, part in files.items() for key in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model.safetensors").unlink()
    back, own = load_back(tmp_path, trained), trained.model.state_dict()
    assert all(torch.equal(back[key], own[key]) for key in own)


@pytest.fixture(scope="module")
def run_folder(composed, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(composed(*tiny, "max_steps=2", "val_every=2"), folder)
    return folder


def exporting(run_folder, out, **changes):
    keys = {"checkpoint": "last", "average": 1, "format": "hf", "dtype": "float32", "tokens": 64}
    return export(settings(ExportConfig, {"run_dir": str(run_folder), "out": str(out), **keys, **changes}))


CLEAN = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
encoded = tokenizer("3 plus 4 é", return_tensors="pt")
ids = encoded.input_ids
loss = model(input_ids=ids, labels=ids).loss.item()
out = model.generate(ids, attention_mask=encoded.attention_mask, max_new_tokens=8, do_sample=False, eos_token_id=None)
assert "llm" not in sys.modules and "data" not in sys.modules
print(ids[0].tolist(), loss, out[0].tolist(), tokenizer.decode(ids[0], skip_special_tokens=True), sep="|")
"""


def test_an_exported_run_works_in_a_process_without_this_project(run_folder, tmp_path):
    pytest.importorskip("transformers")
    from llm.generate import stream_tokens
    from llm.training.rebuild import rebuild_model

    out = exporting(run_folder, tmp_path / "hf")
    answer = subprocess.run(
        [sys.executable, "-I", "-c", CLEAN, str(out)], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert answer.returncode == 0, answer.stderr
    ids, loss, generated, text = answer.stdout.strip().split("|")
    trained = rebuild_model(run_folder, "last")
    own = [trained.tokenizer.bos_id, *trained.tokenizer.encode("3 plus 4 é").tolist()]
    assert json.loads(ids) == own
    assert text == "3 plus 4 é"
    tokens = torch.tensor([own])
    with torch.no_grad():
        logits = trained.model.logits(trained.model(tokens, positions=torch.arange(len(own))[None]).hidden)
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:])
    assert float(loss) == pytest.approx(float(expected), abs=1e-5)  # fp32 in another order
    greedy = {"max_new_tokens": 8, "temperature": 0.0, "top_k": None, "top_p": None, "seed": 0}
    drawn = [int(token) for token in stream_tokens(trained.model, [own], **greedy)]
    assert json.loads(generated) == own + drawn


def test_training_continues_from_an_exported_folder(run_folder, composed, tiny, tmp_path):
    pytest.importorskip("transformers")
    from llm.training.rebuild import rebuild_model

    out = exporting(run_folder, tmp_path / "hf")
    again = tmp_path / "again"
    train(composed(*tiny, "max_steps=1", "val_every=1", "optimizer.lr=1e-12", f"init_from={out}"), again)
    own, back = (rebuild_model(folder, "last").model.state_dict() for folder in (run_folder, again))
    for name, tensor in own.items():
        torch.testing.assert_close(back[name], tensor, atol=1e-9, rtol=1e-6)  # one update at a rate of 1e-12


def test_half_precision_is_half_the_size_and_is_compared_as_rounded(run_folder, tmp_path):
    pytest.importorskip("transformers")
    whole, half = (exporting(run_folder, tmp_path / d, dtype=d) for d in ("float32", "bfloat16"))
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (whole, half)]
    assert sizes[1] < 0.6 * sizes[0]


def test_exported_files_have_the_mode_that_the_umask_gives(run_folder, tmp_path):
    pytest.importorskip("transformers")
    before = os.umask(0o027)
    try:
        out = exporting(run_folder, tmp_path / "hf")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o640}


def test_a_folder_in_use_is_refused_and_nothing_is_left_of_an_export_that_differs(run_folder, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("")
    with pytest.raises(ConfigError, match=r"out=.*not empty"):
        exporting(run_folder, tmp_path / "full")
    monkeypatch.setattr("llm.commands.export.compare_logits", lambda *a, **k: 1.0)
    with pytest.raises(CheckpointError, match="logits differ by 1"):
        exporting(run_folder, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]

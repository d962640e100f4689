"""Folders of transformers' own classes with random weights: read with equal logits, or refused by their key."""

import json

import pytest
import torch
from catalogue import CONF
from folder_cases import CASES, OVERRIDES, SIZES, Case, table

from llm.config.build import build_model
from llm.errors import CheckpointError
from llm.huggingface.defaults import DEFAULTS
from llm.huggingface.load import load_hf_weights
from llm.huggingface.logits import TOLERANCE, compare_logits, random_windows

transformers = pytest.importorskip("transformers")


def name_of(case: Case) -> str:
    return "-".join([case.model_type, *case.config])


@pytest.fixture
def written(tmp_path):
    """Write a folder in which no weight has a value that hides a mistake."""

    def write(case: Case):
        config = transformers.CONFIG_MAPPING[case.model_type](**{**SIZES, **case.config})
        model = transformers.AutoModelForCausalLM.from_config(config).float()
        with torch.no_grad():
            for tensor in [
                *model.parameters(),
                *(b for n, b in model.named_buffers() if n.endswith("correction_bias")),
            ]:
                tensor.add_(torch.randn_like(tensor) * 0.1)
        model.save_pretrained(tmp_path / "hf")
        return tmp_path / "hf"

    return write


def loaded(folder, composed, overrides):
    given = {override.split("=")[0] for override in overrides}
    cfg = composed(*(o for o in OVERRIDES if o.split("=")[0] not in given), *overrides)
    model = build_model(cfg, SIZES["vocab_size"])
    model.load_state_dict(load_hf_weights(folder, model, context_length=24, bos_id=1))
    return model.eval()


@pytest.mark.parametrize("case", [case for case in CASES if not case.refusal], ids=name_of)
def test_a_folder_is_read_with_the_logits_of_its_class(written, composed, case):
    folder = written(case)
    model = loaded(folder, composed, case.overrides.split())
    ids = random_windows(tokens=72, context_length=24, vocab_size=SIZES["vocab_size"], bos_id=1)
    difference = compare_logits(model, folder, ids)
    with torch.no_grad():
        largest = model.logits(model(ids, positions=torch.arange(24).expand_as(ids)).hidden).abs().max()
    assert difference <= TOLERANCE * max(1.0, float(largest))


@pytest.mark.parametrize("case", [case for case in CASES if case.refusal], ids=name_of)
def test_what_no_setting_computes_is_refused_by_its_key(written, composed, case):
    softmax = "model=moe model/ffn/router=softmax model/ffn/balance=aux_loss"
    overrides = {
        "mixtral": f"{softmax} model.ffn.router.normalize=true",
        "qwen3_moe": f"{softmax} model.attention.qk_norm=true",
        "glm4_moe": "model=moe",
    }.get(case.model_type, "")
    with pytest.raises(CheckpointError, match=case.refusal):
        loaded(written(case), composed, overrides.split())


def test_every_other_class_of_transformers_is_refused_by_its_model_type(composed, tmp_path):
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    others = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - DEFAULTS.keys())
    assert len(others) > 100
    model = build_model(composed(*OVERRIDES), SIZES["vocab_size"])
    for model_type in others:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        with pytest.raises(CheckpointError, match=f"its model_type is {model_type}; only llama"):
            load_hf_weights(tmp_path, model, context_length=24, bos_id=1)


def test_the_page_shows_the_table():
    page = (CONF.parent / "docs" / "adaptation.md").read_text()
    assert table() in page, "paste tests/folder_cases.py's table() into docs/adaptation.md"

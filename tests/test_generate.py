import pytest
import torch

from llm.config.build import build_model
from llm.errors import ConfigError
from llm.generate import filter_logits, generate_text, sample_token, stream_tokens

GREEDY = {"temperature": 0.0, "top_k": None, "top_p": None, "seed": 0}


@pytest.fixture(scope="module")
def model(composed):
    return build_model(composed("model.d_model=32", "model.num_layers=2", "model.ffn.d_ff=48"), 30).eval()


def tokens(model, prompts, **options):
    return torch.stack(list(stream_tokens(model, prompts, **options)), dim=1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_decoding_with_the_cache_equals_decoding_without(model, temperature):
    options = {"max_new_tokens": 40, "temperature": temperature, "top_k": 20, "top_p": 0.9, "seed": 3}
    prompts = [[1, 2, 3], [4, 5, 6]]
    assert torch.equal(tokens(model, prompts, **options), tokens(model, prompts, **options, use_cache=False))


def test_prompts_of_different_lengths_do_not_disturb_one_another(model):
    together = tokens(model, [[1], [2, 3, 4, 5]], max_new_tokens=20, **GREEDY)
    apart = [tokens(model, [prompt], max_new_tokens=20, **GREEDY) for prompt in ([1], [2, 3, 4, 5])]
    assert torch.equal(together, torch.cat(apart))


def test_a_seed_gives_the_same_draw_and_another_seed_another(model):
    draw = lambda seed: tokens(model, [[1, 2]], max_new_tokens=30, temperature=1.0, top_k=None, top_p=None, seed=seed)  # noqa: E731
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_draws_follow_the_filtered_distribution():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(20000, -1)
    drawn = sample_token(logits, temperature=1.0, top_k=None, top_p=0.9, generator=torch.Generator().manual_seed(0))
    frequencies = torch.bincount(drawn, minlength=4) / 20000
    # 0.9 is reached by the first three; four standard errors of a frequency are 0.014
    torch.testing.assert_close(frequencies, torch.tensor([0.5, 0.3, 0.15, 0.0]) / 0.95, atol=0.014, rtol=0)


def test_top_k_keeps_the_k_highest_and_temperature_sharpens():
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]])
    kept = filter_logits(logits, temperature=0.5, top_k=2, top_p=None)
    assert kept.tolist() == [[-torch.inf, 6.0, 4.0, -torch.inf]]


def test_the_nucleus_always_keeps_the_most_likely():
    kept = filter_logits(torch.tensor([[5.0, 1.0]]), temperature=1.0, top_k=None, top_p=0.01)
    assert kept.isfinite().tolist() == [[True, False]]


class Letters:
    bos_id = 0

    def encode_batch(self, texts):
        return [[ord(c) - 96 for c in text] for text in texts]

    def decode(self, ids):
        return "".join(chr(96 + i) for i in ids)


def test_text_ends_where_the_next_document_begins(model, monkeypatch):
    drawn = iter([torch.tensor([2, 3]), torch.tensor([0, 4]), torch.tensor([5, 0])])
    monkeypatch.setattr("llm.generate.decode.sample_token", lambda *a, **k: next(drawn))
    texts = generate_text(model, ["a", "bc"], tokenizer=Letters(), max_new_tokens=3, **GREEDY)
    assert texts == ["ab", "bccd"]


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1"),
        ({"top_p": 0.0}, "top_p=0"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(model, setting, key):
    with pytest.raises(ConfigError, match=key):
        next(stream_tokens(model, [[1]], **({"max_new_tokens": 1, **GREEDY} | setting)))


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(ConfigError, match="at least one token"):
        next(stream_tokens(model, [[]], max_new_tokens=1, **GREEDY))

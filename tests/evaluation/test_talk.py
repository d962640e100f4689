"""`python -m llm.generate`, and where texts end."""

import pytest
import torch

from llm.commands.talk import check_lengths, check_talk
from llm.config.build import build_model, build_tokenizer
from llm.errors import ConfigError
from llm.generate import generate, stream_text
from llm.generate.sampling import penalize_repetition
from llm.generate.text import GrowingText
from llm.training.rebuild import rebuild_model

GREEDY = {"temperature": 0.0, "top_k": None, "top_p": None, "seed": 0}


@pytest.fixture(scope="module")
def tokenizer(composed):
    return build_tokenizer(composed("tokenizer=bytes"))


@pytest.fixture(scope="module")
def model(composed):
    return build_model(composed("model.d_model=32", "model.num_layers=2", "model.ffn.d_ff=48"), 257).eval()


def test_a_streamed_text_equals_the_whole_text(model, tokenizer):
    options = {
        "tokenizer": tokenizer,
        "max_new_tokens": 60,
        "temperature": 1.5,
        "top_k": None,
        "top_p": None,
        "seed": 1,
    }
    whole = generate(model, ["é"], **options)
    assert "é" + "".join(stream_text(model, "é", **options)) == whole.texts[0]
    assert whole.num_tokens == 60
    assert whole.cache_bytes > 0
    assert whole.tokens_per_second > 0


def test_a_stop_string_ends_a_text_for_any_division_into_tokens_and_is_removed(tokenizer):
    text = GrowingText(tokenizer, ["END", "ENOUGH"])
    shown = ""
    for byte in b"one ENE ENDless":
        text.add(byte)
        shown += text.news()
    assert text.is_done
    assert text.finished() == shown == "one ENE "
    assert text.num_drawn == len("one ENE END")


def test_a_continuation_keeps_its_first_space():
    from tokenizers import Tokenizer, decoders, models

    block = "\N{LOWER ONE EIGHTH BLOCK}"
    pieces = Tokenizer(models.BPE(vocab={f"{block}hello": 0, f"{block}world": 1}, merges=[]))
    pieces.decoder = decoders.Metaspace()

    class Pieces:
        bos_id = 2
        decode = staticmethod(lambda ids: pieces.decode([i for i in ids if i != 2]))

    def continued(prompt, stop):
        text = GrowingText(Pieces(), stop, prompt=prompt)
        text.add(1)
        return text.finished(), text.is_done

    assert continued([2, 0], [" world w"]) == (" world", False)
    assert continued([2, 0], [" world"]) == ("", True)
    assert continued([2], []) == ("world", False)


def test_incomplete_characters_and_possible_stop_strings_are_held_back(tokenizer):
    text = GrowingText(tokenizer, ["xyz"])
    pieces = []
    for byte in "aéxy".encode():
        text.add(byte)
        pieces.append(text.news())
    assert pieces == ["a", "", "é", "", ""]


def test_the_penalty_is_that_of_transformers():
    logits_module = pytest.importorskip("transformers.generation.logits_process")
    logits, ids = torch.randn(3, 11), torch.randint(11, (3, 7))
    expected = logits_module.RepetitionPenaltyLogitsProcessor(1.3)(ids, logits.clone())
    assert torch.equal(penalize_repetition(logits, ids, 1.3), expected)
    padded = torch.cat([torch.full((3, 4), -1), ids], dim=1)
    assert torch.equal(penalize_repetition(logits, padded, 1.3), expected)


def test_penalised_prompts_of_different_lengths_continue_as_single_prompts_do(model, tokenizer):
    options = {"tokenizer": tokenizer, "max_new_tokens": 30, "repetition_penalty": 1.5, **GREEDY}
    together = generate(model, ["a", "a longer one"], **options).texts
    assert together == [generate(model, [prompt], **options).texts[0] for prompt in ("a", "a longer one")]


def test_a_text_too_long_for_the_position_is_refused_with_the_longest_possible(trained):
    rope = rebuild_model(trained[0], "last")
    check_lengths(rope, ["3 plus 4"], 24)  # 9 tokens read, the last of 24 is never read
    with pytest.raises(ConfigError, match=r"max_new_tokens=25: .* lower it to 24, or read with model/position=rerope"):
        check_lengths(rope, ["3 plus 4"], 25)
    with pytest.raises(ConfigError, match=r"prompt=…: 41 tokens, .* reads 32; shorten it"):
        check_lengths(rope, ["x" * 40], 1)
    node = {"_target_": "llm.model.position.rerope.ReRoPE", "_partial_": True, "base": 10000.0, "window": 16}
    node |= {"log_n": "none", "train_length": None}
    check_lengths(rebuild_model(trained[0], "last", position=node), ["x" * 4000], 1000)


def test_settings_of_the_command_are_checked(trained):
    given = {"run_dir": str(trained[0]), "checkpoint": "last", "average": 1, "prompt": "x", "max_new_tokens": 4}
    given |= {"temperature": 0.0, "top_k": None, "top_p": None, "repetition_penalty": 1.0, "stop": [], "seed": 0}
    given |= {"use_cache": True, "stream": True}
    assert check_talk(given).prompt == "x"
    with pytest.raises(ConfigError, match="repetition_penalty=0"):
        check_talk(given | {"repetition_penalty": 0.0})
    with pytest.raises(ConfigError, match=r"promt=y: unknown key; did you mean prompt"):
        check_talk(given | {"promt": "y"})

"""Each evaluation on a small run, and the errors of eval.py."""

import json
import math

import pytest
import torch
from catalogue import CONF, options
from torch import nn

from llm.commands.evaluate import evaluate
from llm.commands.export import write_model
from llm.commands.help import help_page
from llm.config.files import load
from llm.config.resume import merge_resumed
from llm.errors import CheckpointError, ConfigError
from llm.evals.evaluation import Subject
from llm.evals.extrapolation import Extrapolation
from llm.evals.held_out_loss import HeldOutLoss
from llm.model.transformer import Head, Transformer, TransformerOutput
from llm.objective.next_token import NextToken
from llm.run_folder.checkpoint_mean import mean_state
from llm.training.rebuild import rebuild, rebuild_model
from llm.training.train import train


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def test_the_loss_equals_that_of_training_and_several_runs_give_one_table(trained, judging, tmp_path, caplog):
    folder, loss = trained
    cfg = judging(f"run_dir=[{folder},{folder}]", "eval=[loss]")
    with caplog.at_level("INFO"):
        assert evaluate(cfg, tmp_path) == pytest.approx(loss, abs=1e-6)
    assert read(folder / "eval", "loss")["val/loss"] == pytest.approx(loss, abs=1e-6)
    assert read(tmp_path, "comparison")[str(folder)]["loss"] == pytest.approx(loss, abs=1e-6)
    assert "bits_per_byte" in caplog.text


def test_the_path_of_a_checkpoint_identifies_its_run(trained, judging, tmp_path):
    folder, loss = trained
    cfg = judging(f"checkpoint={folder}/checkpoints/last", "eval=[loss]")
    assert evaluate(cfg, tmp_path) == pytest.approx(loss, abs=1e-6)


def test_an_average_of_checkpoints_is_the_mean_of_their_weights(trained, judging, tmp_path):
    folder, loss = trained
    steps = [folder / f"checkpoints/step-{step:08d}" for step in (20, 30, 40)]
    states = [mean_state([step]) for step in steps]
    model = rebuild_model(folder, "last", average=3).model.state_dict()
    for name, tensor in model.items():
        mean = torch.stack([state[f"model.{name}"].double() for state in states]).mean(0)
        torch.testing.assert_close(tensor, mean.float(), atol=0, rtol=1e-6)
    averaged = evaluate(judging(f"run_dir={folder}", "eval=[loss]", "average=3"), tmp_path)
    assert averaged != pytest.approx(loss, abs=1e-6)
    with pytest.raises(CheckpointError, match=r"average=9: .* has only 4 checkpoints"):
        evaluate(judging(f"run_dir={folder}", "eval=[loss]", "average=9"), tmp_path)


def test_several_sources_are_measured_separately_on_held_out_text(composed, tiny, judging, corpus, tmp_path):
    patterns = [f"{corpus}/1*.txt", f"{corpus}/2*.txt"]
    settings = [t for t in tiny if not t.startswith("data.files")]
    cfg = composed(*settings, f"data.files=[{','.join(patterns)}]", "max_steps=2", "val_every=2")
    folder = tmp_path / "run"
    folder.mkdir()
    train(cfg, folder)
    evaluate(judging(f"run_dir={folder}", "eval=[loss]"), tmp_path / "out")
    found = read(tmp_path / "out", "loss")
    parts = found["by_source"]
    assert list(parts) == patterns
    low, high = sorted(part["val/loss"] for part in parts.values())
    assert low - 0.05 < found["val/loss"] < high + 0.05
    evaluate(judging(f"run_dir={folder}", "eval=[loss]", "eval.loss.sources={}"), tmp_path / "none")
    assert "by_source" not in read(tmp_path / "none", "loss")


def test_a_run_and_its_evaluation_measure_the_validation_set_of_the_user(composed, tiny, judging, tmp_path, caplog):
    for name in ("train", "val_a", "val_b"):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} {i} and {i * i}\n" for i in range(200)))
    own = [f"{tmp_path}/val_{name}.txt" for name in "ab"]
    settings = [t for t in tiny if not t.startswith("data.files")]
    settings = [t for t in settings if not t.startswith("loader.val")]
    settings += [f"data.files={tmp_path}/train.txt", f"data.val_files=[{','.join(own)}]", "loader.val_tokens=100000"]
    folder = tmp_path / "run"
    folder.mkdir()
    loss = train(composed(*settings, "max_steps=2", "val_every=2"), folder)
    assert evaluate(judging(f"run_dir={folder}", "eval=[loss]"), tmp_path / "out") == pytest.approx(loss, abs=1e-6)
    assert list(read(tmp_path / "out", "loss")["by_source"]) == own
    caplog.clear()
    trained_on = f"eval.loss.sources={{mine: {tmp_path}/train.txt}}"
    evaluate(judging(f"run_dir={folder}", "eval=[loss]", trained_on), tmp_path / "mine")
    assert "the run was trained on this text" in caplog.text
    saved = load(folder / "config.yaml")
    given = {**saved, "data": {**saved["data"], "val_files": own[0]}}
    with pytest.raises(ConfigError, match=r"data\.val_files=.*: the run was made with"):
        merge_resumed(saved, given, [f"data.val_files={own[0]}"])


def test_an_evaluation_reads_a_validation_set_of_its_own_whole(composed, tiny, tmp_path, caplog):
    for name in ("train", "val"):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} {i} and {i * i}\n" for i in range(200)))
    settings = [t for t in tiny if not t.startswith(("data.files", "loader.val"))]
    settings += [f"data.files={tmp_path}/train.txt", f"data.val_files={tmp_path}/val.txt", "loader.val_tokens=64"]
    train(composed(*settings, "max_steps=1", "val_every=1", "callbacks.samples=null"), tmp_path / "run")
    assert "loader.val_tokens=64: each validation of the run reads so many of the set's" in caplog.text
    data = rebuild(tmp_path / "run", "last").data
    read_tokens = sum(batch["labels"].numel() for batch in data.validation_batches())
    assert data.val_tokens - 8 * 32 < read_tokens <= data.val_tokens  # whole windows of 32, in multiples of 8
    assert read_tokens > 64


def test_a_text_is_read_whole_by_default_and_by_share_1(trained, judging, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("12 plus 7 makes 19.\n" * 9)
    source = f"eval.loss.sources={{text: {text}}}"
    for share in ("null", "1"):
        settings = (source, f"eval.loss.share={share}")
        evaluate(judging(f"run_dir={trained[0]}", "eval=[loss]", *settings), tmp_path / share)
        bits, loss = (
            read(tmp_path / share, "loss")["by_source"]["text"][f"val/{n}"] for n in ("bits_per_byte", "loss")
        )
        assert loss / math.log(2) == pytest.approx(bits)  # a token per byte
    assert read(tmp_path / "1", "loss")["by_source"] == read(tmp_path / "null", "loss")["by_source"]


def test_overlapping_windows_give_the_perplexity_of_a_loop_over_transformers(trained, judging, tmp_path):
    transformers = pytest.importorskip("transformers")
    trained_model = rebuild_model(trained[0], "last")
    write_model(trained_model, tmp_path, dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} times 7 makes {7 * n}. " for n in range(9)))
    settings = (f"eval.loss.sources={{text: {text}}}", "eval.loss.stride=12")
    evaluate(judging(f"run_dir={trained[0]}", "eval=[loss]", *settings), tmp_path / "out")
    ids = torch.tensor([[256, *text.read_bytes()]])
    total, scored_to = 0.0, 1
    for begin in range(0, ids.shape[1], 12):
        window = ids[:, begin : begin + 32]
        with torch.no_grad():
            scores = theirs(input_ids=window).logits.log_softmax(-1)[0, :-1]
        losses = -scores.gather(1, window[0, 1:, None])[:, 0]
        total += float(losses[scored_to - begin - 1 :].sum())
        scored_to = begin + window.shape[1]
        if scored_to == ids.shape[1]:
            break
    found = read(tmp_path / "out", "loss")["by_source"]["text"]["val/loss"]
    assert found == pytest.approx(total / (ids.shape[1] - 1), rel=1e-5)  # fp32 in another order
    with pytest.raises(ConfigError, match=r"eval\.loss\.stride=32: must lie in \[1, context_length - 1 = 31\]"):
        evaluate(judging(f"run_dir={trained[0]}", "eval=[loss]", "eval.loss.stride=32"), tmp_path / "out")


def test_attention_is_measured_by_layer(trained, judging, tmp_path):
    evaluate(judging(f"run_dir={trained[0]}", "eval=[attention]"), tmp_path)
    layers = read(tmp_path, "attention")
    assert len(layers) == 2
    assert all(0 < layer["entropy"] < math.log(32) and 1 <= layer["effective_keys"] <= 32 for layer in layers)
    assert (tmp_path / "attention.png").stat().st_size > 1000


@pytest.mark.parametrize("position", [None, "model/position=rerope"])
def test_the_loss_over_longer_contexts_is_that_of_the_same_last_tokens(trained, judging, tmp_path, position):
    settings = ["eval.extrapolation.last=8", "eval.extrapolation.factors=[1,2,4]", "eval.extrapolation.windows=6"]
    settings += [position, "model.position.window=16"] if position else []
    evaluate(judging(f"run_dir={trained[0]}", "eval=[extrapolation]", *settings), tmp_path)
    found = read(tmp_path, "extrapolation")
    assert list(found["by_context"]) == ["32", "64", "128"]
    assert found["windows"] == 6
    assert len(found["by_position"]["loss"]) == 8


def test_experts_and_codes_are_counted_where_there_are_any(composed, tiny, judging, trained, tmp_path):
    moe = ("model=moe", "model.ffn.num_experts=4", "model/attention=vq", "model/position=rerope")
    moe += ("model.position.window=8", "model.attention.block_size=8", "model.attention.codebook.codebook_size=8")
    folder = tmp_path / "run"
    folder.mkdir()
    train(composed(*tiny, *moe, "max_steps=2", "val_every=2"), folder)
    evaluate(judging(f"run_dir={folder}", "eval=[experts,codebook]"), tmp_path)
    experts, codes = read(tmp_path, "experts"), read(tmp_path, "codebook")
    assert all(sum(layer["load"]) == pytest.approx(1) and len(layer["load"]) == 4 for layer in experts)
    assert all(0 < layer["usage"] <= 1 and 1 <= layer["perplexity"] <= 8 for layer in codes)
    for name in ("experts", "codebook"):
        with pytest.raises(ConfigError, match=f"eval={name}: the model has no {name}"):
            evaluate(judging(f"run_dir={trained[0]}", f"eval=[{name}]"), tmp_path)


@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        (("eval=[]",), r"eval=\[\]: nothing to do"),
        (("eval=[samples]", "eval.samples.temperature=-1"), "temperature=-1"),
        (("eval=[samples]", "eval.samples.prompts=[]"), "needs at least one"),
        (("eval=[extrapolation]", "eval.extrapolation.last=100"), "above context_length=32"),
        (("eval=[loss]", "eval.loss.share=1.5"), r"eval\.loss\.share=1\.5"),
        (("eval=[loss]", "average=0"), "average=0"),
    ],
)
def test_a_mistake_is_refused_by_name(trained, judging, tmp_path, settings, answer):
    with pytest.raises(ConfigError, match=answer):
        evaluate(judging(f"run_dir={trained[0]}", *settings), tmp_path)


def test_a_folder_without_a_run_is_named(judging, tmp_path):
    for setting, answer in (
        (f"run_dir={tmp_path}", "holds no config.yaml"),
        ("checkpoint=last", "neither names a run"),
    ):
        with pytest.raises(ConfigError, match=answer):
            evaluate(judging(setting, "eval=[loss]"), tmp_path)


class Words(Transformer):
    """Predicts exactly a language of eight words of two letters, each as likely, and never the end of a document."""

    def __init__(self, tokens):
        nn.Module.__init__(self)
        self.lm_head = Head(len(tokens) + 1, len(tokens) + 1, bias=False)
        self.token_embedding = nn.Embedding(len(tokens) + 1, 1)
        self.lm_head.weight.data = torch.eye(len(tokens) + 1)
        self.tokens = tokens

    def forward(self, input_ids, *, positions, document_ids):
        ids = input_ids
        hidden = torch.full((*ids.shape, len(self.tokens) + 1), -100.0)
        for place in torch.cartesian_prod(*map(torch.arange, ids.shape)).tolist():
            before = "".join(self.tokens[i] for i in ids[place[0], : place[1] + 1].tolist() if i < len(self.tokens))
            begun = before[len(before) // 2 * 2 :]  # the half of a word that is there already
            allowed = [
                i
                for i, token in enumerate(self.tokens)
                if any((begun + token) == w[: len(begun + token)] for w in WORDS)
            ]
            weights = torch.tensor([sum(w.startswith(begun + self.tokens[i]) for w in WORDS) for i in allowed]).double()
            hidden[place[0], place[1], allowed] = (weights / weights.sum()).log().float()
        return TransformerOutput(hidden=hidden, losses={}, metrics={})


WORDS = [a + b for a in "ab" for b in "cdef"]


class WordData:
    """Random words as tokens of one letter, or of a whole word."""

    def __init__(self, tokens, text):
        self.tokens, width = tokens, len(tokens[0])
        ids = [len(tokens)] + [tokens.index(text[i : i + width]) for i in range(0, len(text), width)]
        self.ids, self.bos_id, self.tokenizer = torch.tensor([ids]), len(tokens), self
        self.token_bytes = [len(token) for token in tokens] + [0]

    def validation_batches(self):
        ids = self.ids[:, :-1]
        places = torch.arange(ids.shape[1])[None]
        yield {"input_ids": ids, "labels": self.ids[:, 1:], "positions": places, "document_ids": torch.zeros_like(ids)}


@pytest.mark.parametrize("tokens", [sorted({c for word in WORDS for c in word}), WORDS], ids=["letters", "words"])
def test_bits_per_byte_of_a_known_language_do_not_depend_on_the_tokenizer(tokens):
    choices = torch.randint(8, (24,), generator=torch.Generator().manual_seed(0)).tolist()
    data = WordData(tokens, "".join(WORDS[i] for i in choices))
    objective = NextToken(vocab_size=len(tokens) + 1, bos_id=len(tokens))
    subject = Subject("known", Words(tokens), objective, data, "32-true", 32, lambda files, share: None)
    figures = HeldOutLoss(sources={}, share=None)(subject).figures
    # three bits a word of two bytes
    assert figures["val/bits_per_byte"] == pytest.approx(1.5, abs=1e-5)
    assert figures["val/loss"] == pytest.approx(3 * math.log(2) * len(tokens[0]) / 2, abs=1e-5)


def test_settings_of_extrapolation_ascend():
    with pytest.raises(ConfigError, match="must ascend"):
        Extrapolation(factors=[4, 2], last=8, windows=4)


def test_help_lists_the_options_of_evaluations_and_none_of_training():
    page = help_page(CONF, "eval")
    assert "python eval.py [key=value" in page
    assert all(f" {name} " in page for group in ("eval", "model/position") for name in options(group))
    assert "  * loss" in page
    assert "optimizer" not in page
    assert "train.py" not in page

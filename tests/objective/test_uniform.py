"""Uniform diffusion: its bound in closed form, tight at the leave-one-out prediction, and its exact reverse step."""

import itertools
import math

import numpy as np
import pytest
import torch
from objective_tables import TABLE_BOS, TABLE_VOCABULARY, window

from llm.contracts import IGNORED_LABEL
from llm.errors import ConfigError
from llm.model.transformer import TransformerOutput
from llm.objective.uniform_diffusion import MARGIN, UniformDiffusion, integrand
from llm.objective.uniform_text import CLEAN_TIME, reverse_weights
from llm.ops.noise import KeyedNoise

SIZE = 3
SAMPLING = {"temperature": 1.0, "top_k": None, "top_p": None}


def uniform(**settings):
    options = {"samples": 16, "steps": 8} | settings
    return UniformDiffusion(vocab_size=TABLE_VOCABULARY, bos_id=TABLE_BOS, **options)


def direct_integrand(p, clean, noisy, kept):
    """The sum over the vocabulary as it is defined."""
    size = len(p)
    u = 1 + kept * (size * p - 1)
    x = torch.full((size,), 1 - kept, dtype=torch.float64)
    x[clean] += size * kept
    r, r_model = x / x[noisy], u / u[noisy]
    return float((r_model - r - r * (r_model / r).log()).sum() / (size * kept))


@pytest.mark.parametrize("kept", [1e-3, 0.3, 0.999])
def test_the_closed_form_equals_the_sum_over_the_vocabulary(kept):
    scores = torch.randn(40, 7, dtype=torch.float64)
    clean, noisy = torch.randint(7, (40,)), torch.randint(7, (40,))
    found = integrand(scores, clean, noisy, torch.full((40,), kept, dtype=torch.float64))
    expected = [direct_integrand(scores[i].softmax(-1), clean[i], noisy[i], kept) for i in range(40)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-9)
    assert (found >= -1e-12).all()


def joint_of_two():
    weights = torch.rand(SIZE, SIZE, generator=torch.Generator().manual_seed(2), dtype=torch.float64) ** 2
    return weights / weights.sum()


def expected_bound(text, *, leave_one_out):
    """Integrate the bound of two tokens over levels and noisy texts, with the exact predictions of a joint."""
    joint, (nodes, weights) = joint_of_two(), np.polynomial.legendre.leggauss(60)
    total = 0.0
    for node, weight in zip(nodes, weights, strict=True):
        # nodes crowd at both ends, where the integrand is singular: t = s² (3 − 2 s)
        s = (node + 1) / 2
        t, slope = s * s * (3 - 2 * s), 6 * s * (1 - s) / 2
        kept = 1 - t
        passing = torch.full((SIZE, SIZE), t / SIZE, dtype=torch.float64) + kept * torch.eye(SIZE)
        for noisy in itertools.product(range(SIZE), repeat=2):
            chance = float(passing[text[0], noisy[0]] * passing[text[1], noisy[1]])
            seen = (joint * passing[:, noisy[1]], joint.T * passing[:, noisy[0]])
            for place in range(2):
                prediction = seen[place].sum(1)
                if not leave_one_out:
                    prediction = prediction * passing[:, noisy[place]]
                scores = (prediction / prediction.sum()).log()[None]
                one = [torch.tensor([v]) for v in (text[place], noisy[place])]
                found = integrand(scores, *one, torch.tensor([kept], dtype=torch.float64))
                total += weight * slope * chance * float(found)
    return total


@pytest.mark.parametrize("text", [(0, 1), (2, 2)])
def test_the_bound_is_tight_for_every_text_at_the_prediction_from_the_other_tokens(text):
    exact = -math.log(float(joint_of_two()[text]))
    assert expected_bound(text, leave_one_out=True) == pytest.approx(exact, abs=2e-3)


def test_at_the_posterior_the_mean_of_the_bound_is_above_the_entropy():
    joint = joint_of_two()
    texts = itertools.product(range(SIZE), repeat=2)
    mean = sum(float(joint[text]) * expected_bound(text, leave_one_out=False) for text in texts)
    assert mean > float(-(joint * joint.log()).sum()) + 0.1


def test_the_reverse_step_is_the_exact_posterior_of_the_next_level():
    kept, kept_after = 0.4, 0.7
    prior = torch.rand(SIZE, dtype=torch.float64)
    prior = prior / prior.sum()

    def passing(ratio):
        return ratio * torch.eye(SIZE, dtype=torch.float64) + (1 - ratio) / SIZE

    for noisy in range(SIZE):
        joint = prior[:, None] * passing(kept_after) * passing(kept / kept_after)[:, noisy][None]  # x, z_s
        expected = joint.sum(0) / joint.sum()
        found = reverse_weights(prior[None], torch.tensor([noisy]), kept, kept_after)[0]
        torch.testing.assert_close(found / found.sum(), expected, rtol=1e-12, atol=0)
        last = reverse_weights(prior[None], torch.tensor([noisy]), kept, 1.0)[0]
        posterior = prior * passing(kept)[:, noisy]
        torch.testing.assert_close(last / last.sum(), posterior / posterior.sum(), rtol=1e-12, atol=0)


class NoisyJoint:
    """The exact predictions, from all other noisy tokens, of a joint distribution of two tokens."""

    vocab_size = TABLE_VOCABULARY

    def __call__(self, ids, *, times, **inputs):
        kept = float(times[0, -1, 0].double().sigmoid())
        size = self.vocab_size
        joint = torch.zeros(size, size, dtype=torch.float64)
        joint[:SIZE, :SIZE] = joint_of_two()
        passing = kept * torch.eye(size, dtype=torch.float64) + (1 - kept) / size
        hidden = torch.zeros(*ids.shape, size, dtype=torch.float64)
        hidden[:, 1] = (joint @ passing[:, ids[:, 2]]).T
        hidden[:, 2] = (joint.T @ passing[:, ids[:, 1]]).T
        return TransformerOutput(hidden.log(), {}, {})

    def logits(self, hidden):
        return hidden.clone()

    def parameters(self):
        yield torch.zeros(1)


def test_many_passes_sample_the_joint_distribution_and_one_pass_its_marginals():
    count, joint = 4000, joint_of_two()

    def drawn(steps):
        options = {"max_new_tokens": 2, "steps": steps, "seed": 0} | SAMPLING
        (tokens,) = list(uniform().decode(NoisyJoint(), [[TABLE_BOS]] * count, **options))
        assert (tokens < SIZE).all()  # bos never remains
        return torch.bincount(tokens @ torch.tensor([SIZE, 1]), minlength=SIZE**2).double() / count

    def distance(shares, expected):
        return float((shares - expected.flatten()).abs().sum() / 2)

    independent = joint.sum(1)[:, None] * joint.sum(0)
    assert distance(independent.flatten(), joint) > 0.05
    # half the summed distance of 9 shares of 4000 draws from their means is about 0.012
    assert distance(drawn(64), joint) < 0.03
    assert distance(drawn(1), independent) < 0.03


def test_as_many_tokens_are_replaced_as_the_level_says_and_times_tell_it():
    tokens = torch.randint(0, 3, (1, 2001)).tolist()[0]
    batch = {name: value.expand(8, -1) for name, value in window(tokens).items()}
    noise = KeyedNoise(0, 0, torch.arange(8))
    prepared = uniform().prepare(None, batch, noise)
    kept = prepared.targets["kept"][:, 0]
    torch.testing.assert_close(1 - kept, MARGIN + (1 - 2 * MARGIN) * noise.levels()[:, 0])
    changed = (prepared.inputs["input_ids"] != batch["input_ids"])[:, 1:].double().mean(1)
    # a replacement is another token three times of four; the deviation of 2000 draws is 0.01
    torch.testing.assert_close(changed, 0.75 * (1 - kept), rtol=0, atol=0.045)
    times = prepared.inputs["times"][..., 0]
    assert (times[:, 0] == CLEAN_TIME).all()
    torch.testing.assert_close(times[:, 1].double().sigmoid(), kept, rtol=1e-4, atol=1e-6)
    assert (times[:, 1:] < CLEAN_TIME).all()


def test_ignored_tokens_have_no_loss():
    scores, kept = torch.randn(3, 5), torch.full((3,), 0.5)
    found = integrand(scores, torch.tensor([1, IGNORED_LABEL, 2]), torch.tensor([0, 4, 2]), kept)
    assert found[1] == 0
    assert (found[[0, 2]] > 0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps=0: must be at least 1"),
        ({"repetition_penalty": 1.2}, r"repetition_penalty=1\.2: objective=uniform draws tokens in no fixed order"),
        ({"use_cache": False}, "use_cache=false: objective=uniform reads the whole text"),
    ],
)
def test_decoding_refuses_settings_without_a_meaning(settings, message):
    options = {"steps": None, "seed": 0} | SAMPLING | settings
    with pytest.raises(ConfigError, match=message):
        uniform().decode(NoisyJoint(), [[TABLE_BOS]], max_new_tokens=2, **options)

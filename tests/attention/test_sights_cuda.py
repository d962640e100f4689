"""The kernels that a CUDA device takes for sights other than causal, as far as a CPU can run them."""

import pytest
import torch
import torch.nn.functional as F

from llm.contracts import Sight
from llm.model.attention.kernels import cuda, reference_attention, sighted_attention
from llm.model.attention.kernels.key_spans import key_spans

TWO_SIDED = Sight("bidirectional")


def inputs(time, dtype=torch.float32):
    return tuple(torch.randn(2, time, heads, 16).to(dtype) for heads in (4, 2, 2))


def options(sight, time, documents):
    """Arguments of a sight over `time` keys; rows of two documents, or of one."""
    half = time // 2 if sight.kind == "block_pair" else time
    starts = torch.arange(half) >= (13 if documents else half)
    positions = torch.where(starts, torch.arange(half) - 13, torch.arange(half)).repeat(time // half).expand(2, -1)
    ids = starts.long().repeat(time // half).expand(2, -1) if documents else None
    return {"positions": positions, "document_ids": ids, "window": None}


def on_cuda(q, k, v, sight, given, return_lse=False):
    spans = key_spans(sight, time=q.shape[1], time_k=k.shape[1], **given)
    kept = {name: given[name] for name in ("document_ids", "window")}
    out, lse = cuda.sighted_cuda_attention(q, k, v, sight=sight, spans=spans, scale=0.25, **kept, return_lse=return_lse)
    return (out, lse) if return_lse else out


def dense_flex():
    """Return an attention and a mask builder with the whole mask in memory; the compiler refuses type checks."""

    def build_mask(visible, rows, _, time, time_k, *, device):
        return torch.stack(
            [
                torch.stack([torch.stack([visible(r, 0, i, j) for j in torch.arange(time_k)]) for i in range(time)])
                for r in range(rows or 1)
            ]
        )

    def attend(q, k, v, *, block_mask, scale, enable_gqa, return_lse):
        mask = block_mask[:, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
        if not return_lse:
            return out
        keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = (q @ keys.mT * scale).masked_fill(~mask, -torch.inf)
        return out, scores.logsumexp(-1)

    return attend, build_mask


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("sight", [TWO_SIDED, Sight("block", 4), Sight("block_pair", 4)], ids=str)
def test_flex_attention_reads_the_spans(sight, documents, monkeypatch):
    monkeypatch.setattr(cuda, "compiled_flex", dense_flex)
    q, k, v = inputs(32)
    given = options(sight, 32, documents)
    expected = reference_attention(q, k, v, sight=sight, scale=0.25, **given)
    torch.testing.assert_close(on_cuda(q, k, v, sight, given), expected, atol=1e-5, rtol=1e-4)
    out, lse = on_cuda(q, k, v, sight, given, return_lse=True)
    _, expected_lse = reference_attention(q, k, v, sight=sight, scale=0.25, **given, return_lse=True)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-4)


def test_whole_rows_take_sdpa_without_a_mask_and_documents_a_two_sided_window(monkeypatch):
    q, k, v = inputs(20)
    given = options(TWO_SIDED, 20, documents=False)
    expected = reference_attention(q, k, v, sight=TWO_SIDED, scale=0.25, **given)
    torch.testing.assert_close(on_cuda(q, k, v, TWO_SIDED, given), expected, atol=1e-5, rtol=1e-4)
    seen = []

    def kernel(q, k, v, starts, ends, longest, longest_k, **settings):
        seen.append((starts.unique().tolist(), settings["window_size"]))
        return q

    monkeypatch.setattr(cuda, "varlen_kernel", lambda: kernel)
    monkeypatch.setattr(cuda, "can_use_varlen", lambda q, v, ids: True)
    given = options(TWO_SIDED, 20, documents=True)
    on_cuda(q, k, v, TWO_SIDED, given)
    on_cuda(q, k, v, TWO_SIDED, given | {"window": 5})
    assert seen == [([0, 13, 20, 33, 40], (-1, -1)), ([0, 13, 20, 33, 40], (4, 4))]


@pytest.mark.parametrize("documents_per_row", [1, 2, 5, 16])
def test_the_sequences_of_flash_attention_are_the_documents_padded_to_a_power_of_two(documents_per_row, monkeypatch):
    rows, time = 3, 64
    q = torch.randn(rows, time, 2, 16)
    ids = (torch.arange(time) * documents_per_row // time).expand(rows, -1).contiguous()
    seen = []
    monkeypatch.setattr(cuda, "varlen_kernel", lambda: lambda q, k, v, offsets, *_, **__: seen.append(offsets) or q)
    monkeypatch.setattr(cuda, "can_use_varlen", lambda q, v, ids: True)
    for _ in range(2):  # two layers
        cuda.cuda_attention(q, q, q, document_ids=ids, scale=0.25, window=None, return_lse=False)
    documents = rows * documents_per_row
    assert len(seen[0]) - 1 == 2 ** (documents - 1).bit_length()
    assert seen[0].unique().tolist() == [*(-(-time * i // documents_per_row) for i in range(documents)), rows * time]
    assert seen[1] is seen[0]  # counted once per batch
    cuda.cuda_attention(q, q, q, document_ids=None, scale=0.25, window=8, return_lse=False)
    assert seen[2].tolist() == [0, 64, 128, 192]


def test_a_block_mask_is_made_once_per_batch_and_window(monkeypatch):
    made = []
    monkeypatch.setattr(cuda, "compiled_flex", lambda: (lambda q, k, v, **_: q, lambda *a, **_: made.append(a) or a))
    q = torch.randn(2, 32, 2, 16)

    def layers(ids, *windows):
        made.clear()
        for window in windows:
            cuda.flex(q, q, q, document_ids=ids, scale=0.25, window=window, return_lse=False)
        return len(made)

    ids = torch.zeros(2, 32, dtype=torch.long)
    assert layers(ids, None, 4, None, 4) == 2
    assert layers(ids.clone(), None, None) == 1
    ids[:, 9:] = 1
    assert layers(ids, 4, 4) == 1  # changed in place


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("sight", [TWO_SIDED, Sight("block", 4), Sight("block_pair", 4)], ids=str)
def test_a_gpu_equals_the_definition(sight, documents, dtype):
    q, k, v = inputs(80, dtype)
    given = options(sight, 80, documents)
    expected = reference_attention(*(x.float() for x in (q, k, v)), sight=sight, scale=0.25, **given)
    placed = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    found = sighted_attention(q.cuda(), k.cuda(), v.cuda(), sight=sight, scale=0.25, **placed)
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if dtype == torch.bfloat16 else {"atol": 1e-4, "rtol": 1e-3}
    torch.testing.assert_close(found.float().cpu(), expected, **tolerance)

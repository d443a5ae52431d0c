import pytest
import torch
from torch.nn import functional

from copydesk.attention import PaddedAttention, attend, attend_rows

LENGTHS = [3, 3, 1, 300, 7, 7]


def make_inputs(*shape: int) -> list[torch.Tensor]:
    return list(torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).unbind())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "tokens"), [(3, 1), (3, 7), (0, 7), (3, 0), (3, 48), (3, 300), (2, 1_030)])
def test_attention_is_that_of_pytorch_and_so_are_its_gradients(dtype, rows, tokens):
    inputs = [tensor.to(dtype) for tensor in make_inputs(rows, 16, tokens, 8)]
    answers = []
    for attention, precision in ((attend, dtype), (functional.scaled_dot_product_attention, torch.float32)):
        learning = [tensor.to(precision, copy=True).requires_grad_() for tensor in inputs]
        answer = attention(*learning)
        gradients = torch.autograd.grad(answer.float().square().sum(), learning)
        answers.append([tensor.float() for tensor in (answer, *gradients)])

    rtol, atol = (1e-4, 1e-5) if dtype == torch.float32 else (2e-2, 3e-2)  # eight bits
    torch.testing.assert_close(*answers, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [7, 191, 1_030])
def test_attention_that_is_only_read_is_pytorchs_own(dtype, tokens):
    inputs = [tensor.to(dtype) for tensor in make_inputs(5, 2, tokens, 8)]
    expected = functional.scaled_dot_product_attention(*inputs)
    with torch.inference_mode():
        assert torch.equal(attend(*inputs, torch.bfloat16), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_rows_that_are_only_read_may_be_multiplied_in_bfloat16(dtype):
    inputs = make_inputs(3, 2, 800, 8)  # more scores than are computed at once
    expected = functional.scaled_dot_product_attention(*inputs)
    with torch.inference_mode():
        found = attend(*(tensor.to(dtype) for tensor in inputs), torch.bfloat16)
        alone = attend(*(tensor[1:2].to(dtype) for tensor in inputs), torch.bfloat16)

    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)
    assert not torch.equal(found.float(), expected)
    assert torch.equal(alone, found[1:2])


def expected_of(inputs: list[torch.Tensor]) -> torch.Tensor:
    rows = zip(*(tensor.split(LENGTHS) for tensor in inputs), strict=True)
    attended = [functional.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in row))[0] for row in rows]
    return torch.cat([row.transpose(0, 1) for row in attended])


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_each_row_attends_to_its_own_tokens_alone(learns, padded):
    inputs = [tensor.requires_grad_(learns) for tensor in make_inputs(sum(LENGTHS), 2, 8)]
    attention = PaddedAttention(torch.tensor(LENGTHS), torch.device("cpu"))
    with torch.set_grad_enabled(learns):
        found = attention(*inputs) if padded else attend_rows(*inputs, LENGTHS)

    expected = expected_of(inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    if learns:
        gradients = [torch.autograd.grad(answer.square().sum(), inputs) for answer in (found, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)

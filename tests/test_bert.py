import copy

import pytest
import torch
from torch.nn import functional
from transformers import BertConfig, BertModel

from copydesk.bert import Bert, BertSettings, attend

CONFIG = BertConfig(
    vocab_size=40,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=16,
    layer_norm_eps=1e-3,
)


@pytest.fixture(scope="module")
def pair() -> tuple[Bert, BertModel]:
    """Build transformers' model with random weights, and ours with the same ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = BertModel(CONFIG, add_pooling_layer=False).eval()
    for weight in theirs.parameters():
        weight.data += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))
    settings = BertSettings.read(CONFIG.to_dict())
    assert settings is not None
    ours = Bert(settings)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("padded", [False, True])
def test_hidden_states_and_gradients_are_those_of_transformers(pair, padded):
    ids = torch.randint(1, 40, (5, 16), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([16, 1, 7, 15, 3])
    mask = (torch.arange(16) < lengths[:, None]).long() if padded else None
    weights = []
    hidden = []
    for model in pair:
        model.zero_grad()
        read = model(input_ids=ids, attention_mask=mask).last_hidden_state
        read = read if mask is None else read * mask[..., None]
        read.square().sum().backward()
        hidden.append(read)
        weights.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})

    torch.testing.assert_close(*hidden, rtol=1e-5, atol=1e-5)
    assert weights[0].keys() == weights[1].keys()
    for name, gradient in weights[0].items():
        torch.testing.assert_close(gradient, weights[1][name], rtol=1e-3, atol=1e-3)


def test_bfloat16_is_multiplied_in_few_numbers_of_rows_whatever_the_texts(pair):
    ours, theirs = (copy.deepcopy(model).to(torch.bfloat16) for model in pair)
    rows: set[int] = set()
    for module in ours.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: rows.add(len(inputs[0])))

    for shape in ((1, 1), (5, 13), (8, 8), (9, 15)):
        ids = torch.randint(1, 40, shape, generator=torch.Generator().manual_seed(0))
        found, expected = (model(input_ids=ids).last_hidden_state for model in (ours, theirs))
        assert found.shape == (*shape, 32)
        assert torch.allclose(found.float(), expected.float(), atol=0.1)
    assert rows == {64, 128, 192}


def test_settings_left_out_are_what_transformers_takes_them_for():
    settings = BertSettings.read({"model_type": "bert"})
    assert settings is not None

    assert BertSettings.read(BertConfig().to_dict()) == settings


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "roberta"},
        {"hidden_act": "relu"},
        {"is_decoder": True},
        {"position_embedding_type": "relative_key"},
        {"hidden_size": "wide"},
    ],
)
def test_what_bert_is_not_is_left_to_transformers(change):
    assert BertSettings.read(CONFIG.to_dict() | change) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7, 300])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_that_of_pytorch_and_so_are_its_gradients(dtype, tokens, masked):
    random = torch.Generator().manual_seed(0)
    inputs = [torch.randn(3, 2, tokens, 8, generator=random).to(dtype) for _ in range(3)]
    mask = (torch.arange(tokens) < torch.tensor([1, 5, 300])[:, None])[:, None, None] if masked else None
    answers = []
    for attention, precision in ((attend, dtype), (functional.scaled_dot_product_attention, torch.float32)):
        learning = [tensor.to(precision, copy=True).requires_grad_() for tensor in inputs]
        answer = attention(*learning, mask)
        gradients = torch.autograd.grad(answer.float().square().sum(), learning)
        answers.append([tensor.float() for tensor in (answer, *gradients)])

    rtol, atol = (1e-4, 1e-5) if dtype == torch.float32 else (2e-2, 3e-2)  # eight bits
    torch.testing.assert_close(*answers, rtol=rtol, atol=atol)


def test_attention_that_is_only_read_is_pytorchs_own():
    inputs = torch.randn(3, 5, 2, 7, 8, generator=torch.Generator().manual_seed(0)).unbind()
    expected = functional.scaled_dot_product_attention(*inputs)
    with torch.inference_mode():
        assert torch.equal(attend(*inputs), expected)

import copy

import pytest
import torch
from transformers import BertConfig, BertModel

from copydesk.bert import Bert, BertSettings
from copydesk.ragged import TokenRows

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


def make_rows(*lengths: int) -> TokenRows:
    random = torch.Generator().manual_seed(0)
    return TokenRows.of([torch.randint(1, 40, (length,), generator=random).tolist() for length in lengths])


def hidden_of(model: Bert | BertModel, rows: TokenRows) -> torch.Tensor:
    if isinstance(model, Bert):
        return model(rows)
    ids, mask = rows.padded(0)
    return model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]


def test_hidden_states_and_gradients_are_those_of_transformers(pair):
    weights = []
    hidden = []
    for model in pair:
        model.zero_grad()
        hidden.append(hidden_of(model, make_rows(16, 1, 7, 7, 15, 3)))
        hidden[-1].square().sum().backward()
        weights.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})

    torch.testing.assert_close(*hidden, rtol=1e-5, atol=1e-5)
    assert weights[0].keys() == weights[1].keys()
    for name, gradient in weights[0].items():
        torch.testing.assert_close(gradient, weights[1][name], rtol=1e-3, atol=1e-3)


def test_in_bfloat16_hidden_states_are_nearly_those_of_transformers(pair):
    ours, theirs = (copy.deepcopy(model).to(torch.bfloat16) for model in pair)

    for lengths in ([1], [13] * 5, [8] * 8, [15, 9, 16, 16, 16, 16, 16, 16, 15]):
        rows = make_rows(*lengths)
        found, expected = (hidden_of(model, rows) for model in (ours, theirs))
        assert found.shape == (sum(lengths), 32)
        assert torch.allclose(found.float(), expected.float(), atol=0.1)


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

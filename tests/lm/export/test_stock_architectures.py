from __future__ import annotations

import pytest

from data_prep.errors import UserError
from lm.export.checkpoint_config import read_config, with_defaults
from lm.export.stock_architectures import STOCK_CLASSES, stock_class, stock_config, weight_names
from lm.model.transformer import Transformer


def test_every_weight_has_a_name_and_none_has_two(small):
    for changes in ({}, {"qk_norm": True, "tie_embeddings": False}):
        model = Transformer(small.replace(vocab_size=300, **changes).model)
        names = weight_names(model.config)
        assert names.keys() == model.state_dict().keys()
        assert len(set(names.values())) == len(names)


def test_a_config_is_read_back_as_the_shape_it_was_made_from(small, dataset):
    for stock in STOCK_CLASSES:
        config = small.replace(vocab_size=400, qk_norm=stock.qk_norm, head_size=20, rope_theta=123.0)
        shape, context, found = read_config(with_defaults(stock_config(config, dataset.tokenizer, stock)))
        assert context == config.data.context_length
        assert found is stock
        assert (shape.head_size, shape.rope_theta, shape.qk_norm) == (20, 123.0, stock.qk_norm)
        assert shape.feed_forward_size == config.model.feed_forward_width


@pytest.mark.parametrize(
    ("changes", "readout", "words"),
    [
        ({"activation": "relu2"}, "next_token", "the activation relu2"),
        ({"logit_softcap": 15.0}, "next_token", "logit_softcap 15"),
        ({"qk_norm": True}, "masked_token", "qk_norm in a masked model"),
        ({"qk_norm": True}, "masked_next_token", "qk_norm in a masked model"),
        ({"activation": "relu2", "logit_softcap": 5.0}, "next_token", "relu2 .*; nor logit_softcap 5"),
    ],
)
def test_what_no_stock_class_supports_is_refused_with_its_reason(small, changes, readout, words):
    with pytest.raises(UserError, match=words):
        stock_class(small.replace(**changes).model, readout)

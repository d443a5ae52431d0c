"""What every part of the measurement is given: the model, sizes, repeats, and the same encoder as others load it."""

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from copydesk.saved import load_saved

ROOT = Path(__file__).parents[2]
DROPOUT = 0.1
"""What BERT-like encoders, all-MiniLM-L6-v2 among them, are published with."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    pages: int = 32
    """Pages that are read."""
    training_pages: int = 24
    articles: int = 48
    """Articles of 512 tokens that are learnt from."""
    tried_sections: int = 512
    """Sections by which the others' best batch size is chosen."""
    composed: int = 528
    """Different pages that are streamed, with variation, again and again."""
    streamed: tuple[int, ...] = (100, 316, 1_000, 3_162, 10_000)
    """Numbers of pages after which time and memory are noted."""
    lengths: tuple[int, ...] = (1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 64_000)
    """Tokens of single pages."""
    matrices: tuple[int, ...] = (1_024, 2_048, 4_096)
    """Sizes of the matrices whose product gives the peak."""
    peak_seconds: float = 0.5
    """For each of them."""


QUICK = Sizes(
    pages=2,
    training_pages=2,
    articles=2,
    tried_sections=8,
    composed=2,
    streamed=(4, 16, 32),
    lengths=(250, 500, 1_000),
    matrices=(128,),
    peak_seconds=0.01,
)


@dataclass(frozen=True, slots=True)
class Setup:
    """What a part is given."""

    model: str
    """Our model folder."""
    folder: Path
    """For files that last as long as the measurement."""
    sizes: Sizes
    repeats: int

    @property
    def stock(self) -> str:
        """The folder of the model's text encoder as transformers saves it."""
        return str(self.folder / "stock")


def save_stock(setup: Setup) -> None:
    """Write the model's text encoder, in float32 and with dropout, and its tokenizer, for others to load.

    Raises:
        ModelError, EncoderError: the model folder cannot be used.
    """
    saved = load_saved(setup.model)
    dropout = {"hidden_dropout_prob": DROPOUT, "attention_probs_dropout_prob": DROPOUT}
    encoder = AutoModel.from_config(AutoConfig.for_model(**saved.model.shape.encoder | dropout))
    encoder.load_state_dict(saved.model.encoder.state_dict(), strict=False)  # ours lacks the pooler, which is not read
    encoder.save_pretrained(setup.stock)
    PreTrainedTokenizerFast(
        tokenizer_object=saved.tokenizer,
        pad_token=saved.tokenizer.id_to_token(encoder.config.pad_token_id or 0),
        model_max_length=encoder.config.max_position_embeddings,
    ).save_pretrained(setup.stock)

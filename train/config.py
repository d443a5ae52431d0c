"""What an experiment is: a frozen, validated `Experiment`.

Knows every setting, its type and its meaning; knows nothing of files or of what is done with it. Top keys are stage
names.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from copydesk.encode import Encoding
from copydesk.encoder import MINILM
from copydesk.network import PageShape


class Part(BaseModel):
    """A group of settings: closed, frozen, documented."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


Seed: TypeAlias = Annotated[int, Field(ge=0, lt=2**32)]
"""As numpy takes one."""


class PageSource(Part):
    """Annotated web pages: stand-off labels joined with the pages that they are about."""

    name: str
    """Name in reports and slices."""
    annotations: Path
    """JSON lines as `data/README.md` describes them."""
    folder: Path
    """Folder in which each annotation's page is looked for, as NAME of SOURCE/NAME with
    `.html.gz`, `.html`, `.txt` or `.txt.gz`, else as its `file`."""
    only_evaluate: bool = False
    """What would train is left out; validation and test are those that they are without this."""


class NewsroomSource(Part):
    """Pages composed from the newsroom corpus, as `data/newsroom/README.md` describes it."""

    name: str
    """Name in reports and slices."""
    newsroom: Path
    """Folder of the corpus."""
    num_pages: PositiveInt
    """Pages to compose; each site and each of its articles in turn."""
    languages: list[str] | None = None
    """ISO 639 codes of the sites that are composed; null: all."""
    only_train: bool = False
    """All pages train. Else they are split by groups of sites, each with families of paywall and sponsored text of its
    own."""
    seed: Seed = 0


class ArticleSource(Part):
    """Topic-labelled articles: JSON lines, Parquet or a hub data set."""

    name: str
    """Name in reports and slices."""
    path: str
    """A `.jsonl`, `.jsonl.gz` or `.parquet` file, else the id of a hub data set."""
    hub_config: str | None = None
    """Configuration of the hub data set."""
    hub_split: str = "train"
    """Split of the hub data set."""
    id_column: str | None = "id"
    """Null: rows are numbered."""
    title_column: str | None = "title"
    text_column: str = "text"
    labels_column: str = "topics"
    """A label or a list of labels a row."""
    url_column: str | None = "url"
    publisher_column: str | None = None
    """Column that names the publisher of rows without an address."""
    sites: dict[str, str] = {}
    """Site of each publisher, for rows without an address; one not listed is a site of its own."""
    label_map: Path | None = None
    """YAML or JSON: label → topic ids. Null: the labels are topic ids."""
    decidable: list[str] | Literal["all"] = "all"
    """Topics that this source can decide at all: of the others an absent label is unknown, not negative."""
    only_positive: bool = False
    """An absent label says nothing even of decidable topics (publishers' own sections, mostly one a row)."""
    weak: bool = False
    """Labels come from a rule, not a judge: a judged copy of the same article wins."""
    language: str = "en"
    max_tokens: PositiveInt | None = None
    """Take a random part of about this many tokens (a quarter of the characters)."""
    only_evaluate: bool = False
    """What would train is left out; validation and test are those that they are without this."""


class Prepare(Part):
    """Stage 1: sources → deduplicated, site-disjoint splits."""

    topics: Path
    """The topic list."""
    pages: list[PageSource | NewsroomSource]
    articles: list[ArticleSource] = []
    site_aliases: dict[str, str] = {}
    """Sites of one publisher that must not be parted: alias → site."""
    test_fraction: float = Field(gt=0, lt=1)
    """Share of the rows, sites being whole."""
    num_folds: int = Field(ge=2)
    """Site-disjoint folds of what is not test; fold 0 is validation."""
    large_site_rows: PositiveInt = 300
    """A site with more rows is always trained on."""
    near_duplicate_similarity: float = Field(default=0.8, gt=0, le=1)
    """Jaccard similarity of word 5-grams from which two articles are one."""
    seed: Seed = 0


class TransformerFit(Part):
    """Stage 2 with a transformer."""

    kind: Literal["transformer"]
    encoder: str = MINILM
    """A local folder or a hub id."""
    encoder_layers: NonNegativeInt | None = None
    """Layers of the encoder that are kept, the lowest ones; null keeps all, 0 its word vectors alone."""
    tuning: Literal["full", "lora", "heads"] = "full"
    """What of the encoder learns: all but the embeddings, low-rank updates of its linear layers, or nothing."""
    lora_rank: PositiveInt = 16
    frozen_layers: NonNegativeInt = 0
    """The encoder's lowest layers that do not learn: cheaper to train and to store."""
    encoding: Encoding = Encoding()
    min_hint_sites: PositiveInt = 3
    """Tags, class words and link words are hints if at least so many training sites use them: those of one site teach
    nothing of others."""
    network: PageShape = PageShape()
    warm_up_epochs: NonNegativeInt = 0
    """Epochs in which the page encoder and the heads learn alone, on fixed vectors of the pretrained encoder, before
    all learn together (linear probing, then fine-tuning: arXiv:2202.10054). Cheap: the texts are encoded once."""
    warm_up_learning_rate: PositiveFloat = 1e-3
    """Peak rate of these epochs."""
    epochs: PositiveInt
    tokens_per_batch: PositiveInt = 12_000
    """Tokens of sections in one step, over all processes."""
    learning_rate: PositiveFloat
    """Peak rate of the encoder, reached when warm-up ends."""
    head_learning_rate: PositiveFloat
    """Peak rate of all that is not pretrained."""
    weight_decay: float = Field(default=0.01, ge=0)
    warmup_fraction: float = Field(default=0.06, ge=0, le=1)
    """Share of all steps spent warming up."""
    class_weight_power: float = Field(ge=0, le=1)
    """How rare section labels are made to count: each by the inverse of its share of the sections to this power."""
    consistency_weight: float = Field(default=0.0, ge=0)
    """Weight, beside the section loss, of how far what is said of a section differs between readings of its page with
    other hints left out (R-Drop, arXiv:2106.14448). Above 0 each page encoder reads each page twice."""
    own_text_weight: float = Field(default=0.0, ge=0)
    """Weight, beside the section loss, of what is lost on the sections' own text; needs `network.own_text_readers`."""
    page_share: dict[str, Annotated[float, Field(gt=0, le=1)]] = {}
    """Page source → share of its training pages drawn in each epoch, where not all are."""
    cleaned_share: float = Field(default=0.0, ge=0, le=1)
    """Share of these pages that an epoch also shows as texts which somebody else has cleaned: with little boilerplate
    or none, some of them a beginning only."""
    topic_weight: float = Field(default=1.0, ge=0)
    """Weight of the topic loss beside the section loss."""
    hint_dropout: float = Field(default=0.3, ge=0, le=1)
    """Share of training pages that are read as if they were plain text."""
    attribute_hint_dropout: float = Field(default=0.2, ge=0, le=1)
    """Share of training pages of which only the tags are hinted, neither class names nor links."""
    hint_word_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the single hints that are left out of the other training pages."""
    spacing_dropout: float = Field(default=0.5, ge=0, le=1)
    """Share of the readings as plain text that have no blank lines between their lines."""
    patience: PositiveInt = 2
    """Epochs without a better validation score after which training ends."""
    checkpoint_steps: PositiveInt = 100
    """Steps between checkpoints, from which `--resume` continues; each epoch ends with one too."""
    out_of_fold_epochs: NonNegativeInt = 0
    """Epochs of the models that score the other folds for thresholds and temperatures; 0: none does."""
    folds_at_once: PositiveInt = 2
    """Folds that one of those models leaves out."""
    refit: bool = False
    """Train once more, on training and validation pages together, when all is chosen: the model to ship, `models/NAME/
    refit`. Temperatures and thresholds are those of the model before, and only test can say how good it is."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto` takes bfloat16 where the processor multiplies it natively."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: Seed = 0

    @property
    def num_views(self) -> int:
        """How many times a page is read in a step, each time with other hints left out."""
        return self.network.page_encoders * (2 if self.consistency_weight else 1)

    @model_validator(mode="after")
    def _reads_own_text_to_learn_from(self) -> "TransformerFit":
        if self.own_text_weight and not self.network.own_text_readers:
            raise ValueError(
                f"own_text_weight is {self.own_text_weight}, network.own_text_readers is 0: set it to 1, say, or the "
                "weight to 0"
            )
        return self

    @model_validator(mode="after")
    def _keeps_layers_to_freeze(self) -> "TransformerFit":
        kept = self.encoder_layers
        if kept is not None and self.frozen_layers > kept:
            raise ValueError(f"frozen_layers is {self.frozen_layers}, encoder_layers keeps only {kept}")
        if kept == 0 and self.tuning == "lora":
            raise ValueError("encoder_layers is 0, which leaves nothing to adapt: set tuning to full")
        return self

    @model_validator(mode="after")
    def _page_width_fits_its_heads(self) -> "TransformerFit":
        width = self.network.page_width
        if self.network.page_layers and width % 64:
            raise ValueError(f"network.page_width is {width}, expected a multiple of 64")
        return self


class BaselineFit(Part):
    """Stage 2 with scikit-learn: TF-IDF and section features into logistic regression."""

    kind: Literal["baseline"]
    max_text_features: PositiveInt = 50_000
    """Size of the vocabulary of words and word pairs."""
    inverse_regularisation: PositiveFloat = 1.0
    """`C` of the logistic regressions."""
    class_weights: Literal["none", "balanced"] = "none"
    seed: Seed = 0


class Release(Part):
    """Stage 3: calibration, thresholds, the model folder and its card."""

    name: str = "copydesk"
    """Name in the model folder and in the registry."""
    license: str = "apache-2.0"
    """Of the model, in its card, as the Hugging Face hub names it."""
    languages: list[str] = ["en"]
    """What the model is made for, in its card: ISO 639 codes."""
    weights: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the stored weights."""
    min_topic_positives: PositiveInt = 20
    """Topics with fewer positives share one threshold."""
    register_model: bool = True
    """Register in MLflow with the alias `challenger`."""


class Evaluate(Part):
    """Stage 4: scores of the released folder."""

    split: Literal["validation", "test"] = "validation"
    """Test is read only when a model is released."""
    bootstrap_samples: PositiveInt = 1_000
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: Seed = 0


class Range(Part):
    """Values between two ends, both included: whole numbers where the setting is one."""

    low: int | float
    high: int | float
    log: bool = False
    """Drawn evenly on a logarithmic scale."""

    @model_validator(mode="after")
    def _has_an_inside(self) -> "Range":
        if self.low >= self.high:
            raise ValueError("low must be less than high")
        if self.log and self.low <= 0:
            raise ValueError("low must be above 0 on a logarithmic scale")
        return self

    @property
    def ends(self) -> list[int | float]:
        """The values that are possible if all are."""
        return [self.low, self.high]


class Choices(Part):
    """Some values."""

    choices: list[bool | int | float | str | None] = Field(min_length=2)

    @property
    def ends(self) -> list[bool | int | float | str | None]:
        """The values that are possible if all are."""
        return self.choices


def _kind_of_space(value: Any) -> str:
    given = value.keys() if isinstance(value, dict) else [type(value).__name__.lower()]
    return "choices" if "choices" in given else "range"


Space = Annotated[Annotated[Range, Tag("range")] | Annotated[Choices, Tag("choices")], Discriminator(_kind_of_space)]


class Sweep(Part):
    """What `train.sweep` searches. No stage reads it."""

    settings: dict[str, Space] = Field(min_length=1)
    """Dotted name of a setting of fit or release → {low, high, log} or {choices}."""
    startup_trials: PositiveInt = 5
    """Trials drawn at random, and finished before one is pruned, before the search learns from them."""
    seed: Seed = 0


_NOT_SWEPT = ("fit.kind", "fit.refit", "release.name", "release.register_model")


class Experiment(Part):
    """All settings of one experiment."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    """Names the folders `data/prepared/NAME` and `models/NAME` and the MLflow runs."""
    prepare: Prepare
    fit: Annotated[TransformerFit | BaselineFit, Field(discriminator="kind")]
    release: Release = Release()
    evaluate: Evaluate = Evaluate()
    sweep: Sweep | None = None

    @field_validator("name")
    @classmethod
    def _is_not_the_published_model(cls, name: str) -> str:
        if name == "released":
            raise ValueError("models/released is the published model: give the experiment another name")
        return name

    @model_validator(mode="after")
    def _shares_name_sources(self) -> "Experiment":
        named = {source.name for source in self.prepare.pages}
        if isinstance(self.fit, TransformerFit) and (unknown := set(self.fit.page_share) - named):
            raise ValueError(
                f"fit.page_share names {sorted(unknown)}, expected some of the page sources {sorted(named)}"
            )
        return self

    @model_validator(mode="after")
    def _sweep_is_possible(self) -> "Experiment":
        searched = self.sweep.settings if self.sweep else {}
        if faults := [fault for name, space in searched.items() for fault in _faults_of_space(self, name, space)]:
            raise ValueError("sweep.settings cannot be searched: " + "; ".join(faults))
        return self

    @property
    def is_refit(self) -> bool:
        """Tell whether validation pages train, too."""
        return isinstance(self.fit, TransformerFit) and self.fit.refit

    @property
    def learnt(self) -> list[str]:
        """Splits that train."""
        return ["train", "validation"] if self.is_refit else ["train"]

    @property
    def title(self) -> str:
        """Name of its MLflow run."""
        return f"{self.name}-refit" if self.is_refit else self.name

    @property
    def prepared(self) -> Path:
        """Folder of the prepared splits."""
        return Path("data/prepared") / self.name

    @property
    def folder(self) -> Path:
        """Folder of all that is made of the prepared splits."""
        return Path("models") / self.name / ("refit" if self.is_refit else "")

    @property
    def before_refit(self) -> "Experiment":
        """The same without the refit."""
        return Experiment.model_validate(with_settings(self, {"fit.refit": False}))

    @property
    def fitted(self) -> Path:
        """Folder of checkpoints and of the best weights."""
        return self.folder / "fit"

    @property
    def released(self) -> Path:
        """The finished model folder."""
        return self.folder / "release"

    @property
    def evaluated(self) -> Path:
        """Folder of scores and figures."""
        return self.folder / "evaluation"


class Trial(Experiment):
    """One of several experiments on the same prepared splits, as `train.sweep` runs them."""

    trial: str = Field(pattern=r"^[a-z]+-[0-9]+$")
    """Names its folder and its MLflow run, beside the experiment's name."""
    parent: str = Field(exclude=True)
    """Journal of the MLflow run under which it stands."""

    @property
    def title(self) -> str:
        """Name of its MLflow run."""
        return f"{self.name}-{self.trial}"

    @property
    def folder(self) -> Path:
        """Folder of all that is made of the prepared splits."""
        return Path("models") / self.name / "sweep" / self.trial


def with_settings(experiment: Experiment, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a config without a sweep, with other values of the settings of these dotted names."""
    content: dict[str, Any] = experiment.model_dump(mode="json", exclude={"sweep"})
    for name, value in values.items():
        *parents, last = name.split(".")
        group = content
        for parent in parents:
            group = group[parent]
        group[last] = value
    return content


def value_of(experiment: Experiment, name: str) -> Any:
    """Return the value of a setting.

    Raises:
        KeyError: there is no setting of this dotted name.
    """
    value: Any = experiment.model_dump(mode="json")
    for part in name.split("."):
        if not isinstance(value, dict):
            raise KeyError(name)
        value = value[part]
    return value


def _faults_of_space(experiment: Experiment, name: str, space: Range | Choices) -> list[str]:
    """Say what of a search space is no setting, or no value that it can have."""
    try:
        value = value_of(experiment, name)
    except KeyError:
        return [f"{name} is no setting of this experiment"]
    if not name.startswith(("fit.", "release.")) or name in _NOT_SWEPT:
        return [f"{name} is the same for all trials: search settings of fit and release, {', '.join(_NOT_SWEPT)} apart"]
    if isinstance(space, Range):
        if isinstance(value, bool) or not isinstance(value, int | float):
            return [f"{name} is {value!r}, which is no number: give choices"]
        if isinstance(value, int) and not all(isinstance(end, int) for end in space.ends):
            return [f"{name} is a whole number, got ends {space.low} and {space.high}"]
    faults = []
    for end in space.ends:
        try:
            Experiment.model_validate(with_settings(experiment, {name: end}))
        except ValidationError as error:
            faults += [f"{name} cannot be {end!r}: {fault['msg']}" for fault in error.errors()]
    return faults

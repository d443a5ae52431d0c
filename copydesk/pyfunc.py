"""The file that MLflow keeps beside a model and runs to load it (models from code).

Knows how MLflow calls a model; what a row means is in `copydesk.registry`. Nobody else imports it.
"""

from threading import Lock
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

import copydesk
from copydesk.page import FailedPage, Page
from copydesk.registry import ARTIFACT, documents_from


class PageReader(PythonModel):
    """Reads pages: rows with `html` or `text`, and perhaps `url`, in; pages as `copydesk.Page` describes them out."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the model folder that was packaged."""
        self._predictor = copydesk.load(context.artifacts[ARTIFACT])
        self._lock = Lock()  # several threads of MLflow's server would only fight for the cores

    def predict(  # MLflow knows the arguments by these names
        self,
        context: PythonModelContext,  # noqa: ARG002
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,  # noqa: ARG002
    ) -> list[dict[str, Any]]:
        """Read the pages, one a row; the row of one that cannot be read is an empty page with `error`."""
        documents = documents_from(model_input)
        with self._lock:
            return [self._row_of(page) for page in self._predictor.stream(documents)]

    def _row_of(self, page: Page | FailedPage) -> dict[str, Any]:
        if isinstance(page, Page):
            return page.model_dump(mode="json")
        # Spark needs the columns of a page in each row.
        empty = Page(text="", headline=None, body="", sections=[], topics=[], model=self._predictor.info)
        return empty.model_dump(mode="json") | page.model_dump()


set_model(PageReader())

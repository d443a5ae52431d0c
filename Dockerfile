# The service with the released model: docker build -t copydesk . && docker run -p 127.0.0.1:8080:8080 copydesk
# Another model: docker run -v ./models/mine:/model:ro …, or -e COPYDESK_MODEL=models:/copydesk@champion
FROM python:3.12-slim AS base
ENV PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 MLFLOW_DISABLE_TELEMETRY=true
RUN useradd --create-home --uid 10001 copydesk
WORKDIR /home/copydesk

FROM base AS serve
# An index of CPU builds of torch makes the image gigabytes smaller: --build-arg TORCH_INDEX=…
ARG TORCH_INDEX=""
COPY constraints.txt pyproject.toml README.md LICENSE NOTICE /build/
RUN if [ -n "$TORCH_INDEX" ]; then \
      pip install --index-url "$TORCH_INDEX" "$(grep '^torch==' /build/constraints.txt)"; \
    fi
COPY copydesk /build/copydesk
RUN pip install --constraint /build/constraints.txt "/build[encoder,mlflow,serve]"
COPY models/released /model
ENV COPYDESK_MODEL=/model
USER 10001
EXPOSE 8080
HEALTHCHECK --start-period=60s --interval=10s --timeout=5s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/readyz', timeout=4)"]
# Without a shell between, so that SIGTERM reaches the service.
ENTRYPOINT ["copydesk", "serve", "--host", "0.0.0.0"]

FROM base AS mlflow
COPY constraints.txt /build/
# A new volume takes its owner from /artifacts.
RUN pip install --constraint /build/constraints.txt mlflow 'psycopg[binary]' && \
    install --directory --owner=copydesk /artifacts
USER 10001
EXPOSE 5000
ENTRYPOINT ["mlflow", "server", "--host", "0.0.0.0", "--port", "5000"]

# syntax=docker/dockerfile:1
# `clampdown serve` in a container: the embedded model with its plans, on every address of the container.
#   docker build -t clampdown .
#   docker run --rm -p 127.0.0.1:8000:8000 clampdown
#   docker run --rm -p 127.0.0.1:8000:8000 -v "$PWD/runs/mine:/run:ro" clampdown /run --host 0.0.0.0
# Whoever reaches the port may ask: `--api-key-file`, `--allow-host` and a proxy with TLS are docs/serving.md's.
FROM python:3.11-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
# --no-deps: the wheel alone; what it needs is installed by its pins below.
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim
ARG PIP_EXTRA_INDEX_URL=""
# Give PyTorch's CPU index as PIP_EXTRA_INDEX_URL for an image without CUDA's libraries (several GB less).
ENV PIP_EXTRA_INDEX_URL=${PIP_EXTRA_INDEX_URL} PYTHONUNBUFFERED=1 HF_HOME=/cache/huggingface XDG_CACHE_HOME=/cache
WORKDIR /app
COPY constraints.txt ./
COPY --from=build /wheels /wheels
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
RUN pip install --no-cache-dir "$(grep '^torch==' constraints.txt)" -c constraints.txt \
    && pip install --no-cache-dir -c constraints.txt "$(ls /wheels/*.whl)[serve]" \
    && useradd --system --uid 10001 --home /app clampdown \
    && mkdir /cache && chown clampdown /cache
USER 10001
EXPOSE 8000
HEALTHCHECK --start-period=60s --interval=30s --timeout=5s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
ENTRYPOINT ["clampdown", "serve"]
CMD ["--host", "0.0.0.0"]
